"""Embeddings of a batch's tokens, made on the fly and kept: least recently used go first.

Feher et al., arXiv 2411.18553: a table of fixed capacity (published: 5,000 at evaluation, 10,000
in training); a batch's unique tokens that are not in it go through the provider in one call.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decoding.dynamic_vocabulary.providers import Provider
from models.errors import InputError

CAPACITY = 5000


@dataclasses.dataclass
class Counts:
    """What a cache did so far.

    Attributes:
      batches: lookups.
      calls: lookups that had to ask the provider.
      hits, misses: unique tokens that were there, and that were not.
      evicted: tokens thrown out.
    """

    batches: int = 0
    calls: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0


class EmbeddingCache:
    """A table of input embeddings on the device, and which token each of its rows is.

    Attributes:
      table: float32 [capacity, D]; rows as the model's first layer takes them.
      counts: see `Counts`.
    """

    def __init__(self, provider: Provider, capacity: int = CAPACITY, scale: float | None = None):
        """An empty cache.

        Args:
          provider: where rows come from.
          capacity: rows; no batch may have more different tokens.
          scale: the model's `embedding_scale`.
        """
        if capacity < 1:
            raise InputError(f"capacity: {capacity} must be at least 1")
        self.table = jnp.zeros((capacity, provider.width), jnp.float32)
        self.counts = Counts()
        self._provider, self._scale = provider, scale or 1.0
        self._slots: dict[str, int] = {}  # in the order of their last use

    def __contains__(self, token: str) -> bool:
        return token in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slots(self, batch: Sequence[Sequence[str]]) -> list[list[int]]:
        """Rows of the table that hold a batch's tokens, which are made where they are missing.

        Makes room by throwing out the tokens whose last use is longest ago, but none of this batch;
        all of this batch's then count as just used. The table is right for the batches looked up
        last: use it before the next lookup.

        Raises:
          InputError: more different tokens than capacity.
        """
        needed = dict.fromkeys(token for row in batch for token in row)
        capacity = self.table.shape[0]
        if len(needed) > capacity:
            raise InputError(
                f"capacity: {capacity} rows do not hold the batch's {len(needed)} different tokens"
            )
        missing = [token for token in needed if token not in self._slots]
        self.counts.batches += 1
        self.counts.hits += len(needed) - len(missing)
        self.counts.misses += len(missing)
        if missing:
            self.counts.calls += 1
            self._insert(missing, self._free(len(missing), needed))
        for token in needed:
            self._slots[token] = self._slots.pop(token)
        return [[self._slots[token] for token in row] for row in batch]

    def _free(self, count: int, needed: dict[str, int | None]) -> list[int]:
        """`count` rows of the table: unused ones first, then those of the oldest tokens."""
        used = len(self._slots)
        free = list(range(used, min(used + count, self.table.shape[0])))
        old = [token for token in self._slots if token not in needed][: count - len(free)]
        self.counts.evicted += len(old)
        return free + [self._slots.pop(token) for token in old]

    def _insert(self, tokens: list[str], slots: list[int]) -> None:
        rows = np.asarray(self._provider.embed(tokens).input) * self._scale
        # Few shapes, so that few programs are compiled: what fills up goes to no row.
        size = 1 << (len(tokens) - 1).bit_length()
        index = np.full((size,), self.table.shape[0], np.int32)
        index[: len(slots)] = slots
        padded = np.zeros((size, rows.shape[1]), np.float32)
        padded[: len(slots)] = rows
        self.table = _store(self.table, index, padded)
        self._slots.update(zip(tokens, slots, strict=True))


@functools.partial(jax.jit, donate_argnums=0)
def _store(table: jnp.ndarray, slots: jnp.ndarray, rows: jnp.ndarray) -> jnp.ndarray:
    return table.at[slots].set(rows, mode="drop")
