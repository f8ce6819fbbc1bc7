"""A table of what the trigram encoder said (Chimera, arXiv 2402.15758).

The state of a trigram depends on its three tokens alone, so it need not be made twice. Each row has
a table of its own with one place for every hash; keys are compared exactly, and of two trigrams
with one place the newer stays.
"""

import jax
import jax.numpy as jnp
from flax import struct

# Odd multipliers that mix the ids of a trigram (from SplitMix64's constants, in 32 bits).
_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


class TrigramStates(struct.PyTreeNode):
    """The table.

    Attributes:
      keys: int32 [B, Q, 3], the trigram in each place; -1 where there is none.
      states: [B, Q, D].
    """

    keys: jnp.ndarray
    states: jnp.ndarray


def create(batch: int, places: int, width: int, dtype: jnp.dtype) -> TrigramStates:
    """An empty table of `places` a row."""
    return TrigramStates(
        jnp.full((batch, places, 3), -1, jnp.int32), jnp.zeros((batch, places, width), dtype)
    )


def _place(table: TrigramStates, ids: jnp.ndarray) -> jnp.ndarray:
    mixed = ids.astype(jnp.uint32) * jnp.array(_MIX, jnp.uint32)
    hashed = mixed[..., 0] ^ (mixed[..., 1] >> 7) ^ (mixed[..., 2] >> 13)
    return (hashed % table.keys.shape[1]).astype(jnp.int32)


def find(table: TrigramStates, ids: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
    """States [B, W, D] of trigrams int [B, W, 3], and whether they are there, bool [B, W]."""
    place = _place(table, ids)
    keys, states = jax.vmap(lambda row, at: (row.keys[at], row.states[at]))(table, place)
    return states, (keys == ids).all(axis=-1)


def add(
    table: TrigramStates, ids: jnp.ndarray, states: jnp.ndarray, usable: jnp.ndarray
) -> TrigramStates:
    """Puts trigrams int [B, W, 3] with states [B, W, D] in where `usable` bool [B, W]."""
    places = table.keys.shape[1]
    place = jnp.where(usable, _place(table, ids), places)  # out of range: dropped
    # Of several with one place the last is written, so that its key and its state go together.
    later = jnp.triu(jnp.ones((ids.shape[1],) * 2, bool), 1)
    lost = ((place[:, :, None] == place[:, None, :]) & later).any(axis=-1)
    place = jnp.where(lost, places, place)

    def put(row: TrigramStates, at: jnp.ndarray, key: jnp.ndarray, state: jnp.ndarray):
        return TrigramStates(
            row.keys.at[at].set(key, mode="drop"), row.states.at[at].set(state, mode="drop")
        )

    return jax.vmap(put)(table, place, ids, states.astype(table.states.dtype))
