"""DySpec's trees: golden shapes, the two builders against each other, budgets and counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import randomness
from decoding.sampling import SamplingConfig
from decoding.speculative import dynamic_tree
from decoding.speculative.dynamic_tree import greedy_tree_drafter, threshold_tree_drafter
from decoding.speculative.multi_draft import recursive_rejection
from decoding.speculative.sources import Growing, Source
from decoding.speculative.tree import DraftTree
from tests.decoding import tiny


def fixed_source(table: jnp.ndarray) -> Source:
    """log_q after each token from a table [V, V]; counts as a model."""

    def root(params, inner, state):
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]
        return table[last], inner

    def nodes(params, inner, state, tree: Growing, first, width):
        index = jnp.minimum(first[:, None] + jnp.arange(width), tree.tokens.shape[1] - 1)
        return table[jnp.take_along_axis(tree.tokens, index, axis=1)], inner

    nothing = lambda *_: ()  # noqa: E731
    return Source((), nothing, nothing, root, nodes, lambda inner, path, count: inner, True)


@functools.cache
def state_of(rows: int):
    """A decode state of one-token prompts 0, 1, 2, ... modulo 3."""
    method = tiny.build("autoregressive")
    prompts = [[i % 3] for i in range(rows)]
    return tiny.start(method, tiny.params(), prompts, slots=8, buffer=8)


def propose(drafter, rows: int = 1):
    return jax.device_get(jax.jit(lambda s: drafter.propose({}, (), s))(state_of(rows)))


def paths(tree: DraftTree, row: int = 0) -> list[tuple[int, ...]]:
    """Every drafted path as its tokens, in the order of its nodes."""
    found = {0: ()}
    for node in np.flatnonzero(tree.valid[row])[1:]:
        found[node] = (*found[int(tree.parent[row, node])], int(tree.tokens[row, node]))
    return list(found.values())[1:]


@pytest.fixture
def draws_in_order(monkeypatch):
    """Draws come out from the likeliest token on: no noise."""
    monkeypatch.setattr(
        dynamic_tree.randomness, "gumbel", lambda keys, size: jnp.zeros((*keys.shape, size))
    )


THREE = jnp.log(jnp.asarray([[0.6, 0.3, 0.1]] * 3))


def test_golden_tree_of_six(draws_in_order):
    """Every node has the law (.6, .3, .1): a, aa, b, aaa, ba, ab."""
    draft = propose(greedy_tree_drafter(fixed_source(THREE), 6, 6, 3))
    assert paths(draft.tree) == [(0,), (0, 0), (1,), (0, 0, 0), (1, 0), (0, 1)]
    # Drawn at: root, a, aa, b. The source is asked once for each.
    assert draft.calls.tolist() == [4]


def test_golden_tree_of_a_threshold(draws_in_order):
    """The same law: t = .25 gives a, b | aa, ba | aaa in three layers."""
    draft = propose(threshold_tree_drafter(fixed_source(THREE), 8, 0.25, 6, 4))
    assert sorted(paths(draft.tree)) == sorted([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])
    assert draft.calls.tolist() == [3]
    assert draft.counters["tree_nodes"].tolist() == [5]


RANDOM = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)) * 4))
ROWS = 32


@functools.cache
def greedy_trees(budget: int):
    return propose(greedy_tree_drafter(fixed_source(RANDOM), budget, budget, 16), ROWS)


def node_values(tree: DraftTree, row: int) -> list[tuple[float, int]]:
    """Place values of the nodes in order: P(parent) times the mass not drawn before."""
    value, left, found = {0: 1.0}, {}, []
    for node in np.flatnonzero(tree.valid[row])[1:]:
        parent = int(tree.parent[row, node])
        q = float(np.exp(tree.log_q[row, parent, tree.tokens[row, node]]))
        left.setdefault(parent, 1.0)
        found.append((value[parent] * left[parent], int(node)))
        value[node], left[parent] = value[parent] * q, left[parent] - q
    return found


def test_popped_values_never_increase_and_the_budget_is_spent():
    draft = greedy_trees(12)
    for row in range(ROWS):
        values = [value for value, _ in node_values(draft.tree, row)]
        assert len(values) == 12
        assert (np.diff(values) <= 1e-5).all()


def test_both_builders_grow_the_same_tree():
    """With the threshold at the last value that was popped; noise belongs to the node."""
    greedy = greedy_trees(12)
    least = [node_values(greedy.tree, row)[-1][0] for row in range(ROWS)]
    for row in (0, 9):
        drafter = threshold_tree_drafter(fixed_source(RANDOM), 20, least[row] - 1e-6, 20, 20)
        layered = propose(drafter, ROWS)
        assert sorted(paths(layered.tree, row)) == sorted(paths(greedy.tree, row))


def test_the_budget_is_never_exceeded_and_the_rest_is_counted():
    draft = propose(threshold_tree_drafter(fixed_source(RANDOM), 6, 0.01, 20, 20), ROWS)
    nodes = draft.counters["tree_nodes"]
    assert nodes.max() == 6 and draft.tree.num_nodes == 7
    # Within the layer that would overflow, places of larger value are kept.
    sparse = propose(threshold_tree_drafter(fixed_source(RANDOM), 6, 0.6, 20, 20), ROWS)
    assert (sparse.counters["tree_nodes"] < 6).any()


def test_no_duplicate_siblings_and_children_after_parents():
    for draft in (
        greedy_trees(12),
        propose(threshold_tree_drafter(fixed_source(RANDOM), 12, 0.02, 20, 20), ROWS),
    ):
        for row in range(ROWS):
            found = paths(draft.tree, row)
            assert len(set(found)) == len(found)
        assert (draft.tree.parent[:, 1:] < np.arange(1, draft.tree.num_nodes)).all()


def test_the_shape_follows_confidence():
    """A sure drafter gets a chain, an unsure one a bush, of the same number of nodes."""
    one_hot = jnp.log(jnp.asarray(np.roll(np.eye(3), 1, axis=1)))
    chain = propose(greedy_tree_drafter(fixed_source(one_hot), 5, 5, 3))
    assert chain.tree.depth[0].tolist() == [0, 1, 2, 3, 4, 5]
    flat = jnp.full((8, 8), -jnp.log(8.0))
    bush = propose(greedy_tree_drafter(fixed_source(flat), 7, 7, 8))
    assert bush.tree.depth[0].max() == 1
    layered = propose(threshold_tree_drafter(fixed_source(one_hot), 5, 0.2, 8, 4))
    assert layered.tree.depth[0].max() == 5


def test_an_ended_text_is_not_drawn_beyond(draws_in_order):
    draft = propose(greedy_tree_drafter(fixed_source(THREE), 6, 6, 3, (0,)))
    assert not [path for path in paths(draft.tree) if 0 in path[:-1]]


def depth_first(parent: np.ndarray) -> np.ndarray:
    """Old numbers of the nodes of [B, N] parents, in depth-first order."""

    def visit(row: int, node: int) -> list[int]:
        below = np.flatnonzero(parent[row] == node)
        return [node, *(n for child in below for n in visit(row, int(child)))]

    return np.asarray([visit(row, 0) for row in range(len(parent))])


def test_depth_first_masks_are_denser():
    """Fewer blocks of 32 x 32 that are not empty, as published for larger trees."""
    tree = jax.tree.map(np.asarray, greedy_trees(255).tree)

    def blocks(mask: np.ndarray) -> int:
        return int(mask.reshape(8, 32, 8, 32).any(axis=(1, 3)).sum())

    created = depth_ordered = 0
    for ancestry, order in zip(np.asarray(tree.ancestry), depth_first(tree.parent), strict=True):
        created += blocks(ancestry)
        depth_ordered += blocks(ancestry[np.ix_(order, order)])
    assert depth_ordered < 0.8 * created


def test_order_of_nodes_does_not_matter_as_long_as_siblings_keep_theirs():
    """Depth-first numbering gives the same verdict as the order of creation."""
    draft = greedy_trees(12)
    tree = jax.tree.map(np.asarray, draft.tree)
    N = tree.num_nodes
    order = depth_first(tree.parent)
    new = np.argsort(order, axis=1)
    take = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    parent = take(tree.parent)
    parent = np.where(parent < 0, -1, np.take_along_axis(new, np.maximum(parent, 0), axis=1))
    other = tree.replace(
        tokens=take(tree.tokens), depth=take(tree.depth), valid=take(tree.valid), parent=parent,
        log_q=np.take_along_axis(tree.log_q, order[..., None], axis=1),
    )  # fmt: skip
    # A target near the drafter, so that walks go deep.
    noise = np.random.default_rng(1).normal(size=(ROWS, N, 40)).astype(np.float32)
    logits = np.asarray(RANDOM)[tree.tokens] + 0.5 * noise
    keys = randomness.row_keys(0, jnp.arange(ROWS))
    verify = jax.jit(recursive_rejection, static_argnums=4)
    at = jnp.full((ROWS,), 5)
    a = verify(tree, logits, keys, at, SamplingConfig(1.0))
    b = verify(
        other, np.take_along_axis(logits, order[..., None], axis=1), keys, at, SamplingConfig(1.0)
    )
    np.testing.assert_array_equal(a.count, b.count)
    inside = np.arange(a.tokens.shape[1]) < np.asarray(a.count)[:, None]
    np.testing.assert_array_equal(a.tokens * inside, b.tokens * inside)
    assert np.asarray(a.count).max() > 3
