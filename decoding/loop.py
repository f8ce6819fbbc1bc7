"""The one loop that drives every method whose rows grow to the right.

A method is a bundle of pure functions (`Method`), in the way of an Optax transformation; the loop
owns the text, the stop rules and the counters. `advance` runs rounds on the device until every
row is done, until the cache must grow, or until a number of rounds has passed (for streaming);
cutting a run into several calls changes nothing in its result.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding import stats as work
from decoding import stopping
from models import cache as kv

# Parameters of every model a method uses, by role: {'target': ..., 'draft': ...}.
ModelParams = dict[str, Any]


class DecodeState(struct.PyTreeNode):
    """Everything a run is, between two rounds.

    The last of a row's tokens is always pending: committed to the text, in no cache yet. So a
    method's cache holds lengths - 1 tokens, and each round's target call begins with it.

    Attributes:
      tokens: int32 [B, M], prompt and continuation; zeros beyond `lengths`.
      lengths: int32 [B], tokens in each row.
      prompt_lengths: int32 [B].
      reason: int32 [B], `stopping` code; RUNNING while the row is not done.
      keys: row keys [B], see `decoding.randomness`.
      stats: work counters.
      rounds: int32 [], rounds run by the loop.
      inner: the method's own state: caches, tables.
    """

    tokens: jnp.ndarray
    lengths: jnp.ndarray
    prompt_lengths: jnp.ndarray
    reason: jnp.ndarray
    keys: jax.Array
    stats: work.Stats
    rounds: jnp.ndarray
    inner: Any

    @property
    def active(self) -> jnp.ndarray:
        """Rows that are not done: bool [B]."""
        return self.reason == stopping.RUNNING


class Emission(struct.PyTreeNode):
    """What a round decided: the first `count` [B] of `tokens` [B, E], and the work it took."""

    tokens: jnp.ndarray
    count: jnp.ndarray
    work: work.Stats


class Memory(NamedTuple):
    """How to take what a run has learned out of a method's inner state, and put it into another.

    Attributes:
      take: inner state -> value.
      put: (fresh inner state, value) -> inner state.
    """

    take: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]


class Method(NamedTuple):
    """A decoding method.

    Attributes:
      name: as users call it.
      roles: the models it needs, keys of `ModelParams`.
      depth: draft depths it reports acceptance for.
      lookahead: cache slots it may write beyond a row's committed tokens in one round.
      init: (batch, slots) -> inner state with empty caches.
      prefill: (params, inner, tokens [B, P], lengths [B]) -> inner; the first `lengths` tokens
        of each row enter the caches.
      step: (params, state) -> (inner, Emission). Rows that are not active may return anything,
        but their cache lengths must not move.
      counters: names of its own work counters, see `Stats.extra`.
      memory: what it learns in a run and may take into the next one; None if nothing.
      lossless: whether its text follows the target's distribution.
    """

    name: str
    roles: tuple[str, ...]
    depth: int
    lookahead: int
    init: Callable[[int, int], Any]
    prefill: Callable[[ModelParams, Any, jnp.ndarray, jnp.ndarray], Any]
    step: Callable[[ModelParams, DecodeState], tuple[Any, Emission]]
    counters: tuple[str, ...] = ()
    memory: Memory | None = None
    lossless: bool = True


def _is_cache(node: Any) -> bool:
    return isinstance(node, kv.KVCache)


def caches(inner: Any) -> list[kv.KVCache]:
    """Every cache inside a method's state."""
    return [leaf for leaf in jax.tree.leaves(inner, is_leaf=_is_cache) if _is_cache(leaf)]


def map_caches(function: Callable[[kv.KVCache], Any], inner: Any) -> Any:
    """Applies `function` to every cache inside a method's state."""
    return jax.tree.map(
        lambda leaf: function(leaf) if _is_cache(leaf) else leaf, inner, is_leaf=_is_cache
    )


def append(state: DecodeState, emission: Emission, stop: stopping.StopConfig) -> DecodeState:
    """Adds a round's tokens to the text, cut by the stop rules, and counts the work."""
    active = state.active
    kept, reason = stopping.cut(
        emission.tokens, emission.count, state.lengths, state.prompt_lengths, stop
    )
    kept = jnp.where(active, kept, 0)
    # Each buffer slot takes the emitted token that belongs there, if any.
    offset = jnp.arange(state.tokens.shape[1]) - state.lengths[:, None]
    index = jnp.clip(offset, 0, emission.tokens.shape[1] - 1)
    new = jnp.take_along_axis(emission.tokens, index, axis=1)
    tokens = jnp.where((offset >= 0) & (offset < kept[:, None]), new, state.tokens)
    spent = emission.work.replace(tokens_emitted=kept)
    return state.replace(
        tokens=tokens,
        lengths=state.lengths + kept,
        reason=jnp.where(active, reason, state.reason),
        stats=state.stats.add(spent, active),
        rounds=state.rounds + 1,
    )


@functools.partial(jax.jit, static_argnames=("method", "stop", "slots"), donate_argnames="state")
def advance(
    params: ModelParams,
    state: DecodeState,
    until_round: jnp.ndarray,
    *,
    method: Method,
    stop: stopping.StopConfig,
    slots: int,
) -> DecodeState:
    """Runs rounds until all rows are done, `until_round` is reached or a cache is too small.

    Args:
      params: parameters by role.
      state: consumed (its buffers are reused).
      until_round: int32 [], absolute round to stop at.
      method: the method.
      stop: stop rules.
      slots: S of the method's caches.
    """

    def proceed(state: DecodeState) -> jnp.ndarray:
        active = state.active
        needed = jnp.where(active, state.lengths - 1 + method.lookahead, 0).max()
        return active.any() & (state.rounds < until_round) & (needed <= slots)

    def one_round(state: DecodeState) -> DecodeState:
        inner, emission = method.step(params, state)
        return append(state.replace(inner=inner), emission, stop)

    state = state.replace(inner=map_caches(kv.fold, state.inner))
    state = jax.lax.while_loop(proceed, one_round, state)
    return state.replace(inner=map_caches(kv.unfold, state.inner))


@functools.partial(jax.jit, static_argnames=("method", "slots", "buffer"))
def start(
    params: ModelParams,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
    keys: jax.Array,
    memory: Any = None,
    *,
    method: Method,
    slots: int,
    buffer: int,
) -> DecodeState:
    """The state before the first round: caches hold all but each prompt's last token.

    Args:
      params: parameters by role.
      tokens: int32 [B, P], prompts padded on the right.
      lengths: int32 [B], at least 1.
      keys: row keys [B].
      memory: what `method.memory` took from an earlier run; None for a cold start.
      method: the method.
      slots: cache slots to begin with, at least P.
      buffer: M, at least P and as long as the longest row may grow.
    """
    B, P = tokens.shape
    inner = method.init(B, slots)
    if memory is not None and method.memory is not None:
        inner = method.memory.put(inner, memory)
    inner = method.prefill(params, inner, tokens, lengths - 1)
    inside = jnp.arange(P) < lengths[:, None]
    return DecodeState(
        tokens=jnp.pad(jnp.where(inside, tokens, 0), ((0, 0), (0, buffer - P))),
        lengths=lengths,
        prompt_lengths=lengths,
        reason=jnp.zeros((B,), jnp.int32),
        keys=keys,
        stats=work.zeros(B, method.depth, method.counters),
        rounds=jnp.zeros((), jnp.int32),
        inner=inner,
    )


@functools.partial(jax.jit, static_argnames="slots")
def grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with caches of `slots` slots."""
    return state.replace(inner=map_caches(lambda c: kv.resize(c, slots), state.inner))
