"""Prompt tokens that learn to say what the model will say (PPD, arXiv 2405.18628, section 3.2).

    directory = prompt_marginals.ensure(PartRecipe("code_target"), PromptTokensConfig())
    python -m experiments.generate --method=ppd --method_params=DIRECTORY \\
        --method_option marginals=part ...

A copy of the prompt tokens is put behind many places of a text at once; each copy sees its own
prefix alone, so that one pass trains them all. What the k-th is to say is the target's distribution
k tokens further on, in the target's own greedy continuation. Nothing but the embeddings learns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import prompt_tokens, transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice
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
      targets: what is to be foretold behind a cut: the target's 'greedy' continuation (published),
        which takes a pass more for each distance; or the 'data', with its own tokens.
      start: embeddings begin as those of 'tokens' (published: the words of a sentence; here, tokens
        at even distances in the vocabulary), or 'random'.
    """

    cuts: int = 16
    decay: float = 0.8
    targets: str = "greedy"
    start: str = "tokens"

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise InputError(f"objective.cuts: {self.cuts} must be at least 1")
        if not 0 < self.decay <= 1:
            raise InputError(f"objective.decay: {self.decay} must be above 0 and at most 1")
        check_choice("objective.targets", self.targets, ("greedy", "data"))
        check_choice("objective.start", self.start, ("tokens", "random"))


def part(config: PromptTokensConfig, objective: Objective) -> Part:
    """What `target_features` trains."""

    def begin(model: TransformerConfig, target_params: Any, params: Any) -> Any:
        del params
        number = config.distances * config.ensemble
        tokens = jnp.linspace(0, model.vocab_size - 1, number + 2)[1:-1].astype(jnp.int32)
        return prompt_tokens.from_tokens(config, model, target_params, tokens)

    return Part(
        "prompt_tokens",
        functools.partial(prompt_tokens.init, config),
        functools.partial(loss, config, objective),
        lambda directory, params: prompt_tokens.save(directory, config, params),
        {"prompts": dataclasses.asdict(config), "objective": dataclasses.asdict(objective)},
        begin=begin if objective.start == "tokens" else None,
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

    A cut in padding does not count, nor one in a prompt that no loss is taken on, nor what lies
    beyond the model's last position; with targets from data, nor does a distance that leaves its
    document. Metrics: `agreement_k`, how often the k-th prompt token's likeliest token is the
    target's.
    """
    frozen = jax.lax.stop_gradient(target_params)
    n, C = config.distances, objective.cuts
    B, T = batch["tokens"].shape
    cut = jax.random.randint(key, (B, C), 0, T)
    logits = ahead(config, model, params, frozen, batch, cut)
    targets, counts = (_from_data if objective.targets == "data" else _greedy)(
        model, frozen, features, batch, cut, n
    )
    total, metrics = jnp.zeros(()), {}
    for k in range(1, n + 1):
        said, target, counted = (x[:, :, k - 1] for x in (logits, targets, counts))
        nats = losses.forward_kl(said, target)
        total = total + objective.decay ** (k - 1) * losses.masked_mean(nats, counted) / n
        same = said.argmax(axis=-1) == target.argmax(axis=-1)
        metrics[f"agreement_{k}"] = losses.masked_mean(same, counted)
    return total, metrics


def _at(table: jnp.ndarray, index: jnp.ndarray) -> jnp.ndarray:
    """table[b, index[b, c]], the last entry beyond the end: [B, T, ...] -> [B, C, ...]."""
    last = table.shape[1] - 1
    return jax.vmap(lambda row, where: row[where])(table, jnp.minimum(index, last))


def _from_data(
    model: TransformerConfig,
    target_params: Any,
    features: Features,
    batch: DeviceBatch,
    cut: jnp.ndarray,
    n: int,
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """What the target says n tokens on in the text: logits [B, C, n, V], and which count."""
    segment, T = batch["segment_ids"], batch["tokens"].shape[1]
    further = [cut + k for k in range(1, n + 1)]
    hidden = jnp.stack([_at(features.hidden, at) for at in further], axis=2)
    counts = [
        _at(batch["loss_mask"], at)
        * (at < T)
        * (_at(segment, at) == _at(segment, cut))
        * (_at(segment, cut) != 0)
        for at in further
    ]
    return transformer.unembed(model, target_params, hidden), jnp.stack(counts, axis=2)


def _greedy(
    model: TransformerConfig,
    target_params: Any,
    features: Features,
    batch: DeviceBatch,
    cut: jnp.ndarray,
    n: int,
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """As `_from_data`, where the target goes on from each cut by itself, a pass a token."""
    logits = transformer.unembed(model, target_params, _at(features.hidden, cut))
    tokens, found = [], []
    for _ in range(n):
        tokens.append(logits.argmax(axis=-1))
        soft = transformer.token_embeddings(model, target_params, jnp.stack(tokens, axis=2))
        _, hidden = branches.hidden(model, target_params, batch, cut, soft)
        logits = transformer.unembed(model, target_params, hidden[:, :, -1])
        found.append(logits)
    segment = batch["segment_ids"]
    ends = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    asked = (segment != 0) & ((batch["loss_mask"] > 0) | ends)
    counts = _at(asked, cut) & (_at(batch["positions"], cut) + n < model.max_position)
    counts = jnp.broadcast_to(counts[:, :, None], (*cut.shape, n)).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.stack(found, axis=2)), counts


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
        model, target_params, batch, cut, params["embedding"], config.ensemble, config.mask
    )
    logits = transformer.unembed(model, target_params, found)
    shape = (*cut.shape, config.distances, config.ensemble, logits.shape[-1])
    return logits.reshape(shape).mean(axis=3)
