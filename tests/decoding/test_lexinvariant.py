"""Decoding with a table of token vectors for every row, against a naive loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, methods, randomness, stopping
from decoding.sampling import SamplingConfig
from models import random_embeddings as lex
from models import sharding
from models.errors import InputError
from tests.decoding import tiny

CONFIG = tiny.LEXINVARIANT
STOP = stopping.StopConfig(12)


@functools.cache
def params():
    """With blocks that say more than the current token's own vector does."""
    drawn = lex.init(CONFIG, jax.random.key(0))
    return {
        "target": jax.tree_util.tree_map_with_path(
            lambda path, x: x * 40 if path[-2].key in ("out", "down") else x, drawn
        )
    }


def decode(temperature, rows=tiny.PROMPTS, stop=STOP, **kwargs):
    method = tiny.build("lexinvariant", temperature)
    return generation.generate(params(), rows, method, stop, **kwargs)


@jax.jit
def _logits(table, tokens):
    return lex.apply(CONFIG, params()["target"], table, tokens).logits


def tables(rows, seed=0):
    keys = randomness.row_keys(seed, jnp.arange(rows))
    own = randomness.at(keys, jnp.zeros(rows, jnp.int32), randomness.TABLE)
    return keys, lex.draw(CONFIG, params()["target"], own)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_is_decoded_under_one_table_of_its_own(temperature):
    """A loop without cache that draws the same noise; rows of eight lengths."""
    found = decode(temperature)
    keys, table = tables(len(tiny.PROMPTS))
    texts = [list(prompt) for prompt in tiny.PROMPTS]
    for _ in range(12):
        padded = np.zeros((8, 64), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        logits = np.asarray(_logits(table, padded))
        lengths = np.array([len(text) for text in texts])
        last = logits[np.arange(8), lengths - 1]
        if temperature:
            noise = randomness.at(keys, jnp.asarray(lengths), randomness.SAMPLE)
            last = last + np.asarray(randomness.gumbel(noise, CONFIG.vocab_size))
        for text, token in zip(texts, last.argmax(axis=1), strict=True):
            text.append(int(token))
    for row, text, prompt in zip(found, texts, tiny.PROMPTS, strict=True):
        assert row.token_ids == text[len(prompt) :]
        assert row.stats["target_calls"] == 12
    assert not np.allclose(table[0], table[1])


def test_a_row_depends_on_its_own_number_alone():
    whole = decode(1.0)
    alone = decode(1.0, tiny.PROMPTS[3:4], row_ids=[3])
    assert alone[0].token_ids == whole[3].token_ids
    # The same prompt in two rows is under two ciphers: greedy texts differ.
    twice = decode(0.0, [tiny.PROMPTS[2]] * 2)
    assert twice[0].token_ids != twice[1].token_ids
    assert decode(0.0, seed=1)[2].token_ids != decode(0.0, seed=0)[2].token_ids


def test_streaming_growing_caches_and_a_mesh_change_nothing():
    # 150 tokens take more slots than a run begins with.
    stop = stopping.StopConfig(150)
    whole = decode(1.0, tiny.PROMPTS[:2], stop)
    streamed = [[], []]
    method = tiny.build("lexinvariant", 1.0)
    for event in generation.stream(params(), tiny.PROMPTS[:2], method, stop, every=40):
        streamed[event.row] += event.token_ids
    assert streamed == [row.token_ids for row in whole]
    mesh = sharding.make_mesh(2, 4)
    placed = {"target": jax.device_put(
        params()["target"], sharding.tree_shardings(params()["target"], mesh))}  # fmt: skip
    split = generation.generate(placed, tiny.PROMPTS, method, STOP, mesh=mesh)
    assert [row.token_ids for row in split] == [row.token_ids for row in decode(1.0)]


def test_end_of_text_is_said_without_having_been_seen_and_ends_rows():
    """A model without an opinion: end of text is as likely as any other token."""
    target = dict(params()["target"])
    target["final_norm"] = {"scale": target["final_norm"]["scale"] * 0}
    method, stop = tiny.build("lexinvariant", 1.0), generation.stop_config(CONFIG, 150)
    rows = generation.generate({"target": target}, tiny.PROMPTS, method, stop)
    ended = [row for row in rows if row.finish_reason == "eos"]
    assert len(ended) > 4
    assert all(row.token_ids[-1] == 5 and 5 not in row.token_ids[:-1] for row in ended)


def test_the_standard_model_is_decoded_by_the_same_method():
    config = CONFIG.replace(table="learned")
    target = lex.init(config, jax.random.key(1))
    method = methods.build("lexinvariant", {"target": config}, SamplingConfig())
    rows = generation.generate({"target": target}, [tiny.PROMPTS[2]] * 2, method, STOP)
    assert rows[0].token_ids == rows[1].token_ids  # one table for all
    text = [*tiny.PROMPTS[2], *rows[0].token_ids]
    logits = lex.apply(config, target, target["fixed"]["embedding"], jnp.array([text])).logits[0]
    start = len(tiny.PROMPTS[2])
    assert rows[0].token_ids == np.asarray(logits.argmax(axis=1))[start - 1 : -1].tolist()


def test_models_and_methods_that_do_not_go_together_are_refused():
    for name, config in (("autoregressive", CONFIG), ("lexinvariant", tiny.TARGET)):
        with pytest.raises(InputError, match=re.escape(f"method {name}: the target model")):
            methods.build(name, {"target": config}, SamplingConfig())
