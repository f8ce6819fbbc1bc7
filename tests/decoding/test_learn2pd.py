"""Learn2PD's filter and end-of-text prediction against a naive loop, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, stopping
from decoding.unmasking import learned_filter
from decoding.unmasking.canvas import View
from decoding.unmasking.end_of_text import cut_at_end_of_text
from decoding.unmasking.prediction import Prediction
from decoding.unmasking.selectors import Choice
from models import sharding
from models.errors import InputError
from tests.decoding import masked, tiny
from tests.decoding.masked import EOS, MASK, NEW

BLOCK = 10  # the last of a canvas of 24 is short


@functools.cache
def filter_params(block: int = BLOCK, depth: int = 2):
    config = learned_filter.FilterConfig(block, depth)
    return jax.tree.map(lambda x: 3 * x, learned_filter.init(config, jax.random.key(3)))


def build(**options):
    return tiny.build("learn2pd", **{"block_length": BLOCK, "early_stop": False, **options})


def decode(method, rows=tiny.PROMPTS, *, trained=None, stop=masked.STOP, **kwargs):
    params = masked.params() | {learned_filter.ROLE: trained or filter_params()}
    return generation.generate(params, rows, method, stop, **kwargs)


def naive_filter(params, confidence):
    x = np.asarray(confidence, np.float64)
    for i in range(len(params)):
        layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"layer_{i}"])
        x = (np.maximum(x, 0) if i else x) @ layer["kernel"] + layer["bias"]
    return 1 / (1 + np.exp(-x))


def naive(prompt, tau, *, eotp=True, cache="none"):
    """Section 2.8 for one row, `tau` None for one token a step: text, calls, canvas lengths."""
    canvas, model, calls, cuts = np.array([*prompt, *[MASK] * NEW]), masked.Reference(), 0, []
    for start in range(len(prompt), len(prompt) + NEW, BLOCK):
        step = 0
        while (canvas[start : start + BLOCK] == MASK).any():
            end, stop = len(canvas), min(start + BLOCK, len(canvas))
            first, last = 0, end
            if step and cache != "none":
                first, last = start, {"prefix": end, "dual": stop}[cache]
            law = masked.softmax(model(canvas, first, last))
            token, sure = np.zeros(end, int), np.zeros(end)
            token[first:last], sure[first:last] = law.argmax(axis=1), law.max(axis=1)
            seen = np.zeros(BLOCK)
            seen[: stop - start] = sure[start:stop]
            masks = [i for i in range(first, last) if canvas[i] == MASK]
            here = [i for i in masks if start <= i < stop]
            chosen = []
            if tau is not None:
                final = naive_filter(filter_params(), seen) > tau
                chosen = [i for i in here if final[i - start]]
            by_filter = [i for i in chosen if token[i] == EOS]
            foreseen = [i for i in masks if token[i] == EOS]
            for i in {*chosen, max(here, key=sure.__getitem__)}:
                canvas[i] = token[i]
            step, calls = step + 1, calls + 1
            if eotp and by_filter:
                canvas = canvas[: by_filter[0] + 1]
            elif eotp and foreseen:
                canvas = canvas[: max(foreseen, key=sure.__getitem__) + 1]
            cuts.append(len(canvas))
    text = canvas[len(prompt) :].tolist()
    return text[: text.index(EOS) + 1] if EOS in text else text, calls, cuts


CASES = {
    "filter": ({"eotp": False}, {"tau": 0.5, "eotp": False}),
    "both": ({}, {"tau": 0.5}),
    "end_of_text_alone": ({"rule": "quota"}, {"tau": None}),
    "prefix": ({"cache": "prefix"}, {"tau": 0.5, "cache": "prefix"}),
    "dual": ({"cache": "dual"}, {"tau": 0.5, "cache": "dual"}),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_and_calls_are_those_of_a_naive_loop(case):
    """No cut canvas leaves keys behind: the naive loop runs the model on the shorter text."""
    options, how = CASES[case]
    rows = decode(build(filter_threshold=0.5, **options))
    found = [naive(prompt, **how) for prompt in tiny.PROMPTS]
    assert tiny.texts(rows) == [text for text, _, _ in found]
    assert [row.stats["target_calls"] for row in rows] == [calls for _, calls, _ in found]
    saved = [calls < NEW for _, calls, _ in found]
    assert any(saved)
    if case != "filter":
        lengths = [[NEW + len(p), *cuts] for p, (_, _, cuts) in zip(tiny.PROMPTS, found)]
        assert any(len(set(cuts)) > 1 for cuts in lengths)
        assert any(len(set(cuts)) > 2 for cuts in lengths) or case == "dual"  # cut again
    if case == "both":
        for i in (1, 4):
            assert decode(
                build(filter_threshold=0.5), [tiny.PROMPTS[i]], row_ids=[i]
            ) == [rows[i]]  # fmt: skip


def test_the_filter_is_small_and_linear_layers_are_what_it_is():
    for depth, size in ((1, 1056), (2, 2112), (4, 4224)):
        config = learned_filter.FilterConfig(32, depth)
        params = learned_filter.init(config, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
        confidence = np.random.default_rng(depth).random((3, 32))
        found = jax.nn.sigmoid(learned_filter.apply(params, jnp.asarray(confidence)))
        np.testing.assert_allclose(found, naive_filter(params, confidence), atol=1e-6)


def test_thresholds_one_and_zero_are_plain_unmasking_and_whole_blocks():
    slow = decode(build(filter_threshold=1, eotp=False), stop=masked.ENDLESS)
    plain = masked.decode(
        tiny.build("llada", block_length=BLOCK, early_stop=False), stop=masked.ENDLESS
    )
    assert slow == plain
    assert all(row.stats["target_calls"] == NEW for row in slow)
    fast = decode(build(filter_threshold=0, eotp=False), stop=masked.ENDLESS)
    assert all(row.stats["target_calls"] == 3 for row in fast)
    between = decode(build(filter_threshold=0.5, eotp=False), stop=masked.ENDLESS)
    assert all(3 <= row.stats["target_calls"] <= NEW for row in between)


def test_a_shorter_last_block_is_padded_with_zeros():
    view = _view(start=[3, 9], stop=[11, 12])
    confidence = jnp.asarray(np.random.default_rng(0).random((2, 16)), jnp.float32)
    found = learned_filter.block_confidence(view, confidence, 8)
    np.testing.assert_array_equal(found[0], confidence[0, 3:11])
    np.testing.assert_array_equal(found[1], [*confidence[1, 9:12], 0, 0, 0, 0, 0])


def _view(start, stop):
    B, S = len(start), 16
    shape = jnp.zeros((B, S), bool)
    some = jnp.zeros((B,), jnp.int32)
    masks = jnp.arange(S) >= 4
    return View(
        tokens=jnp.full((B, S), MASK), masked=jnp.broadcast_to(masks, (B, S)), open=shape,
        start=jnp.asarray(start), stop=jnp.asarray(stop), prompt_lengths=some, ends=some + S,
        step=some, calls=some, active=some == 0, keys=jax.random.split(jax.random.key(0), B),
    )  # fmt: skip


def test_rule_a_cuts_at_the_leftmost_and_rule_b_at_the_most_confident():
    S, tokens = 16, np.full((5, 16), 7)
    confidence = np.full((5, S), 0.5, np.float32)
    tokens[:, [6, 8, 13]] = EOS  # 13 is in a later block
    confidence[:, 8], confidence[:, 13] = 0.7, 0.9
    tokens[3, 6:], tokens[4, 2] = 7, EOS
    confidence[4, 2] = 1.0  # a prediction at a token that is visible counts for nothing
    known = np.ones((5, S), bool)
    known[2, 12:] = False  # not computed: only the block was
    sure = np.zeros((5, S), bool)
    sure[0, [6, 8, 9]] = True
    sure[1, 5] = True  # of another token than the end
    prediction = Prediction(*map(jnp.asarray, (known, tokens, confidence)), {})
    none = jnp.zeros((5,), bool)
    choice = Choice(jnp.asarray(sure), prediction.tokens, none, (), {}, jnp.asarray(sure))
    cut = cut_at_end_of_text((EOS,))
    view = _view([4] * 5, [10] * 5)
    assert cut(view, prediction, choice).tolist() == [7, 14, 9, 16, 14]
    # A rule that is never sure leaves rule B.
    assert cut(view, prediction, choice.replace(sure=None)).tolist() == [14, 14, 9, 16, 14]
    assert cut is cut_at_end_of_text((EOS,))


def test_cut_canvases_go_on_at_smaller_sizes():
    """Work that is saved is saved in the arrays, not only in what is counted."""
    method, stop = build(rule="quota"), stopping.StopConfig(64, (EOS,))
    state, slots = generation.begin(masked.params(), tiny.PROMPTS[:2], method, stop)
    assert slots == 96
    state, slots = generation.advance(masked.params(), state, slots, method, stop, rounds=4)
    assert slots == 32
    assert state.ends.tolist() == [19, 4]


def test_sharded_rows_are_those_of_one_device():
    method, mesh = build(filter_threshold=0.5), sharding.make_mesh(4, 2)
    placed = jax.device_put(
        masked.params()["target"], sharding.param_shardings(masked.CONFIG, mesh)
    )
    params = {"target": placed, "filter": filter_params()}
    rows = generation.generate(params, tiny.PROMPTS, method, masked.STOP, mesh=mesh)
    assert rows == decode(method)


def test_filters_travel_through_files(tmp_path):
    config = learned_filter.FilterConfig(BLOCK, 4)
    learned_filter.save(tmp_path / "filter", config, filter_params(depth=4))
    found, params = learned_filter.load(tmp_path / "filter")
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, params, filter_params(depth=4))


def test_what_is_refused():
    with pytest.raises(InputError, match=r"threshold: 1\.5 must be between 0 and 1"):
        build(filter_threshold=1.5)
    with pytest.raises(InputError, match="block_length: 0: a learned filter needs blocks"):
        build(block_length=0)
    with pytest.raises(InputError, match="depth: 3 is not known; allowed: 1, 2, 4"):
        learned_filter.FilterConfig(32, 3)
    with pytest.raises(InputError, match="block_length: 10 given, but the filter is for blocks of"):
        decode(build(), trained=filter_params(8))
    with pytest.raises(InputError, match="eotp: the target model has no end-of-text token"):
        cut_at_end_of_text(())
