"""T5's relative positions: a learned scalar a head and bucket of distances, added to the scores.

Raffel et al., arXiv 1910.10683, section 2.1. One table serves all layers, as in T5. Nothing else
knows positions, so keys lie in a cache as they are.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import RelativeBiasConfig


def buckets(
    distance: jnp.ndarray, *, num_buckets: int, max_distance: int, causal: bool
) -> jnp.ndarray:
    """The bucket of each distance (position of the query less that of the key).

    The first half of the buckets are distances 0, 1, 2, ...; the other half grows by a constant
    factor up to `max_distance`, and the last one is everything beyond. Keys to come are in the
    bucket of distance 0 if the model is causal; else half of all buckets is theirs.

    Args:
      distance: int [...].
      num_buckets: in all.
      max_distance: see `RelativeBiasConfig`.
      causal: whether the model is left to right.

    Returns:
      int32 [...], 0 .. num_buckets - 1.
    """
    first = jnp.zeros_like(distance)
    if causal:
        distance = jnp.maximum(distance, 0)
    else:
        num_buckets //= 2
        first = jnp.where(distance < 0, num_buckets, 0)
        distance = jnp.abs(distance)
    exact = num_buckets // 2
    growth = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + (growth * (num_buckets - exact)).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """What is added to the attention scores of every layer."""

    config: RelativeBiasConfig

    @nn.compact
    def __call__(self, positions: jnp.ndarray, key_positions: jnp.ndarray) -> jnp.ndarray:
        """Float32 [B, K, G, T, S] of positions int [B, T] and key positions int [B, S] or [S].

        B is 1 where all rows share their positions and these are given once.
        """
        config = self.config
        shape = (config.relative_buckets, config.num_kv_heads, config.queries_per_kv)
        table = self.param("embedding", nn.initializers.normal(config.embed_dim**-0.5), shape)
        distance = positions[:, :, None] - jnp.atleast_2d(key_positions)[:, None, :]
        index = buckets(
            distance,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
            causal=config.causal,
        )
        # A product rather than a gather, whose gradient would be a scatter.
        chosen = jax.nn.one_hot(index, config.relative_buckets)
        return jnp.einsum("btsr,rkg->bkgts", chosen, table.astype(jnp.float32))
