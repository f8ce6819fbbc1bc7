"""PUCT and best-first search against plain Python objects, under the same noise."""

import dataclasses
import functools
import heapq
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.speculative import tree_search
from decoding.speculative.tree import DraftTree
from decoding.speculative.tree_search import SearchConfig
from models.errors import InputError

VOCAB, R = 12, 5
ROOTS = [(a, b) for a in range(0, VOCAB, 3) for b in range(0, VOCAB, 2)]
PUBLISHED = SearchConfig()
SMALL = SearchConfig(iterations=40, top_sentences=8)


@functools.cache
def table():
    """Random rows for most pairs, some of equal weights: dict, and arrays [V, V, R]."""
    rng = np.random.default_rng(0)
    rows, tokens = {}, np.full((VOCAB, VOCAB, R), -1, np.int32)
    weights = np.zeros((VOCAB, VOCAB, R), np.float32)
    for a in range(VOCAB):
        for b in range(VOCAB):
            n = int(rng.integers(0, R + 1))
            if (a + 2 * b) % 5 == 0:
                continue  # not known
            row = rng.permutation(VOCAB)[:n]
            equal = rng.random() < 0.3
            tokens[a, b, :n] = row
            weights[a, b, :n] = 0.04 if equal else rng.exponential(0.3, n) + 0.01
            rows[a, b] = dict(zip(row.tolist(), weights[a, b, :n].tolist()))
    return rows, tokens, weights


def successors(a, b):
    _, tokens, weights = table()
    known = (a >= 0) & (b >= 0)
    return (
        jnp.where(known[..., None], jnp.asarray(tokens)[a, b], -1),
        jnp.where(known[..., None], jnp.asarray(weights)[a, b], 0.0),
    )


# --- The reference -----------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    number: int
    pair: tuple
    parent: "Node | None"
    prior: float
    visits: int = 0
    total: float = 0.0
    children: list = dataclasses.field(default_factory=list)

    @property
    def words(self):
        """The sentence: the root's second token and what follows."""
        return [*(self.parent.words if self.parent else []), self.pair[1]]


def puct(node, parent, config):
    if node.visits == 0:
        return math.inf
    explore = config.c1 + math.log((parent.visits + config.c2 + 1) / config.c2)
    explore *= node.prior * math.sqrt(parent.visits) / (1 + node.visits)
    return node.total / node.visits + explore


def naive_search(root, noise, config, length, value):
    """Nodes in order of creation; numbered as `SearchTree` numbers them."""
    rows = table()[0]
    nodes = [Node(0, root, None, 0.0)]
    for i in range(config.iterations):
        node, path = nodes[0], [nodes[0].pair]
        while node.children and len(path) < length:
            scores = [puct(child, node, config) for child in node.children]
            best = scores.index(max(scores))
            apart = [abs(s - scores[best]) for s in scores if s != scores[best]]
            assert not apart or min(apart) > 1e-5, "near-tie: choose another seed"
            node = node.children[best]
            path.append(node.pair)
        if rows.get(node.pair) and len(path) < length:
            for rank, (token, weight) in enumerate(rows[node.pair].items()):
                pair = (node.pair[1], token)
                node.children.append(Node(1 + i * R + rank, pair, node, weight))
            nodes += node.children
            node = node.children[-1]
            path.append(node.pair)
        while len(path) < length and rows.get(path[-1]):
            row = rows[path[-1]]
            drawn = noise[i][len(path) - 1] * sum(row.values())
            upto = itertools.accumulate(row.values())
            token = next(token for token, total in zip(row, upto) if drawn < total)
            path.append((path[-1][1], token))
        worth = 1.0
        for step, following in itertools.pairwise(path):
            worth += rows[step].get(following[1] if value == "path" else following[0], 0.0)
        while node is not None:
            node.visits, node.total, node = node.visits + 1, node.total + worth, node.parent
    return nodes


def naive_sentences(nodes, top):
    """Drafts of the most visited nodes, the root's word dropped and an arg-max appended."""
    rows, found = table()[0], []
    for node in sorted(nodes, key=lambda n: (-n.visits, n.number))[:top]:
        words = node.words
        if len(words) >= 2 and (row := rows.get((words[-2], words[-1]))):
            words = [*words, max(row, key=row.get)]
        found.append(tuple(words[1:]))
    return found


