"""Loading and saving checkpoints in Hugging Face's directory format.

A directory holds `config.json` and safetensors weights (`models.safetensors_io`); what each
tensor is called and how it is laid out is `models.hf_names`.
"""

import functools
import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from models import distributed, hf_config, hf_names, safetensors_io, sharding
from models.config import DTYPES, TransformerConfig
from models.errors import InputError, check_choice, nearest
from models.hf_fields import read_eos
from models.hf_names import Index, Parameter
from models.tokenizer import FILES as TOKENIZER_FILES

_ALIGNMENT = 64  # bytes; JAX on a CPU uses a host array so aligned as it is, without a copy
# Parts of multimodal checkpoints that a language model has no use for.
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")


def load_config(directory: str | os.PathLike[str]) -> TransformerConfig:
    """The architecture of a checkpoint, end-of-sequence ids of `generation_config.json` included.

    Raises:
      InputError: no such directory, no or malformed `config.json`, or one that describes a model
        that is not covered; see `models.hf_config.from_hf`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"checkpoint: {str(directory)!r} is not a directory")
    path = directory / "config.json"
    raw = safetensors_io.read_json(path)
    try:
        config = hf_config.from_hf(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    stops = _generation_stops(directory / "generation_config.json")
    if not stops:
        return config
    # What is only a family's default gives way to what is said.
    said = "eos_token_id" in raw or "eos_token_id" in (raw.get("text_config") or {})
    known = config.eos_token_ids if said else ()
    return config.replace(eos_token_ids=tuple(dict.fromkeys(known + stops)))


def _generation_stops(path: Path) -> tuple[int, ...]:
    if not path.is_file():
        return ()
    stops = safetensors_io.read_json(path).get("eos_token_id")
    try:
        return read_eos(stops)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[TransformerConfig, Any]:
    """Reads a checkpoint straight into device arrays, one parameter at a time.

    Args:
      directory: a local Hugging Face checkpoint.
      dtype: a name of `models.config.DTYPES` to convert to; default as stored.
      mesh: where parameters are laid out by `models.sharding`'s table, each device's part being
        read on its own; default the default device.

    Returns:
      The architecture, its `dtype` that of the embedding as loaded; and the parameter tree.

    Raises:
      InputError: anything wrong with config or files; a tensor that is missing, unexpected or of
        another shape than the architecture has, by name.
    """
    config = load_config(directory)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    with safetensors_io.Reader(directory) as reader:
        names = _names_in(reader, config)
        table = _checked_table(reader, config, names)
        shardings = None
        if mesh is not None:
            shardings = flax.traverse_util.flatten_dict(sharding.param_shardings(config, mesh))
        loaded = {}
        for path, parameter in table.items():
            target = np.dtype(DTYPES[dtype]) if dtype else _stored_dtype(reader, parameter, names)
            read = functools.partial(_read, reader, parameter, names, target)
            if shardings is None:
                array = jax.device_put(read(tuple(slice(0, n) for n in parameter.shape)))
            else:
                array = jax.make_array_from_callback(
                    parameter.shape, shardings[path], _memoised(read, parameter.shape)
                )
            # The host copy can go before the next one is made.
            loaded[path] = array.block_until_ready()
    params = flax.traverse_util.unflatten_dict(loaded)
    return config.replace(dtype=params["embedder"]["embedding"].dtype.name), params


Names = Callable[[str], str]


def _names_in(reader: safetensors_io.Reader, config: TransformerConfig) -> Names:
    """How this checkpoint spells the tables' tensor names."""
    embed = next(iter(hf_names.table(config).values())).pieces[0].name
    for prefix in hf_names.PREFIXES:
        if hf_names.stored_name(embed, prefix) in reader.tensors:
            return functools.partial(hf_names.stored_name, prefix=prefix)
    return functools.partial(hf_names.stored_name, prefix=hf_names.PREFIXES[0])


def _checked_table(
    reader: safetensors_io.Reader, config: TransformerConfig, names: Names
) -> dict[hf_names.Path, Parameter]:
    """The parameters and their pieces; raises InputError unless the files hold just these."""
    fused = any(name.endswith("experts.gate_up_proj") for name in reader.tensors)
    table = hf_names.table(config, fused_experts=fused)
    expected = {
        names(piece.name): piece.tensor_shape
        for parameter in table.values()
        for piece in parameter.pieces
    }
    tensors, where = reader.tensors, reader.directory
    extra = [n for n in tensors if n not in expected and not _ignorable(n, config, names)]
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(
            f"{where}: tensor {missing[0]!r} of shape {expected[missing[0]]} is missing"
            f"{_and_more(missing)}{nearest(missing[0], extra)}"
        )
    if extra:
        raise InputError(
            f"{where}: unexpected tensor {extra[0]!r} of shape {tensors[extra[0]].shape}"
            f"{_and_more(extra)}; not part of the {config.family} model of config.json"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{where / tensors[name].file}: tensor {name!r} has shape "
                f"{tensors[name].shape}; expected {shape} from config.json"
            )
    return table


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _ignorable(name: str, config: TransformerConfig, names: Names) -> bool:
    """Tensors that say nothing new: constant buffers, tied duplicates, other modalities."""
    return (
        name.endswith("rotary_emb.inv_freq")
        or (config.tie_embeddings and name == names(hf_names.head_name(config)))
        or name.removeprefix("model.").startswith(_OTHER_PARTS)
    )


