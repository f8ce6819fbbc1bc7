"""Heads that see what was guessed before them, trained on all positions at once (Chimera).

    recipe = PartRecipe("code_target")
    part = chimera_heads.part(ChimeraConfig(), Objective())
    directory = target_features.ensure(recipe, part)
    python -m experiments.generate --method=chimera --method_params=DIRECTORY ...

arXiv 2402.15758: after every x_0 .. x_i, and x_{i+1} that the target has said, K steps of drafting
are gone through as in decoding. What they attend to is the target's states up to x_i and the
trigrams up to x_{i+1}, shared by all i, and each i's own drafts. Nothing but encoders and heads
learns.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import chimera_heads, transformer
from models.chimera_heads import ChimeraConfig
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from training import loop, losses
from training.fitting import DeviceBatch
from training.medusa_heads import accuracy, ahead
from training.target_features import Features, Part

READS = ("drafted", "text")
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learned from; the paper names next tokens and distillation, without weights.

    Attributes:
      distillation: weight of the target's distribution; the rest is the data's tokens' (published
        code: 0).
      state_weight: lambda, of the squared distance of Z from the state H that it stands for, mean
        over channels.
      reads: what step k + 1 reads as the token that step k has guessed: 'drafted', its likeliest
        (published code), or 'text', the data's, which is what an accepted draft is.
      detach: whether Z is a constant to the steps after it (published code).
    """

    distillation: float = 1.0
    state_weight: float = 0.1
    reads: str = "drafted"
    detach: bool = True

    def __post_init__(self) -> None:
        check_choice("objective.reads", self.reads, READS)
        if not 0 <= self.distillation <= 1:
            raise InputError(f"objective.distillation: {self.distillation} must be between 0 and 1")
        if self.state_weight < 0:
            raise InputError(f"objective.state_weight: {self.state_weight} must be at least 0")


def part(config: ChimeraConfig, objective: Objective) -> Part:
    """What `target_features` trains."""
    return Part(
        "chimera_heads",
        functools.partial(chimera_heads.init, config),
        functools.partial(loss, config, objective),
        lambda directory, params: chimera_heads.save(directory, config, params),
        {"heads": dataclasses.asdict(config), "objective": dataclasses.asdict(objective)},
        begin=chimera_heads.with_head,
    )


def loss(
    heads: ChimeraConfig,
    objective: Objective,
    config: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
    key: jax.Array,
) -> tuple[jax.Array, loop.Metrics]:
    """Mean over heads, each a mean over the tokens that have so many after them in their segment.

    Metrics: see `medusa_heads.accuracy`; `state_distance`, the mean squared distance of Z from H.
    """
    del key
    frozen = jax.lax.stop_gradient(target_params)
    steps = forward(heads, objective, config, params, features, batch, frozen)
    teacher = transformer.unembed(config, frozen, features.hidden)
    total, distance = jnp.zeros(()), jnp.zeros(())
    metrics: dict[str, jax.Array] = {}
    for k, (logits, drafted) in enumerate(steps):
        there, targets, counts = ahead(batch, k)
        nats = losses.distillation(
            logits, teacher[:, there], targets, weight=objective.distillation
        )
        total = total + losses.masked_mean(nats, counts)
        apart = jnp.square(drafted - features.hidden[:, there]).mean(axis=-1)
        distance = distance + losses.masked_mean(apart, counts)
        metrics |= accuracy(logits, targets, counts, k)
    metrics["state_distance"] = distance / heads.heads
    return (total + objective.state_weight * distance) / heads.heads, metrics


def forward(
    heads: ChimeraConfig,
    objective: Objective,
    config: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
) -> list[tuple[jax.Array, jax.Array]]:
    """K steps of drafting after every token of packed rows.

    Returns:
      Of each step k: logits float32 [B, T, V] of the token k + 2 places on, and Z [B, T, D], which
      stands for the target's state k + 1 places on.
    """
    positions, hidden = batch["positions"], features.hidden
    trigram = functools.partial(chimera_heads.trigram, heads, config, target_params, params)
    entries = functools.partial(chimera_heads.entries, config, params)
    before, last, token = jnp.roll(batch["tokens"], 1, axis=1), batch["tokens"], batch["targets"]
    shared: _Entries | None = None
    own: list[_Entries] = []  # of each place's drafts
    found: list[tuple[jax.Array, jax.Array]] = []
    for k in range(heads.heads):
        if k:
            before, last, token = last, token, _next(objective, batch, found[-1][0], k)
        at = positions + k + 1
        x = trigram(chimera_heads.trigram_ids(before, last, token, at))
        drafted = x
        if heads.context:
            queries, *of_trigrams = entries(x, at)
            if shared is None:
                of_states = entries(hidden, positions)[1:]
                shared = _Entries(*map(_side_by_side, of_states, of_trigrams))
            else:
                earlier = found[-1][1]
                if objective.detach:
                    earlier = jax.lax.stop_gradient(earlier)
                own = [*own, _Entries(*entries(earlier, at - 1)[1:])] if heads.draft_states else []
                own = [*own, _Entries(*of_trigrams)]
            mixed = _attend(config, queries, shared, features.mask, own)
            drafted = chimera_heads.finish(config, params, x, mixed)
        logits = chimera_heads.logits(heads, config, target_params, params, k, hidden, drafted)
        found.append((logits, drafted))
    return found


def _next(objective: Objective, batch: DeviceBatch, logits: jax.Array, k: int) -> jax.Array:
    """What step k reads as its newest token: int [B, T]."""
    if objective.reads == "text":
        return jnp.roll(batch["targets"], -k, axis=1)
    return jax.lax.stop_gradient(logits).argmax(axis=-1).astype(jnp.int32)


class _Entries(NamedTuple):
    """Keys and values, [B, T, K, H] each."""

    keys: jax.Array
    values: jax.Array


def _side_by_side(of_states: jax.Array, of_trigrams: jax.Array) -> jax.Array:
    return jnp.concatenate([of_states, of_trigrams], axis=1)


def _attend(
    config: TransformerConfig,
    queries: jax.Array,
    shared: _Entries,
    mask: jax.Array,
    own: list[_Entries],
) -> jax.Array:
    """Attention to what all places share, and to what each has of its own.

    Args:
      config: the target's.
      queries: [B, T, K, G, H].
      shared: of T states and then of T trigrams.
      mask: bool [B, T, T], which of either a place sees.
      own: entry t is seen by the query of place t alone.

    Returns:
      [B, T, K, G, H].
    """
    queries = queries * config.scale
    scores = [jnp.einsum("btkgh,bskh->bkgts", queries, shared.keys)]
    scores += [jnp.einsum("btkgh,btkh->bkgt", queries, mine.keys)[..., None] for mine in own]
    if (cap := config.attention_softcap) is not None:
        scores = [cap * jnp.tanh(score / cap) for score in scores]
    both = jnp.concatenate([mask, mask], axis=-1)
    scores[0] = jnp.where(both[:, None, None], scores[0], _HIDDEN)
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    S = both.shape[-1]
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights[..., :S], shared.values)
    for j, mine in enumerate(own):
        share = weights[..., S + j].transpose(0, 3, 1, 2)[..., None]
        mixed = mixed + share * mine.values[..., None, :]
    return mixed
