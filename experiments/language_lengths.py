"""Sequence lengths of the same content in many languages, before and after merging.

CLDR's names of the same territories are short parallel texts; a tokeniser trained on one language
makes far more tokens of others.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from decoding.dynamic_vocabulary import merging
from decoding.dynamic_vocabulary.boundaries import Valid
from models.byte_level import ByteLevel
from models.errors import InputError
from training.datasets import cldr


class Lengths(NamedTuple):
    """Tokens of one language's texts.

    Attributes:
      locale, script: of CLDR.
      size: bytes.
      before: tokens as the model has them.
      merged: after `budget` merges of batches of this language alone.
      words: after every merge.
      mixed: after `budget` merges of batches in which all languages stand side by side.
    """

    locale: str
    script: str
    size: int
    before: int
    merged: int
    words: int
    mixed: int


def parallel_texts(locales: Sequence[str], names_a_row: int) -> dict[str, list[str]]:
    """Rows of territories' names, the same territories in every language.

    Raises:
      InputError: the locales share too few names.
    """
    names = {locale: cldr.names(locale, "territory") for locale in locales}
    shared = sorted(set.intersection(*(set(found) for found in names.values())))
    if len(shared) < names_a_row:
        raise InputError(f"locales: they share {len(shared)} names; {names_a_row} make a row")
    return {
        locale: [
            ", ".join(found[code] for code in shared[at : at + names_a_row])
            for at in range(0, len(shared) - names_a_row + 1, names_a_row)
        ]
        for locale, found in names.items()
    }


def measure(
    source: ByteLevel, valid: Valid, locales: Sequence[str], *, names_a_row: int, budget: int
) -> list[Lengths]:
    """Lengths by language.

    Args:
      source: the model's tokeniser.
      valid: see `merging.merge`.
      locales: of `cldr.locales()`.
      names_a_row: names of a row of text.
      budget: merges of a batch; a batch is a language's rows, or one row of each language.
    """
    texts = parallel_texts(locales, names_a_row)
    tokens = {
        locale: [[source.tokens[i] for i in source.encode(row)] for row in rows]
        for locale, rows in texts.items()
    }
    mixed = dict.fromkeys(locales, 0)
    for batch in zip(*tokens.values(), strict=True):
        for locale, row in zip(tokens, merging.merge(batch, budget, valid).tokens, strict=True):
            mixed[locale] += len(row)
    found = []
    for locale, rows in tokens.items():
        full = merging.merge(rows, None, valid).lengths
        size = sum(len(row.encode()) for row in texts[locale])
        at = full[min(budget, len(full) - 1)]
        script = cldr.script_of(locale)
        found.append(Lengths(locale, script, size, full[0], at, full[-1], mixed[locale]))
    return found


def fairness(lengths: Sequence[int]) -> dict[str, float]:
    """How unevenly the same content is cut.

    Args:
      lengths: tokens of each language, the reference (English) first.

    Returns:
      mean and largest premium over the reference, and the Gini coefficient of the lengths (0 when
      all are alike).
    """
    values = np.asarray(lengths, float)
    premium = values / values[0]
    differences = np.abs(values[:, None] - values[None]).mean()
    return {
        "mean_premium": float(premium.mean()),
        "largest_premium": float(premium.max()),
        "gini": float(differences / (2 * values.mean())),
    }


def table(found: Sequence[Lengths]) -> list[dict[str, Any]]:
    """A record a language, with absolute reductions."""
    return [
        {
            **row._asdict(),
            "absolute": 1 - row.words / row.before,
            "absolute_merged": 1 - row.merged / row.before,
            "absolute_mixed": 1 - row.mixed / row.before,
        }
        for row in found
    ]
