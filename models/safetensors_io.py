"""Reading and writing directories of safetensors files, as Hugging Face lays them out.

A directory holds either one `model.safetensors` or several shards named by
`model.safetensors.index.json`. Tensors are read one at a time, or a slice of one, so that host
memory holds no more than what the caller asked for. Everything here is about names, shapes and
bytes; what the tensors mean is `models.hf_names`.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from models.errors import InputError, nearest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLES = (".bin", ".pt", ".pth")
# Files that describe weights: replaced together, never carried over from an older checkpoint.
_WEIGHT_FILES = ("config.json", "generation_config.json", INDEX)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is.

    Attributes:
      file: name within the directory.
      shape: as stored.
      dtype: None when it is not one of `DTYPES` (integer buffers, quantised weights).
      stored_as: the file's own name of the dtype.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    stored_as: str


class Reader:
    """The tensors of one directory, read on request. Close it, or use it as a context manager.

    Attributes:
      directory: the checkpoint.
      tensors: name -> TensorInfo, from the files' headers.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens every file and reads its header; no tensor data is read.

        Raises:
          InputError: the directory is missing or has no safetensors weights, only pickled ones;
            a file is truncated or corrupt; the index names a missing shard or a tensor that its
            shard does not have; a tensor lies in two shards.
        """
        self.directory = Path(directory)
        files, listed = _find_weights(self.directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:  # closes what is open when a later file is bad
            for file in files:
                self._open(file, stack)
            for name, file in listed.items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise InputError(
                        f"{self.directory / INDEX}: tensor {name!r} is not in {file}, where the "
                        f"index puts it{nearest(name, self.tensors)}"
                    )
            self._stack = stack.pop_all()

    def _open(self, file: str, stack: contextlib.ExitStack) -> None:
        path = self.directory / file
        try:
            opened = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            names = list(opened.keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: truncated or corrupt safetensors file ({one_line(error)}); "
                "copy or download it again"
            ) from error
        self._files[file] = opened
        for name in names:
            if name in self.tensors:
                raise InputError(
                    f"{self.directory}: tensor {name!r} is in two shards, "
                    f"{self.tensors[name].file} and {file}; allowed: one"
                )
            view = opened.get_slice(name)
            stored_as = view.get_dtype()
            shape = tuple(view.get_shape())
            self.tensors[name] = TensorInfo(file, shape, DTYPES.get(stored_as), stored_as)

    def read(self, name: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """The tensor `name`, or the part of it in `index` (one slice an axis, step 1).

        Returns:
          A new array of the stored dtype; nothing else of the tensor is held in memory.

        Raises:
          InputError: the tensor's dtype is not one of `DTYPES`, or it cannot be read.
        """
        info = self.tensors[name]
        opened = self._files[info.file]
        if info.dtype is None:
            raise InputError(
                f"{self.directory / info.file}: tensor {name!r} is stored as {info.stored_as}; "
                f"allowed: {', '.join(sorted(DTYPES))}"
            )
        try:
            if index is None or all(
                part.start == 0 and part.stop == size for part, size in zip(index, info.shape)
            ):
                return opened.get_tensor(name)
            return opened.get_slice(name)[tuple(index)]
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"{self.directory / info.file}: cannot read tensor {name!r} ({one_line(error)})"
            ) from error

    def close(self) -> None:
        self._stack.close()
        self._files = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_weights(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The weight files of a directory, and the index's tensor -> file map ({} without one)."""
    if not directory.is_dir():
        raise InputError(f"checkpoint: {str(directory)!r} is not a directory")
    if (directory / SINGLE).is_file():
        return [SINGLE], {}
    if (directory / INDEX).is_file():
        listed = _read_index(directory / INDEX)
        files = sorted(set(listed.values()))
        for file in files:
            if not (directory / file).is_file():
                raise InputError(f"{directory / INDEX}: names shard {file!r}, which is missing")
        return files, listed
    names = sorted(entry.name for entry in directory.iterdir())
    if pickled := [name for name in names if name.endswith(_PICKLES)]:
        raise InputError(
            f"{directory}: only pickled weights ({pickled[0]}); refused, since unpickling can run "
            "any code. Convert once, where you trust the file: AutoModelForCausalLM."
            "from_pretrained(DIR).save_pretrained(NEW_DIR) in transformers writes safetensors"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"; found {', '.join(others[:3])}" if others else ""
    raise InputError(f"{directory}: no weights; expected {SINGLE} or {INDEX}{found}")


def _read_index(path: Path) -> dict[str, str]:
    content = read_json(path)
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{path}: weight_map must be an object of tensor name to file name")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{path}: tensor {name!r} is put in {file!r}; allowed: a file of this directory"
            )
    return listed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises InputError naming the file when it is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor that `write` asks for when its shard's turn comes. `make` returns it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write(directory: Path, tensors: Sequence[TensorToWrite], max_shard_bytes: int) -> None:
    """Writes tensors in order into shards of at most `max_shard_bytes`, with an index if needed.

    A tensor larger than that has a shard of its own. Host memory holds one shard at a time. The
    directory must exist; wrap the call in `replacing` for atomicity. Raises InputError when
    `max_shard_bytes` is not positive or the disk refuses.
    """
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: {max_shard_bytes} must be at least 1")
    shards: list[list[TensorToWrite]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    listed = {}
    for number, shard in enumerate(shards, start=1):
        one = len(shards) == 1
        file = SINGLE if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: np.ascontiguousarray(tensor.make()) for tensor in shard}
        try:
            # transformers opens only files that say which framework's layout they follow.
            safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{directory / file}: cannot write ({one_line(error)})") from error
        listed.update(dict.fromkeys(arrays, file))
        del arrays  # before the next shard is made
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
        write_json(directory / INDEX, index)


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to fill, which takes the place of `directory` when the block ends well.

    The work happens in a hidden sibling. Whatever goes wrong, an exception or a kill, a
    checkpoint that was at `directory` is still whole, and nothing half-written can be loaded
    from there. (For the instant between two renames the old one is at `.NAME.*.old` beside it.)
    Files of the old directory that are not weights (a tokeniser, notes) are kept.

    Raises:
      InputError: `directory` holds something other than a checkpoint; the disk is full or not
        writable.
    """
    target = Path(directory).resolve()
    _check_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = _sibling(target, "tmp")
        work.mkdir()
    except OSError as error:
        raise InputError(f"{target}: cannot write ({one_line(error)})") from error
    try:
        yield work
        for entry in [*work.iterdir(), work]:
            _sync(entry)
        _swap(work, target)
        _sync(target.parent)
    except OSError as error:
        raise InputError(f"{target}: cannot write ({one_line(error)})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: exists and is not a directory")
    names = [entry.name for entry in target.iterdir()]
    if names and not any(name in ("config.json", SINGLE, INDEX) for name in names):
        raise InputError(
            f"{target}: holds {sorted(names)[0]!r} and no checkpoint; "
            "allowed: a new or empty directory, or an older checkpoint to replace"
        )


def _swap(work: Path, target: Path) -> None:
    """Puts `work` where `target` is; the old directory is gone only once the new one is there."""
    if not target.exists():
        work.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    for entry in old.iterdir():
        weights = entry.name in _WEIGHT_FILES or entry.suffix == ".safetensors"
        if not weights and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{uuid.uuid4().hex}.{kind}"


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, for an `InputError` to quote."""
    return " ".join(str(error).split()) or type(error).__name__
