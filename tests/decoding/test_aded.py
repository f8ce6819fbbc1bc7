"""ADED: exact at any temperature, adaptive over a stream, and what its store learns and when."""

import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, methods, randomness, stopping
from decoding.sampling import SamplingConfig, draw, log_probs
from decoding.speculative import aded, rules, trigram, verification
from decoding.speculative.aded import Learning
from decoding.speculative.method import speculative
from decoding.speculative.tree_search import SearchConfig
from decoding.speculative.verification import Verdict
from models.errors import InputError
from tests.decoding import exact_laws, tiny
from tests.decoding.test_trigram import Reference, assert_equal

# Three methods serve most tests, so that little is compiled.
PUBLISHED = {}
STATIC = {"update": False, "value": "code", "c1": 1.814, "slots": 1024}
GREEDY = {"search": "best_first", "store": "per_row", "learn_prompt": True, "slots": 1024}


def corpus_store(texts, slots=1024):
    """A store of some texts' tri-grams."""
    trigrams = np.concatenate([np.stack([t[:-2], t[1:-1], t[2:]], axis=1) for t in texts])
    found, counts = np.unique(trigrams, axis=0, return_counts=True)
    return aded.initial_memory(trigram.from_counts(found, counts, slots))


@functools.cache
def half_known():
    """A corpus of what half of the prompts are continued with."""
    rows = zip(tiny.PROMPTS[::2], tiny.plain_greedy()[::2])
    return corpus_store([np.asarray([*prompt, *text]) for prompt, text in rows])


def per_call(rows):
    return generation.total_stats(rows)["tokens_per_target_call"]


# --- The text is the target's ------------------------------------------------------------------


@pytest.mark.parametrize("options", [PUBLISHED, STATIC, GREEDY], ids=str)
def test_at_temperature_zero_the_text_is_plain_greedy(options):
    hot = generation.HotStart(half_known() if options is STATIC else None)
    rows = tiny.decode(tiny.build("aded", **options), hot=hot)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    total = generation.total_stats(rows)
    assert 0 < sum(total["accepted"]) < sum(total["proposed"])
    assert len(total["accepted"]) == 4 and total["accepted"][3] > 0  # 3 searched, 1 appended
    assert total["tree_nodes"] <= 64 * total["target_calls"]


NUCLEUS = SamplingConfig(1.2, top_p=0.8)
EOS = (exact_laws.EOS,)


def small(rule="exact_match"):
    """On the models of the exact laws; 15000 rows share its store."""
    search = SearchConfig(iterations=6, sentence_length=2)
    drafter = aded.aded_drafter("puct", search, Learning(slots=64), 5)
    return speculative("aded", exact_laws.TARGET, drafter, rule, NUCLEUS)


@functools.cache
def laws():
    return exact_laws.laws(NUCLEUS, EOS)


def test_whole_texts_follow_the_exact_law_and_are_plain_samplings():
    """Each row's drafts depend on all others'; its tokens do not."""
    counts = exact_laws.sampled(small(), EOS)
    assert exact_laws.p_value(counts, laws()) > 1e-3
    plain = exact_laws.small("autoregressive", NUCLEUS)
    np.testing.assert_array_equal(counts, exact_laws.sampled(plain, EOS))


# --- The published code's sampling, which does not ---------------------------------------------


