"""Medusa's heads: what each is trained to say."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import special

from models import medusa_heads, transformer
from models.medusa_heads import MedusaConfig
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import medusa_heads as training
from training import target_features

TARGET = jax.jit(lambda key: transformer.init(MODEL, key))(jax.random.key(5))


def test_head_k_learns_the_token_k_plus_two_places_on(tmp_path):
    config = MedusaConfig(2)
    before = jax.tree.map(np.asarray, TARGET)
    result = target_features.train(
        dataclasses.replace(CONFIG, num_steps=12),
        training.part(config),
        TARGET,
        train_batches=Batches(),
        eval_batches=[make_batch(1000)],
        workdir=tmp_path,
    )
    jax.tree.map(np.testing.assert_array_equal, before, TARGET)
    losses = [loss for (loss,) in lines(tmp_path, "eval_loss")]
    assert losses[-1] < losses[0]

    batch, params = make_batch(1000), result.state.params
    nats, right = np.zeros(2), np.zeros(2)
    count = np.zeros(2)
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            hidden = transformer.apply(MODEL, TARGET, batch["tokens"][row, at][None]).hidden
            logits = np.asarray(medusa_heads.apply(MODEL, TARGET, params, hidden)[0], np.float64)
            for k in range(2):
                for i in range(len(at) - k - 1):
                    later = at[i + k + 1]
                    if batch["loss_mask"][row, later]:
                        label = batch["targets"][row, later]
                        nats[k] -= special.log_softmax(logits[i, k])[label]
                        right[k] += logits[i, k].argmax() == label
                        count[k] += 1
    mean = (nats / count) @ [1, 0.8] / 1.8
    assert result.metrics["eval_loss"] == pytest.approx(mean, rel=1e-4)
    assert result.metrics["eval_agreement_1"] == pytest.approx((right / count)[1], rel=1e-5)
