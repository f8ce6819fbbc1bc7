"""How parameters, caches and batches lie on a mesh of devices: one table.

The mesh has two axes: 'data' splits the batch, 'model' splits heads, the feed-forward width and
the vocabulary (Megatron-style tensor parallelism). Everything else follows from XLA's sharding
propagation, so a decoding loop or a training step is the same code on one device and on many.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models import transformer
from models.cache import KVCache
from models.config import TransformerConfig
from models.errors import InputError

# First match wins. Paths are joined with '/', for example layers_3/attention/qkv/kernel.
PARTITION_TABLE: tuple[tuple[str, P], ...] = (
    (r"embedder/embedding$", P("model", None)),
    (r"relative_bias/embedding$", P(None, "model", None)),
    (r"attention/qkv/kernel$", P(None, "model", None, None)),
    (r"attention/qkv/bias$", P("model", None, None)),
    (r"attention/out/kernel$", P("model", None, None, None)),
    (r"moe/gate_up/kernel$", P(None, None, None, "model")),
    (r"moe/down/kernel$", P(None, "model", None)),
    (r"mlp/gate_up/kernel$", P(None, None, "model")),
    (r"mlp/gate_up/bias$", P(None, "model")),
    (r"mlp/up/kernel$", P(None, "model")),
    (r"mlp/up/bias$", P("model")),
    (r"mlp/down/kernel$", P("model", None)),
    (r"lm_head/kernel$", P(None, "model")),
    (r".*", P()),
)


def make_mesh(
    data: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of data x model devices.

    Args:
      data, model: devices along each axis. 1 x 1, which asks for no layout, is of several processes
        a device of each along 'data'.
      devices: to choose from; None for those of all processes.

    Raises:
      InputError: there are fewer devices, or a process of the job would have none of them.
    """
    everywhere = devices is None
    devices = jax.devices() if devices is None else devices
    count = jax.process_count()
    if everywhere and count > 1 and data == model == 1:
        data, devices = (
            count,
            [next(d for d in devices if d.process_index == i) for i in range(count)],
        )
    available = len(devices)
    if data < 1 or model < 1 or data * model > available:
        raise InputError(
            f"mesh: {data}x{model} needs {data * model} devices; {available} available"
        )
    devices = devices[: data * model]
    idle = set(range(count)) - {device.process_index for device in devices}
    if everywhere and idle:
        raise InputError(
            f"mesh: {data}x{model} leaves process {min(idle)} without a device; the "
            f"{count} processes of this job have {available} devices in all"
        )
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def spec_for(path: str) -> P:
    """The table's entry for one parameter path."""
    return next(spec for pattern, spec in PARTITION_TABLE if re.search(pattern, path))


def path_string(path: tuple[Any, ...]) -> str:
    """A pytree key path as the table writes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for any tree that contains parameters, such as an optimiser's state.

    Leaves are matched by the end of their path, so that moments lie as their parameters do.
    Raises InputError naming the parameter whose axis the mesh does not divide.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, shape = path_string(path), jax.numpy.shape(leaf)
        spec = spec_for(name)
        if len(spec) > len(shape):  # factored or scalar optimiser state
            spec = P()
        for axis, split in enumerate(spec):
            if split is not None and shape[axis] % mesh.shape[split]:
                raise InputError(
                    f"mesh: axis {split!r} of size {mesh.shape[split]} does not divide axis "
                    f"{axis} of {name} {tuple(shape)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def param_shardings(config: TransformerConfig, mesh: Mesh) -> Any:
    """NamedShardings for the parameters of `config`; errors as `tree_shardings`."""
    return tree_shardings(transformer.param_shapes(config), mesh)


def cache_shardings(cache: KVCache, mesh: Mesh) -> Any:
    """Caches are split over rows and key/value heads."""
    store = NamedSharding(mesh, P("data", "model", None, None))
    return cache.replace(
        keys=(store,) * len(cache.keys),
        values=(store,) * len(cache.values),
        lengths=NamedSharding(mesh, P("data")),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, P("data"))
