"""Distributions against transformers' logits processors, draws by their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import special, stats
from transformers.generation import logits_process as hf

from decoding import randomness, sampling
from decoding.sampling import SamplingConfig
from models.errors import InputError

B, V = 6, 50


def logits_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    if kind == "peaked":
        logits[:, 3] += 60
    elif kind == "flat":
        logits = logits * 1e-3
    elif kind == "ruled_out":
        logits[rng.random((B, V)) < 0.5] = -np.inf
    elif kind == "large":
        logits = logits * 1e4
    return logits


def reference(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Log-probabilities after transformers' warpers, in the order of its `generate`."""
    warpers = [hf.TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        warpers.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(config.min_p))
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(None, scores)
    return special.log_softmax(scores.double().numpy(), axis=-1)


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "ruled_out", "large"])
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(1.0),
        SamplingConfig(0.3),
        SamplingConfig(7.0),
        SamplingConfig(1.0, top_k=1),
        SamplingConfig(1.0, top_k=7),
        SamplingConfig(1.0, top_k=V + 10),
        SamplingConfig(1.0, top_p=0.9),
        SamplingConfig(1.0, top_p=1e-4),
        SamplingConfig(1.0, min_p=0.1),
        SamplingConfig(1.0, min_p=1.0),
        SamplingConfig(0.7, top_k=20, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_log_probs_agree_with_transformers(config, kind):
    logits = logits_of(kind)
    found = np.asarray(sampling.log_probs(jnp.asarray(logits), config))
    assert found.dtype == np.float32
    expected = reference(logits, config)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(np.exp(found), np.exp(expected), atol=1e-5)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(-1), 1, atol=1e-5)


def test_ties_share_a_fate():
    """Equal logits are kept or dropped together; transformers' top-k does the same."""
    logits = np.array([[2.0, 1, 1, 1, 0, 0]], np.float32)

    def kept(config):
        log_probs = np.asarray(sampling.log_probs(jnp.asarray(logits), config))
        return np.flatnonzero(log_probs[0] > -np.inf).tolist()

    assert kept(SamplingConfig(1.0, top_k=2)) == [0, 1, 2, 3]
    theirs = reference(logits, SamplingConfig(1.0, top_k=2))[0]
    assert np.flatnonzero(theirs > -np.inf).tolist() == [0, 1, 2, 3]
    first = special.softmax(logits[0])[0]
    assert kept(SamplingConfig(1.0, top_p=first * 0.99)) == [0]
    assert kept(SamplingConfig(1.0, top_p=first * 1.01)) == [0, 1, 2, 3]
    assert kept(SamplingConfig(1.0, min_p=0.999 * np.exp(-1))) == [0, 1, 2, 3]


def test_all_equal_logits_stay_uniform():
    for config in (SamplingConfig(1.0, top_k=3), SamplingConfig(1.0, top_p=0.5)):
        found = sampling.log_probs(jnp.zeros((1, 8)), config)
        np.testing.assert_allclose(np.exp(found), np.full((1, 8), 1 / 8), atol=1e-6)


def test_leading_axes_are_free():
    logits = jnp.asarray(logits_of("normal")).reshape(2, 3, V)
    config = SamplingConfig(0.8, top_k=9, top_p=0.9)
    found = sampling.log_probs(logits, config)
    flat = sampling.log_probs(logits.reshape(B, V), config)
    np.testing.assert_allclose(found.reshape(B, V), flat, atol=1e-6)


def test_temperature_zero_is_all_mass_on_the_first_maximum():
    logits = jnp.array([[1.0, 5, 5, 2], [-jnp.inf, -3, -2, -4]])
    found = sampling.log_probs(logits, SamplingConfig(0.0, top_k=3, top_p=0.1))
    inf = np.inf
    np.testing.assert_array_equal(found, [[-inf, 0, -inf, -inf], [-inf, -inf, 0, -inf]])
    keys = randomness.row_keys(0, jnp.arange(2))
    drawn = sampling.draw(logits, keys, jnp.zeros(2, jnp.int32), SamplingConfig())
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, [1, 2])


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_agrees_with_transformers(penalty):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, (B, 20)).astype(np.int32)
    lengths = np.array([20, 1, 7, 0, 13, 2])
    logits = logits_of("normal")
    logits[0, 5] = 0
    seen = sampling.seen_tokens(jnp.asarray(tokens), jnp.asarray(lengths), V)
    config = SamplingConfig(repetition_penalty=penalty)
    found = sampling.penalise(jnp.asarray(logits), seen, config)
    processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
    for b in range(B):
        np.testing.assert_array_equal(
            np.flatnonzero(seen[b]), np.unique(tokens[b, : lengths[b]]).astype(int)
        )
        text = torch.tensor(tokens[b : b + 1, : lengths[b]], dtype=torch.long)
        expected = processor(text, torch.tensor(logits[b : b + 1])) if lengths[b] else None
        expected = logits[b : b + 1] if expected is None else expected.numpy()
        np.testing.assert_allclose(found[b : b + 1], expected, rtol=1e-6)


def test_the_penalty_leaves_ruled_out_tokens_ruled_out():
    logits = jnp.array([[-jnp.inf, 1.0]])
    for penalty in (0.5, 2.0):
        config = SamplingConfig(repetition_penalty=penalty)
        out = sampling.penalise(logits, jnp.ones((1, 2), bool), config)
        assert np.asarray(out)[0, 0] == -np.inf


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(1.0), SamplingConfig(1.7, top_k=4), SamplingConfig(0.8, top_p=0.85)],
    ids=str,
)
def test_draws_have_the_frequencies_of_the_distribution(config):
    """A chi-square over 20,000 rows; a stream of another purpose or position is independent."""
    rows, size = 20_000, 8
    logits = np.random.default_rng(1).normal(size=size).astype(np.float32)
    logits[2] = -np.inf
    keys = randomness.row_keys(11, jnp.arange(rows))
    batch = jnp.broadcast_to(logits, (rows, size))
    draw = jax.jit(sampling.draw, static_argnums=(3, 4))
    drawn = np.asarray(draw(batch, keys, jnp.full(rows, 5), config, randomness.SAMPLE))
    other = np.asarray(draw(batch, keys, jnp.full(rows, 5), config, randomness.DRAFT))
    expected = np.exp(reference(logits[None], config)[0])
    counts = np.bincount(drawn, minlength=size)
    assert not counts[expected == 0].any()
    possible = expected > 0
    test = stats.chisquare(counts[possible], expected[possible] * rows)
    assert test.pvalue > 1e-3
    pairs = np.zeros((size, size))
    np.add.at(pairs, (drawn, other), 1)
    assert stats.chi2_contingency(pairs[possible][:, possible]).pvalue > 1e-3


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("nan")),
    ],
)
def test_bad_values_name_the_field_and_the_value(field, value):
    with pytest.raises(InputError, match=rf"^{field}: {value} must be "):
        SamplingConfig(**{field: value})
