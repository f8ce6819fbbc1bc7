"""Directories of this project's own models: config.json beside model.safetensors.

For models that have no Hugging Face counterpart. Tensors are named by their path in the parameter
tree, joined with '/'.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from models import safetensors_io
from models.errors import InputError, nearest
from models.sharding import path_string

_KIND = "model_type"
_MAX_SHARD_BYTES = 5 * 2**30

Config = TypeVar("Config")


def save(directory: str | os.PathLike[str], kind: str, config: Any, params: Any) -> None:
    """Writes a model, replacing one that is there as a whole or not at all.

    Args:
      directory: new, empty, or of an older model.
      kind: what sort of model it is; `load` refuses another.
      config: a dataclass of what JSON can hold.
      params: tree of arrays.

    Raises:
      InputError: the directory holds something else, or the disk refuses.
    """

    def to_write(path: tuple[Any, ...], leaf: Any) -> safetensors_io.TensorToWrite:
        shape, dtype = np.shape(leaf), np.dtype(leaf.dtype)
        return safetensors_io.TensorToWrite(
            path_string(path), shape, dtype, lambda: np.asarray(leaf)
        )

    tensors = [to_write(*entry) for entry in jax.tree_util.tree_leaves_with_path(params)]
    with safetensors_io.replacing(directory) as work:
        safetensors_io.write_json(work / "config.json", {_KIND: kind, **dataclasses.asdict(config)})
        safetensors_io.write(work, tensors, _MAX_SHARD_BYTES)


def kind_of(directory: str | os.PathLike[str]) -> str | None:
    """What `save` was told that the model is; None where there is no config that says so."""
    path = Path(directory) / "config.json"
    return safetensors_io.read_json(path).get(_KIND) if path.is_file() else None


def load_config(
    directory: str | os.PathLike[str], kind: str, make_config: Callable[..., Config]
) -> Config:
    """The config alone; arguments and errors as `load`."""
    path = Path(directory) / "config.json"
    fields = safetensors_io.read_json(path)
    found = fields.pop(_KIND, None)
    if found != kind:
        raise InputError(f"{path}: {_KIND}: {found!r} must be {kind!r}")
    try:
        return make_config(**fields)
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: {safetensors_io.one_line(error)}") from None


def load(
    directory: str | os.PathLike[str],
    kind: str,
    make_config: Callable[..., Config],
    param_shapes: Callable[[Config], Any],
) -> tuple[Config, Any]:
    """Reads what `save` wrote: the config and the parameters, on the default device.

    Args:
      directory: with config.json and safetensors.
      kind: as given to `save`.
      make_config: the config's class; unknown fields are refused.
      param_shapes: the tree of `jax.ShapeDtypeStruct` that a config's parameters have.

    Raises:
      InputError: files that are missing or damaged, a model of another kind, an unknown field, a
        tensor that is missing, too many or of another shape.
    """
    config = load_config(directory, kind, make_config)
    template = param_shapes(config)
    with safetensors_io.Reader(directory) as reader:
        names = {path_string(at) for at, _ in jax.tree_util.tree_leaves_with_path(template)}
        if extra := sorted(set(reader.tensors) - names):
            raise InputError(
                f"{directory}: tensor {extra[0]!r} is not of this model{nearest(extra[0], names)}"
            )

        def read(at: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = path_string(at)
            if name not in reader.tensors:
                raise InputError(f"{directory}: tensor {name!r} is missing")
            if (shape := reader.tensors[name].shape) != leaf.shape:
                raise InputError(
                    f"{directory}: tensor {name!r} has shape {list(shape)}; the config asks for "
                    f"{list(leaf.shape)}"
                )
            return jnp.asarray(reader.read(name), leaf.dtype)

        return config, jax.tree_util.tree_map_with_path(read, template)
