"""The loop: appending, counting, compiling once, and staying on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, randomness, stopping
from decoding import stats as work
from decoding.stopping import RUNNING
from models import cache as kv
from tests.decoding import tiny

METHODS = ("autoregressive", "prompt_lookup", "speculative_sampling")
NUM_DRAFT = 5  # the default


# --- Counters against a simulation -------------------------------------------------------------


def lookup(text: list[int]) -> list[int]:
    """Prompt lookup at its defaults: n-grams of 3, 2, 1; the latest whole draft or the earliest."""
    for n in (3, 2, 1):
        starts = [s for s in range(len(text) - n) if text[s : s + n] == text[-n:]]
        drafts = [text[s + n : s + n + NUM_DRAFT] for s in starts]
        if drafts:
            return next((d for d in reversed(drafts) if len(d) == NUM_DRAFT), drafts[0])
    return []


def model_draft(text: list[int]) -> list[int]:
    return tiny.greedy(tiny.DRAFT, tiny.params()["draft"], [text], NUM_DRAFT)[0]


DRAFTERS = {
    "autoregressive": (lambda text: [], 0),
    "prompt_lookup": (lookup, 0),
    "speculative_sampling": (model_draft, NUM_DRAFT),
}


def simulate(name: str, prompt: list[int], following: tuple[int, ...]) -> dict:
    """One row, round by round, at temperature 0; `following` is what the target says."""
    draft, draft_calls = DRAFTERS[name]
    depth = 0 if name == "autoregressive" else NUM_DRAFT
    counts = {"target_calls": 0, "target_positions": 0, "draft_calls": 0, "tokens_emitted": 0}
    proposed, accepted = [0] * depth, [0] * depth
    while counts["tokens_emitted"] < tiny.NEW_TOKENS:
        done = counts["tokens_emitted"]
        drafts = draft(prompt + list(following[:done]))
        agreed = 0
        while agreed < len(drafts) and drafts[agreed] == following[done + agreed]:
            agreed += 1
        for at in range(depth):
            proposed[at] += at < len(drafts)
            accepted[at] += at < agreed
        counts["target_calls"] += 1
        counts["target_positions"] += depth + 1
        counts["draft_calls"] += draft_calls
        counts["tokens_emitted"] = min(done + agreed + 1, tiny.NEW_TOKENS)
    return {**counts, "proposed": proposed, "accepted": accepted}


@pytest.mark.parametrize("name", METHODS)
def test_counters_agree_with_a_simulation(name):
    """Also that a row that is done costs nothing more while others go on."""
    following = tiny.plain_greedy(tiny.NEW_TOKENS + NUM_DRAFT + 1)
    rows = tiny.decode(tiny.build(name))
    for row, prompt, text in zip(rows, tiny.PROMPTS, following, strict=True):
        assert row.stats == simulate(name, prompt, text)
    if name != "autoregressive":
        assert len({row.stats["target_calls"] for row in rows}) > 1


# --- Compilation and transfers -----------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_one_compilation_a_shape(name):
    method = tiny.build(name)
    tiny.decode(method)
    before = loop.start._cache_size(), loop.advance._cache_size()
    others = tiny.prompts((31, 2, 9, 9, 20, 1, 30, 4), seed=3)
    rows = tiny.decode(method, others, seed=5, row_ids=range(100, 108))
    assert tiny.texts(rows) != [list(row) for row in tiny.plain_greedy()]
    list(generation.stream(tiny.params(), others, method, tiny.STOP, every=3))
    assert (loop.start._cache_size(), loop.advance._cache_size()) == before


@pytest.mark.parametrize("name", METHODS)
def test_nothing_leaves_the_device_inside_a_run(name):
    method, params = tiny.build(name), tiny.params()
    state, slots = generation.begin(params, tiny.PROMPTS, method, tiny.STOP)
    fixed = {"method": method, "stop": tiny.STOP, "slots": slots}
    text = loop.advance.lower(params, state, np.int32(9), **fixed).as_text()
    assert "stablehlo.while" in text
    for host in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert host not in text
    until = jnp.int32(2**30)
    with jax.transfer_guard("disallow"):
        state = loop.advance(params, state, until, **fixed)
    assert not state.active.any()
    state, _ = generation.begin(params, tiny.PROMPTS, method, tiny.STOP)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # noqa: SIM117
        with jax.transfer_guard("disallow"):
            loop.advance(params, state, np.int32(2**30), **fixed)


# --- Appending ---------------------------------------------------------------------------------


def made_up_state(rng: np.random.Generator, B: int, M: int) -> loop.DecodeState:
    lengths = rng.integers(3, 12, B)
    tokens = np.where(np.arange(M) < lengths[:, None], rng.integers(0, 9, (B, M)), 0)
    state = loop.DecodeState(
        tokens=jnp.asarray(tokens, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        prompt_lengths=jnp.full((B,), 3, jnp.int32),
        reason=jnp.asarray(rng.choice([RUNNING, RUNNING, stopping.EOS], B), jnp.int32),
        keys=randomness.row_keys(0, jnp.arange(B)),
        stats=work.zeros(B, 2),
        rounds=jnp.int32(4),
        inner=(),
    )
    assert 0 < state.active.sum() < B
    return state


def test_append_adds_the_kept_tokens_of_active_rows():
    rng, B, M, E = np.random.default_rng(0), 60, 16, 3
    stop = stopping.StopConfig(10, (7,))
    state = made_up_state(rng, B, M)
    emitted, count = rng.integers(0, 9, (B, E)), rng.integers(1, E + 1, B)
    accepted = rng.integers(0, 2, (B, 2))
    spent = work.round_work(
        B, 2, target_positions=4, draft_calls=3, accepted=jnp.asarray(accepted, jnp.int32)
    )
    emission = loop.Emission(jnp.asarray(emitted, jnp.int32), jnp.asarray(count), spent)
    found = jax.device_get(loop.append(state, emission, stop).replace(keys=()))
    assert found.rounds == 5
    before = jax.device_get(state.replace(keys=()))
    for b in range(B):
        text = before.tokens[b, : before.lengths[b]].tolist()
        reason, was_active = before.reason[b], before.reason[b] == RUNNING
        new = 0
        while was_active and reason == RUNNING and new < count[b]:
            text.append(emitted[b, new])
            new += 1
            if text[-1] == 7:
                reason = stopping.EOS
            elif len(text) == 13:
                reason = stopping.LENGTH
        assert found.tokens[b].tolist() == text + [0] * (M - len(text))
        assert (found.lengths[b], found.reason[b]) == (len(text), reason)
        stats = found.stats
        assert stats.tokens_emitted[b] == new
        assert [stats.target_calls[b], stats.target_positions[b], stats.draft_calls[b]] == (
            [1, 4, 3] if was_active else [0, 0, 0]
        )
        assert stats.accepted[b].tolist() == (accepted[b] * was_active).tolist()
        assert not stats.proposed[b].any()
    assert set(found.reason.tolist()) == {RUNNING, stopping.EOS, stopping.LENGTH}


# --- Caches inside a method's state ------------------------------------------------------------


def test_caches_are_found_anywhere_and_grown():
    first, second = kv.create(tiny.SMALL, 2, 4), kv.create(tiny.SMALL_DRAFT, 2, 4)
    inner = {"a": (first, jnp.ones(3)), "b": [second]}
    assert loop.caches(inner) == [first, second]
    state = made_up_state(np.random.default_rng(0), 5, 16).replace(inner=inner)
    grown = loop.grow(state, slots=6)
    assert [cache.slots for cache in loop.caches(grown.inner)] == [6, 6]
    np.testing.assert_array_equal(grown.inner["a"][1], np.ones(3))
    np.testing.assert_array_equal(grown.tokens, state.tokens)


def test_advance_stops_before_a_cache_is_too_small_and_goes_on_after_it_has_grown():
    """By the row that needs most; the first slots that do not do are named by `lookahead`."""
    method = tiny.build("prompt_lookup", num_draft=1)
    rows, stop = [[1, 2, 3, 4, 5, 6], [7]], stopping.StopConfig(9)
    state = tiny.start(method, tiny.params(), rows, slots=8, buffer=16)
    fixed = {"method": method, "stop": stop}
    state = loop.advance(tiny.params(), state, jnp.int32(99), slots=8, **fixed)
    # A round at length n writes slots n - 1 .. n + lookahead - 2.
    assert state.active.all()
    assert int(state.lengths.max()) - 1 + method.lookahead > 8
    assert int(state.lengths.max()) - 1 <= 8
    rounds = int(state.rounds)
    assert rounds > 0
    state = loop.advance(tiny.params(), state, jnp.int32(99), slots=8, **fixed)
    assert int(state.rounds) == rounds
    state = loop.grow(state, slots=16)
    state = loop.advance(tiny.params(), state, jnp.int32(99), slots=16, **fixed)
    np.testing.assert_array_equal(state.lengths, [15, 10])
    expected = tiny.greedy(tiny.TARGET, tiny.params()["target"], rows, 9)
    assert [state.tokens[b, len(row) :][:9].tolist() for b, row in enumerate(rows)] == expected
