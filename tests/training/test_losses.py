import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from training import losses

B, T, V = 2, 3, 11


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, T, V)).astype(np.float32) * 3
    target_logits = rng.normal(size=(B, T, V)).astype(np.float32) * 3
    return logits, target_logits, rng.integers(0, V, (B, T))


def test_cross_entropy_is_minus_the_log_probability_of_the_target(arrays):
    logits, _, targets = arrays
    expected = -np.take_along_axis(
        special.log_softmax(logits.astype(np.float64), -1), targets[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(losses.cross_entropy(logits, targets), expected, rtol=1e-5)


def test_cross_entropy_gradient_is_softmax_minus_one_hot(arrays):
    logits, _, targets = arrays
    gradient = jax.grad(lambda x: losses.cross_entropy(x, targets).sum())(jnp.asarray(logits))
    expected = special.softmax(logits, -1) - np.eye(V)[targets]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_cross_entropy_survives_large_bfloat16_logits():
    logits = jnp.array([300.0, -300.0, 0.0], jnp.bfloat16)
    found = losses.cross_entropy(logits, jnp.array(1))
    assert found.dtype == jnp.float32
    assert float(found) == 600.0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_is_the_relative_entropy_of_the_softened_target(arrays, temperature):
    logits, target_logits, _ = arrays
    p = special.softmax(target_logits.astype(np.float64) / temperature, -1)
    q = special.softmax(logits.astype(np.float64) / temperature, -1)
    expected = special.rel_entr(p, q).sum(-1) * temperature**2
    found = losses.forward_kl(logits, target_logits, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_forward_kl_teaches_the_model_and_leaves_the_target_alone(arrays):
    logits, target_logits, _ = arrays
    to_model, to_target = jax.grad(lambda x, y: losses.forward_kl(x, y, 2.0).sum(), argnums=(0, 1))(
        jnp.asarray(logits), jnp.asarray(target_logits)
    )
    # d/dx of T^2 KL(p || softmax(x / T)) is T (q - p).
    p, q = special.softmax(target_logits / 2, -1), special.softmax(logits / 2, -1)
    np.testing.assert_allclose(to_model, 2 * (q - p), atol=1e-5)
    assert not np.any(to_target)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_mixes_soft_and_hard(arrays, weight):
    logits, target_logits, targets = arrays
    found = losses.distillation(logits, target_logits, targets, weight=weight, temperature=2.0)
    p, q = special.softmax(target_logits / 2, -1), special.softmax(logits / 2, -1)
    soft = special.rel_entr(p, q).sum(-1) * 4
    log_q = special.log_softmax(logits, -1)
    hard = -np.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, weight * soft + (1 - weight) * hard, rtol=1e-4)


def test_masked_mean_counts_only_what_the_mask_lets_through():
    values, mask = jnp.array([[1.0, 5.0], [3.0, 100.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    assert float(losses.masked_mean(values, mask)) == 2.0
    assert float(losses.masked_mean(values, jnp.zeros((2, 2)))) == 0.0


def test_uniform_bytes_cost_eight_bits_each():
    nats = 10 * np.log(256)
    assert losses.bits_per_byte(nats, 10) == pytest.approx(8.0)
