"""Neighbourhoods of codes, and acceptance by the probability of a whole neighbourhood."""

import jax.numpy as jnp

from models.errors import InputError


def nearest_codes(embeddings: jnp.ndarray, count: int) -> jnp.ndarray:
    """The codes nearest to each one, itself first, in order of L2 distance.

    Args:
      embeddings: float [K, d], the codebook.
      count: k, codes a neighbourhood has, 1 .. K.

    Returns:
      int32 [K, k]; ties go to the smaller id.

    Raises:
      InputError: a count out of range.
    """
    K = len(embeddings)
    if not 1 <= count <= K:
        raise InputError(f"neighbours: {count} must be between 1 and the {K} codes")
    distance = jnp.sum((embeddings[:, None] - embeddings[None]) ** 2, axis=-1)
    # Equal codes would be as near as the code itself, which comes first whatever its id.
    distance = jnp.where(jnp.eye(K, dtype=bool), -1.0, distance)
    return jnp.argsort(distance, axis=1, stable=True)[:, :count].astype(jnp.int32)


def pooled(probs: jnp.ndarray, drafts: jnp.ndarray, table: jnp.ndarray) -> jnp.ndarray:
    """Probability of each draft's neighbourhood (MuLo-SD's probability pooling).

    Args:
      probs: [..., V] with V >= K.
      drafts: int [...], codes.
      table: int [K, k], from `nearest_codes`.

    Returns:
      [...], sums over the k codes.
    """
    return jnp.take_along_axis(probs, table[drafts], axis=-1).sum(axis=-1)
