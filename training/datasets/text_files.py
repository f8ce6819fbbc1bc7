"""Plain text files of the user's own."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity

# Where a file that is split by position is cut: [0, 90%), [90%, 95%), [95%, 100%).
_CUTS = {"train": (0.0, 0.90), "validation": (0.90, 0.95), "test": (0.95, 1.0)}


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """UTF-8 text files, one example a file.

    Splits hold different files, 90/5/5 by a hash of the path relative to the files' common
    folder. When that leaves a split without a file (a handful of files), files are instead
    ranked by that hash: 5% of them, at least one, are test data, as many validation data. Fewer
    than three files cannot be shared out: then each file is cut by position, its first 90%,
    next 5% and last 5% of characters (moved to the next line start) being the three splits.

    Options:
      files: a path or glob (`**` descends), or a list of them.

    Examples:
      text: the content; path: relative to the common folder, with '/'.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, files: str | Sequence[str], data_dir: str | None = None):
        self._files = find_files(files)
        options = {"content": identity.digest_files(sorted(self._files.items()))}
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Plain text files.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "path": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        names = sorted(self._files)
        if len(names) < len(identity.SPLITS):
            texts = [(name, _read(self._files[name])) for name in names]
            parts = (
                (split, (name, _part(text, split)))
                for name, text in texts
                for split in identity.SPLITS
                if _part(text, split)
            )
            groups = identity.group(parts)
        else:
            assigned = assign_splits(names)
            groups = identity.group((assigned[name], (name, None)) for name in names)
        return {split: self._generate_examples(group) for split, group in groups.items()}

    def _generate_examples(self, files: Any) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (name, part) in enumerate(files):
            text = _read(self._files[name]) if part is None else part
            yield index, {"text": text, "path": name}


def find_files(patterns: str | Sequence[str]) -> dict[str, Path]:
    """Name (relative to the common folder, with '/') to path of every matching file with text.

    Raises:
      InputError: a pattern matches no file with text, or there is no pattern.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise InputError("files: [] names no file")
    paths: set[Path] = set()
    for pattern in patterns:
        found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]  # noqa: PTH111, PTH207
        matches = {path.resolve() for path in found if path.is_file() and path.stat().st_size}
        if not matches:
            raise InputError(f"files: {pattern!r} matches no file that has text")
        paths |= matches
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return {path.relative_to(common).as_posix(): path for path in paths}


def assign_splits(names: Sequence[str]) -> dict[str, str]:
    """The split of each of three or more files; no split is left without a file."""
    assigned = {name: identity.split_of(name) for name in names}
    if set(assigned.values()) == set(identity.SPLITS):
        return assigned
    held_out = max(1, round(len(names) * 0.05))
    ranked = sorted(names, key=identity.rank)
    return {
        name: "test" if i < held_out else "validation" if i < 2 * held_out else "train"
        for i, name in enumerate(ranked)
    }


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"files: {str(path)!r} is not UTF-8 text (byte {error.start}); convert or leave it out"
        ) from None


def _part(text: str, split: str) -> str:
    start, end = (_line_start(text, int(len(text) * cut)) for cut in _CUTS[split])
    return text[start:end]


def _line_start(text: str, at: int) -> int:
    """The first line start at or after `at`; `at` itself when no line ends after it."""
    if at == 0 or at >= len(text):
        return at
    newline = text.find("\n", at - 1)
    return at if newline < 0 or newline + 1 == len(text) else newline + 1
