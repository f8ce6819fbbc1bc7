"""Masked image models conditioned on text vectors, against those of classes with a table made by
hand; the sampler's null branch; files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import randomness
from decoding.images import mask_predict
from decoding.images.mask_predict import SamplerConfig
from models import enat
from models.errors import InputError

E, B = 5, 3
BY_CLASS = enat.ENATConfig(
    num_codes=7, num_tokens=9, num_classes=B, embed_dim=8, num_heads=2, encoder_layers=1
)
CONFIG = enat.TextENATConfig(**dataclasses.asdict(BY_CLASS), text_dim=E)
UNIFORM = dataclasses.replace(CONFIG, disentangled=False)
RNG = np.random.default_rng(0)
TEXTS = RNG.normal(size=(B, E)).astype(np.float32)
MASKED = np.argsort(RNG.uniform(size=(B, 9)), 1) < 6
IDS = np.where(MASKED, CONFIG.mask_id, RNG.integers(0, 7, (B, 9)))
KEYS = randomness.row_keys(0, jnp.arange(B))
apply = jax.jit(enat.apply, static_argnums=0)


@functools.cache
def params_of(config):
    """Random everywhere, the statistics of texts too."""
    params = jax.jit(enat.init, static_argnums=0)(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


def by_hand(config):
    """The same network with a class for each text, whose embeddings are worked out here."""
    params = dict(params_of(config))
    norm, text = params.pop("text_norm"), params.pop("text")
    null = params.pop("null_text")["embedding"]
    rows = (TEXTS * norm["scale"] + norm["bias"]) @ text["kernel"] + text["bias"]
    table = {"embedding": np.concatenate([rows, null]).astype(np.float32)}
    model = dataclasses.replace(BY_CLASS, disentangled=config.disentangled)
    return model, {**params, "classes": table}


@pytest.mark.parametrize("config", [CONFIG, UNIFORM], ids=["enat", "uniform"])
def test_a_text_stands_where_a_class_does(config):
    model, params = by_hand(config)
    indices = enat.indices_of(MASKED)
    texts = np.stack([TEXTS[0], TEXTS[2], np.zeros(E, np.float32)])
    found = apply(config, params_of(config), IDS, texts, indices)
    expected = apply(model, params, IDS, np.array([0, 2, model.null_class]), indices)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(found.features, expected.features, atol=1e-5)


def test_visible_tokens_alone_are_encoded_with_their_text():
    """What training reuses."""
    model, params = by_hand(CONFIG)
    visible = np.nonzero(~MASKED)[1].reshape(B, -1)
    encode = jax.jit(enat.encode_visible, static_argnums=0)
    found = encode(CONFIG, params_of(CONFIG), IDS, TEXTS, visible)
    np.testing.assert_allclose(found, encode(model, params, IDS, np.arange(B), visible), atol=1e-5)


def test_another_caption_gives_other_logits_to_its_row_alone():
    indices, params = enat.indices_of(MASKED), params_of(CONFIG)
    first = np.asarray(apply(CONFIG, params, IDS, TEXTS, indices).logits)
    texts = np.stack([TEXTS[1], *TEXTS[1:]])
    second = np.asarray(apply(CONFIG, params, IDS, texts, indices).logits)
    assert np.abs(first[0] - second[0]).max() > 0.05
    np.testing.assert_array_equal(first[1:], second[1:])


def test_the_sampler_guides_by_the_null_vector():
    """Row for row the images of the network of classes, whose null class is tested by itself."""
    model, params = by_hand(CONFIG)
    sampler = SamplerConfig(steps=2, guidance=9.0)
    found = mask_predict.sample(CONFIG, sampler, params_of(CONFIG), KEYS, TEXTS)
    expected = mask_predict.sample(model, sampler, params, KEYS, jnp.arange(B))
    np.testing.assert_array_equal(found.ids, expected.ids)
    table = np.array(params["classes"]["embedding"])
    table[-1] += 3
    other = {**params, "classes": {"embedding": table}}
    changed = mask_predict.sample(model, sampler, other, KEYS, jnp.arange(B))
    assert (changed.ids != found.ids).any()  # so that another null vector would have been seen


def test_null_rows_train_the_null_embedding_and_nothing_trains_the_statistics():
    indices = enat.indices_of(MASKED)

    @jax.jit
    def gradients(texts):
        def loss(params):
            return jnp.sum(jnp.sin(enat.apply(CONFIG, params, IDS, texts, indices).logits))

        return jax.grad(loss)(params_of(CONFIG))

    size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    of_texts, of_nulls = gradients(TEXTS), gradients(np.zeros_like(TEXTS))
    assert size(of_texts["text"]) > 0
    assert size(of_texts["null_text"]) == 0
    assert size(of_nulls["text"]) == 0
    assert size(of_nulls["null_text"]) > 0
    assert size(of_texts["text_norm"]) == 0


def test_statistics_standardise():
    mean, deviation = RNG.normal(size=E), RNG.uniform(0.5, 2, size=E)
    params = enat.with_text_statistics(params_of(CONFIG), mean, deviation)
    norm = params["text_norm"]
    np.testing.assert_allclose(
        TEXTS * norm["scale"] + norm["bias"], (TEXTS - mean) / deviation, atol=1e-5
    )


def test_a_saved_network_is_the_same(tmp_path):
    enat.save(tmp_path / "enat", CONFIG, params_of(CONFIG))
    config, loaded = enat.load(tmp_path / "enat")
    assert config == CONFIG
    assert isinstance(config, enat.TextENATConfig)
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(CONFIG))


def test_bad_input():
    indices = enat.indices_of(MASKED)
    with pytest.raises(InputError, match=r"condition: shape \(3, 4\) must be \(3, 5\)"):
        enat.apply(CONFIG, params_of(CONFIG), IDS, TEXTS[:, :4], indices)
    with pytest.raises(InputError, match=r"condition: shape \(3, 5\) must be \(3,\)"):
        enat.apply(*by_hand(CONFIG), IDS, TEXTS, indices)
    with pytest.raises(InputError, match=r"enat.text_dim: 0 must be at least 1"):
        dataclasses.replace(CONFIG, text_dim=0)
