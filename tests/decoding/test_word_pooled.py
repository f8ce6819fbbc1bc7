"""Decoding with p > 1 vectors a word, in GPT's blocks, against the teacher-forced model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, stopping
from decoding.autoregressive import pending_tokens
from decoding.hierarchical import call, units_written
from decoding.speculative.tree import chain
from models import hierarchical
from tests.decoding.test_hierarchical import build, decode, greedy, split_ids, teacher_forced
from tests.models.test_word_pooling import CONFIG
from tests.models.tiny_hierarchical import params

A, B, UNKNOWN, END = 0, 1, 2, CONFIG.word_end
ROWS = [[A, B, END, A], [B, END, B, A, END, A, A, A, END], [UNKNOWN]]
STOP = stopping.StopConfig(12, (CONFIG.document_end,))


@functools.cache
def together():
    return decode(build(config=CONFIG), ROWS, CONFIG, STOP)


def test_greedy_text_is_that_of_the_teacher_forced_model():
    """Rows of different lengths, which stand at different places of their words."""
    assert [row.token_ids for row in together()] == greedy(CONFIG, ROWS, 12)
    assert sum(row.token_ids.count(END) for row in together()) >= 3


def test_a_row_is_the_same_alone():
    method = build(config=CONFIG)
    for number, row in enumerate(together()):
        (alone,) = decode(method, [ROWS[number]], CONFIG, STOP, row_ids=[number])
        assert alone.token_ids == row.token_ids and alone.stats == row.stats


def test_a_word_costs_p_positions_of_the_backbone():
    for prompt, row in zip(ROWS, together(), strict=True):
        consumed = [prompt[-1], *row.token_ids[:-1]]
        assert row.stats["target_calls"] == consumed.count(END)
        assert row.stats["target_positions"] == 4 * row.stats["target_calls"]
        assert row.stats["decoder_calls"] == len(row.token_ids)


def test_teacher_forced_probability_is_the_product_over_the_cached_path():
    """Section 6, item 5: each unit asked of the loop's own caches."""
    text = [A, B, END, B, END, UNKNOWN, A, B, END, A, END, B, B]
    log_p = jax.nn.log_softmax(teacher_forced(CONFIG, [text]))[0]
    done, last = split_ids(CONFIG, text)
    expected = 0.0
    for n, word in enumerate([*done, last]):
        closed = n < len(done) and len(word) < CONFIG.max_word
        expected += sum(
            float(log_p[n, k, u]) for k, u in enumerate([*word, END][: len(word) + closed])
        )

    @jax.jit
    def law(model, state):
        nothing = jnp.zeros((1, 0), jnp.int32)
        pending = chain(pending_tokens(state), nothing, nothing.astype(bool))
        inner, found = call(CONFIG, model, state, pending)
        found = hierarchical.possible(CONFIG, found[:, 0], units_written(CONFIG, state))
        return state.replace(inner=inner), jax.nn.log_softmax(found)[0]

    model = params(CONFIG)
    state, _ = generation.begin(
        {"target": model}, [text[:1]], build(config=CONFIG), STOP, buffer=64
    )
    tokens = jnp.zeros((1, 64), jnp.int32).at[0, : len(text)].set(jnp.asarray(text))
    total = float(log_p[0, 0, text[0]])
    for length in range(1, len(text)):
        state = state.replace(tokens=tokens, lengths=jnp.asarray([length], jnp.int32))
        state, values = law(model, state)
        total += float(values[text[length]])
    assert total == pytest.approx(expected, abs=1e-4)
    assert int(state.inner.backbone.lengths[0]) == 4 * len(done)
    assert np.isfinite(total) and total < -1
