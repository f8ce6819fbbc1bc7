"""Every mask against a double loop that spells its sentence out."""

import jax.numpy as jnp
import numpy as np
import pytest

from models import masks

B, T, S = 3, 5, 9
POSITIONS = np.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [3, 1, 1, 8, 0]])


def loop(sees, batch=B, queries=T, keys=S) -> np.ndarray:
    """bool [batch, queries, keys] from a function of (row, query, key)."""
    out = np.zeros((batch, queries, keys), bool)
    for b in range(batch):
        for t in range(queries):
            for s in range(keys):
                out[b, t, s] = sees(b, t, s)
    return out


def check(mask, expected) -> None:
    assert mask.dtype == jnp.bool_
    assert 0 < expected.mean() < 1  # the case says something
    np.testing.assert_array_equal(mask, expected)


def test_causal():
    check(masks.causal(POSITIONS, S), loop(lambda b, t, s: s <= POSITIONS[b, t]))


def test_prefix_is_seen_by_every_query():
    lengths = np.array([3, 0, 2])
    expected = loop(lambda b, t, s: s <= POSITIONS[b, t] or s < lengths[b])
    assert (expected != loop(lambda b, t, s: s <= POSITIONS[b, t])).any()
    check(masks.prefix(POSITIONS, S, lengths), expected)


def test_full_hides_invalid_keys_from_all():
    valid = np.random.default_rng(0).random((B, S)) < 0.5
    check(masks.full(valid, T), loop(lambda b, t, s: valid[b, s]))


@pytest.mark.parametrize("window", [1, 3])
def test_within(window):
    rng = np.random.default_rng(1)
    mask, keys = rng.random((B, T, S)) < 0.8, rng.integers(0, 9, (B, S))
    expected = loop(lambda b, t, s: mask[b, t, s] and abs(POSITIONS[b, t] - keys[b, s]) < window)
    check(masks.within(mask, POSITIONS, keys, window), expected)
    shared = loop(lambda b, t, s: mask[b, t, s] and abs(POSITIONS[b, t] - keys[0, s]) < window)
    check(masks.within(mask, POSITIONS, keys[0], window), shared)


def test_a_window_over_a_causal_mask_leaves_that_many_keys():
    positions = np.arange(20)[None]
    mask = masks.within(masks.causal(positions, 20), positions, np.arange(20), 4)
    np.testing.assert_array_equal(mask[0].sum(axis=1), np.minimum(np.arange(20) + 1, 4))


def test_segments_and_padding():
    queries = np.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3], [0, 0, 1, 1, 1]])
    keys = np.random.default_rng(2).integers(0, 4, (B, S))
    expected = loop(lambda b, t, s: queries[b, t] == keys[b, s] and keys[b, s] != 0)
    check(masks.segments(queries, keys), expected)
    assert not np.asarray(masks.segments(queries, keys))[queries == 0].any()


def test_packed_causal():
    ids = np.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3], [1, 1, 1, 1, 1]])
    expected = loop(lambda b, t, s: ids[b, t] == ids[b, s] != 0 and s <= t, keys=T)
    check(masks.packed_causal(ids), expected)


def random_parents(rng: np.random.Generator, nodes: int) -> np.ndarray:
    """A random tree in which some nodes beyond the first few are unused."""
    parent = [-1] + [int(rng.integers(0, i)) for i in range(1, nodes)]
    for i in range(4, nodes):
        if rng.random() < 0.2:
            parent[i] = -1
    return np.array(parent)


def path_to(parent: np.ndarray, node: int) -> list[int]:
    """Nodes from the root, or from the top of an unused one, to `node`."""
    path = [node]
    while parent[path[0]] >= 0:
        path.insert(0, int(parent[path[0]]))
    return path


@pytest.mark.parametrize("seed", range(3))
def test_ancestors_and_tree(seed):
    rng, N = np.random.default_rng(seed), 8
    parent = np.stack([random_parents(rng, N) for _ in range(B)])
    paths = [[path_to(parent[b], i) for i in range(N)] for b in range(B)]
    deepest = max(len(path) for row in paths for path in row) - 1
    ancestry = masks.ancestors(parent, deepest)
    check(ancestry, loop(lambda b, i, j: j in paths[b][i], queries=N, keys=N))
    # One that allows for more depth than there is finds nothing more.
    np.testing.assert_array_equal(masks.ancestors(parent, N), ancestry)

    base, slots = np.array([0, 4, 7]), 15  # the last tree ends the cache
    expected = loop(
        lambda b, i, s: s < base[b] or s - base[b] in paths[b][i], queries=N, keys=slots
    )
    check(masks.tree(ancestry, base, slots), expected)


def test_tree_of_a_chain_is_causal():
    parent = np.broadcast_to(np.arange(4) - 1, (2, 4))
    base = np.array([0, 5])
    mask = masks.tree(masks.ancestors(parent, 3), base, 11)
    np.testing.assert_array_equal(mask, masks.causal(base[:, None] + np.arange(4), 11))


@pytest.mark.parametrize("block", [1, 3, 4])
def test_block_diffusion(block):
    keys = np.arange(S)
    expected = loop(lambda b, t, s: s // block <= POSITIONS[b, t] // block)
    check(masks.block_diffusion(POSITIONS, keys, block), expected)
    rows = np.random.default_rng(3).permuted(np.tile(keys, (B, 1)), axis=1)
    expected = loop(lambda b, t, s: rows[b, s] // block <= POSITIONS[b, t] // block)
    check(masks.block_diffusion(POSITIONS, rows, block), expected)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_noisy_and_clean_halves_of_block_diffusion(block):
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 1, 2, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])

    def sees(b, i, j):
        (query_noisy, i), (key_noisy, j) = ((k < T, k % T) for k in (i, j))
        if segments[b, i] != segments[b, j] or segments[b, i] == 0:
            return False
        query, key = positions[b, i] // block, positions[b, j] // block
        if query_noisy:
            return query == key if key_noisy else key < query
        return not key_noisy and key <= query

    expected = loop(sees, queries=2 * T, keys=2 * T)
    check(masks.noisy_and_clean(positions, segments, block), expected)
    check(masks.noisy_and_clean(positions, segments, jnp.int32(block)), expected)
