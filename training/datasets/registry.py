"""`load`: examples of a dataset by name, whether built here, a public tfds one or a folder.

Nothing here reaches for the network unless `download=True` is given, and TensorFlow is never
needed: datasets are stored as array_record and read with tfds' data sources.
"""

import contextlib
import inspect
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import naming, read_only_builder

from models.errors import InputError, nearest
from models.files import cache_root
from training.datasets.arithmetic import Arithmetic
from training.datasets.cldr import Cldr
from training.datasets.digit_scenes import DigitScenes
from training.datasets.jsonl_prompts import JsonlPrompts
from training.datasets.slot_sentences import SlotSentences
from training.datasets.spelled_numbers import SpelledNumbers
from training.datasets.stdlib_code import StdlibCode
from training.datasets.stdlib_docstrings import StdlibDocstrings
from training.datasets.text_files import TextFiles

BUILDERS = {
    "stdlib_code": StdlibCode,
    "stdlib_docstrings": StdlibDocstrings,
    "arithmetic": Arithmetic,
    "spelled_numbers": SpelledNumbers,
    "slot_sentences": SlotSentences,
    "text_files": TextFiles,
    "jsonl_prompts": JsonlPrompts,
    "digit_scenes": DigitScenes,
    "cldr": Cldr,
}


class Examples(Sequence):
    """A random-access data source: `examples[i]` is a dict, with text features as `str`.

    Args:
      source: a tfds data source.
      text_field: the feature that `examples[i]["text"]` is taken from; None to add none.
      full_name: tfds' name of the dataset, its configuration and version: an identity of the
        content.
    """

    def __init__(self, source: Any, text_field: str | None, full_name: str = ""):
        self.full_name = full_name
        self._source = source
        self._text_field = text_field

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is out of range for {len(self)} examples")
        example = self._source[int(index) % len(self)]
        example = {name: _decode(value) for name, value in example.items()}
        if self._text_field is not None:
            example["text"] = example[self._text_field]
        return example

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Examples({self._source!r})"


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    text_field: str | None = None,
    download: bool = False,
    **builder_options: Any,
) -> Examples:
    """Examples of one split, prepared on disk first if they are not there yet.

    Args:
      name: a key of `BUILDERS`; the folder of a dataset that tfds has prepared (the one with
        `dataset_info.json`); or the name of any tfds dataset, such as 'gsm8k' or
        'c4/en:3.1.0', prepared as array_record.
      split: a split or slice in tfds' notation, such as 'train' or 'train[:1%]'.
      data_dir: where prepared datasets are; None for `cache_root()`, or for a public
        dataset tfds' own default (`TFDS_DATA_DIR`, else ~/tensorflow_datasets).
      text_field: the text feature to read as 'text'; None where it has that name already.
      download: whether a public dataset that is not prepared may be downloaded.
      **builder_options: the options of a builder of `BUILDERS`, or tfds' of a public dataset.

    Raises:
      InputError: unknown name, option, split or field; data that is not there; an empty split.
    """
    if name in BUILDERS:
        builder = _own(name, data_dir, builder_options)
    elif Path(name, "dataset_info.json").is_file():
        _check_options(f"the prepared folder {name!r}", builder_options, ())
        builder = tfds.builder_from_directory(name)
    else:
        builder = _public(name, data_dir, download, builder_options)
    return _read(builder, name, split, text_field)


def _own(name: str, data_dir: Any, options: dict[str, Any]) -> tfds.core.DatasetBuilder:
    make = BUILDERS[name]
    parameters = inspect.signature(make).parameters
    allowed = [option for option in parameters if option != "data_dir"]
    _check_options(name, options, allowed)
    for option in allowed:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise InputError(f"{option}: dataset {name!r} needs this option")
    folder = Path(data_dir).expanduser() if data_dir else cache_root() / "datasets"
    with _quiet():
        builder: tfds.core.DatasetBuilder = make(**options, data_dir=str(folder))
        prepare(builder)
    return builder


