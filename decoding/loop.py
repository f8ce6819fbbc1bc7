"""The one loop that drives every method, whether rows grow to the right or masks are filled in.

A method is a bundle of pure functions (`Method`), in the way of an Optax transformation; the loop
owns the text, the stop rules and the counters. `advance` runs rounds on the device until every
row is done, until its arrays have the wrong size (a cache must grow, a canvas has shrunk), or
until a number of rounds has passed (for streaming); cutting a run into several calls changes
nothing in its result.

In a profile the parts of a round are `draft`, `target`, `verify` (what decides which tokens stay)
and `commit`; see docs/performance.md.
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

    Of a row that grows to the right the last token is always pending: committed to the text, in
    no cache yet. So a method's cache holds lengths - 1 tokens, and each round's target call begins
    with it. Of a row whose masks are filled in, the tokens from `lengths` to `ends` are the canvas
    that is still being worked on.

    Attributes:
      tokens: int32 [B, M], prompt and continuation; zeros beyond `lengths` (or `ends`).
      lengths: int32 [B], tokens in each row that will not change any more.
      prompt_lengths: int32 [B].
      reason: int32 [B], `stopping` code; RUNNING while the row is not done.
      keys: row keys [B], see `decoding.randomness`.
      stats: work counters.
      rounds: int32 [], rounds run by the loop.
      inner: the method's own state: caches, tables.
      ends: int32 [B], where each row's canvas ends; None for rows that grow to the right.
    """

    tokens: jnp.ndarray
    lengths: jnp.ndarray
    prompt_lengths: jnp.ndarray
    reason: jnp.ndarray
    keys: jax.Array
    stats: work.Stats
    rounds: jnp.ndarray
    inner: Any
    ends: jnp.ndarray | None = None

    @property
    def active(self) -> jnp.ndarray:
        """Rows that are not done: bool [B]."""
        return self.reason == stopping.RUNNING


class Emission(struct.PyTreeNode):
    """What a round decided: the first `count` [B] of `tokens` [B, E], and the work it took."""

    tokens: jnp.ndarray
    count: jnp.ndarray
    work: work.Stats


class Revision(struct.PyTreeNode):
    """What a round that fills masks decided.

    Attributes:
      tokens: int32 [B, S], the first S tokens of each row as they are now.
      settled: int32 [B], how many of them will not change any more.
      ends: int32 [B], where each canvas ends; never later than before.
      done: bool [B], rows in which nothing is left to do.
      work: the work it took; `tokens_emitted` is filled by the loop.
      complete: int32 [B], where an end of text among the first so many tokens ends the row, though
        further blocks might change some of them; None for `settled`.
    """

    tokens: jnp.ndarray
    settled: jnp.ndarray
    ends: jnp.ndarray
    done: jnp.ndarray
    work: work.Stats
    complete: jnp.ndarray | None = None


