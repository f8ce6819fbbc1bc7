"""Every attention mask of the project, as boolean arrays [B, T, S]: True may be attended.

T are the query tokens of the call; S are the keys, either cache slots or the call's own tokens.
Unless said otherwise slot s of a cache holds the token at position s, so a mask over slots
is also what hides the slots beyond a row's length.
"""

import jax.numpy as jnp


def causal(positions: jnp.ndarray, num_keys: int) -> jnp.ndarray:
    """Each query sees slots up to its own position.

    Args:
      positions: int [B, T].
      num_keys: S.

    Returns:
      bool [B, T, S].
    """
    return jnp.arange(num_keys) <= positions[..., None]


def prefix(positions: jnp.ndarray, num_keys: int, prefix_lengths: jnp.ndarray) -> jnp.ndarray:
    """Causal, but the first `prefix_lengths` [B] slots are seen by every query of the row."""
    inside = jnp.arange(num_keys) < prefix_lengths[:, None, None]
    return causal(positions, num_keys) | inside


def full(valid_keys: jnp.ndarray, num_queries: int) -> jnp.ndarray:
    """Bidirectional over the valid keys [B, S], the same for each of `num_queries` queries."""
    batch, num_keys = valid_keys.shape
    return jnp.broadcast_to(valid_keys[:, None, :], (batch, num_queries, num_keys))


def within(
    mask: jnp.ndarray, positions: jnp.ndarray, key_positions: jnp.ndarray, window: int
) -> jnp.ndarray:
    """Restricts `mask` to keys fewer than `window` positions away (sliding window).

    Args:
      mask: bool [B, T, S].
      positions: int [B, T] of the queries.
      key_positions: int [B, S] or [S].
      window: keys a query sees, itself included.
    """
    distance = positions[..., None] - jnp.atleast_2d(key_positions)[:, None, :]
    return mask & (jnp.abs(distance) < window)


def segments(query_segments: jnp.ndarray, key_segments: jnp.ndarray) -> jnp.ndarray:
    """Packed sequences: a token sees its own segment only; segment 0 is padding.

    Args:
      query_segments: int [B, T].
      key_segments: int [B, S].
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_segments != 0)[:, None, :]


def packed_causal(segment_ids: jnp.ndarray) -> jnp.ndarray:
    """Causal attention inside each segment of packed rows: int [B, T] -> bool [B, T, T]."""
    index = jnp.arange(segment_ids.shape[1])
    return segments(segment_ids, segment_ids) & (index[None, :] <= index[:, None])


def ancestors(parent: jnp.ndarray, max_depth: int) -> jnp.ndarray:
    """Which nodes lie on the path from the root to each node, itself included.

    Args:
      parent: int [B, N], the index of each node's parent, smaller than its own; -1 at the root
        and at unused nodes.
      max_depth: depth of the deepest node.

    Returns:
      bool [B, N, N]; entry [b, i, j] is True when j is i or an ancestor of i.
    """
    index = jnp.arange(parent.shape[1])
    reached = jnp.broadcast_to(index[:, None] == index[None, :], (*parent.shape, len(index)))
    current = parent
    for _ in range(max_depth):
        reached = reached | (current[:, :, None] == index)
        above = jnp.take_along_axis(parent, jnp.maximum(current, 0), axis=1)
        current = jnp.where(current >= 0, above, -1)
    return reached


def tree(ancestry: jnp.ndarray, base: jnp.ndarray, num_keys: int) -> jnp.ndarray:
    """Draft-tree nodes over a cache: the whole committed prefix plus each node's ancestors.

    Args:
      ancestry: bool [B, T, N], rows of `ancestors` for the T nodes that are queries.
      base: int [B], committed length; node i stands in slot base + i.
      num_keys: S.

    Returns:
      bool [B, T, S].
    """
    B, T, N = ancestry.shape
    node = jnp.arange(num_keys)[None, :] - base[:, None]
    inside = (node >= 0) & (node < N)
    index = jnp.broadcast_to(jnp.clip(node, 0, N - 1)[:, None, :], (B, T, num_keys))
    on_path = jnp.take_along_axis(ancestry, index, axis=2)
    return (node < 0)[:, None, :] | (inside[:, None, :] & on_path)


def block_diffusion(positions: jnp.ndarray, key_positions: jnp.ndarray, block: int) -> jnp.ndarray:
    """Bidirectional inside a block of `block` tokens, causal between blocks.

    Args:
      positions: int [B, T].
      key_positions: int [B, S] or [S].
      block: tokens in a block.
    """
    keys = jnp.atleast_2d(key_positions)[:, None, :]
    return keys // block <= positions[..., None] // block


def noisy_and_clean(
    positions: jnp.ndarray, segment_ids: jnp.ndarray, block: int | jnp.ndarray
) -> jnp.ndarray:
    """Training of block diffusion on [x_t ; x_0], a noisy row and then its clean copy.

    A noisy token sees its own noisy block and the clean blocks before it; a clean token sees clean
    blocks up to its own. So one call scores every block as if its past were already decoded.
    Arriola et al., 'Block Diffusion', arXiv 2503.09573, section 3.1. Nothing crosses segments.

    Args:
      positions: int [B, T], of both copies; blocks are aligned to position 0.
      segment_ids: int [B, T]; segment 0 is padding.
      block: tokens in a block; may be traced, so that a schedule compiles once.

    Returns:
      bool [B, 2 T, 2 T].
    """
    blocks = positions // block
    queries, keys = blocks[:, :, None], blocks[:, None, :]
    noisy = jnp.concatenate([queries == keys, keys < queries], axis=2)
    clean = jnp.concatenate([jnp.zeros_like(noisy[:, :, : keys.shape[2]]), keys <= queries], axis=2)
    doubled = jnp.tile(segment_ids, (1, 2))
    return jnp.concatenate([noisy, clean], axis=1) & segments(doubled, doubled)
