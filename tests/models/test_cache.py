"""The cache's pure functions against NumPy loops over rows and slots."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cache as kv
from tests.models.random_models import BASE

K, S, H = BASE.num_kv_heads, 12, BASE.head_dim


def filled(lengths, slots=S, seed=0) -> kv.KVCache:
    """A cache in which every slot, scratch included, holds its own random numbers."""
    rng = np.random.default_rng(seed)

    def stores():
        shape = (len(lengths), K, slots, H)
        return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))

    return kv.KVCache(stores(), stores(), jnp.asarray(lengths, jnp.int32))


def stores(cache: kv.KVCache) -> list[np.ndarray]:
    return [np.array(store) for store in (*cache.keys, *cache.values)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_create_is_empty_and_of_the_compute_dtype(dtype):
    cache = kv.create(BASE.replace(dtype=dtype), batch=3, slots=7)
    assert cache.slots == 7
    assert [store.shape for store in stores(cache)] == [(3, K, 7, H)] * 4
    assert {store.dtype for store in (*cache.keys, *cache.values)} == {jnp.dtype(dtype)}
    assert cache.lengths.dtype == jnp.int32
    assert not np.any(cache.lengths)
    assert len(kv.create(BASE, 1, 4, num_layers=1).keys) == 1


@pytest.mark.parametrize("T", [1, 3, S])
@pytest.mark.parametrize("rows", [1, 4, 19], ids="{}_rows".format)
def test_write_puts_each_row_at_its_own_slot_and_nothing_else_changes(rows, T):
    rng = np.random.default_rng(T)
    store = rng.normal(size=(rows, K, S, H)).astype(np.float32)
    update = rng.normal(size=(rows, K, T, H)).astype(np.float32)
    start = np.resize([(S - T) // 2, 0, S - T, min(1, S - T)], rows)
    expected = store.copy()
    for b in range(rows):
        for t in range(T):
            expected[b, :, start[b] + t] = update[b, :, t]
    write = jax.jit(kv.write)
    np.testing.assert_array_equal(write(store, update, start), expected)
    if rows == 1:  # the folded form
        np.testing.assert_array_equal(write(store[0], update, start), expected[0])


def test_write_casts_to_the_dtype_of_the_store():
    store = jnp.zeros((1, 1, 4, 2), jnp.bfloat16)
    out = kv.write(store, jnp.full((1, 1, 1, 2), 1 / 3, jnp.float32), jnp.array([2]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0, 0, 2], jnp.full(2, 1 / 3, jnp.bfloat16))


# Node indices of the accepted paths: none, the root alone, a chain, a branch, a full path.
PATHS = [
    ([0, 0, 0, 0], 0),
    ([0, 5, 2, 1], 1),
    ([0, 1, 2, 3], 4),
    ([0, 2, 5, 0], 3),
    ([0, 3, 4, 6], 4),
    ([0, 2, 5, 0], 2),
]


@pytest.mark.parametrize("spare", [0, 3], ids=["tree_ends_the_cache", "room_after_the_tree"])
def test_commit_moves_the_path_of_each_row(spare):
    lengths = np.array([4, 0, 5, 2, 5, 1])
    N = 7
    cache = filled(lengths, slots=int(lengths.max()) + N + spare)
    path = np.array([nodes for nodes, _ in PATHS])
    count = np.array([count for _, count in PATHS])
    out = jax.jit(kv.commit)(cache, path, count)
    np.testing.assert_array_equal(out.lengths, lengths + count)
    for before, after in zip(stores(cache), stores(out), strict=True):
        for b, base in enumerate(lengths):
            expected = [before[b, :, s] for s in range(base)]
            expected += [before[b, :, base + node] for node in path[b, : count[b]]]
            found = after[b, :, : base + count[b]].swapaxes(0, 1)
            np.testing.assert_array_equal(found, np.reshape(expected, (-1, K, H)))


def test_a_folded_cache_is_the_cache_of_its_row():
    cache = filled([2], slots=9)
    folded = kv.fold(cache)
    assert [store.shape for store in stores(folded)] == [(K, 9, H)] * 4
    assert folded.slots == 9
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same(kv.unfold(folded), cache)
    same(kv.unfold(cache), cache)
    same(kv.fold(folded), folded)
    path, count = jnp.array([[0, 2, 5]]), jnp.array([3])
    same(kv.unfold(kv.commit(folded, path, count)), kv.commit(cache, path, count))
    for slots in (6, 14):
        same(kv.unfold(kv.resize(folded, slots)), kv.resize(cache, slots))
    several = filled([1, 2])
    assert kv.fold(several) is several


def test_commit_of_a_chain_is_a_change_of_length():
    cache = filled([3, 0, 5])
    count = jnp.array([2, 3, 0])
    path = jnp.broadcast_to(jnp.arange(3), (3, 3))
    committed = kv.commit(cache, path, count)
    truncated = kv.truncate(cache, cache.lengths + count)
    jax.tree.map(np.testing.assert_array_equal, committed, truncated)


def test_truncate_changes_lengths_alone():
    cache = filled([3, 0, 5])
    out = kv.truncate(cache, jnp.array([1, 0, 7]))
    np.testing.assert_array_equal(out.lengths, [1, 0, 7])
    for before, after in zip(stores(cache), stores(out), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("slots", [5, S, 20])
def test_resize_keeps_what_is_committed(slots):
    cache = filled([3, 0, 5])
    out = kv.resize(cache, slots)
    assert out.slots == slots
    np.testing.assert_array_equal(out.lengths, cache.lengths)
    for before, after in zip(stores(cache), stores(out), strict=True):
        common = min(S, slots)
        assert after.shape[2] == slots
        np.testing.assert_array_equal(after[:, :, :common], before[:, :, :common])
        assert not np.any(after[:, :, common:])


def test_layers_selects_in_the_given_order():
    cache = filled([1, 2])
    out = kv.layers(cache, [1, 0])
    for name in ("keys", "values"):
        before, after = getattr(cache, name), getattr(out, name)
        assert after[0] is before[1]
        assert after[1] is before[0]
    assert len(kv.layers(cache, [1]).keys) == 1


@pytest.mark.parametrize("rows", [1, 3], ids="{}_rows".format)
def test_switch_is_that_of_lax_and_copies_no_cache(rows):
    cache = filled([2] * rows)

    def branch(amount):
        def run(cache):
            write = lambda s: kv.write(s, jnp.full((rows, K, 1, H), amount), at)  # noqa: E731
            changed = cache.replace(keys=tuple(map(write, cache.keys)))
            return changed, {"sum": amount * changed.keys[0].sum()}

        return run

    at = jnp.full((rows, 1), 5)
    branches = [branch(float(amount)) for amount in range(3)]
    for number in range(3):
        mine = kv.switch(jnp.int32(number), branches, cache)
        jax.tree.map(np.testing.assert_array_equal, mine, jax.lax.switch(number, branches, cache))

    def loop(cache):
        step = lambda i, cache: kv.switch(i % 3, branches, cache)[0]  # noqa: E731
        return kv.unfold(jax.lax.fori_loop(0, 4, step, kv.fold(cache)))

    text = jax.jit(loop, donate_argnums=0).lower(cache).compile().as_text()
    assert not re.search(rf"f32\[[\d,]*{S},{H}\]\S* copy\(", text)
