"""Counts of the work a loop did, one entry a row."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import struct


class Stats(struct.PyTreeNode):
    """Work counters; every array has a leading axis B.

    Attributes:
      target_calls: forward passes of the target after the prompt.
      target_positions: tokens those passes were run on.
      draft_calls: forward passes of a draft model (0 for drafters without one).
      tokens_emitted: tokens appended to the row.
      proposed: [B, E], rounds in which the drafter proposed a token at depth 1..E.
      accepted: [B, E], rounds in which that depth was reached by acceptance.
      extra: a method's own counters by name, each [B].
    """

    target_calls: jnp.ndarray
    target_positions: jnp.ndarray
    draft_calls: jnp.ndarray
    tokens_emitted: jnp.ndarray
    proposed: jnp.ndarray
    accepted: jnp.ndarray
    extra: dict[str, jnp.ndarray]

    def add(self, work: "Stats", active: jnp.ndarray) -> "Stats":
        """Adds one round's work for the rows in which `active` bool [B] holds."""

        def plus(total: jnp.ndarray, amount: jnp.ndarray) -> jnp.ndarray:
            rows = active.reshape(-1, *(1,) * (total.ndim - 1))
            return total + jnp.where(rows, amount, 0).astype(total.dtype)

        return jax.tree.map(plus, self, work)


def zeros(
    batch: int, depth: int, counters: Sequence[str] = (), amounts: Sequence[str] = ()
) -> Stats:
    """Counters at zero for `depth` draft depths (0 for methods without drafts).

    Of a method's own, `counters` are whole numbers and `amounts` are float32.
    """
    count = jnp.zeros((batch,), jnp.int32)
    by_depth = jnp.zeros((batch, depth), jnp.int32)
    extra = dict.fromkeys(counters, count) | dict.fromkeys(amounts, count.astype(jnp.float32))
    return Stats(count, count, count, count, by_depth, by_depth, extra)


def round_work(
    batch: int,
    depth: int,
    *,
    target_positions: int = 1,
    draft_calls: int | jnp.ndarray = 0,
    proposed: jnp.ndarray | None = None,
    accepted: jnp.ndarray | None = None,
    extra: Mapping[str, jnp.ndarray] | None = None,
) -> Stats:
    """The work of one round with one target call; `tokens_emitted` is filled by the loop."""
    empty = jnp.zeros((batch, depth), jnp.int32)
    full = lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))  # noqa: E731
    return Stats(
        target_calls=full(1),
        target_positions=full(target_positions),
        draft_calls=full(draft_calls),
        tokens_emitted=full(0),
        proposed=empty if proposed is None else proposed,
        accepted=empty if accepted is None else accepted,
        extra=dict(extra or {}),
    )
