"""Embeddings on the fly: averages, copies, the cache, and merged rows through a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.dynamic_vocabulary import (
    boundaries,
    embedding_cache,
    merged_input,
    merging,
    providers,
)
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from models import byte_level, token_tables, transformer
from models.errors import InputError
from models.token_tables import Tables
from tests.decoding import tiny
from tests.decoding.test_merging import TEXTS, encode, rule, tokenizer
from tests.models import random_models

CONFIG = tiny.TARGET.replace(
    vocab_size=300, window=None, local_layers=(), tie_embeddings=False, embedding_scale=2.0
)
END = "<|endoftext|>"


@functools.cache
def params():
    return random_models.params(CONFIG)


@functools.cache
def source() -> byte_level.ByteLevel:
    return byte_level.normalise(tokenizer(), pre_tokenization="own")


def own() -> Tables:
    return providers.model_rows(CONFIG, params())


def fvt(calls: list | None = None) -> providers.Provider:
    average = providers.average(CONFIG, params(), source().decompose)
    provider = providers.copying(average, own(), source().specials)

    def embed(tokens):
        if calls is not None:
            calls.append(list(tokens))
        return provider.embed(tokens)

    return provider._replace(embed=embed)


def merged(texts=TEXTS, budget=None) -> list[list[str]]:
    return merging.merge(encode(texts), budget, rule("pretokens")).tokens


def test_an_average_of_constituents():
    rows = own()
    tokens = [END, "Ġ", "pairs", "Ġwords", "ðŁĻĤ", "ð"]
    found = providers.copying(
        providers.average(CONFIG, params(), source().decompose), rows, source().specials
    ).embed(tokens)
    for token, row, head in zip(tokens, found.input, found.output, strict=True):
        ids = source().decompose(token)
        np.testing.assert_allclose(row, np.mean([rows.input[i] for i in ids], axis=0), rtol=1e-5)
        np.testing.assert_allclose(head, np.mean([rows.output[i] for i in ids], axis=0), rtol=1e-5)
    assert len(source().decompose("Ġwords")) > 1
    # Tokens of the vocabulary keep their rows, the special one among them.
    for token in source().tokens[: CONFIG.vocab_size]:
        i = source().tokens.index(token)
        np.testing.assert_array_equal(fvt().embed([token]).input[0], rows.input[i])
    assert fvt().embed([]).input.shape == (0, 16)


def test_own_rows_are_copied_and_the_rest_asked_for():
    asked = []
    constant = providers.Provider(
        "one",
        16,
        lambda tokens: (
            asked.extend(tokens) or Tables(np.ones((len(tokens), 16)), -np.ones((len(tokens), 16)))
        ),
    )
    tokens = ["a", END, "ab", "a"]
    found = providers.copying(constant, own(), source().specials).embed(tokens)
    assert asked == ["a", "ab", "a"]
    i = source().specials[END]
    np.testing.assert_array_equal(found.input[1], own().input[i])
    np.testing.assert_array_equal(found.output[1], own().output[i])
    assert (found.input[[0, 2, 3]] == 1).all()
    assert (found.output[[0, 2, 3]] == -1).all()


def test_tables_in_chunks_equal_one_call():
    tokens = [*source().tokens, "Ġwords", "pairs."]
    whole, parts = fvt().embed(tokens), providers.in_chunks(fvt(), tokens, 7)
    np.testing.assert_array_equal(whole.input, parts.input)
    np.testing.assert_array_equal(whole.output, parts.output)
    config = token_tables.retokenized_config(CONFIG, len(tokens))
    changed = token_tables.with_tables(params(), whole)
    text = jnp.array([source().encode(TEXTS[0])])
    before, after = plain(CONFIG, params(), text), plain(config, changed, text)
    np.testing.assert_allclose(after[..., : CONFIG.vocab_size], before, atol=1e-5)


def test_hits_equal_making_rows_anew():
    cache = EmbeddingCache(fvt(), capacity=200, scale=CONFIG.embedding_scale)
    for batch in (merged(TEXTS[:2]), merged(TEXTS), merged(TEXTS[2:]), merged(TEXTS[:2])):
        slots = cache.slots(batch)
        for row, places in zip(batch, slots, strict=True):
            expected = fvt().embed(row).input * CONFIG.embedding_scale
            np.testing.assert_array_equal(np.asarray(cache.table)[places], expected)
    assert cache.counts.hits > 0


def test_the_oldest_go_first_but_none_of_this_batch():
    cache = EmbeddingCache(fvt(), capacity=4)
    cache.slots([["a", "b"], ["c"]])
    cache.slots([["a"], ["d", "e"]])  # b is the oldest
    assert "b" not in cache
    assert all(token in cache for token in "acde")
    assert cache.counts.evicted == 1
    # c, the oldest now, is needed; d, a and e are not: two of them go, in order of use.
    slots = cache.slots([["c", "f", "g"]])
    assert all(token in cache for token in "cfg")
    assert "e" in cache
    assert "a" not in cache
    assert "d" not in cache
    assert len({*slots[0]}) == 3
    for batch in (["c"], ["f"], ["g", "c"], ["x", "y"], ["c", "g", "x", "z"]):
        places = cache.slots([batch])[0]
        np.testing.assert_array_equal(np.asarray(cache.table)[places], fvt().embed(batch).input)
    assert len(cache) == 4


def test_calls_of_the_provider_fall_and_are_counted():
    calls = []
    cache = EmbeddingCache(fvt(calls), capacity=300)
    batches = [merged(TEXTS[:3]), merged(TEXTS[1:4]), merged(TEXTS), merged(TEXTS)]
    unique = [len({token for row in batch for token in row}) for batch in batches]
    for batch in batches:
        cache.slots(batch)
    asked = [len(call) for call in calls]
    assert asked[0] == unique[0]
    assert asked[1] < unique[1]
    assert len(calls) == 3  # the last batch was all there
    assert all(len(set(call)) == len(call) for call in calls)
    counts = cache.counts
    assert (counts.batches, counts.calls, counts.misses) == (4, 3, sum(asked))
    assert counts.hits == sum(unique) - sum(asked)


def test_a_batch_that_does_not_fit():
    cache = EmbeddingCache(fvt(), capacity=2)
    with pytest.raises(InputError, match="capacity: 2 rows do not hold the batch's 3"):
        cache.slots([["a", "b"], ["c"]])
    with pytest.raises(InputError, match="capacity: 0 must be at least 1"):
        EmbeddingCache(fvt(), capacity=0)


WIDTH = 96


@functools.partial(jax.jit, static_argnames="config")
def run(config, model, table, rows):
    return merged_input.apply(config, model, table, rows).logits


@functools.partial(jax.jit, static_argnames="config")
def plain(config, model, inputs):
    """The model alone: what stands to the right of a row does not matter if it is causal."""
    return transformer.apply(config, model, inputs).logits


@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_either_side_equals_no_padding(causal):
    config = CONFIG.replace(causal=causal, mask_token_id=None if causal else 1)
    cache = EmbeddingCache(fvt(), capacity=300, scale=config.embedding_scale)
    slots = cache.slots(merged(budget=20))
    longest = max(map(len, slots))
    assert len({len(row) for row in slots}) > 2
    assert longest < WIDTH
    sides = {side: merged_input.pad(slots, side=side, width=WIDTH) for side in merged_input.SIDES}
    logits = {side: run(config, params(), cache.table, rows) for side, rows in sides.items()}
    width = WIDTH if causal else longest
    alone = np.zeros((len(slots), width, 16), np.float32)
    for r, row in enumerate(slots):
        alone[r, : len(row)] = np.asarray(cache.table)[row]
    expected = np.asarray(plain(config, params(), alone))
    for r, row in enumerate(slots):
        for side, rows in sides.items():
            valid = np.asarray(rows.valid[r])
            assert np.asarray(rows.last)[r] == np.flatnonzero(valid)[-1]
            if causal or len(row) == longest:
                mine = np.asarray(logits[side][r])[valid]
                np.testing.assert_allclose(mine, expected[r, : len(row)], atol=2e-5)
        # Both sides agree for every row, encoder or decoder.
        right, left = (np.asarray(logits[s][r])[sides[s].valid[r]] for s in ("right", "left"))
        np.testing.assert_allclose(left, right, atol=2e-5)
    assert (sides["left"].positions[:, -1] == [len(row) - 1 for row in slots]).all()


def test_no_merges_and_own_rows_are_the_model_itself():
    cache = EmbeddingCache(fvt(), capacity=300, scale=CONFIG.embedding_scale)
    rows = merged_input.pad(cache.slots(merged(budget=0)), width=WIDTH)
    logits = run(CONFIG, params(), cache.table, rows)
    tokens = np.zeros(rows.slots.shape, np.int32)
    for r, text in enumerate(TEXTS):
        ids = source().encode(text)
        tokens[r, : len(ids)] = ids
    expected = plain(CONFIG, params(), tokens)
    where = rows.valid
    np.testing.assert_allclose(np.asarray(logits)[where], np.asarray(expected)[where], atol=2e-5)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="side: 'middle' is not known"):
        merged_input.pad([[1]], side="middle")
    with pytest.raises(InputError, match="chunk: 0 must be at least 1"):
        providers.in_chunks(fvt(), ["a"], 0)
    assert embedding_cache.CAPACITY == 5000
    assert boundaries.text_of("ð") is None
