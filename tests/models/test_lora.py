"""Low-rank adapters against sums formed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lora, transformer
from models.errors import InputError
from tests.models import random_models

CONFIG = random_models.BASE
HOW = lora.LoraConfig(rank=3, alpha=6.0)


def params():
    return random_models.params(CONFIG)


def trained(how=HOW, seed=0):
    """Adapters whose b is not zero any more."""
    rng = np.random.default_rng(seed)
    found = lora.init(how, params(), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), found)


def test_a_fresh_adapter_changes_nothing():
    fresh = lora.init(HOW, params(), jax.random.key(0))
    assert len(fresh) == 4 * CONFIG.num_layers
    same = lora.merge(HOW, params(), fresh)
    jax.tree.map(np.testing.assert_array_equal, same, params())


def test_the_sum_is_that_of_the_pair_and_other_parameters_stay():
    adapters, base = trained(), params()
    merged = lora.merge(HOW, base, adapters)
    pair = adapters["layers_1/attention/out/kernel"]
    kernel = base["layers_1"]["attention"]["out"]["kernel"]
    delta = 2.0 * np.asarray(pair["a"]) @ np.asarray(pair["b"])
    assert pair["a"].shape[0] == np.prod(kernel.shape[:3])
    found = merged["layers_1"]["attention"]["out"]["kernel"]
    np.testing.assert_allclose(found, kernel + delta.reshape(kernel.shape), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(merged["embedder"]["embedding"], base["embedder"]["embedding"])
    assert lora.num_params(adapters) == sum(
        HOW.rank * sum(sizes) for sizes in lora.adapted(HOW, base).values()
    )
    # As a product on the side, which is how adapters are usually run.
    x = np.random.default_rng(0).normal(size=(5, CONFIG.embed_dim)).astype(np.float32)
    pair = adapters["layers_0/attention/qkv/kernel"]
    beside = x @ np.asarray(base["layers_0"]["attention"]["qkv"]["kernel"]).reshape(16, -1)
    beside = beside + 2.0 * (x @ np.asarray(pair["a"])) @ np.asarray(pair["b"])
    inside = x @ np.asarray(merged["layers_0"]["attention"]["qkv"]["kernel"]).reshape(16, -1)
    np.testing.assert_allclose(inside, beside, rtol=1e-3, atol=1e-4)


def test_only_some_kernels_and_dropout_in_training():
    how = lora.LoraConfig(rank=2, alpha=2.0, kernels=("attention/qkv/kernel",), dropout=0.5)
    adapters = trained(how)
    assert set(adapters) == {f"layers_{i}/attention/qkv/kernel" for i in range(2)}
    base = params()["layers_0"]["attention"]["qkv"]["kernel"]

    def delta(key):
        found = lora.merge(how, params(), adapters, key)["layers_0"]["attention"]["qkv"]["kernel"]
        return np.asarray(found - base).reshape(16, -1)

    whole, dropped = delta(None), delta(jax.random.key(1))
    gone = np.abs(dropped).max(axis=1) == 0
    assert 2 < gone.sum() < 14  # inputs that the adapter does not see
    np.testing.assert_allclose(dropped[~gone], 2 * whole[~gone], rtol=1e-3, atol=1e-5)
    assert (delta(jax.random.key(2)) != dropped).any()


def test_gradient_reaches_the_adapters_through_the_frozen_model():
    tokens = jnp.arange(6)[None]

    def loss(adapters):
        merged = lora.merge(HOW, params(), adapters)
        return transformer.apply(CONFIG, merged, tokens).logits.var()

    gradient = jax.jit(jax.grad(loss))(trained())
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_files(tmp_path):
    adapters = trained()
    lora.save(tmp_path / "adapters", HOW, adapters)
    how, again = lora.load(tmp_path / "adapters", CONFIG)
    assert how == HOW
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    with pytest.raises(InputError, match="has shape"):
        lora.load(tmp_path / "adapters", CONFIG.replace(mlp_dim=32))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rank": 0}, "rank: 0 must be at least 1"),
        ({"dropout": 1.0}, "dropout: 1.0 must be at least 0"),
        ({"kernels": ("mlp/kernel",)}, "kernels: 'mlp/kernel' is not known"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        lora.LoraConfig(**fields)