def prefixes(sentences):
    return {sentence[:n] for sentence in sentences for n in range(1, len(sentence) + 1)}


def paths(drafts):
    """The tokens on the way to each valid node but the root, in order of the nodes."""
    tokens, parent, depth, valid = (np.asarray(x) for x in drafts)
    found = []
    for node in range(1, len(tokens)):
        if valid[node]:
            assert 0 <= parent[node] < node and depth[node] == depth[parent[node]] + 1
            above = found[parent[node] - 1] if parent[node] else ()
            found.append((*above, int(tokens[node])))
        else:
            assert (tokens[node], parent[node], depth[node]) == (0, -1, 0)
    assert valid[0] and (parent[0], depth[0]) == (-1, 0)
    assert valid.sum() == len(found) + 1 and valid[: len(found) + 1].all()
    assert len(set(found)) == len(found)  # no duplicate siblings
    return found


@functools.cache
def search(config):
    """Searches of all ROOTS; their drafts of up to 64 tokens, and of 6. With the noise; NumPy."""
    noise = noise_of(config)

    def one(root, uniforms):
        tree = tree_search.puct_search(successors, root, uniforms, config)
        sentences = functools.partial(tree_search.best_sentences, successors, tree, config)
        return tree, sentences(65), sentences(7)

    found = jax.jit(jax.vmap(one))(jnp.asarray(ROOTS, jnp.int32), noise)
    return noise, *jax.device_get(found)


def noise_of(config):
    shape = (len(ROOTS), config.iterations, config.depth)
    return np.random.default_rng(0).random(shape).astype(np.float32)


def row_of(batch, row):
    return jax.tree.map(lambda x: x[row], batch)


# --- PUCT --------------------------------------------------------------------------------------


def test_puct_numbers():
    n, w = jnp.asarray([0, 10]), jnp.asarray([0.0, 10.0])
    score = tree_search.puct(n, w, jnp.float32(0.5), jnp.int32(100), SearchConfig())
    assert score[0] == jnp.inf
    assert float(score[1]) == pytest.approx(16.733, abs=5e-4)
    assert float(score[1]) == pytest.approx(1 + (32 + math.log(109 / 8)) * 0.5 * 10 / 11)


