"""Draft trees whose shape follows the drafter's confidence (DySpec, arXiv 2410.11744).

The value of drawing once more at node u is the drafter's own estimate that the draw would be
reached and needed: P(u), the probability of the path, times the mass at u that is not drawn yet.
Only *whether to draw* depends on it, never whether a drawn token is kept, so the tree stays a
sample and recursive rejection stays exact. The draws at a node are one Gumbel top-k, so they are
the same whenever they are asked for: both builders grow the same tree where they agree on a
threshold.

The shape depends on draws anywhere in the tree. All noise is therefore keyed by the round (the
root's position): noise that had decided a shape would not be independent of it in a later round.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import top_k
from decoding.speculative import sources, verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.sources import Growing, Source
from decoding.speculative.tree import DraftTree

COUNTERS = ("tree_nodes",)


class _Build(NamedTuple):
    """A tree under construction.

    Attributes:
      tree: the nodes.
      used: int32 [B], nodes there, root included.
      value: float32 [B, N], P of each node; 0 where nothing may be drawn (end of text).
      keys: keys [B, N] of the nodes' noise: the parent's, folded with the rank among siblings.
      log_q: float32 [B, N, V].
      inner: the source's state.
      calls: int32 [B], source calls.
    """

    tree: Growing
    used: jnp.ndarray
    value: jnp.ndarray
    keys: jax.Array
    log_q: jnp.ndarray
    inner: Any
    calls: jnp.ndarray


class _Draws(NamedTuple):
    """Draws without replacement at nodes, in order: [..., R] each.

    Attributes:
      tokens: int32.
      probability: float32, under q.
      left: float32, the mass not drawn before; 0 where nothing is left to draw.
    """

    tokens: jnp.ndarray
    probability: jnp.ndarray
    left: jnp.ndarray


def _draw(log_q: jnp.ndarray, keys: jax.Array, most: int) -> _Draws:
    """The first `most` draws at nodes with distributions log_q [..., V] and keys [...]."""
    noise = randomness.gumbel(keys, log_q.shape[-1])
    _, tokens = top_k(log_q + noise, most)
    drawn = jnp.exp(jnp.take_along_axis(log_q, tokens, axis=-1))
    left = jnp.maximum(1 - (jnp.cumsum(drawn, axis=-1) - drawn), 0.0)
    # What is outside the support is never drawn, whatever rounding leaves of the mass.
    return _Draws(tokens.astype(jnp.int32), drawn, jnp.where(drawn > 0, left, 0.0))


def _begin(
    source: Source, params: ModelParams, inner: Any, state: DecodeState, num_nodes: int
) -> _Build:
    tree = sources.plant(pending_tokens(state), num_nodes)
    log_q, inner = source.root(params, inner, state)
    B, V = log_q.shape
    keys = randomness.at(state.keys, state.lengths, randomness.DRAFT)
    return _Build(
        tree=tree,
        used=jnp.ones(B, jnp.int32),
        value=jnp.zeros((B, num_nodes)).at[:, 0].set(1.0),
        keys=jnp.repeat(keys[:, None], num_nodes, axis=1),
        log_q=jnp.zeros((B, num_nodes, V)).at[:, 0].set(log_q),
        inner=inner,
        calls=jnp.ones(B, jnp.int32),
    )


def _grow(
    build: _Build,
    parent: jnp.ndarray,
    rank: jnp.ndarray,
    draws: _Draws,
    wanted: jnp.ndarray,
    eos_ids: tuple[int, ...],
) -> _Build:
    """Adds the draw of each place (parent, rank), int [B, W], that is `wanted` bool [B, W].

    `draws` has the places' own token, probability and mass: [B, W]. Wanted places come first.
    """
    fold = jax.vmap(jax.vmap(jax.random.fold_in))
    keys = fold(_at(build.keys, parent), rank)
    value = _at(build.value, parent) * draws.probability
    if eos_ids:
        value = jnp.where(jnp.isin(draws.tokens, jnp.asarray(eos_ids)), 0.0, value)
    N = build.value.shape[1]
    place = jnp.where(wanted, build.used[:, None] + jnp.arange(rank.shape[1]), N)

    def put(table: Any, new: Any) -> Any:
        return jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(
            table, place, new
        )

    return build._replace(
        tree=sources.add(build.tree, build.used, draws.tokens, parent, wanted),
        used=build.used + wanted.sum(axis=1),
        value=put(build.value, value),
        keys=put(build.keys, keys),
    )


def _at(table: Any, index: jnp.ndarray) -> Any:
    """table[b, index[b]] for [B, N, ...] and int [B, W]."""
    return jax.vmap(lambda row, at: row[at])(table, index)


@functools.cache
def threshold_tree_drafter(
    source: Source,
    num_draft: int,
    threshold: float,
    max_depth: int,
    width: int,
    eos_ids: tuple[int, ...] = (),
) -> Drafter:
    """DySpec, layer by layer (algorithm 2): draws at every place whose value is >= `threshold`.

    Args:
      source: draft distributions; one call a layer.
      num_draft: most nodes, the root not counted. A layer that would exceed it keeps the places
        of largest value, which is known before their draws.
      threshold: smallest value of a place; about 1 / num_draft.
      max_depth: most layers.
      width: most nodes a layer, and most draws a node.
      eos_ids: tokens that are not drafted beyond.
    """
    N, width, max_depth = num_draft + 1, min(width, num_draft), min(max_depth, num_draft)

    def layer(
        build: _Build, first: jnp.ndarray, log_q: jnp.ndarray, most: int
    ) -> tuple[_Build, jnp.ndarray]:
        """Draws at the nodes from `first` [B] on; returns where the new ones begin."""
        B, W, _ = log_q.shape
        node = jnp.minimum(first[:, None] + jnp.arange(W), N - 1)
        there = first[:, None] + jnp.arange(W) < build.used[:, None]
        draws = _draw(log_q, _at(build.keys, node), most)
        value = jnp.where(there, _at(build.value, node), 0.0)[..., None] * draws.left
        best, index = jax.lax.top_k(value.reshape(B, W * most), min(width, W * most))
        wanted = (best >= threshold) & (jnp.arange(best.shape[1]) < (N - build.used)[:, None])
        chosen = _Draws(
            *(jnp.take_along_axis(x.reshape(B, W * most), index, axis=1) for x in draws)
        )
        parent = jnp.take_along_axis(node, index // most, axis=1)
        return _grow(build, parent, index % most, chosen, wanted, eos_ids), build.used

    def open_rows(build: _Build, first: jnp.ndarray) -> jnp.ndarray:
        """Rows [B] whose last layer has a node to draw at, and room."""
        number = jnp.arange(N)
        last = (number >= first[:, None]) & (number < build.used[:, None])
        return (last & (build.value >= threshold)).any(axis=1) & (build.used < N)

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        build = _begin(source, params, inner, state, N)
        most = min(width, build.log_q.shape[-1])
        start = jnp.zeros_like(build.used)
        build, first = layer(build, start, build.log_q[:, :1], most)

        def proceed(carry: tuple) -> jnp.ndarray:
            build, first, depth = carry
            return (depth < max_depth) & open_rows(build, first).any()

        def one_layer(carry: tuple) -> tuple:
            build, first, depth = carry
            log_q, inner = source.nodes(params, build.inner, state, build.tree, first, width)
            place = first[:, None] + jnp.arange(width)
            stored = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(
                build.log_q, place, log_q
            )
            calls = build.calls + open_rows(build, first)
            build = build._replace(log_q=stored, inner=inner, calls=calls)
            return (*layer(build, first, log_q, most), depth + 1)

        build, _, _ = jax.lax.while_loop(proceed, one_layer, (build, first, jnp.int32(1)))
        return _finish(build, max_depth, source)

    return _drafter(source, N, max_depth, width, propose)


@functools.cache
def greedy_tree_drafter(
    source: Source, num_draft: int, max_depth: int, most: int, eos_ids: tuple[int, ...] = ()
) -> Drafter:
    """DySpec, node by node (algorithm 1): always draws at the place of largest value.

    Args:
      source: draft distributions; a call a node that is drawn at.
      num_draft: nodes, the root not counted.
      max_depth: deepest node.
      most: R, most draws a node.
      eos_ids: tokens that are not drafted beyond.
    """
    N, max_depth = num_draft + 1, min(max_depth, num_draft)

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        build = _begin(source, params, inner, state, N)
        B, _, V = build.log_q.shape
        R = min(most, V)
        row = jnp.arange(B)
        # Draws at every node, filled in when it is first drawn at; until then all mass is left.
        table = _Draws(jnp.zeros((B, N, R), jnp.int32), jnp.zeros((B, N, R)), jnp.ones((B, N, R)))
        known = jnp.zeros((B, N), bool)
        drawn = jnp.zeros((B, N), jnp.int32)

        def ask(build: _Build, node: jnp.ndarray) -> _Build:
            log_q, inner = source.nodes(params, build.inner, state, build.tree, node, 1)
            log_q = jnp.where((node == 0)[:, None], build.log_q[:, 0], log_q[:, 0])
            return build._replace(log_q=build.log_q.at[row, node].set(log_q), inner=inner)

        def one_node(_: jnp.ndarray, carry: tuple) -> tuple:
            build, table, known, drawn = carry
            left = jnp.take_along_axis(table.left, jnp.minimum(drawn, R - 1)[..., None], axis=2)
            may = build.tree.valid & (drawn < R) & (build.tree.depth < max_depth)
            value = jnp.where(may, build.value * left[..., 0], 0.0)
            node = value.argmax(axis=1)
            wanted = value.max(axis=1) > 0
            new = wanted & ~known[row, node]
            # The root's distribution is there already.
            asks = new & (node > 0)
            build = jax.lax.cond(asks.any(), lambda b: ask(b, node), lambda b: b, build)
            build = build._replace(calls=build.calls + asks)
            fresh = _draw(build.log_q[row, node], build.keys[row, node], R)
            table = _Draws(*(old.at[row, node].set(x) for old, x in zip(table, fresh, strict=True)))
            known = known.at[row, node].set(True)
            rank = drawn[row, node]
            one = _Draws(*(x[row, rank][:, None] for x in fresh))
            # Exhausted, as only now is known: nothing is added, the next turn looks elsewhere.
            wanted &= one.left[:, 0] > 0
            build = _grow(build, node[:, None], rank[:, None], one, wanted[:, None], eos_ids)
            return build, table, known, drawn.at[row, node].add(1)

        build, *_ = jax.lax.fori_loop(1, N, one_node, (build, table, known, drawn))
        return _finish(build, max_depth, source)

    return _drafter(source, N, max_depth, 1, propose)


def _finish(build: _Build, max_depth: int, source: Source) -> Draft:
    tree = build.tree
    drafted = DraftTree(
        tokens=tree.tokens,
        parent=tree.parent,
        depth=tree.depth,
        valid=tree.valid,
        log_q=build.log_q,
        max_depth=max_depth,
        is_chain=False,
    )
    calls = build.calls if source.is_model else 0
    return Draft(drafted, build.inner, calls, {"tree_nodes": build.used - 1})


def _drafter(source: Source, num_nodes: int, max_depth: int, scratch: int, propose: Any) -> Drafter:
    return Drafter(
        roles=source.roles,
        num_nodes=num_nodes,
        max_depth=max_depth,
        law=verification.WITHOUT_REPLACEMENT,
        init=source.init,
        prefill=source.prefill,
        propose=propose,
        observe=sources.keep_accepted(source),
        reads=source.reads,
        scratch=scratch,
        counters=COUNTERS,
    )
