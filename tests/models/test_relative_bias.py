"""T5's relative positions: the official buckets, a naive model, keys in any slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cache as kv
from models import masks, relative_bias, transformer
from models.config import RelativeBiasConfig
from models.errors import InputError
from tests.models.random_models import BASE, CASES, params

CONFIG = CASES["relative"]


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_transformers(causal):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-300, 301)
    for num_buckets, max_distance in ((32, 128), (8, 12)):
        expected = t5.T5Attention._relative_position_bucket(
            torch.tensor(-distance),  # of the key, seen from the query
            bidirectional=not causal,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
        found = relative_bias.buckets(
            jnp.array(distance), num_buckets=num_buckets, max_distance=max_distance, causal=causal
        )
        np.testing.assert_array_equal(np.asarray(found), expected.numpy())
        assert len(set(np.asarray(found)[distance >= 0].tolist())) == num_buckets // (2 - causal)


def test_every_layer_adds_the_same_bias_of_its_head_and_distance():
    """Against a call without positions whose scores get the bias from a naive loop."""
    weights = params(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 14))
    table = np.asarray(weights["relative_bias"]["embedding"])  # [buckets, K, G]
    bias = np.zeros((*table.shape[1:], 14, 14), np.float32)
    for query in range(14):
        for key in range(query + 1):
            bucket = relative_bias.buckets(
                jnp.array(query - key), num_buckets=8, max_distance=12, causal=True
            )
            bias[:, :, query, key] = table[int(bucket)]
    x = weights["embedder"]["embedding"][tokens]
    for layer in range(CONFIG.num_layers):
        p = weights[f"layers_{layer}"]
        y = _rmsnorm(x, p["attention_norm"]["scale"])
        qkv = np.einsum("btd,dkgh->btkgh", y, p["attention"]["qkv"]["kernel"])
        queries, keys, values = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        scores = np.einsum("btkgh,bskh->bkgts", queries, keys) * CONFIG.head_dim**-0.5 + bias
        scores = np.where(np.tri(14, dtype=bool), scores, -np.inf)
        weights_ = np.exp(scores - scores.max(-1, keepdims=True))
        weights_ /= weights_.sum(-1, keepdims=True)
        mixed = np.einsum("bkgts,bskh->btkgh", weights_, values)
        x = x + np.einsum("btkgh,kghd->btd", mixed, p["attention"]["out"]["kernel"])
        y = _rmsnorm(x, p["mlp_norm"]["scale"])
        both = np.einsum("btd,dcf->btcf", y, p["mlp"]["gate_up"]["kernel"])
        inner = both[..., 0, :] / (1 + np.exp(-both[..., 0, :])) * both[..., 1, :]
        x = x + inner @ np.asarray(p["mlp"]["down"]["kernel"])
    hidden = _rmsnorm(x, weights["final_norm"]["scale"])
    found = transformer.apply(CONFIG, weights, jnp.array(tokens), with_logits=False).hidden
    np.testing.assert_allclose(np.asarray(found), hidden, atol=2e-4)


def _rmsnorm(x, scale):
    x = np.asarray(x)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)


def test_ragged_rows_keys_in_any_slot_and_positions_given_once():
    weights = params(CONFIG)
    tokens = jnp.array(np.random.default_rng(1).integers(0, 64, (3, 8)), jnp.int32)
    full = transformer.apply(CONFIG, weights, tokens).logits
    once = transformer.apply(CONFIG, weights, tokens, positions=jnp.arange(8)[None]).logits
    np.testing.assert_allclose(once, full, atol=1e-5)
    # Moving a whole row to later positions changes nothing: positions are relative.
    moved = transformer.apply(CONFIG, weights, tokens, positions=jnp.arange(8)[None] + 20).logits
    np.testing.assert_allclose(moved, full, atol=1e-5)
    # Keys written to reversed slots, as a draft tree may, with their positions said.
    cache = kv.create(CONFIG, 3, 8)
    slots = jnp.broadcast_to(jnp.arange(8)[::-1], (3, 8))
    positions = jnp.broadcast_to(jnp.arange(8), (3, 8))
    mask = masks.causal(positions, 8)[:, :, ::-1]
    out = transformer.apply(
        CONFIG, weights, tokens, cache=cache, slots=slots, positions=positions, mask=mask,
        key_positions=slots,
    )  # fmt: skip
    np.testing.assert_allclose(out.logits, full, atol=1e-4)


def test_configs_that_make_no_sense_are_refused():
    for field, value in (
        ("relative_buckets", 7),
        ("relative_max_distance", 4),
        ("positions", "rope"),
    ):
        with pytest.raises(InputError, match=field):
            CONFIG.replace(**{field: value})
    with pytest.raises(InputError, match="RelativeBiasConfig"):
        BASE.replace(positions="t5")
    assert isinstance(CONFIG, RelativeBiasConfig)
    shapes = jax.tree.leaves(transformer.param_shapes(CONFIG))
    assert CONFIG.num_params() == sum(np.prod(leaf.shape) for leaf in shapes)
