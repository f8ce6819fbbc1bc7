"""Heads that go on from their own features are followed as they would draft."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments import feature_heads
from models import feature_head, masks, transformer
from models.feature_head import FeatureHeadConfig
from tests.decoding import tiny
from tests.decoding.test_eagle import head

FSPAD = FeatureHeadConfig("product", alignment="heads")


def test_each_step_reads_what_the_one_before_said():
    target, params = tiny.params()["target"], head(FSPAD)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (3, 12)).astype(np.int32)
    read = np.roll(tokens, 1, axis=0)
    cut = np.array([2, 5, 7], np.int32)
    found = feature_heads.follow(
        tiny.TARGET, target, params, jnp.asarray(tokens), jnp.asarray(read), jnp.asarray(cut),
        steps=3,
    )  # fmt: skip
    hidden = transformer.apply(tiny.TARGET, target, jnp.asarray(tokens)).hidden
    errors, nats, overlap = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros((3, 3))
    for row in range(3):
        features = hidden[row : row + 1, : cut[row] + 1]
        for step in range(3):
            n = features.shape[1]
            index = jnp.arange(n)[None]
            said = feature_head.apply(
                tiny.TARGET, params,
                transformer.embed(
                    tiny.TARGET, target, jnp.asarray(read[row : row + 1, 1 : n + 1]), index + 1
                ),
                features, positions=index, mask=masks.causal(index, n),
            )  # fmt: skip
            wanted = hidden[row, n]
            gap = np.abs(np.asarray(said.features[0, -1] - wanted))
            errors[row, step] = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            p, q = (
                special.softmax(np.asarray(transformer.unembed(tiny.TARGET, target, x), np.float64))
                for x in (wanted, said.readable[0, -1])
            )
            nats[row, step] = -(p * np.log(q)).sum()
            overlap[row, step] = np.minimum(p, q).sum()
            features = jnp.concatenate([features, said.features[:, -1:]], axis=1)
    for name, wanted in (
        ("feature error", errors), ("cross-entropy", nats), ("overlap", overlap)
    ):  # fmt: skip
        assert np.asarray(found[name]) == pytest.approx(wanted.mean(axis=0), rel=1e-3)
