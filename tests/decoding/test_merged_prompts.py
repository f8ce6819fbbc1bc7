"""Decoding after merged prompts against running the whole prefix again for every token."""

import functools

import jax
import numpy as np
import pytest

from decoding import generation, stopping
from decoding.autoregressive import autoregressive
from decoding.dynamic_vocabulary import merged_prompts, providers
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from decoding.sampling import SamplingConfig
from models import byte_level, hypernetwork, token_tables
from tests.decoding import tiny
from tests.decoding.test_embedding_cache import CONFIG, END, merged, own, params, plain, source
from tests.decoding.test_merging import TEXTS

STOP = stopping.StopConfig(10)
V = CONFIG.vocab_size


@functools.cache
def network():
    config = hypernetwork.for_model(CONFIG, hidden_dim=16, mlp_dim=16, num_heads=2, num_layers=2)
    return config, jax.jit(hypernetwork.init, static_argnums=0)(config, jax.random.key(3))


def predicted() -> providers.Provider:
    made = providers.hypernetwork(*network(), own(), source())
    return providers.copying(made, own(), source().specials)


def test_a_hypernetwork_is_asked_by_surface_form_and_specials_are_the_models():
    tokens = [*source().tokens[:5], "Ġwords", "pairs.pairs.pairs", END]
    found = predicted().embed(tokens)
    config, weights = network()
    table = token_tables.joined(own())
    ids = byte_level.surfaces(source(), tokens, pad_id=config.pad_id).ids
    expected = jax.jit(hypernetwork.apply, static_argnums=0)(config, weights, table, ids)
    special = np.isin(tokens, list(source().specials))
    np.testing.assert_allclose(found.input[~special], expected.input[~special], atol=1e-5)
    np.testing.assert_allclose(found.output[~special], expected.output[~special], atol=1e-5)
    np.testing.assert_array_equal(found.input[-1], own().input[source().specials[END]])
    np.testing.assert_array_equal(found.output[-1], own().output[source().specials[END]])
    # Two calls of other sizes give the same rows.
    halves = [predicted().embed(tokens[:3]).input, predicted().embed(tokens[3:]).input]
    np.testing.assert_allclose(np.concatenate(halves), found.input, atol=1e-5)
    # Original embeddings may be kept where there are any.
    kept = providers.copying(predicted(), own(), providers.vocabulary(source()))
    np.testing.assert_array_equal(kept.embed(["a"]).input[0], own().input[source().encode("a")[0]])


def setting(budget, keep):
    """Prompts as ids, and the method's parameters."""
    cache = EmbeddingCache(predicted(), capacity=200, scale=CONFIG.embedding_scale)
    ids = providers.vocabulary(source()) if keep else None
    prompts = merged_prompts.prompt_ids(cache, merged(budget=budget), V, ids)
    return prompts, {"target": params(), merged_prompts.ROLE: cache.table}


def naive(prompts, models, steps):
    """Greedy: the whole prefix, embedding by embedding, for every token."""
    own_rows = np.asarray(params()["embedder"]["embedding"]) * CONFIG.embedding_scale
    made = np.asarray(models[merged_prompts.ROLE])
    rows = [[own_rows[i] if i < V else made[i - V] for i in prompt] for prompt in prompts]
    texts = [[] for _ in prompts]
    for _ in range(steps):
        inputs = np.zeros((len(rows), 96, 16), np.float32)
        for r, row in enumerate(rows):
            inputs[r, : len(row)] = row
        logits = np.asarray(plain(CONFIG, params(), inputs))
        for r, row in enumerate(rows):
            texts[r].append(int(logits[r, len(row) - 1].argmax()))
            row.append(own_rows[texts[r][-1]])
    return texts


@pytest.mark.parametrize("keep", [False, True])
def test_prefill_and_cache_equal_running_the_prefix_again(keep):
    prompts, models = setting(25, keep)
    assert max(max(prompt) for prompt in prompts) >= V
    assert (min(min(prompt) for prompt in prompts) < V) is keep
    assert len({*map(len, prompts)}) > 2
    method = merged_prompts.merged_prompts(CONFIG, SamplingConfig())
    rows = generation.generate(models, prompts, method, STOP)
    assert tiny.texts(rows) == naive(prompts, models, 10)
    for row, text in zip(rows, TEXTS, strict=True):
        assert row.stats["target_calls"] == 10
        assert len(row.prompt_ids) < len(source().encode(text))  # slots that were saved
    # A row does not depend on its neighbours once it is cut.
    swapped = generation.generate(models, prompts[::-1], method, STOP)
    assert tiny.texts(swapped)[::-1] == tiny.texts(rows)


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_no_merges_and_own_rows_are_plain_decoding(penalty):
    prompts, models = setting(0, True)
    assert prompts == [source().encode(text) for text in TEXTS]
    sampling = SamplingConfig(temperature=0.8, repetition_penalty=penalty)
    rows = generation.generate(
        models, prompts, merged_prompts.merged_prompts(CONFIG, sampling), STOP
    )
    plainly = generation.generate(models, prompts, autoregressive(CONFIG, sampling), STOP)
    assert tiny.texts(rows) == tiny.texts(plainly)
