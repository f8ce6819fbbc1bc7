"""Which axis of a parameter lies along which axis of a mesh, and what a step says about it.

With parameters that lie as the table says, XLA's propagation finds everything else. Where training
splits them over 'data' too (fully sharded data parallelism, ZeRO-3: Rajbhandari et al. 2020), it
would as well split activations by width and send those round. There layers say what is meant:
`split_rows` of activations, `gathered` of parameters. Both do nothing outside of `traced_for`.
"""

import contextlib
import functools
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

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


def spec_for(path: str) -> P:
    """The table's entry for one parameter path."""
    return next(spec for pattern, spec in PARTITION_TABLE if re.search(pattern, path))


def over_data(spec: P, shape: Sequence[int], size: int) -> P:
    """`spec` with 'data', of so many devices, along the largest axis that is whole and divides.

    A vector, and what has no such axis, stays as it is.
    """
    splits = [*spec, *[None] * (len(shape) - len(spec))]
    whole = [axis for axis, split in enumerate(splits) if split is None and not shape[axis] % size]
    if len(shape) < 2 or not whole:
        return spec
    splits[max(whole, key=lambda axis: shape[axis])] = "data"
    return P(*splits)


def traced_for(mesh: Mesh) -> contextlib.AbstractContextManager[object]:
    """A context for tracing a step whose parameters are split over 'data' of this mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split_rows(x: jax.Array) -> jax.Array:
    """The same x [B, ...]: B lies along 'data', all else whole."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P("data", *[None] * (x.ndim - 1)))


def gathered(kernel: jax.Array, *path: str) -> jax.Array:
    """The same parameter, whole along 'data'; its gradient is summed to where the parameter lies.

    Within a recomputed block it is gathered again in the backward pass, so that no device holds
    more than a layer of them.

    Args:
      kernel: in the dtype in which it is to travel.
      path: its own, as in the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    spec = spec_for("/".join(path))
    return _gather(spec, over_data(spec, kernel.shape, mesh.shape["data"]), kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(whole: P, split: P, kernel: jax.Array) -> jax.Array:
    del split
    return jax.lax.with_sharding_constraint(kernel, whole)


def _gather_forward(whole: P, split: P, kernel: jax.Array) -> tuple[jax.Array, None]:
    return _gather(whole, split, kernel), None


def _gather_backward(whole: P, split: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # A plain constraint would ask for the sum to be whole on every device first.
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)
