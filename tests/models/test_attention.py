"""Attention against a loop over rows, queries and heads in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import attend

B, T, S, H = 2, 3, 7, 4


def naive(queries, keys, values, mask, scale, softcap):
    out = np.zeros(queries.shape)
    for b, t, k, g in np.ndindex(queries.shape[:-1]):
        visible = np.flatnonzero(mask[b, t])
        scores = keys[b, k, visible] @ queries[b, t, k, g] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, k, g] = weights / weights.sum() @ values[b, k, visible]
    return out


def arrays(K, G, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T, S)) < 0.6
    mask[..., 0] = True
    shapes = (B, T, K, G, H), (B, K, S, H), (B, K, S, H)
    return *(rng.normal(size=shape).astype(dtype) for shape in shapes), mask


@pytest.mark.parametrize("K,G", [(1, 1), (4, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_agrees_with_the_loop(K, G, softcap):
    *qkv, mask = arrays(K, G)
    found = attend(*qkv, mask, scale=0.7, softcap=softcap)
    assert found.shape == (B, T, K, G, H)
    np.testing.assert_allclose(found, naive(*qkv, mask, 0.7, softcap), atol=1e-5)


def test_large_scores_neither_overflow_nor_lose_the_maximum():
    queries, keys, values, mask = arrays(2, 2)
    found = attend(queries * 1e3, keys * 1e3, values, mask, scale=1.0)
    expected = naive(queries * 1e3, keys * 1e3, values, mask, 1.0, None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_hidden_keys_hold_does_not_matter():
    queries, keys, values, mask = arrays(2, 2)
    mask = np.broadcast_to(np.arange(S) < 4, mask.shape)
    rubbish = keys.copy(), values.copy()
    for store in rubbish:
        store[:, :, 4:] = 1e30
    np.testing.assert_array_equal(
        attend(queries, *rubbish, mask, scale=1.0), attend(queries, keys, values, mask, scale=1.0)
    )


def test_a_query_that_sees_nothing_gives_the_mean_and_a_finite_gradient():
    queries, keys, values, mask = arrays(2, 2)
    mask[0, 1] = False
    found = attend(queries, keys, values, mask, scale=1.0)
    np.testing.assert_allclose(
        found[0, 1], np.broadcast_to(values[0].mean(axis=1)[:, None], (2, 2, H)), atol=1e-5
    )
    gradient = jax.grad(lambda q: attend(q, keys, values, mask, scale=1.0).sum())(queries)
    assert np.isfinite(gradient).all()


def test_bfloat16_in_bfloat16_out_softmax_in_float32():
    *qkv, mask = arrays(2, 2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    found = attend(*low, mask, scale=0.5)
    assert found.dtype == jnp.bfloat16
    expected = naive(*(np.asarray(x, np.float64) for x in low), mask, 0.5, None)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0.02, atol=0.02)
