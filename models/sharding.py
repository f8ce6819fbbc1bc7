"""How parameters, caches and batches lie on a mesh of devices, by the table of `placement`.

The mesh has two axes: 'data' splits the batch, 'model' splits heads, the feed-forward width and
the vocabulary (Megatron-style tensor parallelism). Everything else follows from XLA's sharding
propagation, so a decoding loop or a training step is the same code on one device and on many.
Training may split parameters and optimiser state over 'data' as well (`tree_shardings`, `fsdp`).
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models import transformer
from models.cache import KVCache
from models.config import TransformerConfig
from models.errors import InputError
from models.placement import over_data, spec_for


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


def path_string(path: tuple[Any, ...]) -> str:
    """A pytree key path as the table writes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """NamedShardings for any tree that contains parameters, such as an optimiser's state.

    Leaves are matched by the end of their path, so that moments lie as their parameters do.

    Args:
      tree: arrays or shapes.
      mesh: where to.
      fsdp: also split each matrix over 'data', along the largest axis that is whole and that it
        divides; what has none stays whole (fully sharded data parallelism, ZeRO-3: Rajbhandari et
        al. 2020). A step gathers each layer where it is used.

    Raises:
      InputError: names the parameter whose axis 'model' does not divide.
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
        return NamedSharding(mesh, over_data(spec, shape, mesh.shape["data"]) if fsdp else spec)

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
