"""The adapter of an early exit, trained to say what the whole model says (Kangaroo).

    recipe = PartRecipe("code_target")
    directory = target_features.ensure(recipe, exit_adapter.part(ExitAdapterConfig(exit_layer=2)))
    python -m experiments.generate --method=kangaroo --method_params=DIRECTORY ...

arXiv 2404.18911, section 3.2: soft cross-entropy with the target's distribution at the same
position; nothing but the adapter learns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import exit_adapter, transformer
from models.config import TransformerConfig
from models.exit_adapter import ExitAdapterConfig
from training import loop, losses
from training.fitting import DeviceBatch
from training.target_features import Features, Part


def part(adapter: ExitAdapterConfig) -> Part:
    """What `target_features` trains."""
    return Part(
        "exit_adapter",
        functools.partial(exit_adapter.init, adapter),
        loss,
        lambda directory, params: exit_adapter.save(directory, adapter, params),
        dataclasses.asdict(adapter),
        collect=(adapter.exit_layer,),
    )


def loss(
    config: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
    key: jax.Array,
) -> tuple[jax.Array, loop.Metrics]:
    """- sum_v p_v log q_v, p of the whole target and q through the adapter, mean over tokens.

    The metric `acceptance` is the mean of sum_v min(p_v, q_v): the probability that speculative
    sampling keeps a draft from q at temperature 1.
    """
    del key
    hidden, _ = exit_adapter.apply(
        config,
        params,
        features.streams[0],
        positions=batch["positions"],
        mask=features.mask,
    )
    frozen = jax.lax.stop_gradient(target_params)
    log_q = jax.nn.log_softmax(transformer.unembed(config, frozen, hidden))
    p = jax.nn.softmax(transformer.unembed(config, frozen, features.hidden))
    nats = -jnp.sum(p * log_q, axis=-1)
    kept = jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)
    mask = batch["loss_mask"]
    return losses.masked_mean(nats, mask), {"acceptance": losses.masked_mean(kept, mask)}
