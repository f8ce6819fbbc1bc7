"""The adapters of an accelerated residual stream, trained to be ahead of a frozen model (M2R2).

    recipe = PartRecipe("code_deep")
    directory = target_features.ensure(recipe, accelerated_residual.part(AcceleratorConfig()))
    python -m experiments.generate --method=m2r2 --method_params=DIRECTORY ...

arXiv 2502.02040. The streams that the accelerated one should be like are those of the same pass.
Routers learn from the streams of the same run without changing them: they send no gradient into
the adapters.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import accelerated_residual as accelerated
from models import exit_router, expert_routing, transformer
from models.accelerated_residual import AcceleratorConfig
from models.config import TransformerConfig
from models.errors import InputError
from training import loop, losses
from training.fitting import DeviceBatch
from training.target_features import Features, Part


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the losses beside that of alignment.

    Attributes:
      norm: of the squared distance after the final norm, within the alignment.
      gate: of the Kullback-Leibler divergence from the model's distribution at each gate.
      route: of that from each router that is predicted; 0 for a model without experts.
      router: of the exit routers' cross-entropy.
    """

    norm: float = 0.1
    gate: float = 1.0
    route: float = 0.0
    router: float = 1.0

    def __post_init__(self) -> None:
        for field, value in dataclasses.asdict(self).items():
            if not value >= 0:
                raise InputError(f"objective.{field}: {value} must be at least 0")


def part(config: AcceleratorConfig, objective: Objective = Objective()) -> Part:
    """What `target_features` trains."""
    return Part(
        "accelerated_residual",
        functools.partial(accelerated.init, config),
        functools.partial(loss, config, objective),
        lambda directory, params: accelerated.save(directory, config, params),
        {**dataclasses.asdict(config), "objective": dataclasses.asdict(objective)},
        collect=None,
        cache=True,
        begin=accelerated.begin,
    )


def streams(
    config: AcceleratorConfig,
    target: TransformerConfig,
    params: Any,
    features: Features,
    positions: jax.Array,
) -> list[jax.Array]:
    """The accelerated stream after 0, 1, ... adapted layers; at a gate before it starts anew."""
    assert features.cache is not None
    p = features.streams[0]
    found = [p]
    for layer in range(accelerated.num_adapted(config, target.num_layers)):
        if accelerated.interval_of(config, target.num_layers, layer + 1) == layer:
            p = features.streams[layer]
        (p,) = accelerated.apply(
            target,
            params,
            p,
            features.cache,
            (layer, layer + 1),
            positions=positions,
            mask=features.mask,
            key_positions=positions,
        )
        found.append(p)
    return found


def routed_pairs(config: AcceleratorConfig, num_layers: int) -> list[tuple[int, int]]:
    """(i, i'): the stream after i layers says which experts layer i' will need.

    Each layer is predicted once, as soon as the stream has passed it, and at least one layer
    before it runs; those that cannot be are left out.
    """
    pairs, reached = [], 0
    for i in range(1, accelerated.num_adapted(config, num_layers) + 1):
        until = accelerated.ahead(config, num_layers, i)
        pairs += [(i, j) for j in range(max(reached, i) + 1, min(until, num_layers - 1) + 1)]
        reached = max(reached, until)
    return pairs


def loss(
    config: AcceleratorConfig,
    objective: Objective,
    target: TransformerConfig,
    params: Any,
    features: Features,
    batch: DeviceBatch,
    target_params: Any,
    key: jax.Array,
) -> tuple[jax.Array, loop.Metrics]:
    """Alignment with the stream tau(i) layers up, and what `Objective` adds; a mean over tokens.

    Metrics: `alignment`, the mean cosine; `agreement_g`, how often head and final norm say at the
    gate after g layers what they say at the end; `recall`, the share of a layer's experts among
    those that are predicted; the terms of the loss.
    """
    del key
    frozen = jax.lax.stop_gradient(target_params)
    L, mask = target.num_layers, batch["loss_mask"]
    mean = functools.partial(losses.masked_mean, mask=mask)
    ps = streams(config, target, params, features, batch["positions"])
    normalise = functools.partial(transformer.final_norm, target, frozen)

    near: list[jax.Array] = []
    cosines: list[jax.Array] = []
    for i in range(1, len(ps)):
        wanted = features.streams[accelerated.ahead(config, L, i)]
        cosine = _cosine(ps[i], wanted)
        apart = jnp.mean(jnp.square(_wide(normalise(ps[i])) - _wide(normalise(wanted))), axis=-1)
        near.append(mean(1 - cosine + objective.norm * apart))
        cosines.append(mean(cosine))
    total = _mean(near)
    metrics = {"alignment": _mean(cosines)}

    gates = accelerated.gates(config.intervals, L)
    if between := gates[1:-1]:
        logits = transformer.unembed(target, frozen, features.hidden)
        log_p, says = jax.nn.log_softmax(logits), jnp.argmax(logits, axis=-1)
        far, entropies = [], []
        for last, gate in zip(gates, between, strict=False):
            mine = transformer.unembed(target, frozen, normalise(ps[gate]))
            log_q = jax.nn.log_softmax(mine)
            far.append(mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))
            right = jnp.argmax(mine, axis=-1) == says
            metrics[f"agreement_{gate}"] = mean(right.astype(jnp.float32))
            if config.router_width:
                states = jax.lax.stop_gradient(ps[last + 1 : gate + 1])
                for kind in exit_router.ROUTERS:
                    odds = exit_router.score(kind, params[f"router_{gate}"], states)
                    entropies.append(mean(optax.sigmoid_binary_cross_entropy(odds, right)))
        metrics["gate_loss"] = _mean(far)
        total += objective.gate * metrics["gate_loss"]
        if entropies:
            metrics["router_loss"] = _mean(entropies)
            total += objective.router * metrics["router_loss"]

    if objective.route:
        expert_routing.check(target)
        terms, recalls = _routing(config, target, frozen, features, batch, ps)
        metrics["route_loss"], metrics["recall"] = mean(terms), mean(recalls)
        total += objective.route * metrics["route_loss"]
    return total, metrics


def _routing(
    config: AcceleratorConfig,
    target: TransformerConfig,
    frozen: Any,
    features: Features,
    batch: DeviceBatch,
    ps: list[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Divergence from the routers that are predicted, and the share of right experts: [B, T]."""
    terms, recalls = [], []
    for i, layer in routed_pairs(config, target.num_layers):
        true = expert_routing.true_logits(
            target,
            frozen,
            layer,
            features.streams[layer],
            positions=batch["positions"],
            mask=features.mask,
        )
        found = expert_routing.predicted_logits(target, frozen, layer, ps[i])
        log_p, log_q = jax.nn.log_softmax(true), jax.nn.log_softmax(found)
        terms.append(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
        picked, wanted = (expert_routing.chosen(target, x) for x in (found, true))
        recalls.append((picked[..., None] == wanted[..., None, :]).any(-2).mean(-1))
    return _mean(terms), _mean(recalls)


def _mean(terms: Sequence[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack(terms), axis=0)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of the last axis, float32."""
    a, b = _wide(a), _wide(b)
    sizes = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(sizes + 1e-12)
