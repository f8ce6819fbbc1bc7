"""What the dataset builders share: stable splits, content digests and configuration names."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

SPLITS = ("train", "validation", "test")
_TRAIN_PERCENT, _VALIDATION_PERCENT = 90, 5


def split_of(key: str) -> str:
    """'train' (90%), 'validation' (5%) or 'test' (5%) from a hash of `key`.

    The same key has the same split on every machine and in every version of the dataset, so
    that adding examples never moves one between training and test data.
    """
    bucket = rank(key) % 100
    if bucket < _TRAIN_PERCENT:
        return "train"
    return "validation" if bucket < _TRAIN_PERCENT + _VALIDATION_PERCENT else "test"


def rank(key: str) -> int:
    """A 64-bit hash of `key`, the same on every machine: orders keys arbitrarily but stably."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def group(examples: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """(split, example) pairs by split, in order; splits without examples are left out.

    tfds refuses to write an empty split, and a split that is not there has a clear error.
    """
    groups: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for split, example in examples:
        groups[split].append(example)
    return {split: group for split, group in groups.items() if group}


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hexadecimal SHA-256 of (name, content) pairs, in the order given."""
    digest = hashlib.sha256()
    for name, path in files:
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(f"{len(name)}:{name}".encode() + content)
    return digest.hexdigest()


def builder_config(options: Mapping[str, Any]) -> tfds.core.BuilderConfig:
    """A tfds configuration whose name, and so whose folder on disk, is a hash of `options`.

    Everything that changes the examples must be in `options` (file contents as a digest):
    then prepared data can be reused without ever being stale.
    """
    text = json.dumps(options, sort_keys=True)
    return tfds.core.BuilderConfig(
        name=hashlib.sha256(text.encode()).hexdigest()[:16], description=text
    )