def _public(
    name: str, data_dir: Any, download: bool, options: dict[str, Any]
) -> tfds.core.DatasetBuilder:
    unknown = InputError(
        f"dataset: {name!r} is not known{nearest(name, BUILDERS)}; allowed: "
        f"{', '.join(sorted(BUILDERS))}, a folder that tfds prepared, or a tfds dataset that is "
        f"prepared in data_dir or that the installed tfds can make"
    )
    try:
        parsed, _ = naming.parse_builder_name_kwargs(name)
    except ValueError:
        raise unknown from None
    if parsed.namespace and not download:
        # 'huggingface:', 'kaggle:' and other namespaces are looked up on the network.
        raise InputError(f"dataset: {name!r} is looked up on the network; set download=True")
    folder = str(Path(data_dir).expanduser()) if data_dir else None
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False, **options)
    except tfds.core.DatasetNotFoundError:
        raise unknown from None
    except ImportError as error:  # TensorFlow: some builders need it even to say what they hold
        builder = _as_prepared(name, folder, error)
    except (TypeError, ValueError) as error:  # a configuration, version or option
        raise InputError(f"dataset: {name!r}: {str(error).splitlines()[0]}") from error
    if not Path(builder.data_dir).exists():
        if not download:
            raise InputError(
                f"dataset: {name!r} is not prepared in {builder.data_dir!r}; prepare it there "
                f"with file format array_record, name its data_dir, or set download=True"
            )
        with contextlib.redirect_stdout(sys.stderr):
            prepare(builder)
    return builder


def _as_prepared(name: str, folder: str | None, missing: ImportError) -> tfds.core.DatasetBuilder:
    """A dataset whose builder cannot be made here, read by what is on disk."""
    try:
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        raise InputError(
            f"dataset: {name!r} is not prepared in data_dir, and making it needs more than is "
            f"installed ({str(missing).splitlines()[-1]})"
        ) from None


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Writes the dataset unless it is there; safe when several processes do so at once.

    tfds writes into a folder of a random name and renames it: where another process was first
    the rename fails, and its data, equal to ours, is used.

    Raises:
      InputError: the folder cannot be written.
    """
    if Path(builder.data_dir).exists():
        return
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        if not Path(builder.data_dir).exists():
            raise InputError(f"data_dir: cannot write {builder.data_dir!r}: {error}") from error


def _read(
    builder: tfds.core.DatasetBuilder, name: str, split: str, text_field: str | None
) -> Examples:
    # Read through the folder: our own builders would read their options' files again when a
    # data source is sent to another process.
    reader = tfds.builder_from_directory(builder.data_dir)
    try:
        num_examples = reader.info.splits[split].num_examples
    except (KeyError, ValueError):
        raise InputError(
            f"split: {split!r} of dataset {name!r} is not there; allowed: "
            f"{', '.join(sorted(reader.info.splits))}, slices such as 'train[:1%]', 'all'"
        ) from None
    if not num_examples:
        raise InputError(f"split: {split!r} of dataset {name!r} has no examples")
    try:
        source = reader.as_data_source(split)
    except NotImplementedError:
        raise InputError(
            f"dataset: {name!r} in {builder.data_dir!r} is stored as "
            f"{reader.info.file_format.value}; prepare it with file format array_record"
        ) from None
    if text_field is not None and text_field not in reader.info.features:
        fields = sorted(reader.info.features)
        raise InputError(
            f"text_field: {text_field!r} is not a field of dataset {name!r}"
            f"{nearest(text_field, fields)}; allowed: {', '.join(fields)}"
        )
    return Examples(source, text_field, reader.info.full_name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without tfds' remarks on downloads and custom configurations, which are none here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _check_options(name: str, options: dict[str, Any], allowed: Sequence[str]) -> None:
    for option in options:
        if option not in allowed:
            raise InputError(
                f"{option}: dataset {name} has no such option{nearest(option, allowed)}; "
                f"allowed: {', '.join(allowed) or 'none'}"
            )


def _decode(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value
