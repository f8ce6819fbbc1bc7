"""The source of the running Python's standard library: code that is on every machine."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity

# Tests are data rather than library code; the others are not the standard library's own.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


class StdlibCode(tfds.core.GeneratorBasedBuilder):
    """Standard library source, one example a file, split 90/5/5 by a hash of its path.

    Options:
      root: folder to read instead of the running Python's standard library.

    Examples:
      text: the file's content; path: its path relative to the library, with '/'.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, root: str | None = None, data_dir: str | None = None):
        self._root = Path(root or sysconfig.get_paths()["stdlib"])
        if not self._root.is_dir():
            raise InputError(f"root: {str(self._root)!r} is not a folder")
        files = [(name, self._root / name) for name in source_files(self._root)]
        if not files:
            raise InputError(f"root: {str(self._root)!r} holds no Python source files")
        options = {"content": identity.digest_files(files)}
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of the Python standard library, without its tests.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "path": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        examples = ((identity.split_of(e["path"]), e) for e in _read(self._root))
        return {
            split: self._generate_examples(group)
            for split, group in identity.group(examples).items()
        }

    def _generate_examples(self, examples: Any) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(examples)


def source_files(root: Path) -> list[str]:
    """Sorted paths, relative to `root` with '/', of the Python files that are examples."""
    names = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(
        name.as_posix() for name in names if not _EXCLUDED_FOLDERS.intersection(name.parts)
    )


def _read(root: Path) -> Iterator[dict[str, str]]:
    for name in source_files(root):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield {"text": text, "path": name}
