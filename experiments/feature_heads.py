"""What heads on a target's features say when they read their own features: EAGLE-2 and FSPAD.

Acceptance in a tree mixes what a head says with what the tree asks. Here each head of
`config.parts` goes on from many places of the target's own text, reading the text's tokens and the
features that it said itself, and is compared with the target at every step.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.loop import ModelParams
from decoding.sampling import SamplingConfig
from experiments import results, trained_parts
from models import cache as kv
from models import feature_head, transformer
from models.config import TransformerConfig
from models.feature_head import ROLE

STEPS = 4
_CUTS = 12  # places a text


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def follow(
    config: TransformerConfig,
    target_params: Any,
    head: Any,
    tokens: jnp.ndarray,
    read: jnp.ndarray,
    cut: jnp.ndarray,
    *,
    steps: int = STEPS,
) -> dict[str, jnp.ndarray]:
    """How far a head is from its target, `steps` tokens on from a place of each text.

    Args:
      config: the target's architecture.
      target_params: its parameters.
      head: the head's.
      tokens: int32 [B, T], whose features the target makes.
      read: int32 [B, T], tokens that the head reads; `tokens`, but for controls.
      cut: int32 [B], the last feature of the target that is read stands here.
      steps: n; cut + n < T.

    Returns:
      Means over rows, float32 [n] each: `feature error` (smooth L1), `cross-entropy` with the
      target's distribution in nats, `overlap` (sum_v min(p_v, q_v)) and `agreement` (same arg-max).
    """
    B, T = tokens.shape
    hidden = transformer.apply(config, target_params, tokens, with_logits=False).hidden
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    following = jnp.pad(read[:, 1:], ((0, 0), (0, 1)))
    embedded = transformer.embed(config, target_params, following, index + 1)
    run = functools.partial(feature_head.apply, config, head)
    empty = kv.create(config, B, T, num_layers=1)
    cache = run(embedded, hidden, positions=index, cache=empty).cache

    def at(table: jnp.ndarray, place: jnp.ndarray) -> jnp.ndarray:
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1))(table, place)

    features, found = at(hidden, cut), []
    for step in range(steps):
        place = cut + step
        assert cache is not None
        said = run(
            at(embedded, place), features,
            positions=place[:, None], cache=kv.truncate(cache, place),
        )  # fmt: skip
        wanted = at(hidden, place + 1)
        logits = transformer.unembed(config, target_params, wanted)
        p = jax.nn.softmax(logits)
        log_q = jax.nn.log_softmax(transformer.unembed(config, target_params, said.readable))
        found.append(
            {
                "feature error": optax.huber_loss(said.features, wanted, delta=1.0).mean(),
                "cross-entropy": -(p * log_q).sum(axis=-1).mean(),
                "overlap": jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1).mean(),
                "agreement": (log_q.argmax(axis=-1) == logits.argmax(axis=-1)).mean(),
            }
        )
        features, cache = said.features, said.cache
    return jax.tree.map(lambda *values: jnp.stack(values), *found)


def own_text(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with the target's greedy continuations, repeated [B, T], and a place in each [B]."""
    new = min(config.decode.max_new_tokens, 96)
    method = methods.build("autoregressive", {"target": configs["target"]}, SamplingConfig())
    stop = generation.stop_config(configs["target"], new, ())
    rows = generation.generate({"target": params["target"]}, prompts, method, stop)
    length = min(len(row.prompt_ids) for row in rows) + new
    texts = np.asarray([[*row.prompt_ids, *row.token_ids][-length:] for row in rows], np.int32)
    places = np.linspace(length - new - 1, length - STEPS - 2, _CUTS).astype(np.int32)
    return np.repeat(texts, _CUTS, axis=0), np.tile(places, len(texts))


def compare(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """By head, `follow` on the target's text; and the same where it reads another row's tokens."""
    tokens, cut = own_text(config, configs, params, prompts)
    heads = trained_parts.load(config, configs, "feature_head")
    own, other = {}, {}
    for name in config.parts:
        if name in heads:
            run = functools.partial(
                follow, configs["target"], params["target"], heads[name][ROLE], tokens
            )
            own[name] = {k: np.asarray(v, float) for k, v in run(tokens, cut).items()}
            wrong = run(np.roll(tokens, _CUTS + 1, axis=0), cut)
            other[name] = {k: np.asarray(v, float) for k, v in wrong.items()}
    return own, other


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Overlap with the target's distribution by step, as a figure; and that tokens matter."""
    own, other = compare(config, configs, params, prompts)
    steps = list(range(1, STEPS + 1))
    figure = {
        "title": "Heads on their own features",
        "x_label": "step",
        "x_ticks": steps,
        "y_label": "overlap with the target's distribution",
        "series": [
            {"label": name, "x": steps, "y": found["overlap"].tolist()}
            for name, found in own.items()
        ],
    }
    claims = [
        results.at_most(
            f"{name}: overlap when another row's tokens are read, over that with its own",
            other[name]["overlap"][0] / own[name]["overlap"][0],
            0.8,
        )
        for name in own
    ]
    return figure, claims


def measure_errors(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Cross-entropy over feature error at the second step, as a figure; and what freeing what is
    read from what is fed back should do: the former falls, the latter does not grow."""
    own, _ = compare(config, configs, params, prompts)
    figure = {
        "title": "Second step: what is read, over what is fed back",
        "x_label": "feature error (smooth L1)",
        "y_label": "cross-entropy (nats)",
        "series": [
            {"label": name, "x": [found["feature error"][1]], "y": [found["cross-entropy"][1]]}
            for name, found in own.items()
        ],
    }
    claims = []
    for better, worse in (("partial alignment", "EAGLE-2"), ("FSPAD", "feature sampling")):
        if better in own and worse in own:
            for metric, step, bound in (("cross-entropy", 0, 1.0), ("feature error", 1, 1.02)):
                claims.append(
                    results.at_most(
                        f"{metric} of {better} at step {step + 1}, over that of {worse}",
                        own[better][metric][step] / own[worse][metric][step],
                        bound,
                    )
                )
    return figure, claims
