"""Attention over cached or fresh keys, in one function.

The form of the contraction decides the speed on a CPU by up to a factor of five (see
docs/performance.md): keys and values lie as [B, K, S, H], the queries of a group are folded into
one axis, and both products are `dot_general`s with (B, K) as batch dimensions, which XLA runs as
one matrix product a head on contiguous memory without a copy. (B, K) stay separate axes so that
they can be sharded over data and model meshes.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row whose mask is all False gives a uniform average rather than NaN.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    queries: jnp.ndarray,
    keys: jnp.ndarray,
    values: jnp.ndarray,
    mask: jnp.ndarray,
    *,
    scale: float,
    softcap: float | None = None,
    bias: jnp.ndarray | None = None,
) -> jnp.ndarray:
    """Grouped-query scaled dot-product attention; softmax in float32.

    Args:
      queries: [B, T, K, G, H].
      keys: [B, K, S, H], or [K, S, H] from a folded cache.
      values: as `keys`.
      mask: bool [B, T, S]; False hides a key.
      scale: multiplies the scores.
      softcap: c in c * tanh(score / c) (Gemma 2), applied before the mask.
      bias: added to the scores after that, [B, K, G, T, S] or whatever broadcasts to it.

    Returns:
      [B, T, K, G, H], in the dtype of `queries`.
    """
    B, T, K, G, H = queries.shape
    if keys.ndim == 3:  # the folded cache of a single row
        keys, values = keys[None], values[None]
    folded = (queries * scale).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jax.lax.dot_general(
        folded, keys, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    ).reshape(B, K, G, T, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
    # The maximum only keeps the exponential in range: it has no gradient.
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1)
    # Dividing the H-wide result rather than the S-wide weights saves a pass over the scores.
    mixed = jax.lax.dot_general(
        weights.reshape(B, K, G * T, -1).astype(values.dtype),
        values,
        (((3,), (2,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    ).reshape(B, K, G, T, H)
    return (mixed / total[..., None]).transpose(0, 3, 1, 2, 4).astype(queries.dtype)
