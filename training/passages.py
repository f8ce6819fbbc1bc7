"""Short passages of a dataset's documents, each with the class of the document it is from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.errors import InputError


class Passage(NamedTuple):
    """A text and the number of its class."""

    text: str
    label: int


def cut(text: str, least: int) -> list[str]:
    """Runs of whole lines, each of at least `least` characters; what is left at the end is not."""
    found, start, end = [], 0, 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        if end - start >= least:
            found.append(text[start:end])
            start = end
    return found


def of_packages(
    examples: Iterable[Mapping[str, Any]],
    packages: Sequence[str],
    *,
    characters: int,
    most: int,
    seed: int = 0,
) -> list[Passage]:
    """Passages of source files, whose class is the package that they are from.

    Args:
      examples: of `stdlib_code`: text and path.
      packages: folders at the top; files of others are left out.
      characters: least length of a passage.
      most: passages of each package, drawn evenly over its files; all where there are fewer.
      seed: of the draw and of the order.

    Returns:
      Passages in random order.

    Raises:
      InputError: a package without any.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[int, list[str]] = {label: [] for label in range(len(packages))}
    for example in examples:
        top = example["path"].split("/")[0]
        if top in packages and "/" in example["path"]:
            by_label[packages.index(top)] += cut(example["text"], characters)
    chosen = []
    for label, texts in by_label.items():
        if not texts:
            raise InputError(f"packages: {packages[label]!r} has no passage in these examples")
        order = rng.permutation(len(texts))[:most]
        chosen += [Passage(texts[i], label) for i in order]
    return [chosen[i] for i in rng.permutation(len(chosen))]
