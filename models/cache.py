"""The key/value cache as a value: an immutable struct and pure functions on it.

Slot s of a row holds the token at position s. `lengths` says how many slots of each row are
committed; everything beyond is scratch that a mask hides and a later write replaces, so that
rolling back is setting a length.

Inside the decoding loop the arrays of a single row are *folded* to [K, S, H] (`fold`): with a row
axis of size one XLA drops that axis before the attention products, and then copies the whole cache
at every write. All functions here and `attend` take both forms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.config import TransformerConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer.

    Attributes:
      keys: one array a layer, [B, K, S, H], or [K, S, H] when folded.
      values: likewise.
      lengths: int32 [B], committed tokens of each row.
    """

    keys: tuple[jnp.ndarray, ...]
    values: tuple[jnp.ndarray, ...]
    lengths: jnp.ndarray

    @property
    def slots(self) -> int:
        """S, tokens that a row can hold."""
        return self.keys[0].shape[-2]


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
    """Writes T tokens of one layer at each row's own slots.

    Args:
      store: [B, K, S, H], or [K, S, H] when folded.
      update: [B, K, T, H].
      start: int [B], first slot of each row, start + T not exceeding S; or int [B, T], the slot
        of every token, where those from S on are dropped.

    Returns:
      As `store`. In place where the caller donates it.
    """
    update = update.astype(store.dtype)
    if start.ndim == 2:
        if store.ndim == 3:  # a mapped scatter would bring the row axis back, and a copy with it
            return store.at[:, start[0]].set(update[0], mode="drop")
        return jax.vmap(lambda row, new, at: row.at[:, at].set(new, mode="drop"))(
            store, update, start
        )
    if store.ndim == 3:
        return jax.lax.dynamic_update_slice(store, update[0], (0, start[0], 0))
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
        index = jnp.minimum(source, store.shape[-2] - 1)
        if store.ndim == 3:
            rows = store[None, :, index[0]]
        else:
            rows = jnp.take_along_axis(store, index[:, None, :, None], axis=2)
        return write(store, rows, cache.lengths)

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
        more = slots - store.shape[-2]
        if more <= 0:
            return store[..., :slots, :]
        return jnp.pad(store, ((0, 0),) * (store.ndim - 2) + ((0, more), (0, 0)))

    return cache.replace(keys=tuple(map(fit, cache.keys)), values=tuple(map(fit, cache.values)))


def fold(cache: KVCache) -> KVCache:
    """Drops the row axis of a single row; other caches are returned as they are."""
    if cache.lengths.shape[0] != 1 or cache.keys[0].ndim == 3:
        return cache
    return cache.replace(
        keys=tuple(store[0] for store in cache.keys),
        values=tuple(store[0] for store in cache.values),
    )


def unfold(cache: KVCache) -> KVCache:
    """Undoes `fold`."""
    if cache.keys[0].ndim == 4:
        return cache
    return cache.replace(
        keys=tuple(store[None] for store in cache.keys),
        values=tuple(store[None] for store in cache.values),
    )


def switch(
    index: jnp.ndarray, branches: Sequence[Callable[[KVCache], tuple[KVCache, Any]]], cache: KVCache
) -> tuple[KVCache, Any]:
    """`jax.lax.switch` for branches that write a cache, which stay in place here.

    XLA copies what a conditional's branches update, so each of them copied the whole cache; a
    `while_loop` that runs once or not at all does not. See docs/performance.md.

    Args:
      index: int32 [], which branch to run.
      branches: cache -> (cache, result), the results of one structure.
      cache: what they start from.
    """
    result = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(branches[0], cache)[1]
    )
    carry = (jnp.zeros((), bool), cache, result)
    for number, branch in enumerate(branches):

        def once(carry: tuple, branch: Callable = branch) -> tuple:
            return (jnp.zeros((), bool), *branch(carry[1]))

        carry = jax.lax.while_loop(lambda c: c[0], once, (index == number, *carry[1:]))
    return carry[1:]


def layers(cache: KVCache, indices: Sequence[int]) -> KVCache:
    """The cache of some layers only, in the given order."""
    return cache.replace(
        keys=tuple(cache.keys[i] for i in indices),
        values=tuple(cache.values[i] for i in indices),
    )
