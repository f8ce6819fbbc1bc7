"""The tri-gram store of ADED: which tokens followed each pair of tokens, and how strongly.

Liu et al., 'Adaptive draft-verification for efficient LLM decoding', arXiv 2407.12021. A store
begins with a corpus' frequencies, or empty, and is updated from the text while it is written.

It is a hash table in arrays: a pair stands in one of `PROBES` slots, next to each other, from its
hash on. Nothing is ever taken out without something else in its place, so there are no tombstones
and a look-up reads those slots and no others. Functions here act on one store; `jax.vmap` makes
them act on one a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

PROBES = 8
# R of a new store: the successors kept of a pair in a corpus, and room for those that come later.
WIDTH = 16
CORPUS_WIDTH = 12
EMPTY = -1


class Store(struct.PyTreeNode):
    """Pairs of tokens and what followed them; a leading axis B where every row has its own.

    Attributes:
      keys: int32 [S, 2], the pair of each slot; EMPTY where there is none.
      successors: int32 [S, R], in the order in which they came; EMPTY beyond the last.
      weights: float32 [S, R], of each successor; frequencies at first, but neither normalised
        nor below 1 once updated; 0 beyond the last.
    """

    keys: jnp.ndarray
    successors: jnp.ndarray
    weights: jnp.ndarray

    @property
    def slots(self) -> int:
        """S."""
        return self.keys.shape[-2]

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self))


def empty(slots: int, width: int = WIDTH) -> Store:
    """A store without pairs, of `slots` >= PROBES slots and `width` successors each."""
    return Store(
        keys=jnp.full((slots, 2), EMPTY, jnp.int32),
        successors=jnp.full((slots, width), EMPTY, jnp.int32),
        weights=jnp.zeros((slots, width), jnp.float32),
    )


def places(a: Any, b: Any, slots: int) -> Any:
    """Where a pair may stand, in the order in which it is tried.

    Args:
      a: int32 [...], NumPy or JAX.
      b: likewise.
      slots: S.

    Returns:
      uint32 [..., PROBES] of the same library.
    """
    mixed = a.astype(np.uint32) * np.uint32(0x9E3779B1) + b.astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    first = (mixed ^ (mixed >> np.uint32(16))) % np.uint32(slots)
    return (first[..., None] + np.arange(PROBES, dtype=np.uint32)) % np.uint32(slots)


def lookup(store: Store, a: jnp.ndarray, b: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
    """What followed the pairs (a, b), int32 [...] each.

    Returns:
      Successors int32 [..., R], EMPTY beyond the last, and their weights float32 [..., R], 0 there;
      a pair that is not in the store has none.
    """
    where = places(a, b, store.slots)
    found = (store.keys[where] == jnp.stack([a, b], axis=-1)[..., None, :]).all(axis=-1)
    slot = jnp.take_along_axis(where, found.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    known = found.any(axis=-1)[..., None]
    return (
        jnp.where(known, store.successors[slot], EMPTY),
        jnp.where(known, store.weights[slot], 0.0),
    )


def update(
    store: Store, trigrams: jnp.ndarray, usable: jnp.ndarray, delta: float, cap: float
) -> Store:
    """Adds `delta` to the weight of each tri-gram, one after another; weights end at `cap`.

    A new successor begins at 0; in a pair that has R of them it replaces the one of smallest
    weight. A new pair takes the first free one of its slots, or else that of least total weight.

    Args:
      store: one store.
      trigrams: int32 [K, 3].
      usable: bool [K]; the others change nothing.
      delta: weight that an occurrence adds, above 0.
      cap: largest weight.
    """

    def add(store: Store, item: tuple[jnp.ndarray, jnp.ndarray]) -> tuple[Store, None]:
        trigram, usable = item
        pair, token = trigram[:2], trigram[2]
        where = places(pair[0], pair[1], store.slots)
        keys = store.keys[where]
        here, free = (keys == pair).all(axis=1), keys[:, 0] == EMPTY
        total = store.weights[where].sum(axis=1)
        slot = where[jnp.where(here, -2.0, jnp.where(free, -1.0, total)).argmin()]
        known = here.any()
        successors = jnp.where(known, store.successors[slot], EMPTY)
        weights = jnp.where(known, store.weights[slot], 0.0)
        same, room = successors == token, successors == EMPTY
        at = jnp.where(same, -2.0, jnp.where(room, -1.0, weights)).argmin()
        weight = jnp.minimum(jnp.where(same, weights, 0.0).sum() + delta, cap)
        # Both tables' rows wait for what is read of both. XLA then writes them in place; it copies
        # a table that may be read after it is written.
        chosen = (jnp.arange(store.successors.shape[1]) == at) & (weight > 0)

        def put(table: jnp.ndarray, row: jnp.ndarray) -> jnp.ndarray:
            row = jnp.where(usable, row, table[slot])
            return jax.lax.dynamic_update_index_in_dim(table, row, slot, axis=0)

        return Store(
            put(store.keys, pair),
            put(store.successors, jnp.where(chosen, token, successors)),
            put(store.weights, jnp.where(chosen, weight, weights)),
        ), None

    return jax.lax.scan(add, store, (trigrams, usable))[0]


def from_counts(
    trigrams: np.ndarray,
    counts: np.ndarray,
    slots: int,
    *,
    top: int = CORPUS_WIDTH,
    width: int = WIDTH,
) -> Store:
    """A corpus' store: relative frequencies, cut to the `top` most frequent successors of a pair.

    What is cut off stays in the denominator. Pairs that find no place, the rarest ones, are left
    out: less than one in a hundred where there are twice as many slots as pairs.

    Args:
      trigrams: int [n, 3], distinct, in any order.
      counts: int [n], at least 1.
      slots: S.
      top: successors kept of a pair, by frequency (ties: the smaller id), at most `width`.
      width: R.

    Returns:
      A store of NumPy arrays.
    """
    order = np.lexsort((trigrams[:, 2], -counts, trigrams[:, 1], trigrams[:, 0]))
    trigrams, counts = trigrams[order].astype(np.int32), counts[order]
    begins = np.ones(len(counts), bool)
    begins[1:] = (trigrams[1:, :2] != trigrams[:-1, :2]).any(axis=1)
    pair, start = np.cumsum(begins) - 1, np.flatnonzero(begins)
    totals = np.add.reduceat(counts, start) if len(start) else counts
    pairs = trigrams[start, :2]
    rank = np.arange(len(counts)) - start[pair]
    slot = _assign(pairs, totals, slots)
    store = jax.tree.map(np.array, empty(slots, width))
    store.keys[slot[slot >= 0]] = pairs[slot >= 0]
    kept = (rank < top) & (slot[pair] >= 0)
    at = slot[pair[kept]], rank[kept]
    store.successors[at] = trigrams[kept, 2]
    store.weights[at] = counts[kept] / totals[pair[kept]]
    return store


def _assign(pairs: np.ndarray, totals: np.ndarray, slots: int) -> np.ndarray:
    """A slot for each pair, int64 [n]; -1 where all its places went to more frequent ones."""
    wanted = places(pairs[:, 0], pairs[:, 1], slots).astype(np.int64)
    order = np.argsort(-totals, kind="stable")
    slot, taken = np.full(len(pairs), -1), np.zeros(slots, bool)
    for probe in range(PROBES):
        waiting = order[slot[order] < 0]
        waiting = waiting[~taken[wanted[waiting, probe]]]
        found, first = np.unique(wanted[waiting, probe], return_index=True)
        slot[waiting[first]] = found
        taken[found] = True
    return slot
