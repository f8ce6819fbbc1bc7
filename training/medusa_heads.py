"""Heads that guess ahead, trained on the data's own tokens (Medusa-1, arXiv 2401.10774).

    recipe = PartRecipe("code_target")
    directory = target_features.ensure(recipe, medusa_heads.part(MedusaConfig()))
    python -m experiments.generate --method=medusa --method_params=DIRECTORY ...

Section 2.2.1: cross-entropy of head k with the token k + 2 places on, later heads counting less.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import medusa_heads
from models.config import TransformerConfig
from models.medusa_heads import MedusaConfig
from training import loop, losses
from training.fitting import DeviceBatch
from training.target_features import Features, Part

# Weight of head k is this to the power of k (published).
DECAY = 0.8


def part(config: MedusaConfig) -> Part:
    """What `target_features` trains."""
    return Part(
        "medusa_heads",
        functools.partial(medusa_heads.init, config),
        loss,
        lambda directory, params: medusa_heads.save(directory, config, params),
        dataclasses.asdict(config),
    )


def loss(
    config: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
    key: jax.Array,
) -> tuple[jax.Array, loop.Metrics]:
    """Weighted mean over heads, each a mean over the tokens that have so many after them.

    Metrics: `agreement_k`, how often head k's likeliest token is the data's.
    """
    del key
    frozen = jax.lax.stop_gradient(target_params)
    logits = medusa_heads.apply(config, frozen, params, features.hidden)
    K, T = logits.shape[2], logits.shape[1]
    segments, index = batch["segment_ids"], jnp.arange(T)
    total, weights, metrics = jnp.zeros(()), 0.0, {}
    for k in range(K):
        ahead = jnp.minimum(index + k + 1, T - 1)
        targets, counts = batch["targets"][:, ahead], batch["loss_mask"][:, ahead]
        counts = counts * (segments[:, ahead] == segments) * (index + k + 1 < T)
        nats = losses.cross_entropy(logits[:, :, k], targets)
        total = total + DECAY**k * losses.masked_mean(nats, counts)
        weights += DECAY**k
        right = logits[:, :, k].argmax(axis=-1) == targets
        metrics[f"agreement_{k}"] = losses.masked_mean(right, counts)
    return total / weights, metrics
