"""Stop rules against a loop over tokens, and at the end of real runs."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import stopping
from decoding.stopping import CONTEXT, EOS, LENGTH, RUNNING, StopConfig
from models.errors import InputError
from tests.decoding import tiny


def naive_cut(tokens, length, prompt, config):
    """One token at a time: is there room, is it the end?"""
    kept = 0
    for token in tokens:
        if length + kept >= config.max_position or length + kept - prompt >= config.max_new_tokens:
            break
        kept += 1
        if token in config.eos_ids:
            return kept, EOS
    if length + kept - prompt >= config.max_new_tokens:
        return kept, LENGTH
    if length + kept >= config.max_position:
        return kept, CONTEXT
    return kept, RUNNING


@pytest.mark.parametrize("eos_ids", [(), (3,), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("limits", [(10, 1 << 30), (10, 14), (6, 20), (1, 9)], ids=str)
def test_cut_agrees_with_the_loop(eos_ids, limits):
    config = StopConfig(limits[0], eos_ids, limits[1])
    rng = np.random.default_rng(0)
    rows = 300
    tokens = rng.integers(0, 12, (rows, 5))
    prompt = rng.integers(1, 9, rows)
    # Rows that still run: below both limits.
    room = np.minimum(prompt + limits[0], limits[1]) - prompt
    length = prompt + rng.integers(0, room)
    count = rng.integers(1, 6, rows)
    kept, reason = stopping.cut(*map(jnp.asarray, (tokens, count, length, prompt)), config)
    expected = [
        naive_cut(tokens[b, : count[b]].tolist(), length[b], prompt[b], config) for b in range(rows)
    ]
    np.testing.assert_array_equal(np.stack([kept, reason], axis=1), expected)
    assert config.max_new_tokens == 1 or len(np.unique(reason)) >= 2


def test_is_eos_without_ids_is_never():
    tokens = jnp.arange(4)
    assert not stopping.is_eos(tokens, StopConfig(1)).any()
    found = stopping.is_eos(tokens, StopConfig(1, (3, 1, 99)))
    np.testing.assert_array_equal(found, [False, True, False, True])


def test_reasons_have_names():
    assert [stopping.REASONS[code] for code in (RUNNING, EOS, LENGTH, CONTEXT)] == [
        "running", "eos", "length", "context",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, -3])
def test_no_new_tokens_is_an_error(count):
    with pytest.raises(InputError, match=re.escape(f"max_new_tokens: {count} must be at least 1")):
        StopConfig(count)


@functools.cache
def ending() -> StopConfig:
    """Rules under which rows of PROMPTS end in every way: two EOS ids, 24 tokens, 50 positions."""
    reference = tiny.plain_greedy()
    # Tokens whose first occurrence is neither at the start nor at the end of a row.
    firsts = sorted({(row.index(token), token) for row in reference[:4] for token in row})
    chosen = [token for at, token in firsts if 6 <= at <= 12 and token not in reference[5]][:2]
    assert len(chosen) == 2
    return StopConfig(tiny.NEW_TOKENS, (*chosen, 63), max_position=50)


def expected_rows() -> list[tuple[list[int], str]]:
    """The greedy continuations, cut by the rules one token at a time."""
    config, rows = ending(), []
    for prompt, text in zip(tiny.PROMPTS, tiny.plain_greedy(), strict=True):
        kept, reason = naive_cut(text, len(prompt), len(prompt), config)
        rows.append((list(text[:kept]), stopping.REASONS[reason]))
    return rows


@pytest.mark.parametrize("name", ["autoregressive", "prompt_lookup", "speculative_sampling"])
def test_rows_end_where_a_rule_says_and_say_why(name):
    """EOS in the middle of an accepted block cuts what follows; no limit is overshot."""
    expected = expected_rows()
    assert {reason for _, reason in expected} == {"eos", "length", "context"}
    rows = tiny.decode(tiny.build(name), stop=ending())
    assert [(row.token_ids, row.finish_reason) for row in rows] == expected
    for row, prompt in zip(rows, tiny.PROMPTS, strict=True):
        assert row.prompt_ids == prompt
        assert row.stats["tokens_emitted"] == len(row.token_ids)


def test_an_eos_in_the_middle_of_a_block_cuts_it():
    """The row's last round decided more tokens than were kept."""
    method = tiny.build("speculative_sampling")
    free, cut = tiny.decode(method), tiny.decode(method, stop=ending())
    decided = [sum(row.stats["accepted"]) + row.stats["target_calls"] for row in cut]
    kept = [len(row.token_ids) for row in cut]
    ended = [row.finish_reason == "eos" for row in cut]
    assert any(d > k and e for d, k, e in zip(decided, kept, ended, strict=True))
    for row, shorter in zip(free, cut, strict=True):
        assert row.token_ids[: len(shorter.token_ids)] == shorter.token_ids
