"""Where a sampled tree's draft distributions come from: a smaller model, or counts of the text.

A source answers one question: the distribution of the token after each of some nodes of a growing
tree. How the tree grows from there is `sampled_tree`'s and `dynamic_tree`'s business.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, log_probs
from decoding.speculative import scoring
from decoding.speculative.draft_model import feed_pending
from decoding.speculative.drafting import nothing
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig


class Growing(struct.PyTreeNode):
    """A tree while it grows; nodes that are not there yet are all zero.

    Attributes:
      tokens: int32 [B, N]; node 0 is the root, the pending token.
      parent: int32 [B, N]; -1 at the root and at nodes that are not there.
      depth: int32 [B, N].
      valid: bool [B, N].
      ancestry: bool [B, N, N], node j is i or an ancestor of i.
    """

    tokens: jnp.ndarray
    parent: jnp.ndarray
    depth: jnp.ndarray
    valid: jnp.ndarray
    ancestry: jnp.ndarray


def plant(root: jnp.ndarray, num_nodes: int) -> Growing:
    """A tree of nothing but its root, int32 [B], with room for `num_nodes`."""
    shape = (len(root), num_nodes)
    zeros = jnp.zeros(shape, jnp.int32)
    return Growing(
        tokens=zeros.at[:, 0].set(root),
        parent=zeros - 1,
        depth=zeros,
        valid=jnp.zeros(shape, bool).at[:, 0].set(True),
        ancestry=jnp.broadcast_to(jnp.eye(num_nodes, dtype=bool), (*shape, num_nodes)),
    )


def add(
    tree: Growing, first: jnp.ndarray, tokens: jnp.ndarray, parent: jnp.ndarray, valid: jnp.ndarray
) -> Growing:
    """Adds W nodes to each row, at its own place.

    Args:
      tree: with room for them.
      first: int32 [B], number of the first new node; what lies beyond N is dropped.
      tokens: int32 [B, W].
      parent: int32 [B, W], nodes that are there.
      valid: bool [B, W]; the others leave the tree as it is.
    """
    W = tokens.shape[1]
    N = tree.tokens.shape[1]
    place = jnp.where(valid, first[:, None] + jnp.arange(W), N)  # N is out of range: dropped

    def put(table: jnp.ndarray, new: jnp.ndarray) -> jnp.ndarray:
        return jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(
            table, place, new
        )

    def of_parent(table: jnp.ndarray) -> jnp.ndarray:
        return jax.vmap(lambda row, at: row[at])(table, parent)

    itself = jnp.arange(N) == place[:, :, None]
    return Growing(
        tokens=put(tree.tokens, tokens),
        parent=put(tree.parent, parent),
        depth=put(tree.depth, of_parent(tree.depth) + 1),
        valid=put(tree.valid, valid),
        ancestry=put(tree.ancestry, of_parent(tree.ancestry) | itself),
    )


class Source(NamedTuple):
    """Draft distributions of a tree's nodes.

    Attributes:
      roles: models it needs beside the target.
      init: (batch, slots) -> state.
      prefill: (params, state, tokens [B, P], lengths [B], *streams) -> state.
      root: (params, state, decode state) -> (log_q [B, V] after the pending token, state).
      nodes: (params, state, decode state, tree, first [B], width) -> (log_q [B, width, V],
        state) after nodes first .. first + width - 1 of each row.
      commit: (state, path [B, M], count [B], target's output) -> state; `count` nodes of `path`
        were accepted, root included; 0 leaves the row as it was.
      is_model: whether a question is a call of a model.
      reads: as `Drafter.reads`.
    """

    roles: tuple[str, ...]
    init: Callable[[int, int], Any]
    prefill: Callable[..., Any]
    root: Callable[[ModelParams, Any, DecodeState], tuple[jnp.ndarray, Any]]
    nodes: Callable[..., tuple[jnp.ndarray, Any]]
    commit: Callable[[Any, jnp.ndarray, jnp.ndarray, transformer.Output], Any]
    is_model: bool
    reads: tuple[int, ...] = ()


def keep_accepted(source: Source) -> Callable[..., Any]:
    """`Drafter.observe` of a drafter whose state is its source's: commits the accepted path."""

    def observe(
        inner: Any,
        tree: DraftTree,
        verdict: Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> Any:
        return source.commit(inner, verdict.path, jnp.where(active, verdict.count, 0), output)

    return observe


def window(table: jnp.ndarray, first: jnp.ndarray, width: int) -> jnp.ndarray:
    """Rows first .. first + width - 1 of [B, N, ...], the last repeated beyond the end."""
    index = jnp.minimum(first[:, None] + jnp.arange(width), table.shape[1] - 1)
    return jax.vmap(lambda row, at: row[at])(table, index)


def distribution_of(
    logits: jnp.ndarray,
    state: DecodeState,
    tree: Growing,
    rows: jnp.ndarray,
    sampling: SamplingConfig,
) -> jnp.ndarray:
    """log_q [B, W, V] of logits at W nodes, whose rows of the ancestry are bool [B, W, N]."""
    if sampling.repetition_penalty != 1:
        logits = scoring.penalised_logits(
            logits, rows, tree.tokens, state.tokens, state.lengths, sampling
        )
    return log_probs(logits, sampling)


@functools.cache
def model_source(config: TransformerConfig, sampling: SamplingConfig) -> Source:
    """The model of role 'draft', under a tree mask over its own cache.

    The cache holds the text but for its last two tokens, which `root` feeds again each round:
    of an accepted path the last node may not have been fed.
    """

    def distribution(
        params: ModelParams, hidden: jnp.ndarray, state: DecodeState, tree: Growing, rows: Any
    ) -> jnp.ndarray:
        logits = transformer.unembed(config, params["draft"], hidden)
        return distribution_of(logits, state, tree, rows, sampling)

    def root(
        params: ModelParams, cache: kv.KVCache, state: DecodeState
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        hidden, cache = feed_pending(config, params["draft"], cache, state)
        tree = plant(pending_tokens(state), 1)
        log_q = distribution(params, hidden[:, None], state, tree, tree.ancestry)
        return log_q[:, 0], kv.truncate(cache, state.lengths - 1)

    def nodes(
        params: ModelParams,
        cache: kv.KVCache,
        state: DecodeState,
        tree: Growing,
        first: jnp.ndarray,
        width: int,
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        base = state.lengths - 1
        rows = window(tree.ancestry, first, width)
        out = transformer.apply(
            config,
            params["draft"],
            window(tree.tokens, first, width),
            positions=base[:, None] + window(tree.depth, first, width),
            mask=masks.tree(rows, base, cache.slots),
            key_positions=scoring.key_positions(tree.depth, base, cache.slots),
            cache=kv.truncate(cache, base + first),
            with_logits=False,
        )
        assert out.cache is not None
        log_q = distribution(params, out.hidden, state, tree, rows)
        return log_q, kv.truncate(out.cache, base)

    def commit(
        cache: kv.KVCache, path: jnp.ndarray, count: jnp.ndarray, output: transformer.Output
    ) -> kv.KVCache:
        del output
        # The last accepted node need not have been fed; it is fed again as the last but one token.
        return kv.commit(cache, path[:, : max(path.shape[1] - 1, 1)], jnp.maximum(count - 1, 0))

    return Source(
        roles=("draft",),
        init=lambda batch, slots: kv.create(config, batch, slots),
        prefill=lambda params, cache, tokens, lengths: prefill(
            config, params["draft"], cache, tokens, lengths
        ),
        root=root,
        nodes=nodes,
        commit=commit,
        is_model=True,
    )


@functools.cache
def ngram_source(vocab_size: int, sampling: SamplingConfig) -> Source:
    """Counts of what followed the last two tokens, the last one, and anything, in the text so far.

    The three frequencies are mixed (8/11, 2/11, 1/11 where all exist; interpolation after Jelinek
    and Mercer, 1980); no model is called. The sampling's temperature and filters act on the mix.
    """
    mix = (8.0, 2.0, 1.0)

    def follow(
        state: DecodeState, last: jnp.ndarray, before: jnp.ndarray, has_before: jnp.ndarray
    ) -> jnp.ndarray:
        """log_q [B, W, V] after contexts (before, last), int [B, W] each."""
        tokens, lengths = state.tokens, state.lengths
        _B, M = tokens.shape
        place = jnp.arange(M)
        inside = (place + 1 < lengths[:, None])[:, None]  # something follows
        one = inside & (tokens[:, None] == last[..., None])
        earlier = jnp.roll(tokens, 1, axis=1)[:, None] == before[..., None]
        two = one & earlier & (place > 0) & has_before[..., None]
        kinds = (two, one, jnp.broadcast_to(inside, one.shape))
        weights = sum(
            weight * kind / jnp.maximum(kind.sum(axis=-1, keepdims=True), 1)
            for weight, kind in zip(mix, kinds, strict=True)
        )
        following = jnp.roll(tokens, -1, axis=1)
        count = jax.vmap(
            lambda ids, rows: jnp.zeros((rows.shape[0], vocab_size)).at[:, ids].add(rows)
        )(following, weights)
        # A row of one token has seen nothing: all tokens are alike then.
        count = jnp.where(count.sum(axis=-1, keepdims=True) > 0, count, 1.0)
        return log_probs(jnp.log(count), sampling)

    def root(params: ModelParams, inner: Any, state: DecodeState) -> tuple[jnp.ndarray, Any]:
        at = state.lengths[:, None]
        last, before = (
            jnp.take_along_axis(state.tokens, jnp.maximum(at - back, 0), axis=1) for back in (1, 2)
        )
        return follow(state, last, before, at >= 2)[:, 0], inner

    def nodes(
        params: ModelParams,
        inner: Any,
        state: DecodeState,
        tree: Growing,
        first: jnp.ndarray,
        width: int,
    ) -> tuple[jnp.ndarray, Any]:
        parent = jnp.maximum(window(tree.parent, first, width), 0)
        before = jnp.take_along_axis(tree.tokens, parent, axis=1)
        return follow(
            state, window(tree.tokens, first, width), before, jnp.ones(before.shape, bool)
        ), inner

    return Source(
        roles=(),
        init=nothing,
        prefill=nothing,
        root=root,
        nodes=nodes,
        commit=lambda inner, path, count, output: inner,
        is_model=False,
    )
