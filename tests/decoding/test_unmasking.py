"""Block-wise unmasking against a naive loop; rules, caches, stops and work."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, methods, randomness, stopping
from decoding.sampling import SamplingConfig
from decoding.unmasking import canvas, policies, selectors
from models import sharding
from models.errors import InputError
from tests.decoding import masked, tiny
from tests.decoding.exact_laws import p_value
from tests.models import random_models


def by_quota(steps: int):
    def pick(among, sure, step, size):
        count = size // steps + (step < size % steps)
        return sorted(among, key=lambda i: -sure[i])[: max(count, 1)]

    return pick


def by_threshold(least: float):
    def pick(among, sure, step, size):
        return [i for i in among if sure[i] >= least] or [max(among, key=sure.__getitem__)]

    return pick


def by_factor(budget: float):
    def pick(among, sure, step, size):
        ranked = sorted(among, key=lambda i: -sure[i])
        fits = [
            n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - sure[ranked[n - 1]]) < budget
        ]
        return ranked[: max(fits, default=1)]

    return pick


CASES = {
    "quota": ({}, by_quota(8)),
    "three_steps": ({"steps": 3}, by_quota(3)),
    "whole_canvas": ({"block_length": 0, "steps": 10}, by_quota(10)),
    "threshold": ({"rule": "threshold", "threshold": 0.3}, by_threshold(0.3)),
    "factor": ({"rule": "factor", "factor": 1.6}, by_factor(1.6)),
    "prefix": ({"cache": "prefix"}, by_quota(8)),
    "dual": ({"cache": "dual", "rule": "threshold", "threshold": 0.3}, by_threshold(0.3)),
    "shifted": ({"shifted": True, "steps": 4}, by_quota(4)),
    "shifted_dual": ({"shifted": True, "steps": 4, "cache": "dual"}, by_quota(4)),
}


def build(temperature: float = 0.0, **options) -> loop.Method:
    return tiny.build("llada", temperature, **{"block_length": 8, "early_stop": False, **options})


@pytest.mark.parametrize("case", CASES)
def test_canvases_and_calls_are_those_of_a_naive_loop(case):
    options, pick = CASES[case]
    rows = masked.decode(build(**options), stop=masked.ENDLESS)
    for prompt, row in zip(tiny.PROMPTS[:4], rows):
        how = {k: options[k] for k in ("cache", "shifted") if k in options}
        text, calls = masked.unmask(prompt, pick, block=options.get("block_length", 8), **how)
        assert row.token_ids == text[len(prompt) :]
        assert row.stats["target_calls"] == calls
        assert row.finish_reason == "length"
    if case in ("threshold", "factor", "dual"):  # the rule is neither one by one nor all at once
        assert 3 < rows[0].stats["target_calls"] < 24


@pytest.mark.parametrize("case", ("prefix", "dual"))
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_canvas_size(case):
    method = build(1.0, **CASES[case][0])
    together = masked.decode(method)
    for i in (1, 4):
        alone = masked.decode(method, [tiny.PROMPTS[i]], row_ids=[i])
        assert alone == [together[i]]
    assert len({tuple(row.token_ids) for row in together}) > 5


def test_positions_computed():
    """Whole canvas: every call; prefix: the block and what follows; dual: the block alone."""
    prompt = tiny.PROMPTS[0]  # 9 tokens, three blocks of 8
    spent = {
        cache: masked.decode(build(cache=cache), [prompt], stop=masked.ENDLESS)[0].stats
        for cache in ("none", "prefix", "dual")
    }
    assert spent["none"]["target_positions"] == 24 * 33
    assert spent["prefix"]["target_positions"] == 3 * 33 + 7 * (24 + 16 + 8)
    assert spent["dual"]["target_positions"] == 3 * 33 + 21 * 8
    assert spent["none"]["full_calls"] == 24
    assert spent["prefix"]["full_calls"] == spent["dual"]["full_calls"] == 3


def test_texts_end_at_an_end_of_text_and_are_the_same_without_stopping_early():
    early, late = (masked.decode(build(early_stop=stop), seed=3) for stop in (True, False))
    assert tiny.texts(early) == tiny.texts(late)
    ended = [row for row in early if row.finish_reason == "eos"]
    assert ended and all(row.token_ids[-1] == masked.EOS for row in ended)
    assert all(masked.EOS not in row.token_ids[:-1] for row in early)
    saved = [a.stats["target_calls"] < b.stats["target_calls"] for a, b in zip(early, late)]
    assert any(saved) and sum(saved) <= len(ended)
    # Without end-of-sequence tokens every row is as long as its limit.
    assert {len(row.token_ids) for row in masked.decode(build(), stop=masked.ENDLESS)} == {24}


def test_a_context_that_is_full_ends_a_canvas():
    stop = stopping.StopConfig(24, (), max_position=34)
    rows = masked.decode(build(), tiny.PROMPTS[:4], stop=stop)
    assert [len(row.token_ids) for row in rows] == [24, 24, 17, 2]
    assert [row.finish_reason for row in rows] == ["length", "length", "context", "context"]


def test_streaming_gives_the_tokens_of_generate_in_pieces():
    method = build(1.0, rule="threshold", threshold=0.3)
    rows = masked.decode(method)
    found = [[] for _ in rows]
    pieces = 0
    for event in generation.stream(masked.params(), tiny.PROMPTS, method, masked.STOP, every=2):
        found[event.row] += event.token_ids
        pieces += bool(event.token_ids)
        if event.done:
            assert event.finished == rows[event.row]
    assert found == tiny.texts(rows)
    assert pieces > len(rows)


def test_the_mask_is_never_written_and_masks_in_a_prompt_stay():
    prompt = [7, masked.MASK, 9]
    rows = masked.decode(build(2.0), [prompt] * 8)
    assert all(row.prompt_ids == prompt for row in rows)
    assert all(masked.MASK not in row.token_ids for row in rows)


def test_nothing_is_compiled_twice_and_nothing_is_read_by_the_host():
    method = build(**CASES["dual"][0])
    masked.decode(method)
    before = loop.start._cache_size(), loop.advance._cache_size()
    masked.decode(build(**CASES["dual"][0]), tiny.prompts(seed=1))
    assert (loop.start._cache_size(), loop.advance._cache_size()) == before
    state, slots = generation.begin(masked.params(), tiny.PROMPTS, method, masked.STOP)
    fixed = {"method": method, "stop": masked.STOP, "slots": slots, "least": 48}
    text = loop.advance.lower(masked.params(), state, np.int32(9), **fixed).as_text()
    assert "callback" not in text and "outfeed" not in text


def test_sharded_rows_are_those_of_one_device():
    method, mesh = build(1.0, **CASES["dual"][0]), sharding.make_mesh(2, 4)
    placed = jax.device_put(
        masked.params()["target"], sharding.param_shardings(masked.CONFIG, mesh)
    )
    rows = generation.generate({"target": placed}, tiny.PROMPTS, method, masked.STOP, mesh=mesh)
    assert rows == masked.decode(method)


def test_guidance_adds_what_the_prompt_changes():
    plain, guided = build(), build(guidance=0.5)
    rows = masked.decode(guided, [tiny.PROMPTS[0]])
    assert rows[0].stats["target_positions"] == 2 * rows[0].stats["target_calls"] // 2 * 33
    assert rows != masked.decode(plain, [tiny.PROMPTS[0]])
    # One step against the formula.
    prompt = tiny.PROMPTS[0]
    text = np.array([*prompt, *[masked.MASK] * 24])
    blank = np.where(np.arange(33) < 9, masked.MASK, text)
    words = np.arange(masked.CONFIG.vocab_size) != masked.MASK
    conditional, without = (masked.Reference()(row, 0, 33)[:, words] for row in (text, blank))
    law = masked.softmax(without + 1.5 * (conditional - without))[9:17]
    state, slots = generation.begin(masked.params(), [prompt], guided, masked.ENDLESS)
    state, _ = generation.advance(masked.params(), state, slots, guided, masked.ENDLESS, rounds=1)
    first = int(law.max(axis=1).argmax())
    found = np.asarray(state.tokens[0, 9:17])
    assert found[first] == law[first].argmax()
    assert (np.delete(found, first) == masked.MASK).all()


def test_random_order_at_temperature_one_is_the_any_order_law():
    """Over three positions and a vocabulary of five, one token a call in uniform random order."""
    config = random_models.BASE.replace(
        vocab_size=6, num_layers=1, num_kv_heads=4, causal=False, mask_token_id=5, family="llada"
    )
    models = {"target": random_models.params(config)}
    prompt, n = [1, 3], 3
    canvases = list(itertools.product(range(6), repeat=n))
    rows = jnp.asarray([prompt + list(c) for c in canvases])
    logits = np.array(
        jax.jit(lambda p, t: policies.transformer.apply(config, p, t).logits)(
            models["target"], rows
        )
    )[:, 2:, :5]
    conditional = dict(zip(canvases, masked.softmax(logits)))
    texts = list(itertools.product(range(5), repeat=n))
    law = np.zeros(len(texts))
    for order in itertools.permutations(range(n)):
        for t, text in enumerate(texts):
            known, chance = [5] * n, 1.0
            for i in order:
                chance *= conditional[tuple(known)][i][text[i]]
                known[i] = text[i]
            law[t] += chance / 6
    method = methods.build(
        "llada", {"target": config}, SamplingConfig(temperature=1.0),
        {"block_length": 0, "ranking": "random"},
    )  # fmt: skip
    stop, copies = stopping.StopConfig(n), 8000
    found = generation.generate(models, [prompt] * copies, method, stop)
    counts = np.zeros((1, len(texts)), int)
    for row in found:
        counts[0, texts.index(tuple(row.token_ids))] += 1
    assert p_value(counts, law[None]) > 1e-3
    # The test can tell: the law of left to right is another one.
    assert p_value(counts, np.roll(law, 1)[None]) < 1e-6


def test_ranks():
    among = jnp.asarray([[True, False, True, True], [False] * 4])
    score = jnp.asarray([[0.2, 0.9, 0.7, 0.2], [1.0, 2.0, 3.0, 4.0]])
    assert selectors.rank(among, score)[0].tolist() == [1, 3, 0, 2]
    assert selectors.best(among, score, jnp.asarray([2, 2])).tolist() == [
        [True, False, True, False], [False] * 4,
    ]  # fmt: skip
    assert selectors.first_best(among, score).tolist() == [
        [False, False, True, False], [False] * 4,
    ]  # fmt: skip


def test_blocks_of_the_canvas():
    at_prompt, absolute = canvas.Schedule(8), canvas.Schedule(8, absolute=True)
    lengths = jnp.asarray([5, 16])
    for schedule, blocks in ((at_prompt, [0, 0]), (absolute, [0, 2])):
        assert schedule.block_at(lengths, lengths).tolist() == blocks
    assert at_prompt.start_of(jnp.asarray([2, 1]), lengths).tolist() == [21, 24]
    assert absolute.start_of(jnp.asarray([2, 1]), lengths).tolist() == [16, 8]


def test_further_blocks_open_when_the_one_before_is_filled_far_enough():
    schedule = canvas.Schedule(4, horizon=2, open_ratio=0.5)
    tokens = np.full((3, 20), masked.MASK)
    tokens[:, :4] = 1  # prompts of 4 tokens, canvases of 16
    tokens[1, 4:6] = 1
    tokens[2, 4:7], tokens[2, 8:10] = 1, 1
    four, zero = jnp.full((3,), 4), jnp.zeros((3,), jnp.int32)
    progress = canvas.Progress(zero, zero, zero, (), ())
    state = loop.DecodeState(
        jnp.asarray(tokens), four, four, zero, randomness.row_keys(0, zero), (), zero[0], progress,
        jnp.full((3,), 20),
    )  # fmt: skip
    view = canvas.look(state, schedule, masked.MASK)
    assert view.open.sum(axis=1).tolist() == [4, 8, 12]
    assert view.candidates.sum(axis=1).tolist() == [4, 6, 7]


@pytest.mark.parametrize("needed", (1, 32, 33, 49, 64, 65, 97, 513, 1024))
def test_canvas_sizes(needed):
    size, smaller = generation.canvas_slots(needed)
    assert smaller < needed <= size
    assert size <= 32 or size <= 1.5 * smaller


@pytest.mark.parametrize(
    "options,message",
    [
        ({"cache": "both"}, "cache: 'both' is not known; allowed: dual, none, prefix"),
        ({"threshold": 2, "rule": "threshold"}, "threshold: 2.0 must be between 0 and 1"),
        ({"factor": 0, "rule": "factor"}, "factor: 0.0 must be positive"),
        ({"guidance": 1, "cache": "dual"}, "guidance: 1 needs cache=none; given: dual"),
        ({"block_length": -1}, "block_length: -1 must be at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        build(**options)


def test_what_cannot_be_unmasked():
    unmarked = masked.CONFIG.replace(mask_token_id=None)
    with pytest.raises(InputError, match=r"mask_token_id: the target model \(llada\) has none"):
        methods.build("llada", {"target": unmarked}, SamplingConfig())
    with pytest.raises(InputError, match=r"repetition_penalty: 1\.2 is not for methods that fill"):
        methods.build("llada", {"target": masked.CONFIG}, SamplingConfig(repetition_penalty=1.2))
