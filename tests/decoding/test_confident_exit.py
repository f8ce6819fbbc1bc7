"""Exits by confidence: against a naive loop, and what the layers above an exit hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, stopping
from decoding.confident_exit import confidence, confident_exit, threshold
from decoding.sampling import SamplingConfig
from models import cache as kv
from models import transformer
from models.errors import InputError
from models.rope import RopeConfig
from models.state_propagation import propagate
from tests.decoding import tiny

L, NEW, SPAN = 4, 6, 8
CONFIG = tiny.TARGET.replace(num_layers=L, window=None, local_layers=())
STOP = stopping.StopConfig(NEW)
ROWS = [tiny.PROMPTS[i] for i in (6, 1, 0)]


@functools.cache
def params() -> dict:
    return {"target": jax.jit(lambda k: transformer.init(CONFIG, k))(jax.random.key(2))}


def decode(least, measure="softmax", rows=ROWS, **more):
    method = confident_exit(CONFIG, SamplingConfig(), least, SPAN, measure)
    return generation.generate(params(), rows, method, STOP, **more)


@functools.partial(jax.jit, static_argnames="layer")
def one_layer(model, layer, x, cache):
    out = transformer.apply(
        CONFIG, model, x, cache=cache, layers=(layer, layer + 1), collect=(layer + 1,),
        with_logits=False,
    )  # fmt: skip
    return out.collected[0], out.cache


@jax.jit
def head(model, x):
    return transformer.unembed(CONFIG, model, transformer.final_norm(CONFIG, model, x))


def naive(prompt, least):
    """One row, layer by layer; an exited stream goes through the layers above for their cache."""
    model, text, used = params()["target"], list(prompt), []
    cache = kv.create(CONFIG, 1, 64)

    def read(token, t):
        nonlocal cache
        x, gone, layers = jnp.asarray([[token]]), False, 0
        for layer in range(L):
            after, cache = one_layer(model, layer, x, cache)
            if gone:
                continue
            x, layers = after, layers + 1
            logits = np.asarray(head(model, after)[0, 0], float)
            p = np.sort(np.exp(logits) / np.exp(logits).sum())
            gone = t >= 0 and p[-1] - p[-2] >= min(1, 0.9 * least + 0.1 * np.exp(-4 * t / SPAN))
        cache = kv.truncate(cache, cache.lengths + 1)
        return int(logits.argmax()), layers

    for token in text[:-1]:
        read(token, -1)  # prompts run all layers
    for t in range(NEW):
        token, layers = read(text[-1], t)
        text.append(token)
        used.append(layers)
    return text[len(prompt) :], used


def test_tokens_and_layers_are_those_of_a_naive_loop():
    rows = decode(0.05)
    wanted = [naive(prompt, 0.05) for prompt in ROWS]
    assert tiny.texts(rows) == [text for text, _ in wanted]
    layers = np.array([used for _, used in wanted])
    assert 1 < layers.mean() < L
    assert [row.stats["layers_needed"] for row in rows] == layers.sum(axis=1).tolist()
    # A batch runs a layer while one of its rows wants it.
    together = layers.max(axis=0).sum()
    assert {row.stats["layers_run"] for row in rows} == {together}
    alone = decode(0.05, rows=ROWS[1:2])[0]
    assert alone.token_ids == rows[1].token_ids
    assert alone.stats["layers_run"] == layers[1].sum() < together


def test_confidence_is_a_gap_of_probabilities_or_a_cosine():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 3, CONFIG.embed_dim)).astype(np.float32)
    model = params()["target"]
    logits = np.asarray(head(model, jnp.asarray(after)), float)
    p = np.sort(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), axis=-1)
    found = confidence(CONFIG, model, "softmax", before, jnp.asarray(after))
    np.testing.assert_allclose(found, p[:, -1] - p[:, -2], rtol=1e-4)
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    found = confidence(CONFIG, model, "cosine", jnp.asarray(before), jnp.asarray(after))
    np.testing.assert_allclose(found, (before * after).sum(-1) / norms, rtol=1e-4)


def test_who_never_leaves_is_plain_decoding():
    method = tiny.methods.build("autoregressive", {"target": CONFIG}, SamplingConfig())
    plain = generation.generate(params(), ROWS, method, STOP)
    rows = decode(1.5)
    assert tiny.texts(rows) == tiny.texts(plain)
    assert all(row.stats["layers_needed"] == L * NEW for row in rows)
    assert all(row.stats["layers_run"] == NEW for row in decode(0.0, "cosine", ROWS[:1]))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_propagated_keys_and_values_are_those_that_the_layer_would_write(qk_norm):
    config = tiny.TARGET.replace(
        qk_norm=qk_norm, qkv_bias=not qk_norm, local_rope=RopeConfig(theta=100.0)
    )
    model = transformer.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 1, config.embed_dim)).astype(np.float32))
    cache = kv.truncate(kv.create(config, 2, 8), jnp.array([3, 5]))
    for layer in range(config.num_layers):
        run = jax.jit(
            lambda p, x, layer=layer: (
                transformer.apply(
                    config, p, x, cache=cache, layers=(layer, layer + 1), with_logits=False
                ).cache
            )
        )
        wanted, found = run(model, x), propagate(config, model, x, cache, layer)
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
        assert float(jnp.abs(found.keys[layer]).sum()) > 0


def test_the_threshold_falls_as_published():
    steps = np.arange(0, 40)
    found = np.asarray(threshold(0.8, jnp.asarray(steps), 20))
    np.testing.assert_allclose(found, 0.72 + 0.1 * np.exp(-steps / 5), rtol=1e-5)
    assert float(threshold(2.0, jnp.int32(0), 20)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_layers": 3}, "min_layers: 3 must be between 1 and 2"),
        ({"span": 0}, "span"),
        ({"measure": "entropy"}, "measure: 'entropy'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        tiny.build("calm", **options)
