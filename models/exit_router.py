"""Whether a token may leave at a gate: ARLA, and the linear router it is compared with (M2R2).

arXiv 2502.02040. ARLA, accelerated residual latent attention, reads all states that the accelerated
stream has had since the last gate, in few dimensions. Its name and use are the paper's; the form is
our own, since the paper's body could not be read.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROUTERS = ("arla", "linear")


def init(embed_dim: int, slots: int, width: int, key: jax.Array) -> dict[str, Any]:
    """Random parameters of both routers of a gate.

    Args:
      embed_dim: D.
      slots: states between two gates.
      width: c, of the latent attention.
      key: of the random numbers.
    """
    down, state, query, keys, values = jax.random.split(key, 5)

    def normal(key: jax.Array, rows: int, columns: int) -> jnp.ndarray:
        return jax.random.normal(key, (rows, columns)) * rows**-0.5

    return {
        "arla": {
            "down": normal(down, embed_dim, width),
            "slots": jnp.zeros((slots, width)),
            "query": normal(query, width, width),
            "key": normal(keys, width, width),
            "value": normal(values, width, width),
            "state": normal(state, embed_dim, width),
            "weight": jnp.zeros((2 * width,)),
            "bias": jnp.zeros((1,)),
        },
        "linear": {"weight": jnp.zeros((embed_dim,)), "bias": jnp.zeros((1,))},
    }


def score(kind: str, params: Any, states: Sequence[jnp.ndarray]) -> jnp.ndarray:
    """Log-odds that the head says at the gate what it says after the last layer.

    Args:
      kind: of `ROUTERS`.
      params: from `init`.
      states: [..., D] each, of the accelerated stream since the last gate, the gate's own last.

    Returns:
      float32 [...].
    """
    router = params[kind]
    wide = [_unit(state) for state in states]
    if kind == "linear":
        return wide[-1] @ router["weight"] + router["bias"][0]
    narrow = jnp.stack([state @ router["down"] for state in wide], axis=-2) + router["slots"]
    query = narrow[..., -1, :] @ router["query"]
    scores = jnp.einsum("...c,...sc->...s", query, narrow @ router["key"])
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    mixed = jnp.einsum("...s,...sc->...c", weights, narrow @ router["value"])
    both = jnp.concatenate([mixed, wide[-1] @ router["state"]], axis=-1)
    return both @ router["weight"] + router["bias"][0]


def _unit(x: jnp.ndarray) -> jnp.ndarray:
    """In float32, of mean square 1."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def multiply_adds(embed_dim: int, slots: int, width: int) -> int:
    """Products a token that ARLA takes at a gate; 0 for a width of 0."""
    return width * (embed_dim * (slots + 1) + width * (2 * slots + 1) + 2 * slots + 2)
