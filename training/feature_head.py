"""Heads on a target's features: EAGLE's recipe, and FSPAD's losses on the same.

    recipe = PartRecipe("code_target")
    directory = target_features.ensure(recipe, feature_head.part(FeatureHeadConfig(), Objective()))
    python -m experiments.generate --method=eagle2 --method_params=DIRECTORY ...

EAGLE, arXiv 2401.15077, section 4.2: the next feature by a smooth L1 loss, and the target's
distribution there by cross-entropy; a little noise on the features that are read makes the head
bear its own errors. Nothing but the head learns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import feature_head, transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.feature_head import FeatureHeadConfig
from training import loop, losses
from training.fitting import DeviceBatch
from training.target_features import Features, Part


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the loss; defaults are EAGLE's.

    Attributes:
      feature_weight: of the smooth L1 loss, mean over channels.
      token_weight: of the cross-entropy.
      noise: features are read with uniform noise of up to noise * 512 / T for rows of T tokens.
    """

    feature_weight: float = 1.0
    token_weight: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 0:
                raise InputError(f"objective.{field.name}: {value} must be at least 0")


def part(head: FeatureHeadConfig, objective: Objective) -> Part:
    """What `target_features` trains."""
    return Part(
        "feature_head",
        functools.partial(feature_head.init, head),
        functools.partial(loss, head, objective),
        lambda directory, params: feature_head.save(directory, head, params),
        {"head": dataclasses.asdict(head), "objective": dataclasses.asdict(objective)},
    )


def loss(
    head: FeatureHeadConfig,
    objective: Objective,
    config: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
    key: jax.Array,
) -> tuple[jax.Array, loop.Metrics]:
    """The weighted losses of one step ahead, means over the tokens that have a next in their row.

    Slot t reads feature t and token t + 1; it is to say feature t + 1, and the target's
    distribution of token t + 2. It counts where that one counts. Metrics: both losses, and
    `acceptance`, the mean of sum_v min(p_v, q_v).
    """
    frozen = jax.lax.stop_gradient(target_params)
    read = features.hidden
    if objective.noise:
        most = objective.noise * 512 / read.shape[1]
        read = read + jax.random.uniform(key, read.shape, read.dtype, -most, most)
    said = feature_head.apply(
        config,
        params,
        transformer.embed(config, frozen, batch["targets"], batch["positions"] + 1),
        read,
        positions=batch["positions"],
        mask=features.mask,
    )
    wanted = jnp.roll(features.hidden, -1, axis=1)
    segments = batch["segment_ids"]
    follows = (segments == jnp.roll(segments, -1, axis=1)).at[:, -1].set(False)
    mask = jnp.roll(batch["loss_mask"], -1, axis=1) * follows

    D = config.embed_dim
    kept = D if head.alignment != "mask" else max(1, int(head.aligned * D))
    distance = optax.huber_loss(said.features, wanted, delta=1.0)[..., :kept].mean(axis=-1)
    p = jax.nn.softmax(transformer.unembed(config, frozen, wanted))
    log_q = jax.nn.log_softmax(transformer.unembed(config, frozen, said.readable))
    by_feature = losses.masked_mean(distance, mask)
    by_token = losses.masked_mean(-jnp.sum(p * log_q, axis=-1), mask)
    overlap = jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)
    metrics = {
        "feature_loss": by_feature,
        "token_loss": by_token,
        "acceptance": losses.masked_mean(overlap, mask),
    }
    total = objective.feature_weight * by_feature + objective.token_weight * by_token
    return total, metrics
