"""Labelled texts for classifiers of words: sections of prose, CLDR's names, or any tfds dataset."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import InputError, check_choice
from training.datasets import identity, registry
from training.word_models import Task
from training.word_rows import RowShape

NAME_LABELS = ("language", "kind")
_KINDS = ("language", "territory")
# Of a hundred blocks of text: more test data than other datasets have, as there is little text.
_TRAIN, _VALIDATION = 70, 10


def sections(
    rows: RowShape,
    cache: pathlib.Path,
    *,
    packages: Sequence[str],
    words: int = 20,
    block: int = 4,
) -> Task:
    """Which package of the standard library a piece of docstring is of.

    Texts are `words` words between white space, joined by spaces. `block` neighbouring texts are in
    one split (70/10/20 by a hash), and docstrings that occur again are left out where their texts
    are the same: splits share modules, but no text.

    Raises:
      InputError: a package without docstrings.
    """
    texts: dict[str, list[str]] = {split: [] for split in identity.SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in identity.SPLITS}
    seen: set[str] = set()
    found = registry.load("stdlib_docstrings", "all", data_dir=cache / "datasets")
    for example in sorted(found, key=lambda example: example["module"]):
        package = example["module"].split("/")[0]
        if package not in packages:
            continue
        tokens = example["text"].split()
        for number, first in enumerate(range(0, len(tokens) - words + 1, words)):
            text = " ".join(tokens[first : first + words])
            if text in seen:
                continue
            seen.add(text)
            bucket = identity.rank(f"{example['module']}/{number // block}") % 100
            split = "train" if bucket < _TRAIN else "validation"
            split = "test" if bucket >= _TRAIN + _VALIDATION else split
            texts[split].append(text)
            labels[split].append(packages.index(package))
    for number, package in enumerate(packages):
        if number not in labels["train"]:
            raise InputError(f"packages: {package!r} has no docstrings to train on")
    return Task("section", texts, labels, len(packages), rows)


def names(
    rows: RowShape,
    cache: pathlib.Path,
    *,
    label: str,
    locales: Sequence[str],
    held_out: Mapping[str, Sequence[str]] | None = None,
) -> Task:
    """What a CLDR name says of itself: its language, or whether it names a language or a territory.

    Args:
      rows, cache: shape of rows; where datasets are kept.
      label: 'language' (one class a locale) or 'kind'.
      locales: to train on; 'train', 'validation' and 'test' share no code.
      held_out: further splits by name: all names of other locales. Only for 'kind'.

    Raises:
      InputError: an unknown label or locale; held-out locales whose language is asked for.
    """
    check_choice("label", label, NAME_LABELS)
    if label == "language" and held_out:
        raise InputError("held_out: a language that is not trained on has no class")
    wanted = {split: (split, list(locales)) for split in identity.SPLITS}
    wanted |= {name: ("all", list(others)) for name, others in (held_out or {}).items()}
    texts, labels = {}, {}
    order = sorted(locales)
    for name, (split, chosen) in wanted.items():
        found = list(
            registry.load(
                "cldr", split, data_dir=cache / "datasets", locales=chosen, kinds=list(_KINDS)
            )
        )
        texts[name] = [example["text"] for example in found]
        labels[name] = [
            order.index(example["locale"]) if label == "language" else _KINDS.index(example["kind"])
            for example in found
        ]
    classes = len(order) if label == "language" else len(_KINDS)
    return Task(label, texts, labels, classes, rows)


def labelled(
    rows: RowShape,
    *,
    name: str,
    dataset: str,
    text_field: str,
    label_field: str,
    num_classes: int,
    splits: Mapping[str, str],
    **options: Any,
) -> Task:
    """Any classification dataset that tfds has prepared, such as 'glue/sst2'.

    Args:
      rows: shape of rows.
      name: of the task.
      dataset, options: as `registry.load`.
      text_field, label_field: of its examples; labels are integers.
      num_classes: labels are 0 .. num_classes - 1.
      splits: its split for each of 'train', 'validation' and 'test'.
    """
    texts, labels = {}, {}
    for split, theirs in splits.items():
        found = list(registry.load(dataset, theirs, text_field=text_field, **options))
        texts[split] = [example["text"] for example in found]
        labels[split] = [int(example[label_field]) for example in found]
    return Task(name, texts, labels, num_classes, rows)
