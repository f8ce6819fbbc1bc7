"""Prompt tokens that learn to say what the model will say (PPD, arXiv 2405.18628, section 3.2).

    recipe = PartRecipe("code_target")
    part = prompt_tokens.part(PromptTokensConfig(), Objective())
    directory = target_features.ensure(recipe, part)
    python -m experiments.generate --method=ppd --method_params=DIRECTORY ...

A copy of the prompt tokens is put behind many places of a text at once; each copy sees its own
prefix alone, so that one pass trains them all. What the k-th is to say is the target's distribution
k tokens further on. Nothing but the embeddings learns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import prompt_tokens, transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.prompt_tokens import PromptTokensConfig
from training import branches, loop, losses
from training.fitting import DeviceBatch
from training.target_features import Features, Part


@dataclasses.dataclass(frozen=True)
class Objective:
    """How prompt tokens learn.

    Attributes:
      cuts: places a row that a copy is put behind, drawn anew at every step.
      decay: the loss of distance k counts decay ** (k - 1) (published: 0.8).
    """

    cuts: int = 16
    decay: float = 0.8

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise InputError(f"objective.cuts: {self.cuts} must be at least 1")
        if not 0 < self.decay <= 1:
            raise InputError(f"objective.decay: {self.decay} must be above 0 and at most 1")


def part(config: PromptTokensConfig, objective: Objective) -> Part:
    """What `target_features` trains."""
    return Part(
        "prompt_tokens",
        functools.partial(prompt_tokens.init, config),
        functools.partial(loss, config, objective),
        lambda directory, params: prompt_tokens.save(directory, config, params),
        {"prompts": dataclasses.asdict(config), "objective": dataclasses.asdict(objective)},
    )


def loss(
    config: PromptTokensConfig,
    objective: Objective,
    model: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
    key: jax.Array,
) -> tuple[jax.Array, loop.Metrics]:
    """KL of the target's own distributions from those of the prompt tokens, decayed by distance.

    The target reads the data's own tokens after the cut, where the paper lets it go on greedily: no
    generation is needed, and the prefix is the same. A distance that leaves its document does not
    count. Metrics: `agreement_k`, how often the k-th prompt token's likeliest token is the
    target's.
    """
    frozen = jax.lax.stop_gradient(target_params)
    teacher = transformer.unembed(model, frozen, features.hidden)
    n, C = config.distances, objective.cuts
    B, T = batch["tokens"].shape
    cut = jax.random.randint(key, (B, C), 0, T)
    logits = ahead(config, model, params, frozen, batch, cut)

    def at(table: jnp.ndarray, index: jnp.ndarray) -> jnp.ndarray:
        return jax.vmap(lambda row, where: row[where])(table, jnp.minimum(index, T - 1))

    segment = batch["segment_ids"]
    total, metrics = jnp.zeros(()), {}
    for k in range(1, n + 1):
        target = at(teacher, cut + k)
        counts = at(batch["loss_mask"], cut + k) * (cut + k < T)
        counts = counts * (at(segment, cut + k) == at(segment, cut)) * (at(segment, cut) != 0)
        said = logits[:, :, k - 1]
        nats = losses.forward_kl(said, target)
        total = total + objective.decay ** (k - 1) * losses.masked_mean(nats, counts) / n
        same = said.argmax(axis=-1) == target.argmax(axis=-1)
        metrics[f"agreement_{k}"] = losses.masked_mean(same, counts)
    return total, metrics


def ahead(
    config: PromptTokensConfig,
    model: TransformerConfig,
    params: Any,
    target_params: Any,
    batch: DeviceBatch,
    cut: jnp.ndarray,
) -> jnp.ndarray:
    """What copies of the prompt tokens behind `cut` int [B, C] say: float32 [B, C, n, V].

    The logits of a distance are the mean of its embeddings'; see `branches.hidden`.
    """
    _, found = branches.hidden(
        model, target_params, batch, cut, params["embedding"], config.ensemble
    )
    logits = transformer.unembed(model, target_params, found)
    shape = (*cut.shape, config.distances, config.ensemble, logits.shape[-1])
    return logits.reshape(shape).mean(axis=3)