def _stored_dtype(reader: safetensors_io.Reader, parameter: Parameter, names: Names) -> np.dtype:
    dtypes = [reader.tensors[names(piece.name)].dtype for piece in parameter.pieces]
    # A dtype of None is refused, with its name, when the tensor is read.
    known = [dtype for dtype in dtypes if dtype is not None]
    return functools.reduce(np.promote_types, known) if known else np.dtype(np.float32)


def _memoised(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...]
) -> Callable[[Index | None], np.ndarray]:
    """`read` for `make_array_from_callback`, reading once what several devices hold."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def callback(index: Index | None) -> np.ndarray:
        ranges = tuple(i.indices(n)[:2] for i, n in zip(index or (), shape))
        if ranges not in parts:
            parts[ranges] = read(tuple(slice(*r) for r in ranges))
        return parts[ranges]

    return callback


def _read(
    reader: safetensors_io.Reader,
    parameter: Parameter,
    names: Names,
    dtype: np.dtype,
    index: Index,
) -> np.ndarray:
    """The part of a parameter within `index`, assembled from its pieces."""
    array = _aligned_empty(tuple(i.stop - i.start for i in index), dtype)
    for piece in parameter.pieces:
        part = hf_names.overlap(piece, index)
        if part is None:
            continue
        stored = reader.read(names(piece.name), hf_names.stored_index(piece, part))
        target = tuple(
            slice(b.start + p.start - i.start, b.start + p.stop - i.start)
            for b, p, i in zip(piece.block, part, index)
        )
        _copy(array[target], hf_names.to_parameter(piece, part, stored))
    return array


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: np.ndarray, rows: int = 64) -> None:
    """target[...] = source, converting; a transposed source goes a few rows at a time.

    A block of rows stays in cache while its columns are written, twice as fast as NumPy's order.
    """
    axes = [axis for axis, size in enumerate(source.shape) if size > 1]
    if source.flags.c_contiguous or len(axes) < 2 or source.size < 1 << 16:
        target[...] = source
        return
    axis = max(axes, key=lambda a: source.strides[a])
    fastest = min(axes, key=lambda a: source.strides[a])
    inner = source.size // source.shape[axis] // source.shape[fastest]
    step = max(1, rows // inner)
    for start in range(0, source.shape[axis], step):
        block = (slice(None),) * axis + (slice(start, start + step),)
        if inner > rows:
            _copy(target[block], source[block], rows)
        else:
            target[block] = source[block]


def save(
    directory: str | os.PathLike[str],
    config: TransformerConfig,
    params: Any,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: str | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a checkpoint that `load` and transformers read, as a whole or not at all.

    Args:
      directory: new, empty, or an older checkpoint, which is replaced once all is written.
      config: the architecture; its `family` decides names and layout.
      params: the parameter tree, on any devices; where they are those of several processes, all of
        them save, each into its own directory.
      max_shard_bytes: largest file, in bytes of tensor data.
      dtype: a name of `models.config.DTYPES` to convert to; default as it is.
      tokenizer_from: a checkpoint whose tokeniser files are copied along.

    Raises:
      InputError: parameters that do not fit `config`; a config that its family cannot express; a
        directory that holds something else; a disk that is full. An older checkpoint survives.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    flat = flax.traverse_util.flatten_dict(params)
    table = hf_names.table(config)
    _check_parameters(flat, table)
    written = dtype or flat["embedder", "embedding"].dtype.name
    fields = hf_config.to_hf(config.replace(dtype=written))

    @functools.lru_cache(maxsize=1)  # a parameter's pieces are asked for one after another
    def on_host(path: hf_names.Path) -> np.ndarray:
        return np.asarray(distributed.on_host(flat[path]))

    def make(
        path: hf_names.Path, pieces: tuple[hf_names.Piece, ...], stored_as: np.dtype
    ) -> np.ndarray:
        array = np.empty(pieces[0].tensor_shape, stored_as)
        for piece in pieces:
            rows = array[piece.first_row : piece.first_row + piece.shape[0]]
            _copy(rows.reshape(piece.factors), hf_names.to_stored(piece, on_host(path)))
        return array

    tensors = []
    for path, parameter in table.items():
        stored_as = np.dtype(DTYPES[dtype]) if dtype else np.dtype(flat[path].dtype)
        for name, group in itertools.groupby(parameter.pieces, key=lambda piece: piece.name):
            pieces = tuple(group)
            maker = functools.partial(make, path, pieces, stored_as)
            shape = pieces[0].tensor_shape
            tensors.append(safetensors_io.TensorToWrite(name, shape, stored_as, maker))
    with safetensors_io.replacing(directory) as work:
        safetensors_io.write(work, tensors, max_shard_bytes)
        safetensors_io.write_json(work / "config.json", fields)
        if tokenizer_from is not None:
            _copy_tokenizer(Path(tokenizer_from), work)


def _check_parameters(
    flat: Mapping[hf_names.Path, Any], table: dict[hf_names.Path, Parameter]
) -> None:
    for path, parameter in table.items():
        if path not in flat:
            raise InputError(f"params: {'/'.join(path)} of shape {parameter.shape} is missing")
        if tuple(flat[path].shape) != parameter.shape:
            raise InputError(
                f"params: {'/'.join(path)} has shape {tuple(flat[path].shape)}; "
                f"expected {parameter.shape}"
            )
    if extra := [path for path in flat if path not in table]:
        raise InputError(f"params: {'/'.join(extra[0])} is not a parameter of the config")


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise InputError(f"tokenizer_from: {str(source)!r} is not a directory")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
