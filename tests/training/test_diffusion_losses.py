"""Losses of masked diffusion against loops in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from training import diffusion_losses
from training.corruption import Noisy

B, T, V = 3, 5, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(B, T, V)).astype(np.float32) * 3
TARGETS = LOGITS.argmax(-1)
TARGETS[:, ::2] = RNG.integers(0, V, (B, 3))
NATS = -np.take_along_axis(special.log_softmax(LOGITS, -1), TARGETS[..., None], -1)[..., 0]
# Row 0 has every kind; row 1 nothing masked; row 2 nothing changeable.
KINDS = np.array([list("mckmp"), list("kkcpp"), list("ppppp")])
PROBABILITY = np.array([[0.25], [0.9], [0.5]], np.float32)
NOISY = Noisy(TARGETS, KINDS == "m", KINDS == "c", KINDS == "k", PROBABILITY)
CHANGEABLE = KINDS != "p"


def test_elbo_divides_by_the_probability_and_the_rows_length():
    expected = (NATS[0, 0] + NATS[0, 3]) / 0.25 / 4 / B
    found = diffusion_losses.denoising(NATS, NOISY, CHANGEABLE, "elbo")
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_mean_is_over_masked_tokens():
    found = diffusion_losses.denoising(NATS, NOISY, CHANGEABLE, "mean")
    assert float(found) == pytest.approx((NATS[0, 0] + NATS[0, 3]) / 2, rel=1e-6)


def test_editing_weighs_wrong_and_right_tokens():
    found = diffusion_losses.editing(NATS, NOISY, 2.0, 0.5)
    wrong = (NATS[0, 1] + NATS[1, 2]) / 2
    right = (NATS[0, 2] + NATS[1, 0] + NATS[1, 1]) / 3
    assert float(found) == pytest.approx(2 * wrong + 0.5 * right, rel=1e-6)


def test_editing_without_wrong_tokens_is_the_keeping_alone():
    clean = NOISY.replace(corrupted=jnp.zeros((B, T), bool))
    right = (NATS[0, 2] + NATS[1, 0] + NATS[1, 1]) / 3
    assert float(diffusion_losses.editing(NATS, clean, 1.0, 1.0)) == pytest.approx(right, rel=1e-6)


def test_confidence_is_the_entropy_where_the_model_is_right():
    noisy = NOISY.replace(masked=np.ones((B, T), bool))
    right = [
        stats.entropy(special.softmax(LOGITS[b, t]))
        for b in range(B)
        for t in range(T)
        if LOGITS[b, t].argmax() == TARGETS[b, t]
    ]
    assert 0 < len(right) < B * T
    found = diffusion_losses.confidence(LOGITS, TARGETS, noisy)
    assert float(found) == pytest.approx(np.mean(right), rel=1e-5)
