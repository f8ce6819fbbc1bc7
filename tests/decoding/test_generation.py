"""Prompts in, rows out: nothing that surrounds a row, and no way of cutting the run, changes it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from decoding import generation, loop, methods, prefill, stopping
from decoding.sampling import SamplingConfig
from models import cache as kv
from models.errors import InputError
from tests.decoding import tiny
from tests.models import random_models

METHODS = ("autoregressive", "prompt_lookup", "speculative_sampling")


def sampled(name: str) -> loop.Method:
    """At temperature 1; drafts of the shapes that other tests compile too."""
    return tiny.build(name, 1.0)


# --- Rows do not see each other ----------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_the_same_alone_and_in_any_company(name):
    method, order = sampled(name), [5, 2, 7, 0, 6, 3, 1, 4]
    together = tiny.texts(tiny.decode(method))
    # In another order.
    rows = tiny.decode(method, [tiny.PROMPTS[i] for i in order], row_ids=order)
    assert tiny.texts(rows) == [together[i] for i in order]
    # Between other rows, of other lengths.
    others = tiny.prompts((3, 9, 20, 32, 1, 8, 31, 2), seed=9)
    for i in range(0, 8, 2):
        others[i] = tiny.PROMPTS[i]
    found = tiny.texts(tiny.decode(method, others))
    assert [found[i] for i in range(0, 8, 2)] == [together[i] for i in range(0, 8, 2)]
    assert found[1] != together[1]
    # Alone; the first is a prompt of one token.
    for i in (1, 3) if name != "prompt_lookup" else ():
        assert tiny.texts(tiny.decode(method, [tiny.PROMPTS[i]], row_ids=[i])) == [together[i]]


def test_seed_and_row_number_decide_the_text():
    method = sampled("autoregressive")
    same = [tiny.PROMPTS[0]] * 8
    first = tiny.texts(tiny.decode(method, same))
    assert len(set(map(tuple, first))) == 8
    assert tiny.texts(tiny.decode(method, same)) == first
    shifted = tiny.texts(tiny.decode(method, same, row_ids=range(1, 9)))
    assert shifted[:7] == first[1:]
    assert not set(map(tuple, tiny.texts(tiny.decode(method, same, seed=1)))) & set(
        map(tuple, first)
    )


# --- Runs can be cut ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("every", [1, 5])
def test_stream_gives_the_tokens_of_generate(name, every):
    method = sampled(name)
    expected = tiny.decode(method)
    streamed = [[] for _ in tiny.PROMPTS]
    finished = [None] * len(streamed)
    events = list(generation.stream(tiny.params(), tiny.PROMPTS, method, tiny.STOP, every=every))
    for event in events:
        assert finished[event.row] is None, "an event after the last"
        assert event.token_ids or event.done
        streamed[event.row] += event.token_ids
        finished[event.row] = event.finished
    assert streamed == tiny.texts(expected)
    assert finished == expected
    assert len(events) > 2 * len(streamed)


def test_rounds_in_pieces_are_one_run():
    """State, counters and caches included."""
    method, params = sampled("speculative_sampling"), tiny.params()

    def begin():
        return generation.begin(params, tiny.PROMPTS, method, tiny.STOP)

    state, slots = begin()
    whole, _ = generation.advance(params, state, slots, method, tiny.STOP)
    pieces, slots = begin()
    for rounds in (1, 3, 2, 50):
        pieces, slots = generation.advance(params, pieces, slots, method, tiny.STOP, rounds=rounds)
    assert not pieces.active.any()

    def compare(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, pieces, whole)


def test_caches_that_grow_change_nothing():
    """300 tokens through three cache sizes, against one run in a cache of the last size."""
    method, stop = tiny.build("speculative_sampling", num_draft=1), stopping.StopConfig(300)
    params, rows, sizes = tiny.params(), tiny.PROMPTS[:2], set()
    state, slots = generation.begin(params, rows, method, stop)
    while state.active.any():
        sizes.add(slots)
        state, slots = generation.advance(params, state, slots, method, stop, rounds=40)
    assert sizes == {128, 256, 384}
    roomy = tiny.start(method, params, rows, slots=384, buffer=state.tokens.shape[1])
    roomy = loop.advance(params, roomy, jnp.int32(2**30), method=method, stop=stop, slots=384)
    np.testing.assert_array_equal(state.tokens, roomy.tokens)
    np.testing.assert_array_equal(state.lengths, [len(row) + 300 for row in rows])
    jax.tree.map(np.testing.assert_array_equal, state.stats, roomy.stats)
    assert len(np.unique(state.tokens[0, :300])) > 10


def test_cache_sizes():
    found = sorted({generation.cache_slots(n) for n in range(1, 5000)})
    assert found == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    for needed in range(1, 5000):
        slots = generation.cache_slots(needed)
        assert needed <= slots
        assert not [size for size in found if needed <= size < slots]


# --- Penalties and contexts --------------------------------------------------------------------


def penalised_greedy(penalty: float) -> list[list[int]]:
    processor = hf.RepetitionPenaltyLogitsProcessor(penalty)

    def warp(text, logits):
        return processor(torch.tensor([text]), torch.tensor(logits[None])).numpy()[0]

    target = tiny.params()["target"]
    return tiny.greedy(tiny.TARGET, target, tiny.PROMPTS, tiny.NEW_TOKENS, warp=warp)


def test_the_repetition_penalty_of_drafted_tokens_is_that_of_plain_ones():
    penalty = 1.8
    expected = penalised_greedy(penalty)
    assert tuple(map(tuple, expected)) != tiny.plain_greedy()
    config = SamplingConfig(repetition_penalty=penalty)
    for name in ("autoregressive", "speculative_sampling"):
        rows = tiny.decode(methods.build(name, tiny.CONFIGS, config))
        assert tiny.texts(rows) == expected
        if name == "speculative_sampling":
            assert sum(sum(row.stats["accepted"]) for row in rows) > 0


def test_learned_positions_up_to_the_last_one():
    """Drafts that would stand beyond the table of positions do no harm."""
    config = random_models.CASES["learned_positions"]
    target = random_models.params(config)
    rows = tiny.prompts((50, 60, 63, 57))
    stop = generation.stop_config(config, 30)
    method = methods.build(
        "speculative_sampling", {"target": config, "draft": config}, SamplingConfig()
    )
    found = generation.generate({"target": target, "draft": target}, rows, method, stop)
    assert {row.finish_reason for row in found} == {"context"}
    assert [len(row.token_ids) for row in found] == [14, 4, 1, 7]
    for row, text in zip(rows, tiny.texts(found), strict=True):
        assert text == tiny.greedy(config, target, [row], len(text))[0]


def test_a_prompt_read_in_chunks_is_a_prompt_read_at_once(monkeypatch):
    """21 tokens in chunks of 7, the longest allowed that divides them; rows may be empty."""
    config, model = tiny.SMALL, tiny.params(tiny.SMALL)["target"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 21)))
    lengths = np.array([21, 0, 8, 13])

    def read():
        cache = kv.create(config, 4, 24)
        return jax.jit(lambda p: prefill.prefill(config, p, cache, tokens, jnp.asarray(lengths)))(
            model
        )

    assert prefill.CHUNK >= 21
    at_once = read()
    monkeypatch.setattr(prefill, "CHUNK", 10)
    in_chunks = read()
    np.testing.assert_array_equal(in_chunks.lengths, lengths)
    np.testing.assert_array_equal(at_once.lengths, lengths)
    for name in ("keys", "values"):
        for a, b in zip(getattr(at_once, name), getattr(in_chunks, name), strict=True):
            for row, length in enumerate(lengths):
                np.testing.assert_allclose(a[row, :, :length], b[row, :, :length], atol=1e-5)


# --- What goes in and what comes out -----------------------------------------------------------


def test_rows_report_their_prompt_text_and_work():
    rows = tiny.decode(tiny.build("speculative_sampling"))
    for row, prompt in zip(rows, tiny.PROMPTS, strict=True):
        assert row.prompt_ids == prompt
        assert row.finish_reason == "length"
        assert row.stats["tokens_emitted"] == len(row.token_ids) == tiny.NEW_TOKENS
        assert list(row.stats) == [
            "target_calls", "target_positions", "draft_calls", "tokens_emitted", "proposed",
            "accepted",
        ]  # fmt: skip
        assert all(type(value) in (int, list) for value in row.stats.values())


def test_total_stats():
    def row(calls, emitted, proposed, accepted):
        counts = {"target_calls": calls, "target_positions": 6 * calls, "draft_calls": 5 * calls}
        counts |= {"tokens_emitted": emitted, "proposed": proposed, "accepted": accepted}
        return generation.Row([1], [2] * emitted, "length", counts)

    total = generation.total_stats(
        [row(4, 9, [4, 3, 0], [2, 1, 0]), row(1, 3, [1, 1, 0], [1, 1, 0])]
    )
    assert total == {
        "target_calls": 5,
        "target_positions": 30,
        "draft_calls": 25,
        "tokens_emitted": 12,
        "proposed": [5, 4, 0],
        "accepted": [3, 2, 0],
        "tokens_per_target_call": 12 / 5,
        "acceptance_by_depth": [3 / 5, 2 / 4, 0.0],
    }
    plain = generation.total_stats([row(0, 0, [], [])])
    assert plain["tokens_per_target_call"] == 0
    assert plain["acceptance_by_depth"] == []


def test_stop_config_of_a_checkpoint():
    config = tiny.TARGET.replace(eos_token_ids=(7, 9))
    assert generation.stop_config(config, 5) == stopping.StopConfig(5, (7, 9), 1024)
    assert generation.stop_config(config, 5, [3]).eos_ids == (3,)
    assert generation.stop_config(config, 5, ()).eos_ids == ()


@pytest.mark.parametrize(
    "prompts,message",
    [
        ([], "prompts: at least one is needed"),
        ([[1], []], "prompt 1: empty; at least one token is needed"),
        ([[1, 64]], "prompt 0: token id 64 is out of range; allowed: 0 to 63"),
        ([[3], [0, -1]], "prompt 1: token id -1 is out of range; allowed: 0 to 63"),
        ([[1] * 12], "prompt 0: 12 tokens leave no room in a context of 12"),
        ([[1], [1] * 40], "prompt 1: 40 tokens leave no room in a context of 12"),
    ],
    ids=range(6),
)
def test_prompts_that_cannot_be_continued(prompts, message):
    stop = stopping.StopConfig(5, (), max_position=12)
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        generation.check_prompts(prompts, tiny.TARGET, stop)


def test_prompts_that_can_be_continued():
    generation.check_prompts([[0], [63] * 11], tiny.TARGET, stopping.StopConfig(5, (), 12))
