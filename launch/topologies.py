"""TPU slices that are not there: JAX devices to compile for, from the `libtpu` package.

The rest of the process may use any backend. libtpu is told that this is no TPU machine, so that it
neither asks a metadata server nor takes the lock that would let one process a machine load it.
"""

import functools
import importlib.util
import math
import os

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from launch import chips
from models.errors import InputError

# Read by libtpu when it is loaded.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def check_available() -> None:
    """Raises InputError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu: not installed; the compile check needs it: pip install -e '.[compile]'"
        )


@functools.cache
def devices(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a slice, one a chip.

    Args:
      topology: CHIP:SHAPE, for example `v5p:4x4x4`.

    Raises:
      InputError: no such slice; libtpu is missing, or does not go with this JAX.
    """
    chip, shape = chips.parse(topology)
    check_available()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    more: dict[str, object] = {}
    if math.prod(shape) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":  # its two cores as one device, as JAX runs them
        more["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(topology, "tpu", **more).devices
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"topology: libtpu refuses {topology!r} ({error})") from None
    if len(found) != math.prod(shape):
        raise InputError(f"topology: {topology!r} has {len(found)} devices of its chips' size")
    return tuple(found)


def make_mesh(topology: str, data: int, model: int) -> Mesh:
    """A data x model mesh over the whole slice, as `models.sharding.make_mesh` over real devices.

    Raises:
      InputError: as `devices`; a mesh of more or fewer devices than the slice has.
    """
    available = devices(topology)
    if data < 1 or model < 1 or data * model != len(available):
        raise InputError(
            f"mesh: {data}x{model} needs {data * model} devices; {topology} has {len(available)}"
        )
    try:
        grid = mesh_utils.create_device_mesh((data, model), available)
    except (NotImplementedError, ValueError):  # shapes that do not map onto the torus' axes
        import numpy as np

        grid = np.asarray(available).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
