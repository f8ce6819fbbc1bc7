"""Loading experts ahead of time: what predictors are worth on a model's own routing (M2R2, use C).

The routing is that of `config.experts.model` on text; memory and time are simulated
(`decoding.expert_loading`). Whatever is predicted, the model computes the same.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import expert_loading, generation, methods
from decoding.expert_loading import MemoryTiers, Prediction
from decoding.loop import ModelParams
from decoding.sampling import SamplingConfig
from experiments import results
from models import accelerated_residual, expert_routing, hf_checkpoint
from models.accelerated_residual import AcceleratorConfig
from models.config import TransformerConfig
from training import accelerated_residual as training
from training import base_models, target_features
from training.accelerated_residual import Objective
from training.optimizers import OptimizerConfig
from training.target_features import PartRecipe

NONE, PREVIOUS, SLOW, FAST, ORACLE = (
    "on demand", "previous token", "ordinary stream", "M2R2", "oracle",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "target", "extra"))
def routes(
    config: AcceleratorConfig,
    target: TransformerConfig,
    target_params: Any,
    params: Any,
    tokens: jax.Array,
    extra: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the layers' routers choose, and would choose from earlier streams.

    Args:
      config, target: of the stream and of the model.
      target_params, params: theirs.
      tokens: int [N, T].
      extra: experts that are predicted beyond as many as a token has.

    Returns:
      int [N, T, L, K]; and, for each of `training.routed_pairs`, the choice from the ordinary and
      from the accelerated stream, int [N, T, pairs, K + extra] each.
    """
    batch = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
    }
    found = target_features.features(target, target_params, batch, None, True)
    fast = training.streams(config, target, params, found, batch["positions"])
    true = [
        expert_routing.true_logits(
            target,
            target_params,
            layer,
            found.streams[layer],
            positions=batch["positions"],
            mask=found.mask,
        )
        for layer in range(target.num_layers)
    ]
    pairs = training.routed_pairs(config, target.num_layers)

    def from_stream(streams: Sequence[jax.Array]) -> jax.Array:
        logits = [
            expert_routing.predicted_logits(target, target_params, layer, streams[i])
            for i, layer in pairs
        ]
        return jnp.stack([expert_routing.chosen(target, x, extra) for x in logits], axis=2)

    chosen = jnp.stack([expert_routing.chosen(target, x) for x in true], axis=2)
    return chosen, from_stream(found.streams), from_stream(fast)


def predictors(
    config: AcceleratorConfig, true: np.ndarray, slow: np.ndarray, fast: np.ndarray
) -> dict[str, list[Prediction]]:
    """By name, for one row: true int [T, L, K], the others int [T, pairs, P]."""
    pairs = training.routed_pairs(config, true.shape[1])

    def said(chosen: np.ndarray) -> list[Prediction]:
        return [Prediction(i, layer, chosen[:, n]) for n, (i, layer) in enumerate(pairs)]

    return {
        NONE: [],
        PREVIOUS: expert_loading.of_previous_token(true, pairs),
        SLOW: said(slow),
        FAST: said(fast),
        ORACLE: [Prediction(i, layer, true[:, layer]) for i, layer in pairs],
    }


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Speed-up over loading on demand, by predictor and cost of a load; and hit rates."""
    asked = config.experts
    model, weights, accelerator, own = _load(asked)
    texts = _texts(config, model, weights, prompts)
    chosen = routes(accelerator, model, weights, own, jnp.asarray(texts), asked.extra)
    true, slow, fast = (np.asarray(x) for x in chosen)
    rows = [predictors(accelerator, *row) for row in zip(true, slow, fast, strict=True)]
    hits = {
        name: float(
            np.mean(
                [expert_loading.recall(t, row[name]) for t, row in zip(true, rows, strict=True)]
            )
        )
        for name in rows[0]
    }
    share, ratios = asked.share, list(asked.ratios)
    speed: dict[str, list[float]] = {name: [] for name in hits}
    stalls: dict[str, list[float]] = {name: [] for name in hits}
    for ratio in ratios:
        tiers = MemoryTiers(max(model.experts_per_token, round(share * model.num_experts)), ratio)
        runs = {
            name: [
                expert_loading.simulate(t, row[name], tiers)
                for t, row in zip(true, rows, strict=True)
            ]
            for name in hits
        }
        taken = {name: sum(run.seconds for run in found) for name, found in runs.items()}
        for name, found in runs.items():
            speed[name].append(taken[NONE] / taken[name])
            stalls[name].append(sum(run.stalled for run in found) / taken[name])
    load = np.bincount(true.ravel(), minlength=model.num_experts) / true.size
    figure = {
        "title": f"Experts ahead of time, {share:.0%} in fast memory",
        "x_label": "time to load an expert over that to compute a layer",
        "y_label": "speed-up over loading on demand",
        "x_scale": "log",
        "x_ticks": ratios,
        "series": [
            {"label": f"{name} ({hits[name]:.0%} right)", "x": ratios, "y": values}
            for name, values in speed.items()
        ],
        "stalled": stalls,
        "load": {"least": float(load.min()), "most": float(load.max())},
    }
    order = (ORACLE, FAST, SLOW, PREVIOUS, NONE)
    claims = [
        results.at_least(
            f"share of experts that {better} predicts ({hits[better]:.3f}) less that of {worse} "
            f"({hits[worse]:.3f})",
            hits[better] - hits[worse],
            0.0,
        )
        for better, worse in itertools.pairwise(order)
    ]
    best = max(range(len(ratios)), key=lambda i: speed[FAST][i])
    claims += [
        results.at_least(f"speed-up of {better} over that of {worse}, best load", ratio, 1.0)
        for better, worse in ((FAST, NONE), (FAST, SLOW), (ORACLE, FAST))
        for ratio in (speed[better][best] / speed[worse][best],)
    ]
    return figure, claims


def _load(asked: ConfigDict) -> tuple[TransformerConfig, Any, AcceleratorConfig, Any]:
    """The model of experts and its accelerated stream, trained where they are not there."""
    accelerator = AcceleratorConfig(**asked.accelerator)
    recipe: dict[str, Any] = asked.recipe.to_dict()
    if optimizer := recipe.pop("optimizer", None):
        recipe["optimizer"] = OptimizerConfig(**optimizer)
    directory = asked.model
    if directory in base_models.RECIPES:
        directory = base_models.ensure(directory)
    model, weights = hf_checkpoint.load(directory)
    expert_routing.check(model)
    part = training.part(accelerator, Objective(**asked.objective))
    at = target_features.ensure(PartRecipe(asked.model, **recipe), part)
    _, own = accelerated_residual.load(at, model)
    return model, weights, accelerator, own


def _texts(
    config: ConfigDict, model: TransformerConfig, weights: Any, prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Prompts of one length and what the model itself goes on with."""
    method = methods.build("autoregressive", {"target": model}, SamplingConfig())
    stop = generation.stop_config(model, config.experts.new_tokens, ())
    width = min(map(len, prompts))
    rows = generation.generate(
        {"target": weights}, [row[:width] for row in prompts], method, stop, seed=config.seed
    )
    return [[*row.prompt_ids, *row.token_ids] for row in rows]