def published_sampling(tree, logits, keys, positions, sampling):
    """BASELINE, NOT EXACT: how the published code verifies at temperatures above 0.

    Draws a token of its own for every path and position, keeps the longest path that agrees, and
    draws the token after it anew.
    """
    B, N = tree.tokens.shape
    M = tree.max_depth + 1
    parent, at = jnp.maximum(tree.parent, 0), jnp.arange(N)
    by_depth = jnp.where(tree.ancestry, tree.depth[:, None, :], -1)
    # The node at each depth of the path to each node: [B, N, M].
    path = jax.vmap(lambda rows: (rows[:, None, :] == jnp.arange(M)[:, None]).argmax(axis=-1))(
        by_depth
    )
    V = logits.shape[-1]
    noise = randomness.gumbel(randomness.at(keys, positions, 98), N * M * V).reshape(B, N, M, V)
    take = jax.vmap(lambda table, index: table[index])
    drawn = (take(log_probs(logits, sampling), take(parent, path)) + noise).argmax(axis=-1)
    agrees = (drawn == take(tree.tokens, path)) | (jnp.arange(M) == 0)
    inside = jnp.arange(M) <= tree.depth[:, :, None]
    length = jnp.cumprod(agrees & inside, axis=2).sum(axis=2)
    length = jnp.where(tree.valid, length, 0)
    is_leaf = tree.valid & ~((tree.parent[:, None, :] == at[:, None]) & tree.valid[:, None]).any(2)
    best = jnp.where(is_leaf, length, 0).argmax(axis=1)
    path, count = take(path, best), take(length, best)
    last = jnp.take_along_axis(path, count[:, None] - 1, axis=1)[:, 0]
    final = draw(take(logits, last), keys, positions + count - 1, sampling)
    tokens = jnp.pad(jnp.take_along_axis(tree.tokens, path, axis=1)[:, 1:], ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(M) == count[:, None] - 1, final[:, None], tokens)
    return Verdict(path.astype(jnp.int32), count.astype(jnp.int32), tokens.astype(jnp.int32))


def test_published_sampling_emits_a_child_of_one_half_three_times_in_four():
    B = 4000
    tree = aded.DraftTree(
        tokens=jnp.tile(jnp.asarray([[0, 2]]), (B, 1)),
        parent=jnp.tile(jnp.asarray([[-1, 0]]), (B, 1)),
        depth=jnp.tile(jnp.asarray([[0, 1]]), (B, 1)),
        valid=jnp.ones((B, 2), bool),
        log_q=None,
        max_depth=1,
        is_chain=False,
    )
    logits = jnp.log(jnp.tile(jnp.asarray([0.2, 0.3, 0.5]), (B, 2, 1)))
    keys, positions = randomness.row_keys(0, jnp.arange(B)), jnp.full(B, 7)
    share, once = {}, SamplingConfig(1.0)
    for rule in (published_sampling, verification.exact_match):
        verdict = jax.jit(rule, static_argnums=4)(tree, logits, keys, positions, once)
        share[rule] = float((verdict.tokens[:, 0] == 2).mean())
    assert share[published_sampling] == pytest.approx(0.75, abs=0.03)
    assert share[verification.exact_match] == pytest.approx(0.5, abs=0.03)


def test_published_sampling_fails_the_chi_square_that_the_exact_rule_passes(monkeypatch):
    spec = rules.RuleSpec(published_sampling, (verification.DETERMINISTIC,), lossless=False)
    monkeypatch.setitem(rules.RULES, "published_sampling", spec)
    counts = exact_laws.sampled(small("published_sampling"), EOS)
    assert exact_laws.p_value(counts, laws()) < 1e-12


# --- Adaptation --------------------------------------------------------------------------------


def test_accepted_drafts_grow_over_a_repeated_stream_with_updates_only():
    stream, hot, cold = [], generation.HotStart(), generation.HotStart(half_known())
    adaptive, static = tiny.build("aded", **PUBLISHED), tiny.build("aded", **STATIC)
    flat = []
    for _ in range(4):
        stream.append(per_call(tiny.decode(adaptive, hot=hot)))
        flat.append(per_call(tiny.decode(static, hot=cold)))
    assert stream[1] > 2 * stream[0] and stream[3] >= stream[1]
    assert len(set(flat)) == 1 and flat[0] > 1
    jax.tree.map(np.testing.assert_array_equal, cold.value, half_known())
    # What was learned is in the store, not in the method: a new start is cold again.
    assert per_call(tiny.decode(adaptive)) == stream[0]