CONFIGS = {
    "published": PUBLISHED,
    "first release": dataclasses.replace(SMALL, c1=1.814, value="code"),
    "deep": dataclasses.replace(SMALL, c1=0.5, c2=2.0, sentence_length=6, top_sentences=30),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_node_of_every_search_is_the_references(name):
    config = CONFIGS[name]
    noise, trees, drafts, _ = search(config)
    sizes, valued = set(), 0
    for row, root in enumerate(ROOTS):
        nodes = naive_search(root, noise[row], config, config.sentence_length, config.value)
        tree = row_of(trees, row)
        assert np.flatnonzero(tree.exists).tolist() == [node.number for node in nodes]
        for node in nodes:
            at = node.number
            assert tuple(tree.pair[at]) == node.pair
            assert tree.parent[at] == (node.parent.number if node.parent else -1)
            assert tree.depth[at] == len(node.words) - 1
            assert tree.prior[at] == np.float32(node.prior)
            assert tree.visits[at] == node.visits
            assert tree.total[at] == pytest.approx(node.total, rel=1e-5)
        expected = naive_sentences(nodes, config.top_sentences)
        assert set(paths(row_of(drafts, row))) == prefixes(expected)
        sizes.add(len(nodes))
        valued += nodes[0].total > nodes[0].visits
    assert 1 in sizes and max(sizes) > 30  # roots that are not known, and real trees
    assert valued > len(ROOTS) / 3  # the look-up of published code finds something here too


def test_limits():
    """150 iterations, 3 searched tokens and 1 appended, 24 sentences, 64 nodes."""
    noise, trees, drafts, _ = search(PUBLISHED)
    assert (trees.visits[:, 0] == 150).all()
    assert trees.visits.max() == 150
    assert trees.depth[trees.exists].max() == 3
    assert drafts.tokens.shape == (len(ROOTS), 65)
    assert drafts.depth.max() == 4
    for row, root in enumerate(ROOTS):
        nodes = naive_search(root, noise[row], PUBLISHED, 4, "path")
        sentences = naive_sentences(nodes, 24)
        assert len(sentences) <= 24
        found = paths(row_of(drafts, row))
        assert set(found) == prefixes(sentences)
        assert len(found) <= 2 * 23
        # Every sentence can be read off the tree.
        assert set(sentences) - {()} <= set(found)
        in_order = [len(path) for path in found]
        assert in_order == sorted(in_order)
    assert drafts.valid.sum(axis=1).max() > 30


def test_a_smaller_budget_leaves_out_the_deepest_nodes():
    _, _, drafts, cut = search(PUBLISHED)
    for row in range(len(ROOTS)):
        whole = paths(row_of(drafts, row))
        assert paths(row_of(cut, row)) == whole[:6]
    assert cut.tokens.shape == (len(ROOTS), 7)
    assert drafts.valid.sum(axis=1).max() > 30


def test_the_mask_is_the_ancestor_relation():
    _, _, drafts, _ = search(PUBLISHED)
    tree = DraftTree(*map(jnp.asarray, drafts), log_q=None, max_depth=4, is_chain=False)
    ancestry = np.asarray(tree.ancestry)
    for row, parent in enumerate(drafts.parent):
        for node in np.flatnonzero(drafts.valid[row]):
            on_path, above = {int(node)}, parent[node]
            while above >= 0:
                on_path.add(int(above))
                above = parent[above]
            assert set(np.flatnonzero(ancestry[row, node])) == on_path


def test_more_exploration_drafts_more_first_tokens():
    config, constants = dataclasses.replace(SMALL, top_sentences=4), (0.0, 1.814, 8.0, 32.0)

    def first_tokens(c1, root, uniforms):
        chosen = dataclasses.replace(config, c1=c1)
        tree = tree_search.puct_search(successors, root, uniforms, chosen)
        return (tree_search.best_sentences(successors, tree, chosen, 65).depth == 1).sum()

    over_roots = jax.vmap(first_tokens, (None, 0, 0))
    found = jax.jit(jax.vmap(over_roots, (0, None, None)))(
        jnp.asarray(constants), jnp.asarray(ROOTS, jnp.int32), noise_of(config)
    )
    diversity = np.asarray(found).mean(axis=1)
    assert (np.diff(diversity) >= 0).all() and diversity[-1] > 1.2 * diversity[0]


# --- Best first --------------------------------------------------------------------------------


def naive_best_first(root, max_depth, num_nodes):
    rows, found, heap = table()[0], [], []

    def offer(node, pair, probability, words):
        row = rows.get(pair, {})
        for rank, (token, weight) in enumerate(row.items()):
            p = probability * weight / sum(row.values())
            heapq.heappush(heap, (-np.float32(p), node, rank, p, (*words, token), pair[1]))

    offer(0, root, 1.0, ())
    while heap and len(found) < num_nodes - 1:
        _, _, _, p, words, last = heapq.heappop(heap)
        found.append(words)
        if len(words) < max_depth:
            offer(len(found), (last, words[-1]), p, words)
    return found


def test_best_first_adds_the_likeliest_continuation_each_time():
    drafts = jax.device_get(
        jax.jit(jax.vmap(lambda root: tree_search.best_first(successors, root, 4, 24)))(
            jnp.asarray(ROOTS, jnp.int32)
        )
    )
    full = 0
    for row, root in enumerate(ROOTS):
        expected = naive_best_first(root, 4, 24)
        assert paths(row_of(drafts, row)) == expected
        full += len(expected) == 23
    assert full > 5 and drafts.depth.max() == 4


# --- Settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("value", "paths", r"value: 'paths' is not known \(did you mean 'path'\?\)"),
        ("iterations", 0, "iterations: 0 must be at least 1"),
        ("sentence_length", 1, "sentence_length: 1 must be at least 2"),
        ("top_sentences", 1, "top_sentences: 1 must be at least 2"),
        ("c2", 0.0, "c2: 0.0 must be above 0"),
    ],
)
def test_bad_settings_are_named(field, value, message):
    with pytest.raises(InputError, match=f"^{message}"):
        SearchConfig(**{field: value})