class Canvas(NamedTuple):
    """How the rows of a method that fills masks are laid out.

    Attributes:
      mask_id: the token that stands for 'not decided'.
      multiple: canvases end at a multiple of this; what exceeds a row's limit is cut when it is
        done.
      early_stop: a row is done when an end-of-sequence token is settled.
    """

    mask_id: int
    multiple: int = 1
    early_stop: bool = True


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
        of each row enter the caches: all but the last, or the whole prompt with a canvas.
      step: (params, state) -> (inner, Emission), or Revision for a method with a canvas. Rows
        that are not active may return anything, but their cache lengths must not move.
      counters: names of its own work counters, see `Stats.extra`.
      memory: what it learns in a run and may take into the next one; None if nothing.
      lossless: whether its text follows the target's distribution.
      canvas: for a method that fills masks; its state's `tokens` are then [B, S] for S slots.
      amounts: names of its own work counters that are not whole numbers.
      needed: (tokens [B, M], lengths [B]) -> int [B], cache slots that the next round of rows with
        these texts takes, of NumPy or JAX arrays; None where tokens have a slot each, which is
        `lengths - 1 + lookahead`.
      resize: (inner state, slots) -> the same with caches of so many slots; None to resize every
        cache. For methods with caches that do not grow with the text.
      begin: (params, inner, row keys [B]) -> inner, before prompts are read: what a row draws once
        for all of its calls; None if nothing.
    """

    name: str
    roles: tuple[str, ...]
    depth: int
    lookahead: int
    init: Callable[[int, int], Any]
    prefill: Callable[[ModelParams, Any, jnp.ndarray, jnp.ndarray], Any]
    step: Callable[[ModelParams, DecodeState], tuple[Any, Emission | Revision]]
    counters: tuple[str, ...] = ()
    memory: Memory | None = None
    lossless: bool = True
    canvas: Canvas | None = None
    amounts: tuple[str, ...] = ()
    needed: Callable[[Any, Any], Any] | None = None
    resize: Callable[[Any, int], Any] | None = None
    begin: Callable[[ModelParams, Any, jax.Array], Any] | None = None


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


def revise(
    state: DecodeState, revision: Revision, stop: stopping.StopConfig, early_stop: bool
) -> DecodeState:
    """Takes over a round's canvas, finishes the rows that are done, and counts the work.

    A row that is done keeps its text up to the first end-of-sequence token, or to its limit.
    """
    assert state.ends is not None
    active, S = state.active, revision.tokens.shape[1]
    limit = jnp.minimum(stopping.limits(state.prompt_lengths, stop), revision.ends)
    index = jnp.arange(S)
    mine = (index >= state.prompt_lengths[:, None]) & (index < limit[:, None])
    ends_text = stopping.is_eos(revision.tokens, stop) & mine
    has_eos = ends_text.any(axis=1)
    end = jnp.where(has_eos, ends_text.argmax(axis=1) + 1, limit)
    done = revision.done
    if early_stop:
        complete = revision.settled if revision.complete is None else revision.complete
        done |= (complete >= end) & (has_eos | (complete >= limit))
    done &= active
    # Text after an end-of-sequence token is never shown, not even before the row is done.
    lengths = jnp.where(done, end, jnp.clip(revision.settled, state.lengths, end))
    reason = jnp.where(has_eos, stopping.EOS, stopping.at_limit(state.prompt_lengths, stop))
    tokens = jnp.where(active[:, None], revision.tokens, state.tokens[:, :S])
    lengths = jnp.where(active, lengths, state.lengths)
    spent = revision.work.replace(tokens_emitted=lengths - state.lengths)
    return state.replace(
        tokens=jax.lax.dynamic_update_slice(state.tokens, tokens, (0, 0)),
        lengths=lengths,
        ends=jnp.where(active, revision.ends, state.ends),
        reason=jnp.where(done, reason, state.reason),
        stats=state.stats.add(spent, active),
        rounds=state.rounds + 1,
    )


def slots_needed(state: DecodeState, method: Method) -> jnp.ndarray:
    """Slots that the next round of the rows that are not done takes: int32 []."""
    if state.ends is not None:
        needed = state.ends
    elif method.needed is not None:
        needed = method.needed(state.tokens, state.lengths)
    else:
        needed = state.lengths - 1 + method.lookahead
    return jnp.where(state.active, needed, 0).max()


@functools.partial(
    jax.jit, static_argnames=("method", "stop", "slots", "least"), donate_argnames="state"
)
def advance(
    params: ModelParams,
    state: DecodeState,
    until_round: jnp.ndarray,
    *,
    method: Method,
    stop: stopping.StopConfig,
    slots: int,
    least: int = 0,
) -> DecodeState:
    """Runs rounds until all rows are done, `until_round` is reached or `slots` does not fit.

    Args:
      params: parameters by role.
      state: consumed (its buffers are reused).
      until_round: int32 [], absolute round to stop at.
      method: the method.
      stop: stop rules.
      slots: S of the method's caches, and of the canvas that a round sees.
      least: rounds that need no more than so many slots are left to a call with fewer.
    """

    def proceed(state: DecodeState) -> jnp.ndarray:
        needed = slots_needed(state, method)
        fits = (needed <= slots) & (needed > least)
        return state.active.any() & (state.rounds < until_round) & fits

    def one_round(state: DecodeState) -> DecodeState:
        seen = state
        if method.canvas is not None:
            seen = state.replace(tokens=state.tokens[:, :slots])
        inner, decided = method.step(params, seen)
        state = state.replace(inner=inner)
        with jax.named_scope("commit"):
            if isinstance(decided, Emission):
                return append(state, decided, stop)
            assert method.canvas is not None
            return revise(state, decided, stop, method.canvas.early_stop)

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
    ends: jnp.ndarray | None = None,
    *,
    method: Method,
    slots: int,
    buffer: int,
) -> DecodeState:
    """The state before the first round: caches hold all but each prompt's last token.

    With a canvas what they hold is the method's affair, and the rows are filled up with masks.

    Args:
      params: parameters by role.
      tokens: int32 [B, P], prompts padded on the right.
      lengths: int32 [B], at least 1.
      keys: row keys [B].
      memory: what `method.memory` took from an earlier run; None for a cold start.
      ends: int32 [B], where canvases end, at most `buffer`; None without a canvas.
      method: the method.
      slots: cache slots to begin with, at least P, or what `method.needed` says.
      buffer: M, at least P and as long as the longest row may grow.
    """
    B, P = tokens.shape
    inner = method.init(B, slots)
    if memory is not None and method.memory is not None:
        inner = method.memory.put(inner, memory)
    if method.begin is not None:
        inner = method.begin(params, inner, keys)
    inner = method.prefill(params, inner, tokens, lengths if method.canvas else lengths - 1)
    index = jnp.arange(buffer)
    rows = jnp.where(index < lengths[:, None], jnp.pad(tokens, ((0, 0), (0, buffer - P))), 0)
    if method.canvas is not None:
        assert ends is not None
        blank = (index >= lengths[:, None]) & (index < ends[:, None])
        rows = jnp.where(blank, method.canvas.mask_id, rows)
    return DecodeState(
        tokens=rows,
        lengths=lengths,
        prompt_lengths=lengths,
        reason=jnp.zeros((B,), jnp.int32),
        keys=keys,
        stats=work.zeros(B, method.depth, method.counters, method.amounts),
        rounds=jnp.zeros((), jnp.int32),
        inner=inner,
        ends=ends,
    )


@functools.partial(jax.jit, static_argnames=("slots", "resize"))
def grow(
    state: DecodeState, slots: int, resize: Callable[[Any, int], Any] | None = None
) -> DecodeState:
    """The same state with caches of `slots` slots, by the method's own `resize` if it has one."""
    if resize is not None:
        return state.replace(inner=resize(state.inner, slots))
    return state.replace(inner=map_caches(lambda c: kv.resize(c, slots), state.inner))