def test_an_unknown_pair_drafts_nothing_and_the_row_still_moves_on():
    rows = tiny.decode(tiny.build("aded", **STATIC))
    for row in rows:
        assert row.stats["target_calls"] == row.stats["tokens_emitted"] == tiny.NEW_TOKENS
        assert row.stats["unknown_pairs"] == tiny.NEW_TOKENS
        assert row.stats["tree_nodes"] == 0
    hot = generation.HotStart(half_known())
    known = generation.total_stats(tiny.decode(tiny.build("aded", **STATIC), hot=hot))
    assert 0 < known["unknown_pairs"] < known["target_calls"]


# --- What is learned, and when -----------------------------------------------------------------


def state_of(rows, active):
    """A decode state of some rows between two rounds, without models."""
    lengths = jnp.asarray([len(row) for row in rows])
    tokens = jnp.asarray([[*row, *[0] * (40 - len(row))] for row in rows])
    reason = jnp.where(jnp.asarray(active), stopping.RUNNING, stopping.LENGTH)
    keys = randomness.row_keys(0, jnp.arange(len(rows)))
    return loop.DecodeState(tokens, lengths, lengths, reason, keys, (), jnp.int32(0), ())


_TEXT = np.random.default_rng(5).integers(0, 4, 75)
ROWS = [row.tolist() for row in np.split(_TEXT, [1, 3, 23, 33, 69])]
ACTIVE = [True, True, True, True, False, True]


@functools.cache
def round_drafter(shared):
    learning = Learning(slots=8, shared=shared, learn_prompt=True)
    return aded.aded_drafter("best_first", SearchConfig(), learning, 64)


@pytest.mark.parametrize("shared", [True, False])
def test_a_round_adds_the_last_sixteen_tokens_of_active_rows_in_row_order(shared):
    drafter, state = round_drafter(shared), state_of(ROWS, ACTIVE)
    assert {len(row) for row in ROWS} == {1, 2, 20, 10, 36, 6}
    # The prompt, but for its last token, once at the start; then the window.
    store = jax.jit(drafter.prefill)({}, drafter.init(6, 128), state.tokens, state.lengths - 1)
    each = [Reference(8, trigram.WIDTH) for _ in ROWS]
    references = [each[0]] * 6 if shared else each
    for reference, row in zip(references, ROWS):
        reference.add_text(row[:-1])
    draft = jax.jit(drafter.propose)
    for _ in range(2):
        store = draft({}, store, state).inner
        for reference, row, active in zip(references, ROWS, ACTIVE):
            reference.add_text(row[-16:] if active else [])
    assert references[2].evicted["pair"] > 0
    for row, reference in enumerate(references):
        own = store if shared else jax.tree.map(lambda x: x[row], store)  # noqa: B023
        assert_equal(own, reference)
    # Nobody active: nothing learned.
    idle = draft({}, store, state_of(ROWS, [False] * 6)).inner
    jax.tree.map(np.testing.assert_array_equal, idle, store)


def test_the_drafts_of_a_round_come_from_the_store_after_its_update():
    """After 7 8 9 7 8 an empty store knows 7 8 -> 9 -> 7 -> 8: the whole cycle is drafted."""
    drafter, state = round_drafter(False), state_of([[7, 8, 9, 7, 8]] * 6, [True] * 6)
    draft = jax.jit(drafter.propose)({}, drafter.init(6, 128), state)
    tree = draft.tree
    assert tree.tokens.shape == (6, 65) and tree.max_depth == 4 and not tree.is_chain
    assert tree.tokens[0, tree.valid[0]].tolist() == [8, 9, 7, 8, 9]
    assert tree.parent[0, :5].tolist() == [-1, 0, 1, 2, 3]
    assert draft.counters["tree_nodes"].tolist() == [4] * 6
    assert draft.counters["unknown_pairs"].tolist() == [False] * 6


