"""Tree search over a table of successors: PUCT, as ADED drafts with it, and best-first expansion.

Liu et al., 'Adaptive draft-verification for efficient LLM decoding', arXiv 2407.12021. Where the
paper leaves something open this follows its published code. Everything here is for one row; use
`jax.vmap` for a batch. What may follow is asked of a function, so that any table whose states are
pairs of tokens can be searched.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from models.errors import InputError, check_choice

# (a, b), int32 [...] each -> (tokens [..., R], weights [..., R]) of what may follow the pair;
# beyond the last, and for a pair that is not known, token NONE and weight 0.
Successors = Callable[[jnp.ndarray, jnp.ndarray], tuple[jnp.ndarray, jnp.ndarray]]

NONE = -1
VALUES = ("path", "code")


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of `puct_search` and `best_sentences`.

    Attributes:
      iterations: I.
      sentence_length: words of a sentence that is searched: the root's and L drafted ones.
      top_sentences: sentences kept, the root's own, which drafts nothing, among them.
      c1, c2: exploration constants of `puct`.
      value: what a sentence is worth. 'path': 1 + the sum of its steps' weights. 'code': as
        published code has it, where a step from (a, b) counts the weight of b after (a, b)
        instead of that of the token it goes to; nearly all sentences are then worth 1.
    """

    iterations: int = 150
    sentence_length: int = 4
    top_sentences: int = 24
    c1: float = 32.0
    c2: float = 8.0
    value: str = "path"

    def __post_init__(self) -> None:
        check_choice("value", self.value, VALUES)
        for field, least in (("iterations", 1), ("sentence_length", 2), ("top_sentences", 2)):
            if getattr(self, field) < least:
                raise InputError(f"{field}: {getattr(self, field)} must be at least {least}")
        if not self.c2 > 0:
            raise InputError(f"c2: {self.c2} must be above 0")

    @property
    def depth(self) -> int:
        """L, the deepest node of a search."""
        return self.sentence_length - 1


class SearchTree(struct.PyTreeNode):
    """A search of I iterations over pairs with R successors: C = 1 + I R places for nodes.

    The root is node 0. An expansion in iteration i makes all children of a node at once, nodes
    1 + i R and on, in the order of its successors.

    Attributes:
      pair: int32 [C, 2], the last two tokens; NONE where there is no node.
      parent: int32 [C]; NONE at the root.
      depth: int32 [C].
      first_child: int32 [C]; 0 for a node without children.
      prior: float32 [C], weight of the step to the node.
      reward: float32 [C], value of the path to it.
      visits: int32 [C].
      total: float32 [C], sum of the values of its visits.
    """

    pair: jnp.ndarray
    parent: jnp.ndarray
    depth: jnp.ndarray
    first_child: jnp.ndarray
    prior: jnp.ndarray
    reward: jnp.ndarray
    visits: jnp.ndarray
    total: jnp.ndarray

    @property
    def exists(self) -> jnp.ndarray:
        """Which places hold a node: bool [C]."""
        return self.pair[..., 1] != NONE


class Drafts(NamedTuple):
    """A row's draft tree: a trie of N nodes, the root first, parents before children.

    Attributes:
      tokens: int32 [N]; 0 where there is no node.
      parent: int32 [N]; NONE at the root and where there is no node.
      depth: int32 [N].
      valid: bool [N], where there is a node.
    """

    tokens: jnp.ndarray
    parent: jnp.ndarray
    depth: jnp.ndarray
    valid: jnp.ndarray


def puct(
    visits: jnp.ndarray,
    total: jnp.ndarray,
    prior: jnp.ndarray,
    parent_visits: jnp.ndarray,
    config: SearchConfig,
) -> jnp.ndarray:
    """W/n + (c1 + ln((N + c2 + 1) / c2)) p sqrt(N) / (1 + n); infinite for what has no visit.

    Args:
      visits: n, int32 [...].
      total: W, float32 [...].
      prior: p, float32 [...].
      parent_visits: N, int32 [].
      config: c1 and c2.
    """
    N = parent_visits.astype(jnp.float32)
    scale = (config.c1 + jnp.log((N + config.c2 + 1) / config.c2)) * jnp.sqrt(N)
    score = total / jnp.maximum(visits, 1) + scale * prior / (1 + visits)
    return jnp.where(visits == 0, jnp.inf, score)


