"""How far ahead an accelerated stream is, and what leaving with it costs (M2R2).

Measured on held-out text that is given, token by token: what the head would say after each layer
beside what it says after the last. `config.streams` names the parts to measure, by label; the first
one's routers decide where a curve of exits is asked for.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding.loop import ModelParams
from experiments import results, trained_parts
from models import accelerated_residual, exit_router, transformer
from models.accelerated_residual import AcceleratorConfig
from models.config import TransformerConfig
from training import accelerated_residual as training
from training import target_features

_THRESHOLDS = np.linspace(0.0, 1.0, 41)
ORDINARY = "ordinary stream"


class Streams(NamedTuple):
    """What both streams are on rows of text.

    Attributes:
      slow: [N, T, D] each, after 0 .. L layers.
      fast: [N, T, D] each, after 0, 1, ... adapted layers.
      says: int [N, T], the head's word after all layers.
      slow_says, fast_says: int [N, T] each, its word on every one of `slow` and `fast`.
      sure: float [N, T] each, the largest probability on every one of `slow` and `fast`: a pair.
    """

    slow: tuple[jax.Array, ...]
    fast: tuple[jax.Array, ...]
    says: jax.Array
    slow_says: tuple[jax.Array, ...]
    fast_says: tuple[jax.Array, ...]
    sure: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


@functools.partial(jax.jit, static_argnames=("config", "target"))
def read(
    config: AcceleratorConfig,
    target: TransformerConfig,
    target_params: Any,
    params: Any,
    tokens: jax.Array,
) -> Streams:
    """Both streams on tokens int [N, T], and what the head says of them."""
    batch = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
    }
    features = target_features.features(target, target_params, batch, None, True)
    fast = training.streams(config, target, params, features, batch["positions"])

    def word(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = transformer.final_norm(target, target_params, x)
        logits = transformer.unembed(target, target_params, hidden)
        return jnp.argmax(logits, axis=-1), jax.nn.softmax(logits, axis=-1).max(axis=-1)

    slow_words, fast_words = ([word(x) for x in streams] for streams in (features.streams, fast))
    return Streams(
        features.streams,
        tuple(fast),
        slow_words[-1][0],
        tuple(says for says, _ in slow_words),
        tuple(says for says, _ in fast_words),
        (tuple(p for _, p in slow_words), tuple(p for _, p in fast_words)),
    )


def of_parts(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> dict[str, tuple[AcceleratorConfig, Any, Streams]]:
    """By label of `config.streams`: a part's config and parameters, and its streams."""
    found = {}
    width = min(map(len, prompts))
    tokens = jnp.asarray([row[:width] for row in prompts], jnp.int32)
    for label, name in config.streams.items():
        directory = trained_parts.directory_of(config, name)
        accelerator, own = accelerated_residual.load(directory, configs["target"])
        streams = read(accelerator, configs["target"], params["target"], own, tokens)
        found[label] = (accelerator, own, jax.device_get(streams))
    return found


