"""The tri-gram store against a table of Python lists and dicts."""

import functools
import re
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.speculative import trigram

DELTA, CAP = 0.04, 3.0


class Reference:
    """The store's rules, slot by slot, on Python objects; only the hash is taken as given."""

    def __init__(self, slots, width, delta=DELTA, cap=CAP):
        self.slots, self.width, self.delta, self.cap = slots, width, delta, cap
        self.table = {}  # slot -> (pair, {token: weight} in order of arrival)
        self.evicted = Counter()

    def add(self, a, b, token):
        pair = np.asarray([[a], [b]], np.int32)
        probes = trigram.places(*pair, self.slots)[0].tolist()
        slot = next((p for p in probes if p in self.table and self.table[p][0] == (a, b)), None)
        if slot is None:
            free = [p for p in probes if p not in self.table]
            total = lambda p: sum(self.table[p][1].values())  # noqa: E731
            slot = free[0] if free else min(probes, key=total)
            self.evicted["pair"] += not free
            self.table[slot] = ((a, b), {})
        row = self.table[slot][1]
        if token not in row and len(row) == self.width:
            lightest = min(row, key=row.get)
            self.evicted["successor"] += 1
            row = {
                token if t == lightest else t: 0.0 if t == lightest else w for t, w in row.items()
            }
            self.table[slot] = ((a, b), row)
        row[token] = min(row.get(token, 0.0) + self.delta, self.cap)

    def add_text(self, tokens):
        for at in range(len(tokens) - 2):
            self.add(*tokens[at : at + 3])

    def arrays(self):
        """keys, successors and weights as `trigram.Store` lays them out."""
        keys = np.full((self.slots, 2), -1)
        successors = np.full((self.slots, self.width), -1)
        weights = np.zeros((self.slots, self.width))
        for slot, (pair, row) in self.table.items():
            keys[slot] = pair
            successors[slot, : len(row)], weights[slot, : len(row)] = list(row), list(row.values())
        return keys, successors, weights


def assert_equal(store, reference):
    keys, successors, weights = reference.arrays()
    np.testing.assert_array_equal(store.keys, keys)
    np.testing.assert_array_equal(store.successors, successors)
    np.testing.assert_allclose(store.weights, weights, atol=1e-5)


@functools.partial(jax.jit, static_argnames=("delta", "cap"))
def add_text(store, tokens, usable=None, delta=DELTA, cap=CAP):
    trigrams = jnp.stack([tokens[:-2], tokens[1:-1], tokens[2:]], axis=1)
    usable = jnp.ones(len(trigrams), bool) if usable is None else usable
    return trigram.update(store, trigrams, usable, delta, cap)


def rows(store):
    """(a, b) -> {token: weight} of everything in a store."""
    keys, successors, weights = map(np.asarray, (store.keys, store.successors, store.weights))
    return {
        (int(a), int(b)): {int(t): float(w) for t, w in zip(successors[s], weights[s]) if t >= 0}
        for s, (a, b) in enumerate(keys)
        if a >= 0
    }


# --- Updates -----------------------------------------------------------------------------------


def test_sixteen_new_tokens_make_fourteen_rows_of_delta():
    tokens = np.random.default_rng(0).permutation(1000)[:16].astype(np.int32)
    store = add_text(trigram.empty(64), tokens)
    expected = {(int(a), int(b)): {int(c): pytest.approx(0.04)} for a, b, c in
                zip(tokens, tokens[1:], tokens[2:])}  # fmt: skip
    assert len(expected) == 14
    assert rows(store) == expected


def test_a_trigram_gains_delta_whenever_it_is_seen_up_to_the_cap():
    store, tokens = trigram.empty(64), jnp.arange(16)
    for _ in range(3):
        store = add_text(store, tokens)
    assert rows(store)[3, 4] == {5: pytest.approx(0.12)}
    for _ in range(80):
        store = add_text(store, tokens)
    assert all(row == {b + 1: 3.0} for (_, b), row in rows(store).items())
    # Twice in one window counts twice.
    store = add_text(trigram.empty(64), jnp.asarray([7, 7, 7, 7] + [1] * 12))
    assert rows(store)[7, 7] == {7: pytest.approx(0.08), 1: pytest.approx(0.04)}