def puct_search(
    successors: Successors, root: jnp.ndarray, uniforms: jnp.ndarray, config: SearchConfig
) -> SearchTree:
    """Monte-Carlo tree search: select, expand, roll out, back up, `iterations` times.

    Args:
      successors: the table.
      root: int32 [2], last two tokens of the text.
      uniforms: float32 [I, L] in [0, 1); entry [i, d] draws the roll-out's step from depth d.
      config: settings.
    """
    L = config.depth
    R = jax.eval_shape(successors, root[0], root[1])[0].shape[-1]
    C = 1 + config.iterations * R

    def select(tree: SearchTree) -> tuple[jnp.ndarray, jnp.ndarray]:
        """The node at each depth 0..L on the way down, C beyond the last; and the last."""
        node, path = jnp.int32(0), [jnp.int32(0)]
        for _ in range(L):
            first = tree.first_child[node]
            visits, total, prior, pair = (
                jax.lax.dynamic_slice_in_dim(table, first, R)
                for table in (tree.visits, tree.total, tree.prior, tree.pair)
            )
            score = puct(visits, total, prior, tree.visits[node], config)
            best = first + jnp.where(pair[:, 1] == NONE, -jnp.inf, score).argmax()
            path.append(jnp.where(first > 0, best, C).astype(jnp.int32))
            node = jnp.where(first > 0, best, node).astype(jnp.int32)
        return jnp.stack(path), node

    def expand(
        tree: SearchTree, node: jnp.ndarray, base: jnp.ndarray
    ) -> tuple[SearchTree, jnp.ndarray]:
        """Gives `node` its children, if it may have any; returns the last of them, else C."""
        (a, b), depth = tree.pair[node], tree.depth[node]
        tokens, weights = successors(a, b)
        new = (tokens != NONE) & (depth < L)
        gain = weights if config.value == "path" else _echo(tokens, weights, b)

        def put(table: jnp.ndarray, values: jnp.ndarray) -> jnp.ndarray:
            old = jax.lax.dynamic_slice_in_dim(table, base, R)
            wide = new.reshape(-1, *(1,) * (table.ndim - 1))
            rows = jnp.where(wide, values.astype(table.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(table, rows, base, axis=0)

        first = jnp.where(new.any(), base, tree.first_child[node])
        return tree.replace(
            pair=put(tree.pair, jnp.stack([jnp.broadcast_to(b, (R,)), tokens], axis=1)),
            parent=put(tree.parent, node),
            depth=put(tree.depth, depth + 1),
            prior=put(tree.prior, weights),
            reward=put(tree.reward, tree.reward[node] + gain),
            first_child=tree.first_child.at[node].set(first),
        ), jnp.where(new.any(), base + new.sum() - 1, C).astype(jnp.int32)

    def roll_out(tree: SearchTree, leaf: jnp.ndarray, noise: jnp.ndarray) -> jnp.ndarray:
        """The value of the path to `leaf` and of steps drawn by weight from there on."""
        (a, b), depth, value = tree.pair[leaf], tree.depth[leaf], tree.reward[leaf]
        for step in range(1, L):
            tokens, weights = successors(a, b)
            cumulative = jnp.cumsum(weights)
            drawn = (cumulative <= noise[step] * cumulative[-1]).sum()
            drawn = jnp.minimum(drawn, jnp.maximum((tokens != NONE).sum() - 1, 0))
            gain = weights[drawn] if config.value == "path" else _echo(tokens, weights, b)
            # The path is at this depth, or already beyond it, or has ended at an unknown pair.
            goes = (depth == step) & (tokens[0] != NONE)
            value = value + jnp.where(goes, gain, 0.0)
            a, b = jnp.where(goes, b, a), jnp.where(goes, tokens[drawn], b)
            depth = depth + goes
        return value

    def iteration(i: jnp.ndarray, tree: SearchTree) -> SearchTree:
        path, node = select(tree)
        tree, child = expand(tree, node, 1 + i * R)
        value = roll_out(tree, jnp.where(child < C, child, node), uniforms[i])
        path = jnp.append(path, child)  # C is out of range: dropped
        return tree.replace(
            visits=tree.visits.at[path].add(1, mode="drop"),
            total=tree.total.at[path].add(value, mode="drop"),
        )

    zeros, ones = jnp.zeros(C, jnp.int32), jnp.ones(C)
    start = SearchTree(
        pair=jnp.full((C, 2), NONE, jnp.int32).at[0].set(root),
        parent=zeros + NONE,
        depth=zeros,
        first_child=zeros,
        prior=0 * ones,
        reward=ones,
        visits=zeros,
        total=0 * ones,
    )
    return jax.lax.fori_loop(0, config.iterations, iteration, start)


def _echo(tokens: jnp.ndarray, weights: jnp.ndarray, b: jnp.ndarray) -> jnp.ndarray:
    """Weight of b itself among the successors of (a, b): 0 nearly always."""
    return jnp.where(tokens == b, weights, 0.0).sum()


def best_sentences(
    successors: Successors, tree: SearchTree, config: SearchConfig, num_nodes: int
) -> Drafts:
    """The most visited nodes of a search, each with its likeliest successor, as one trie.

    A sentence is the path to a node. `top_sentences` of most visits are kept (ties: the earlier
    node), the root's among them; every other one is extended by the arg-max successor of its last
    pair. A node's ancestors are visited at least as often and are earlier, so they are kept too:
    the nodes are a trie already, and only the appended tokens can repeat one.

    Args:
      successors: the table that was searched.
      tree: the search.
      config: its settings.
      num_nodes: N, root included; of more, the deepest are left out.
    """
    K = min(config.top_sentences, tree.visits.shape[0])
    # As floats: on a CPU the integer top_k is fifty times slower. Ties go to the smaller index.
    visits = jnp.where(tree.exists, tree.visits, -1).astype(jnp.float32)
    count, kept = jax.lax.top_k(visits, K)
    there = count >= 0
    pair, depth, index = tree.pair[kept], tree.depth[kept], jnp.arange(K)
    above = (tree.parent[kept][:, None] == kept).argmax(axis=1)  # not of the root, which is first
    ends, weights = successors(pair[:, 0], pair[:, 1])
    best = jnp.take_along_axis(ends, weights.argmax(axis=1)[:, None], axis=1)[:, 0]
    is_child = (above == index[:, None]) & there & (index > 0)
    repeated = (is_child & (pair[:, 1] == best[:, None])).any(axis=1)
    appended = there & (index > 0) & (ends[:, 0] != NONE) & ~repeated
    return _trie(
        tokens=jnp.concatenate([pair[:, 1], best]),
        parent=jnp.concatenate([above, index]),
        depth=jnp.concatenate([depth, depth + 1]),
        valid=jnp.concatenate([there, appended]),
        num_nodes=num_nodes,
    )


def _trie(
    tokens: jnp.ndarray,
    parent: jnp.ndarray,
    depth: jnp.ndarray,
    valid: jnp.ndarray,
    num_nodes: int,
) -> Drafts:
    """The first `num_nodes` valid nodes by depth, the root first, renumbered: [M] -> [N]."""
    spare = max(num_nodes - len(tokens), 0)
    tokens, parent, depth, valid = (
        jnp.pad(table, (0, spare)) for table in (tokens, parent, depth, valid)
    )
    order = jnp.argsort(jnp.where(valid, depth, jnp.iinfo(jnp.int32).max), stable=True)
    number = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
    order = order[:num_nodes]
    valid = valid[order]
    has_parent = valid & (jnp.arange(num_nodes) > 0)
    return Drafts(
        tokens=jnp.where(valid, tokens[order], 0).astype(jnp.int32),
        parent=jnp.where(has_parent, number[parent[order]], NONE).astype(jnp.int32),
        depth=jnp.where(valid, depth[order], 0).astype(jnp.int32),
        valid=valid,
    )


def best_first(successors: Successors, root: jnp.ndarray, max_depth: int, num_nodes: int) -> Drafts:
    """Adds the continuation of largest path probability, again and again: no noise, no visits.

    A step's probability is its weight as a share of its pair's; ties go to the earlier node, then
    to the earlier successor.

    Args:
      successors: the table.
      root: int32 [2], last two tokens of the text.
      max_depth: deepest node.
      num_nodes: N, root included.
    """

    def open_places(
        a: jnp.ndarray, b: jnp.ndarray, probability: jnp.ndarray
    ) -> tuple[jnp.ndarray, jnp.ndarray]:
        tokens, weights = successors(a, b)
        return tokens, probability * weights / jnp.maximum(weights.sum(), 1e-30)

    def add(i: jnp.ndarray, carry: tuple) -> tuple:
        drafts, tokens, value = carry
        best = value.argmax()
        node, rank = jnp.unravel_index(best, value.shape)
        probability, token = value[node, rank], tokens[node, rank]
        valid, depth = probability > 0, drafts.depth[node] + 1
        drafts = Drafts(
            drafts.tokens.at[i].set(jnp.where(valid, token, 0)),
            drafts.parent.at[i].set(jnp.where(valid, node.astype(jnp.int32), NONE)),
            drafts.depth.at[i].set(jnp.where(valid, depth, 0)),
            drafts.valid.at[i].set(valid),
        )
        follow, new = open_places(drafts.tokens[node], token, probability)
        value = value.at[node, rank].set(0.0)
        return (
            drafts,
            tokens.at[i].set(follow),
            value.at[i].set(jnp.where(depth < max_depth, new, 0.0)),
        )

    zeros = jnp.zeros(num_nodes, jnp.int32)
    first, value = open_places(root[0], root[1], jnp.float32(1))
    drafts = Drafts(
        zeros.at[0].set(root[1]), zeros + NONE, zeros, zeros.astype(bool).at[0].set(True)
    )
    shape = (num_nodes, first.shape[-1])
    places = (
        jnp.full(shape, NONE, jnp.int32).at[0].set(first),
        jnp.zeros(shape).at[0].set(value),
    )
    return jax.lax.fori_loop(1, num_nodes, add, (drafts, *places))[0]