def measure_agreement(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """How often the head says after i layers what it says at the end, by stream and layer."""
    measured = of_parts(config, configs, params, prompts)
    series: list[dict[str, Any]] = []
    claims: list[results.Claim] = []
    margins: list[tuple[str, float]] = []
    costs: dict[str, dict[str, int]] = {}
    for label, (accelerator, _, s) in measured.items():
        costs[label] = accelerated_residual.multiply_adds(accelerator, configs["target"])
        layers = list(range(1, len(s.fast)))
        slow = [float(np.mean(s.slow_says[i] == s.says)) for i in layers]
        fast = [float(np.mean(s.fast_says[i] == s.says)) for i in layers]
        if not series:
            series.append({"label": ORDINARY, "x": layers, "y": slow})
        series.append({"label": label, "x": layers, "y": fast})
        gain = [f - o for f, o in zip(fast, slow, strict=True)]
        claims.append(
            results.at_least(
                f"{label}: least gain of agreement over the ordinary stream at any layer",
                min(gain),
                0.0,
            )
        )
        share = costs[label]["adapter"] / costs[label]["layer"]
        name = f"{label}: products of an adapter over those of a layer"
        claims.append(results.at_most(name, share, 0.1))
        margins.append((label, float(np.mean(gain))))
    for (faster, more), (slower, less) in itertools.pairwise(margins):
        claims.append(
            results.at_least(f"mean gain of {faster} less that of {slower}", more - less, 0.0)
        )
    figure = {
        "title": f"The head's word after i layers is its last ({s.says.size} tokens)",
        "x_label": "layers",
        "y_label": "share of tokens",
        "series": series,
        "multiply_adds": costs,
    }
    return figure, claims


def measure_similarity(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Cosine with the last layer's stream, and whether the rate is what it should be."""
    L = configs["target"].num_layers
    series: list[dict[str, Any]] = []
    claims: list[results.Claim] = []
    for label, (accelerator, _, s) in of_parts(config, configs, params, prompts).items():
        layers = list(range(1, len(s.fast)))
        if not series:
            slow = [_cosine(s.slow[i], s.slow[L]) for i in layers]
            series.append({"label": ORDINARY, "x": layers, "y": slow})
        series.append(
            {"label": label, "x": layers, "y": [_cosine(s.fast[i], s.slow[L]) for i in layers]}
        )
        nearest = [int(np.argmax([_cosine(s.fast[i], h) for h in s.slow])) for i in layers]
        aims = [accelerated_residual.ahead(accelerator, L, i) for i in layers]
        claims.append(
            results.at_least(
                f"{label}: layers nearest to the stream, {nearest}, are those aimed at, {aims}: "
                "share of them",
                float(np.mean(np.equal(nearest, aims))),
                0.8,
            )
        )
    figure = {
        "title": "Cosine with the stream after the last layer",
        "x_label": "layers",
        "y_label": "cosine",
        "series": series,
    }
    return figure, claims


def measure_exits(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Agreement over the mean number of layers, by router and stream; how well routers rank."""
    L = configs["target"].num_layers
    label, (accelerator, own, s) = next(iter(of_parts(config, configs, params, prompts).items()))
    gates = accelerated_residual.gates(accelerator.intervals, L)[:-1]
    right_fast = [s.fast_says[g] == s.says for g in gates[1:]]
    right_slow = [s.slow_says[g] == s.says for g in gates[1:]]
    scores: dict[str, list[np.ndarray]] = {kind: [] for kind in exit_router.ROUTERS}
    for last, gate in itertools.pairwise(gates):
        for kind in exit_router.ROUTERS:
            states = [jnp.asarray(x) for x in s.fast[last + 1 : gate + 1]]
            odds = exit_router.score(kind, own[f"router_{gate}"], states)
            scores[kind].append(np.asarray(jax.nn.sigmoid(odds)))
    scores["confidence"] = [np.asarray(s.sure[1][g]) for g in gates[1:]]
    curves = {
        f"{kind}, accelerated": curve(values, right_fast, gates[1:], L)
        for kind, values in scores.items()
    }
    plain = "confidence, ordinary stream"
    curves[plain] = curve([np.asarray(s.sure[0][g]) for g in gates[1:]], right_slow, gates[1:], L)
    areas = {
        kind: float(np.mean([auc(v, r) for v, r in zip(values, right_fast, strict=True)]))
        for kind, values in scores.items()
    }
    claims = [
        results.at_least(
            f"{name}: mean gain of agreement over plain early exit at the same mean depth",
            gain_at_equal_depth(curves[name], curves[plain]),
            0.0,
        )
        for name in curves
        if name != plain
    ]
    claims += [
        results.at_least(
            f"AUC of {better} ({areas[better]:.3f}) less that of {worse} ({areas[worse]:.3f})",
            areas[better] - areas[worse],
            0.0,
        )
        for better, worse in (("arla", "linear"), ("linear", "confidence"))
    ]
    figure = {
        "title": f"Leaving at gates, {label}",
        "x_label": "layers a token",
        "y_label": "share of tokens",
        "series": [
            {"label": name, "x": depth.tolist(), "y": agreement.tolist()}
            for name, (depth, agreement) in curves.items()
        ],
    }
    return figure, claims


def curve(
    scores: Sequence[np.ndarray],
    right: Sequence[Any],
    gates: Sequence[int],
    num_layers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean layers and share of right words for each threshold, by increasing layers.

    Args:
      scores: of each gate; a token leaves at the first gate whose score is above the threshold.
      right: bool, of each gate; after all layers a word is right.
      gates: layers before each.
      num_layers: L.
    """
    points = set()
    for threshold in (-1.0, *_THRESHOLDS):
        depth = np.full(scores[0].shape, num_layers)
        good = np.ones(scores[0].shape, bool)
        for score, ok, gate in reversed(list(zip(scores, right, gates, strict=True))):
            leaves = score > threshold
            depth, good = np.where(leaves, gate, depth), np.where(leaves, ok, good)
        points.add((float(depth.mean()), float(good.mean())))
    depths, agreements = zip(*sorted(points), strict=True)
    return np.asarray(depths), np.asarray(agreements)


def gain_at_equal_depth(
    mine: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> float:
    """Mean difference of two curves over the depths that both reach, interpolated linearly."""
    low, high = max(mine[0][0], other[0][0]), min(mine[0][-1], other[0][-1])
    at = np.linspace(low, high, 50)
    return float(np.mean(np.interp(at, *mine) - np.interp(at, *other)))


def auc(scores: Any, right: Any) -> float:
    """Probability that a right word scores higher than a wrong one, ties counted half."""
    scores, right = scores.ravel(), right.ravel()
    order = np.sort(scores[~right])
    below = np.searchsorted(order, scores[right], "left")
    upto = np.searchsorted(order, scores[right], "right")
    return float(np.mean(below + upto) / 2 / max(len(order), 1))


def _cosine(a: Any, b: Any) -> float:
    """Mean over tokens."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.mean((a * b).sum(-1) / np.maximum(sizes, 1e-12)))
