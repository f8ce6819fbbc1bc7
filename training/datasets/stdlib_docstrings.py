"""English prose that is on every machine: docstrings of the running Python's standard library."""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity
from training.datasets.stdlib_code import source_files

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class StdlibDocstrings(tfds.core.GeneratorBasedBuilder):
    """Docstrings of standard library modules, one example a module, split 90/5/5 by its name.

    A document is contiguous prose: a module's docstrings in source order, their common indentation
    removed, a blank line between two. Modules whose docstrings are shorter than `min_chars` in all
    are left out. Splits hold different modules, the same ones as `stdlib_code`'s.

    Options:
      root: folder to read instead of the running Python's standard library.
      min_chars: characters that a module's prose must have.

    Examples:
      text: the prose; module: the file's path relative to the library, with '/'.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self, *, root: str | None = None, min_chars: int = 200, data_dir: str | None = None
    ):
        self._root = Path(root or sysconfig.get_paths()["stdlib"])
        if not self._root.is_dir():
            raise InputError(f"root: {str(self._root)!r} is not a folder")
        if min_chars < 1:
            raise InputError(f"min_chars: {min_chars} must be at least 1")
        self._min_chars = min_chars
        files = [(name, self._root / name) for name in source_files(self._root)]
        if not files:
            raise InputError(f"root: {str(self._root)!r} holds no Python source files")
        options = {"content": identity.digest_files(files), "min_chars": min_chars}
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Docstrings of the Python standard library, a document a module.",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "module": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        examples = (
            (identity.split_of(example["module"]), example)
            for example in _read(self._root, self._min_chars)
        )
        return {
            split: self._generate_examples(group)
            for split, group in identity.group(examples).items()
        }

    def _generate_examples(self, examples: Any) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(examples)


def prose(source: str) -> str:
    """The docstrings of a module's source in source order, a blank line between two.

    Raises:
      SyntaxError, ValueError: `source` is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the source
        tree = ast.parse(source)
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node, clean=False)):
            found.append(inspect.cleandoc(text).strip())
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return "".join(f"{text}\n\n" for text in found if text)[:-1]


def _read(root: Path, min_chars: int) -> Iterator[dict[str, str]]:
    for name in source_files(root):
        try:
            text = prose((root / name).read_bytes().decode("utf-8"))
        except (SyntaxError, ValueError):  # not UTF-8, or of another Python
            continue
        if len(text) >= min_chars:
            yield {"text": text, "module": name}
