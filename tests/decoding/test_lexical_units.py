"""Lexical Unit Decoding: spans against a naive loop, the cache, the verified form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, stopping
from decoding.lexical_units import lexical_units, verified_units
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig
from models import cache as kv
from models import transformer
from models.errors import InputError
from tests.decoding import tiny

K, PAD = 4, 63
CONFIG = tiny.TARGET
MODEL = {"target": tiny.params()["target"]}


@functools.cache
def method(threshold: float, **options) -> loop.Method:
    sampling = SamplingConfig(temperature=options.pop("temperature", 0.0))
    return lexical_units(CONFIG, sampling, options.pop("window", K), threshold, PAD, **options)


def decode(threshold: float, stop=tiny.STOP, rows=tiny.PROMPTS, **options) -> list:
    more = {name: options.pop(name) for name in ("seed", "row_ids") if name in options}
    return generation.generate(MODEL, rows, method(threshold, **options), stop, **more)


def naive(prompt, threshold, control=True, first_too=True) -> tuple[list[int], list[int]]:
    """Text and spans, running text and placeholders anew for every call."""
    text, spans = list(prompt), []
    while len(text) < len(prompt) + tiny.NEW_TOKENS:
        row = [*text, *[PAD] * (K - 1)]
        width = 64
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(row)] = row
        logits = np.asarray(tiny._forward(CONFIG)(MODEL["target"], tokens))[0]
        seen = logits[len(text) - 1 : len(text) - 1 + K].astype(np.float64)
        best = seen.argmax(-1)
        p = np.exp(seen - seen.max(-1, keepdims=True))
        sure = (p / p.sum(-1, keepdims=True)).max(-1) >= threshold
        span = []
        for i in range(K):
            taken = sure[i] or (i == 0 and not first_too)
            if control and i and best[i] == best[i - 1]:
                taken = False
            if not taken:
                break
            span.append(int(best[i]))
        span = span or [int(best[0])]
        spans.append(len(span))
        text += span
    return text[len(prompt) : len(prompt) + tiny.NEW_TOKENS], spans


@pytest.mark.parametrize(
    ("threshold", "options"),
    [(0.08, {}), (0.03, {}), (0.08, {"control": False}), (0.08, {"first_too": False})],
)
def test_text_and_spans_are_those_of_a_naive_loop(threshold, options):
    rows = decode(threshold, **options)
    spans = set()
    for row in rows[:4]:
        text, wanted = naive(row.prompt_ids, threshold, **options)
        assert row.token_ids == text
        counts = [row.stats[f"span_{n}"] for n in range(1, K + 1)]
        assert counts == [wanted.count(n) for n in range(1, K + 1)]
        assert row.stats["target_calls"] == len(wanted)
        spans |= set(wanted)
    assert len(spans) > 1 or options == {"control": False}


@pytest.mark.parametrize("options", [{}, {"window": 1}])
def test_a_threshold_above_one_or_a_window_of_one_is_plain_decoding(options):
    threshold = 1.5 if not options else 0.0
    assert tuple(map(tuple, tiny.texts(decode(threshold, **options)))) == tiny.plain_greedy()


def test_spans_grow_as_the_threshold_falls_and_repeats_are_controlled():
    def calls(rows):
        return sum(row.stats["target_calls"] for row in rows)

    runs = [decode(t, control=False) for t in (1.0, 0.1, 0.05, 0.0)]
    assert calls(runs[0]) >= calls(runs[1]) >= calls(runs[2]) >= calls(runs[3])
    assert calls(runs[3]) == len(tiny.PROMPTS) * tiny.NEW_TOKENS // K

    controlled = decode(0.0)
    assert calls(controlled) > calls(runs[3])

    def doubled(rows):
        return sum(a == b for r in rows for a, b in zip(r.token_ids, r.token_ids[1:], strict=False))

    assert doubled(controlled) < doubled(runs[3])


def test_placeholders_leave_no_trace():
    run, slots = method(0.03), 64
    state = tiny.start(run, MODEL, tiny.PROMPTS, slots=slots, buffer=64)

    @jax.jit
    def fresh(tokens, lengths):
        cache = kv.create(CONFIG, len(lengths), slots)
        return prefill(CONFIG, MODEL["target"], cache, tokens[:, :slots], lengths)

    for _ in range(3):
        before = np.asarray(state.lengths)
        state = loop.advance(
            MODEL, state, np.int32(state.rounds + 1), method=run, stop=tiny.STOP, slots=slots
        )
        np.testing.assert_array_equal(state.inner.lengths, before)  # what has been read
        cache = fresh(state.tokens, state.inner.lengths)
        for b, length in enumerate(before):
            for layer in range(CONFIG.num_layers):
                np.testing.assert_allclose(
                    state.inner.keys[layer][b, :, :length],
                    cache.keys[layer][b, :, :length],
                    atol=1e-5,
                )


def test_first_tokens_of_calls_are_plain_decodings_given_what_was_written():
    row = decode(0.03)[0]
    _, spans = naive(row.prompt_ids, 0.03)
    at = 0
    for span in spans:
        text = row.prompt_ids + row.token_ids[:at]
        logits = tiny.last_logits(CONFIG, MODEL["target"], [text])[0]
        assert row.token_ids[at] == int(logits.argmax())
        at += span
        if at >= tiny.NEW_TOKENS:
            break


def test_rows_are_independent_and_sampling_reads_the_rows_own_noise():
    together = tiny.texts(decode(0.05, temperature=0.9, seed=2))
    alone = decode(0.05, rows=tiny.PROMPTS[4:5], temperature=0.9, seed=2, row_ids=[4])
    assert alone[0].token_ids == together[4]
    assert together != tiny.texts(decode(0.05))


def test_a_span_is_cut_at_an_end_of_text_and_at_the_limit():
    whole = tiny.texts(decode(0.0))
    stop = stopping.StopConfig(tiny.NEW_TOKENS, (whole[0][5],))
    for row, text in zip(decode(0.0, stop), whole, strict=True):
        eos = stop.eos_ids[0]
        assert row.token_ids == (text[: text.index(eos) + 1] if eos in text else text)
    short = stopping.StopConfig(6)
    assert [len(r.token_ids) for r in decode(0.0, short, control=False)] == [6] * len(whole)


def test_the_verified_form_is_lossless():
    run = verified_units(CONFIG, SamplingConfig(), K, PAD)
    rows = generation.generate(MODEL, tiny.PROMPTS, run, tiny.STOP)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    sampled = generation.generate(
        MODEL, tiny.PROMPTS, verified_units(CONFIG, SamplingConfig(1.0), K, PAD), tiny.STOP
    )
    assert tiny.texts(sampled) == tiny.texts(tiny.decode(tiny.build("autoregressive", 1.0)))
    assert sum(sum(row.stats["accepted"]) for row in rows) > 0
    # Its drafts are what the placeholders behind the committed text say.
    state = tiny.start(run, MODEL, tiny.PROMPTS, slots=96, buffer=96)
    state = loop.advance(MODEL, state, np.int32(1), method=run, stop=tiny.STOP, slots=96)
    text = np.asarray(state.tokens)[0, : int(state.lengths[0]) - 1].tolist()
    tokens = jnp.asarray([[*text, *[PAD] * (K - 1)]])
    logits = transformer.apply(CONFIG, MODEL["target"], tokens).logits[0, -(K - 1) :]
    np.testing.assert_array_equal(state.inner.drafter.lists[0, :, 0], logits.argmax(-1))


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="window: 0"):
        method(0.5, window=0)
    with pytest.raises(InputError, match="pad_id"):
        tiny.build("lud")
    with pytest.raises(InputError, match="pad_id: 64 is out of range"):
        tiny.build("lud", pad_id=64)
    with pytest.raises(InputError, match="window: 1 must be at least 2"):
        tiny.build("lud", pad_id=1, window=1, verify=True)
