"""Heads on features: their losses, what each loss moves, a target that stays as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models import feature_head, masks, transformer
from models.feature_head import FeatureHeadConfig
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import feature_head as training
from training import target_features
from training.feature_head import Objective

FSPAD = FeatureHeadConfig("product", alignment="heads")
QUIET = Objective(noise=0.0)
LONG = MODEL.replace(max_position=32)
TARGET = jax.jit(lambda key: transformer.init(LONG, key))(jax.random.key(5))
BATCH = make_batch(3)


def moved(config, seed=2):
    """Random values everywhere, where training begins with zeros too."""
    rng = np.random.default_rng(seed)
    params = feature_head.init(config, LONG, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def loss(config, objective, params, batch=BATCH):
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    run = jax.jit(functools.partial(_loss, config, objective))
    return run(params, placed)


def _loss(config, objective, params, batch):
    features = target_features.features(LONG, TARGET, batch, ())
    return training.loss(
        config, objective, LONG, params, features, batch, TARGET, jax.random.key(0)
    )


@pytest.mark.parametrize("config", [FSPAD, FeatureHeadConfig(alignment="mask", aligned=0.25)])
def test_losses_are_those_of_each_segment_alone(config):
    params, width = moved(config), BATCH["tokens"].shape[1]
    index = jnp.arange(width)[None]

    @jax.jit
    def alone(tokens):
        """Padding behind a text changes nothing before it."""
        out = transformer.apply(LONG, TARGET, tokens)
        said = feature_head.apply(
            LONG,
            params,
            transformer.embed(LONG, TARGET, jnp.roll(tokens, -1, axis=1), index + 1),
            out.hidden,
            positions=index,
            mask=masks.causal(index, width),
        )
        read = transformer.unembed(LONG, TARGET, said.readable)
        return out.hidden[0], out.logits[0], said.features[0], read[0]

    distance, nats, overlap = [], [], []
    for row in range(len(BATCH["tokens"])):
        for segment in range(1, BATCH["segment_ids"][row].max() + 1):
            at = np.flatnonzero(BATCH["segment_ids"][row] == segment)
            text = np.zeros((1, width), np.int32)
            text[0, : len(at)] = BATCH["tokens"][row, at]
            # The first tokens foretell the second ones on, the last of which has no next token.
            n = max(len(at) - 2, 0)
            hidden, logits, features, read = (np.asarray(x, np.float64) for x in alone(text))
            error = np.abs(features[:n] - hidden[1 : n + 1])
            error = np.where(error < 1, error**2 / 2, error - 0.5)
            if config.alignment == "mask":
                error = error[:, : MODEL.embed_dim // 4]
            p = special.softmax(logits[1 : n + 1], axis=-1)
            log_q = special.log_softmax(read[:n], axis=-1)
            distance.append(error.mean(axis=-1))
            nats.append(-(p * log_q).sum(axis=-1))
            overlap.append(np.minimum(p, np.exp(log_q)).sum(axis=-1))
    distance, nats, overlap = (np.concatenate(x).mean() for x in (distance, nats, overlap))
    total, metrics = loss(config, QUIET, params)
    assert float(metrics["feature_loss"]) == pytest.approx(distance, rel=1e-4)
    assert float(metrics["token_loss"]) == pytest.approx(nats, rel=1e-4)
    assert float(metrics["acceptance"]) == pytest.approx(overlap, rel=1e-4)
    assert float(total) == pytest.approx(distance + 0.1 * nats, rel=1e-4)


def test_partial_alignment_frees_what_is_read_from_what_is_fed_back():
    """Both losses reach the layer; what is read beside the feature learns from tokens alone."""
    params = moved(FSPAD)

    def sizes(objective):
        placed = {name: jnp.asarray(value) for name, value in BATCH.items()}
        found = jax.jit(jax.grad(lambda p: _loss(FSPAD, objective, p, placed)[0]))(params)
        return {
            name: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(value))
            for name, value in found.items()
        }

    by_token = sizes(Objective(feature_weight=0, token_weight=1, noise=0))
    by_feature = sizes(Objective(feature_weight=1, token_weight=0, noise=0))
    assert set(by_token) == set(by_feature) == set(params)
    assert min(by_token.values()) > 0
    assert by_feature.pop("read") == 0 and min(by_feature.values()) > 0
    # In EAGLE's head they are one vector: changing what is read changes the feature.
    out = feature_head.apply(
        LONG, moved(FeatureHeadConfig()), *(jnp.ones((1, 3, MODEL.embed_dim)),) * 2,
        positions=jnp.arange(3)[None], mask=jnp.ones((1, 3, 3), bool),
    )  # fmt: skip
    np.testing.assert_array_equal(out.features, out.readable)


def test_the_control_has_as_many_parameters():
    def count(config):
        return sum(x.size for x in jax.tree.leaves(feature_head.init(config, MODEL, KEY)))

    KEY, width = jax.random.key(0), MODEL.embed_dim
    assert count(FeatureHeadConfig("product")) == count(FeatureHeadConfig("mlp"))
    wide = count(FeatureHeadConfig("mlp", width=2 * width + width // 3))
    assert wide == pytest.approx(count(FSPAD), rel=0.02)


def test_noise_moves_what_is_read_by_no_more_than_it_should():
    params = moved(FSPAD)
    quiet, loud = (loss(FSPAD, Objective(noise=n), params)[0] for n in (0.0, 0.1))
    assert float(quiet) != float(loud)


def test_only_the_head_learns_and_comes_nearer_to_its_target(tmp_path):
    before = jax.tree.map(np.asarray, TARGET)
    result = target_features.train(
        dataclasses.replace(CONFIG, model=LONG, num_steps=12),
        training.part(FSPAD, Objective()),
        TARGET,
        train_batches=Batches(lambda step: None),
        eval_batches=[make_batch(1000), make_batch(1001)],
        workdir=tmp_path,
    )
    jax.tree.map(np.testing.assert_array_equal, before, TARGET)
    losses = [value for (value,) in lines(tmp_path, "eval_loss")]
    assert losses[-1] < losses[0]
    assert 0 < result.metrics["eval_acceptance"] < 1