@pytest.mark.parametrize("vocab,evicted", [(4, {"successor"}), (9, {"successor", "pair"})])
def test_a_full_table_gives_up_what_weighs_least(vocab, evicted):
    """24 slots of 3 successors, 2000 tokens in ragged pieces: every slot as in the reference."""
    rng = np.random.default_rng(vocab)
    store, reference = trigram.empty(24, 3), Reference(24, 3)
    # Some tokens are far likelier than others, so that weights differ.
    chances = rng.dirichlet(np.full(vocab, 0.5))
    for _ in range(125):
        tokens = rng.choice(vocab, 16, p=chances)
        first = int(rng.integers(0, 14))
        store = add_text(store, jnp.asarray(tokens), jnp.arange(14) >= first)
        reference.add_text(tokens[first:].tolist())
        assert_equal(store, reference)
    assert {kind for kind, count in reference.evicted.items() if count > 20} == evicted


def test_what_is_not_usable_changes_nothing():
    store = add_text(trigram.empty(16, 3), jnp.asarray(np.arange(16) % 5))
    after = add_text(store, jnp.arange(16) + 40, jnp.zeros(14, bool))
    jax.tree.map(np.testing.assert_array_equal, after, store)


def test_a_store_a_row():
    rng = np.random.default_rng(3)
    texts = rng.integers(0, 6, (3, 16))
    stores = jax.tree.map(lambda x: jnp.stack([x] * 3), trigram.empty(24, 3))
    stores = jax.vmap(add_text)(stores, jnp.asarray(texts))
    for row, text in enumerate(texts):
        reference = Reference(24, 3)
        reference.add_text(text.tolist())
        assert_equal(jax.tree.map(lambda x: x[row], stores), reference)  # noqa: B023


def test_updates_happen_in_place():
    """A copy of the tables at every tri-gram would make large stores useless."""
    store, tokens = trigram.empty(4096), jnp.arange(16)
    many = jax.jit(lambda s, t: jax.lax.fori_loop(0, 9, lambda i, s: add_text(s, t), s))
    program = many.lower(store, tokens).compile().as_text()
    body = program[: program.index("\nENTRY ")]  # at the entry the arguments are copied once
    assert "[4096,16]" in body
    assert not re.findall(r"= \w+\[4096,\d+\]\S* copy\(", body)


# --- A corpus ----------------------------------------------------------------------------------


def corpus(vocab=30, size=20000, seed=0):
    """Tri-gram counts of a text with frequent and rare tokens: arrays, and dicts by pair."""
    rng = np.random.default_rng(seed)
    text = [0, 1]
    for number in rng.geometric(0.12, size):
        text.append(int((text[-2] * 7 + text[-1] * 3) % 6 + number) % vocab)
    counts = Counter(zip(text, text[1:], text[2:]))
    by_pair = defaultdict(dict)
    for (a, b, c), count in counts.items():
        by_pair[a, b][c] = count
    trigrams = np.asarray(list(counts))
    return trigrams, np.asarray(list(counts.values())), by_pair


@pytest.mark.parametrize("top", [4, 12])
def test_frequencies_are_normalised_before_they_are_cut(top):
    trigrams, counts, by_pair = corpus()
    assert max(map(len, by_pair.values())) > 16
    found = rows(trigram.from_counts(trigrams, counts, 4096, top=top))
    assert found.keys() == by_pair.keys()
    for pair, row in by_pair.items():
        best = sorted(row, key=lambda token: (-row[token], token))[:top]
        total = sum(row.values())
        assert list(found[pair]) == best  # most frequent first
        assert found[pair] == {token: pytest.approx(row[token] / total) for token in best}
    assert max(map(len, found.values())) == top
    assert min(sum(row.values()) for row in found.values()) < 0.95  # not renormalised