def test_a_delta_of_zero_and_switches_that_are_off_learn_nothing(monkeypatch):
    seen, make = [], aded.aded_drafter
    monkeypatch.setattr(aded, "aded_drafter", lambda *args: seen.append(args) or make(*args))
    tiny.build("aded")
    tiny.build("aded", update=False, learn_prompt=True)
    tiny.build("aded", delta=0.0, learn_prompt=True)
    learning = [args[2] for args in seen]
    assert [one.update for one in learning] == [True, False, False]
    assert [one.learn_prompt for one in learning] == [False, True, False]
    state, drafter = state_of(ROWS, ACTIVE), make(*seen[0])
    store = drafter.init(6, 128)
    assert drafter.prefill({}, store, state.tokens, state.lengths - 1) is store


# --- Stores from outside -----------------------------------------------------------------------


def put(shared, value, batch=2):
    drafter = aded.aded_drafter("puct", SearchConfig(), Learning(slots=16, shared=shared), 8)
    return drafter.memory.put(drafter.init(batch, 128), value)


def test_a_store_from_outside_may_have_any_size_and_serves_every_row():
    store = aded.initial_memory(trigram.empty(64, 5))
    assert put(True, store) is store
    each = put(False, store)
    assert each.keys.shape == (2, 64, 2) and each.weights.shape == (2, 64, 5)
    assert put(False, each) is each
    assert store.num_bytes == 64 * (2 + 5 + 5) * 4


def test_stores_of_rows_must_be_as_many_as_the_rows():
    each = put(False, trigram.empty(16))
    with pytest.raises(InputError, match=r"^memory: 2 stores, one a row; allowed: one store$"):
        put(True, each)
    with pytest.raises(InputError, match=r"one store, or 3, as many as there are rows$"):
        put(False, each, batch=3)


def test_arrays_that_are_no_store_are_refused():
    store = trigram.empty(16)
    for bad, message in (
        (
            store.replace(weights=store.successors),
            "weights is int32[16, 16]; allowed: float32[16, 16]",
        ),
        (store.replace(keys=store.keys[1:]), "keys is int32[15, 2]; allowed: int32[16, 2]"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            aded.initial_memory(bad)
    with pytest.raises(InputError, match="4 slots; allowed: at least 8"):
        aded.initial_memory(trigram.empty(4))


def test_the_default_store_is_small():
    assert trigram.empty(aded.SPEC.options["slots"].default).num_bytes < 3 * 2**20


# --- Options and config ------------------------------------------------------------------------


def test_typical_acceptance_needs_a_store_a_row():
    with pytest.raises(InputError, match=r"^rule: 'typical_acceptance' .* or store='per_row'$"):
        tiny.build("aded", 1.0, rule="typical_acceptance")
    method = tiny.build("aded", 1.0, rule="typical_acceptance", store="per_row")
    assert not method.lossless
    assert tiny.build("aded", 1.0).lossless
    assert tiny.build("aded", 0.0, rule="typical_acceptance", store="per_row").lossless


@pytest.mark.parametrize("preset", ["", "offline"])
def test_the_config_names_methods_and_options_that_exist(preset):
    module = importlib.import_module("experiments.configs.aded")
    config = module.get_config(preset)
    json.loads(config.to_json())
    labels = [entry.label for entry in config.decode.methods]
    assert labels[0] == "plain" and len(set(labels)) == len(labels) == 9
    for entry in config.decode.methods:
        learns = tiny.build(entry.method, **entry.options.to_dict()).memory
        assert learns or not (entry.hot or entry.corpus)
    assert sum(entry.corpus for entry in config.decode.methods) == 5
    named = {name for claim in config.claims for name in (claim.label, claim.over)}
    assert named <= {*labels, ""}  # a bound of its own is over none


def test_the_sweep_varies_one_option_at_a_time():
    settings = importlib.import_module("experiments.configs.aded").sweep()
    assert len({setting["name"] for setting in settings}) == len(settings) == 8
    options = [setting["decode.methods"][1].options.to_dict() for setting in settings]
    defaults = methods.parse_options("aded", {})
    assert options[0] == {name: defaults[name] for name in ("iterations", "delta", "c1")}
    for one in options[1:]:
        assert sum(one[name] != defaults[name] for name in one) == 1
