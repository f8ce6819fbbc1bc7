"""Noise: which positions it touches, how often, and that rows do not depend on each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import corruption

B, T, V, MASK = 64, 100, 7, 3
RNG = np.random.default_rng(0)
TOKENS = RNG.choice([i for i in range(V) if i != MASK], (B, T)).astype(np.int32)
CHANGEABLE = np.arange(T) >= RNG.integers(0, 60, (B, 1))
KEY = jax.random.key(5)


@jax.jit
def noise(key, tokens, changeable):
    probability = corruption.mask_probabilities(key, tokens.shape[0], (0.2, 0.6), 1e-3)
    masked = corruption.mask(key, tokens, changeable, probability, MASK)
    return masked, corruption.corrupt(key, masked, 0.5, V, MASK)


@pytest.fixture(scope="module")
def noisy():
    return jax.tree.map(np.asarray, noise(KEY, TOKENS, CHANGEABLE))


def test_the_three_kinds_share_out_the_changeable_positions(noisy):
    for stage in noisy:
        kinds = stage.masked.astype(int) + stage.corrupted + stage.kept
        np.testing.assert_array_equal(kinds, CHANGEABLE)
        np.testing.assert_array_equal(stage.tokens == MASK, stage.masked)
        np.testing.assert_array_equal(
            stage.tokens[~stage.masked] != TOKENS[~stage.masked], stage.corrupted[~stage.masked]
        )
    assert not noisy[0].corrupted.any()
    assert noisy[1].corrupted.any()


def test_mask_ratios_are_spread_evenly_over_the_band(noisy):
    ratios = np.sort((noisy[0].probability[:, 0] - 1e-3) / (1 - 1e-3))
    assert ratios[0] >= 0.2 - 1e-6
    assert ratios[-1] <= 0.6 + 1e-6
    np.testing.assert_allclose(np.diff(ratios), 0.4 / B, atol=1e-5)
    expected = (noisy[0].probability * CHANGEABLE).sum()
    deviation = np.sqrt((noisy[0].probability * (1 - noisy[0].probability) * CHANGEABLE).sum())
    assert abs(noisy[0].masked.sum() - expected) < 4 * deviation


def test_wrong_tokens_are_uniform_over_the_other_ids():
    tokens = np.full((400, T), 5, np.int32)
    everywhere = np.ones((400, T), bool)
    nothing = corruption.mask(KEY, tokens, everywhere, jnp.zeros((400, 1)), MASK)
    noisy = corruption.corrupt(KEY, nothing, 0.5, V, MASK)
    shares = np.asarray(noisy.corrupted).mean(axis=1)
    assert shares.max() < 0.75
    assert abs(shares.mean() - 0.25) < 0.02  # U(0, 0.5) a row
    assert shares.std() == pytest.approx(0.5 / np.sqrt(12), abs=0.03)
    counts = np.bincount(np.asarray(noisy.tokens)[np.asarray(noisy.corrupted)], minlength=V)
    assert counts[[5, MASK]].tolist() == [0, 0]
    allowed = counts[[i for i in range(V) if i not in (5, MASK)]]
    np.testing.assert_allclose(allowed / allowed.sum(), 1 / (V - 2), atol=0.02)


def test_a_rows_noise_does_not_depend_on_its_neighbours(noisy):
    changed = np.where(np.arange(B)[:, None] == 3, TOKENS, 0)
    _, other = noise(KEY, changed, CHANGEABLE)
    for name in ("tokens", "masked", "corrupted"):
        np.testing.assert_array_equal(getattr(other, name)[3], getattr(noisy[1], name)[3])
    _, again = noise(jax.random.key(6), TOKENS, CHANGEABLE)
    assert np.any(again.masked != noisy[1].masked)


def test_filling_leaves_some_masks_and_sorts_the_rest(noisy):
    before = noisy[1]
    fills = np.where(RNG.random((B, T)) < 0.5, TOKENS, (TOKENS + 1) % V).astype(np.int32)
    after = jax.tree.map(np.asarray, corruption.fill(KEY, before, fills, TOKENS, 0.3))
    assert not np.any(after.masked & ~before.masked)
    assert after.masked.sum() / before.masked.sum() == pytest.approx(0.3, abs=0.05)
    filled = before.masked & ~after.masked
    np.testing.assert_array_equal(after.tokens[filled], fills[filled])
    np.testing.assert_array_equal(after.tokens[~filled], before.tokens[~filled])
    np.testing.assert_array_equal(after.corrupted[filled], fills[filled] != TOKENS[filled])
    kinds = after.masked.astype(int) + after.corrupted + after.kept
    np.testing.assert_array_equal(kinds, CHANGEABLE)


def test_a_share_of_rows_is_cut():
    lengths = np.asarray(corruption.truncated_lengths(KEY, 2000, T, 0.25))[:, 0]
    cut = lengths[lengths < T]
    assert len(cut) / 2000 == pytest.approx(0.25 * (1 - 1 / T), abs=0.04)
    assert cut.min() == 1
    assert cut.mean() == pytest.approx(T / 2, abs=5)
    assert np.all(np.asarray(corruption.truncated_lengths(KEY, 20, T, 0.0)) == T)
