"""The key/value cache as a value: an immutable struct and pure functions on it.

Slot s of a row holds the token at position s. `lengths` says how many slots of each row are
committed; everything beyond is scratch that a mask hides and a later write replaces, so that
rolling back is setting a length.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from models.config import TransformerConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer.

    Attributes:
      keys: one array a layer, [B, K, S, H].
      values: likewise.
      lengths: int32 [B], committed tokens of each row.
    """

    keys: tuple[jnp.ndarray, ...]
    values: tuple[jnp.ndarray, ...]
    lengths: jnp.ndarray

    @property
    def slots(self) -> int:
        """S, tokens that a row can hold."""
        return self.keys[0].shape[2]


def create(
    config: TransformerConfig, batch: int, slots: int, *, num_layers: int | None = None
) -> KVCache:
    """An empty cache in the compute dtype for `num_layers` layers (default: all)."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    layers = range(config.num_layers if num_layers is None else num_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, config.compute_dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, config.compute_dtype) for _ in layers),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def write(store: jnp.ndarray, update: jnp.ndarray, start: jnp.ndarray) -> jnp.ndarray:
    """Writes T tokens of one layer at each row's own slot.

    Args:
      store: [B, K, S, H].
      update: [B, K, T, H].
      start: int [B], first slot of each row; start + T must not exceed S.

    Returns:
      [B, K, S, H]. In place where the caller donates `store`.
    """
    update = update.astype(store.dtype)
    return jax.vmap(lambda row, new, first: jax.lax.dynamic_update_slice(row, new, (0, first, 0)))(
        store, update, start
    )


def commit(cache: KVCache, path: jnp.ndarray, count: jnp.ndarray) -> KVCache:
    """Keeps the accepted path of a draft tree and drops the rest.

    The tree's node i stands in slot lengths + i. The nodes of `path` move, in order, to slots
    lengths, lengths + 1, ...; lengths grow by `count`.

    Args:
      cache: with the tree's keys and values written beyond `lengths`.
      path: int [B, M], node indices, increasing; entries from `count` on are ignored.
      count: int [B], nodes accepted, at most M.
    """
    M = path.shape[1]
    slot = jnp.arange(M)
    # Entries beyond the count keep their own slot, so that the gather is always in range.
    source = jnp.where(slot < count[:, None], path, slot) + cache.lengths[:, None]

    def move(store: jnp.ndarray) -> jnp.ndarray:
        index = jnp.minimum(source, store.shape[2] - 1)[:, None, :, None]
        return write(store, jnp.take_along_axis(store, index, axis=2), cache.lengths)

    return KVCache(
        keys=tuple(map(move, cache.keys)),
        values=tuple(map(move, cache.values)),
        lengths=cache.lengths + count,
    )


def truncate(cache: KVCache, lengths: jnp.ndarray) -> KVCache:
    """Rolls rows back (or, after a write, forward) to `lengths` int [B]."""
    return cache.replace(lengths=lengths)


def resize(cache: KVCache, slots: int) -> KVCache:
    """Grows or shrinks every row to `slots`; committed tokens must fit."""

    def fit(store: jnp.ndarray) -> jnp.ndarray:
        if slots <= store.shape[2]:
            return store[:, :, :slots]
        return jnp.pad(store, ((0, 0), (0, 0), (0, slots - store.shape[2]), (0, 0)))

    return cache.replace(keys=tuple(map(fit, cache.keys)), values=tuple(map(fit, cache.values)))


def layers(cache: KVCache, indices: Sequence[int]) -> KVCache:
    """The cache of some layers only, in the given order."""
    return cache.replace(
        keys=tuple(cache.keys[i] for i in indices),
        values=tuple(cache.values[i] for i in indices),
    )
