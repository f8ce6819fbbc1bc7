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
        begin=medusa_heads.with_head,
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

    Metrics: see `accuracy`.
    """
    del key
    frozen = jax.lax.stop_gradient(target_params)
    logits = medusa_heads.apply(config, frozen, params, features.hidden)
    total, weights = jnp.zeros(()), 0.0
    metrics: dict[str, jax.Array] = {}
    for k in range(logits.shape[2]):
        _, targets, counts = ahead(batch, k)
        nats = losses.cross_entropy(logits[:, :, k], targets)
        total = total + DECAY**k * losses.masked_mean(nats, counts)
        weights += DECAY**k
        metrics |= accuracy(logits[:, :, k], targets, counts, k)
    return total / weights, metrics


def ahead(batch: DeviceBatch, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What head k guesses at each place of packed rows: the token k + 2 places on.

    Returns:
      int [T], the place k + 1 further on, whose next token that is, the last one beyond the end;
      int [B, T], the token; float [B, T], whether it counts: it is of the same segment.
    """
    segments = batch["segment_ids"]
    T = segments.shape[1]
    index = jnp.arange(T) + k + 1
    there = jnp.minimum(index, T - 1)
    counts = batch["loss_mask"][:, there] * (segments[:, there] == segments) * (index < T)
    return there, batch["targets"][:, there], counts


def accuracy(
    logits: jax.Array, targets: jax.Array, counts: jax.Array, k: int
) -> dict[str, jax.Array]:
    """`agreement_k` and `top5_k`: how often the data's token is the head's likeliest, or among
    its five likeliest."""
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    likelier = (logits > own).sum(axis=-1)
    return {
        f"agreement_{k}": losses.masked_mean(likelier == 0, counts),
        f"top5_{k}": losses.masked_mean(likelier < 5, counts),
    }
