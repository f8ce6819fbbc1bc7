"""Character noise on text, word by word: what robustness is measured with.

The perturbations of Neitemeier et al., 'Hierarchical Autoregressive Transformers' (arXiv
2501.10322, section 4: characters of each word permuted, replaced or deleted, and ALL CAPS), beside
insertions and swaps of neighbours. Text in, text out: characters are user-perceived ones (a letter
with its combining marks), so that no UTF-8 sequence and no cluster is ever broken.
"""

import string
from collections.abc import Callable

import numpy as np
import regex

from models.errors import InputError, check_choice

_WORD = regex.compile(r"\S+")
_CLUSTER = regex.compile(r"\X")

# (characters of a word, rate, alphabet, rng) -> characters.
_Rule = Callable[[list[str], float, str, np.random.Generator], list[str]]


def perturb(
    text: str,
    kind: str,
    rate: float,
    rng: np.random.Generator,
    *,
    alphabet: str = string.ascii_lowercase,
) -> str:
    """`text` with noise in its words; white space stays as it is, and every word stays a word.

    A word of n characters has rate * n of them changed on average: the number is rounded up or down
    at random, so that short words get their share too.

    Args:
      text: any text.
      kind: 'permute' (chosen characters change places with each other), 'swap' (disjoint pairs of
        neighbours change places), 'replace' (by another character of `alphabet`), 'delete' (a
        word keeps at least one character), 'insert' (of characters of `alphabet`), or 'upper'
        (each word is written in capitals with probability `rate`).
      rate: 0 to 1.
      rng: draws where and what.
      alphabet: at least two characters.

    Raises:
      InputError: an unknown kind, or a rate or an alphabet out of range.
    """
    check_choice("kind", kind, KINDS)
    if not 0 <= rate <= 1:
        raise InputError(f"rate: {rate} must be between 0 and 1")
    if len(set(alphabet)) < 2:
        raise InputError(f"alphabet: {alphabet!r} must hold at least two characters")
    rule = _RULES[kind]

    def one(match: regex.Match[str]) -> str:
        return "".join(rule(_CLUSTER.findall(match.group()), rate, alphabet, rng))

    return _WORD.sub(one, text)


def _rounded(value: float, rng: np.random.Generator) -> int:
    """`value` rounded up with the probability of its fraction, so that its mean is kept."""
    return int(np.floor(value + rng.random()))


def _permute(word: list[str], rate: float, _: str, rng: np.random.Generator) -> list[str]:
    # Chosen in pairs: a single one has nowhere to go. A cycle in random order moves them all.
    count = min(2 * _rounded(len(word) * rate / 2, rng), len(word))
    places = rng.choice(len(word), count, replace=False)
    changed = list(word)
    for source, target in zip(places, np.roll(places, 1), strict=True):
        changed[target] = word[source]
    return changed


def _swap(word: list[str], rate: float, _: str, rng: np.random.Generator) -> list[str]:
    count = min(_rounded(len(word) * rate / 2, rng), len(word) // 2)
    # Disjoint pairs: places among what is left when each pair counts as one.
    first = np.sort(rng.choice(len(word) - count, count, replace=False)) + np.arange(count)
    changed = list(word)
    for place in first:
        changed[place], changed[place + 1] = word[place + 1], word[place]
    return changed


def _replace(word: list[str], rate: float, alphabet: str, rng: np.random.Generator) -> list[str]:
    count = min(_rounded(len(word) * rate, rng), len(word))
    changed = list(word)
    for place in rng.choice(len(word), count, replace=False):
        others = [letter for letter in alphabet if letter != word[place]]
        changed[place] = others[rng.integers(len(others))]
    return changed


def _delete(word: list[str], rate: float, _: str, rng: np.random.Generator) -> list[str]:
    count = min(_rounded(len(word) * rate, rng), len(word) - 1)
    gone = set(rng.choice(len(word), count, replace=False).tolist())
    return [letter for place, letter in enumerate(word) if place not in gone]


def _insert(word: list[str], rate: float, alphabet: str, rng: np.random.Generator) -> list[str]:
    changed = list(word)
    for _ in range(_rounded(len(word) * rate, rng)):
        changed.insert(rng.integers(len(changed) + 1), alphabet[rng.integers(len(alphabet))])
    return changed


def _upper(word: list[str], rate: float, _: str, rng: np.random.Generator) -> list[str]:
    return [letter.upper() for letter in word] if rng.random() < rate else word


_RULES: dict[str, _Rule] = {
    "permute": _permute,
    "swap": _swap,
    "replace": _replace,
    "delete": _delete,
    "insert": _insert,
    "upper": _upper,
}
KINDS = tuple(_RULES)