def test_a_corpus_that_does_not_fit_keeps_its_frequent_pairs():
    trigrams, counts, by_pair = corpus()
    found = rows(trigram.from_counts(trigrams, counts, 256))
    assert 200 < len(found) <= 256 < len(by_pair)
    of = lambda pairs: np.mean([sum(by_pair[pair].values()) for pair in pairs])  # noqa: E731
    assert of(found) > 1.3 * of(by_pair.keys() - found.keys())


def test_lookup_finds_every_pair_and_nothing_else():
    trigrams, counts, by_pair = corpus()
    store = jax.tree.map(jnp.asarray, trigram.from_counts(trigrams, counts, 4096))
    expected = rows(store)
    a, b = np.meshgrid(np.arange(-1, 40), np.arange(40), indexing="ij")
    found = jax.jit(trigram.lookup)(store, jnp.asarray(a), jnp.asarray(b))
    successors, weights = map(np.asarray, found)
    assert successors.shape == (41, 40, trigram.WIDTH)
    assert 400 < len(by_pair) == len(expected) < 900
    for at in np.ndindex(a.shape):
        row = {int(t): float(w) for t, w in zip(successors[at], weights[at]) if t >= 0}
        assert row == expected.get((int(a[at]), int(b[at])), {})
        assert not weights[at][successors[at] < 0].any()


def test_an_updated_corpus_store_follows_the_same_rules():
    """Learned successors come after the corpus' and push out the lightest when R is reached."""
    trigrams, counts, by_pair = corpus()
    store = jax.tree.map(jnp.asarray, trigram.from_counts(trigrams, counts, 4096, top=3, width=4))
    pair = max(by_pair, key=lambda p: len(by_pair[p]))
    before = rows(store)[pair]
    for token in (100, 101):
        store = trigram.update(store, jnp.asarray([[*pair, token]]), jnp.ones(1, bool), 0.5, CAP)
    lightest = min(before, key=before.get)
    assert before[lightest] < 0.5
    assert rows(store)[pair] == {
        101 if token == lightest else token: pytest.approx(0.5 if token == lightest else weight)
        for token, weight in {**before, 100: 0.5}.items()
    }


def test_fewer_successors_take_less_memory_and_foresee_less():
    trigrams, counts, _ = corpus()
    held_out, seen, _ = corpus(seed=1)
    tops, foreseen = (4, 8, 12, 30), []
    for top in tops:
        store = trigram.from_counts(trigrams, counts, 4096, top=top, width=top)
        assert store.num_bytes == 4096 * (2 + 2 * top) * 4
        row_of = {tuple(pair): slot for slot, pair in enumerate(store.keys.tolist())}
        hit = [c in store.successors[row_of[a, b]] if (a, b) in row_of else False
               for a, b, c in held_out.tolist()]  # fmt: skip
        foreseen.append(seen[hit].sum() / seen.sum())
    gains = np.diff([0, *foreseen])
    assert (gains > 0).all() and (np.diff(gains) < 0).all()  # each time less


# --- Hashing -----------------------------------------------------------------------------------


def test_places_are_spread_and_the_same_in_both_libraries():
    a, b = np.meshgrid(np.arange(64, dtype=np.int32), np.arange(100, 164, dtype=np.int32))
    found = trigram.places(a.ravel(), b.ravel(), 1000)
    in_jax = trigram.places(jnp.asarray(a.ravel()), jnp.asarray(b.ravel()), 1000)
    np.testing.assert_array_equal(in_jax, found)
    assert found.shape == (4096, trigram.PROBES) and found.dtype == np.uint32
    assert (found < 1000).all()
    np.testing.assert_array_equal((found[:, 0] + 3) % 1000, found[:, 3])
    load = np.bincount(found[:, 0], minlength=1000)
    assert ((load - 4.096) ** 2 / 4.096).sum() < 1000 + 5 * np.sqrt(2000)  # chi-square
    # A table half full leaves out less than one pair in a hundred.
    trigrams = np.stack([a.ravel(), b.ravel(), b.ravel()], axis=1)
    store = trigram.from_counts(trigrams, np.ones(4096, int), 8192)
    assert (store.keys[:, 0] >= 0).sum() > 0.99 * 4096
