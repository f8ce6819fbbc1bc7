"""Rounds against information where both are exact: small Markov chains in place of a model."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from decoding import generation, stopping
from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.unmasking import exact_joint, explore, selectors
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.explore import Exploration
from decoding.unmasking.method import unmasking
from decoding.unmasking.selectors import Selector
from experiments import information, results
from models.config import TransformerConfig

_VOCAB, _LENGTH, _COPIES = 3, 8, 64
# From nearly free choice to nearly none.
_SHARPNESS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
_SEEDS = 2
FACTOR = 0.9
ALONE = "sure tokens alone"
_EXPLORING = ("entropy", "random", "confident")


def methods() -> dict[str, Method]:
    """The rules that are compared: sure tokens alone, and with one more token in every round."""
    config, schedule = exact_joint.config(_VOCAB), Schedule(_LENGTH)

    def with_rule(selector: Selector) -> Method:
        sampling = SamplingConfig(temperature=1.0)
        return unmasking("exact", config, sampling, schedule, selector, exact_joint.exact(config))

    def exploring(when: str, score: str) -> Method:
        how = Exploration(rule="factor", factor=FACTOR, when=when, score=score)
        return with_rule(explore.explore(how, schedule, ()))

    found = {"one token a round": with_rule(selectors.quota(_LENGTH, "random"))}
    found[ALONE] = exploring("never", "entropy")
    return found | {f"and the {score} one": exploring("every", score) for score in _EXPLORING}


def _decode(method: Method, joint: Mapping[str, np.ndarray], seed: int) -> list[generation.Row]:
    stop = stopping.StopConfig(_LENGTH)
    return generation.generate({"target": joint}, [[0]] * _COPIES, method, stop, seed=seed)


def log_probability(joint: Mapping[str, np.ndarray], texts: np.ndarray) -> np.ndarray:
    """Of texts int [n, length] under an enumerated joint: float [n]."""
    place = {tuple(text): value for text, value in zip(joint["texts"].tolist(), joint["log_p"])}
    return np.array([place.get(tuple(text), -np.inf) for text in texts.tolist()])


@functools.cache
def _chains(order: int) -> tuple[dict[str, np.ndarray], ...]:
    return tuple(
        exact_joint.markov_chain(_VOCAB, _LENGTH, sharpness=sharpness, seed=seed, order=order)
        for sharpness in _SHARPNESS
        for seed in range(_SEEDS)
    )


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Mean rounds over the entropy of chains, rule by rule, at temperature 1.

    The figure's `table` has for each rule the rounds, the tokens that were sure by round, what
    the texts lose (their mean surprise under the chain less the chain's entropy), and how well a
    line through the chains' entropies explains the rounds.
    """
    del configs, params, prompts
    series: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for label, method in methods().items():
        points, excess, sure, rounds = [], [], [], []
        for joint in _chains(2):
            rows = _decode(method, joint, config.seed)
            calls = np.array([row.stats["target_calls"] for row in rows])
            texts = np.array([row.token_ids for row in rows])
            entropy = float(-(np.exp(joint["log_p"]) * joint["log_p"]).sum())
            points.append((entropy, float(calls.mean())))
            excess.append(float(-log_probability(joint, texts).mean()) - entropy)
            rounds.append(float(calls.mean()))
            if explore.STARVED in rows[0].stats:
                count = np.array([row.stats[explore.EXPLOITED] for row in rows])
                sure.append(float((count / calls).mean()))
        points.sort()
        series.append({"label": label, "x": [x for x, _ in points], "y": [y for _, y in points]})
        table.append(
            {
                "label": label,
                "rounds": float(np.mean(rounds)),
                "sure_a_round": float(np.mean(sure)) if sure else 0.0,
                "lost_nats": float(np.mean(excess)),
                "r_squared": information.r_squared(*np.array(points).T),
            }
        )
    by_label = {line["label"]: line for line in table}
    explored = by_label["and the entropy one"]
    compared = (methods()[label] for label in (ALONE, "and the entropy one"))
    alone, entropy_too = (
        np.mean([row.stats["target_calls"] for j in _chains(0) for row in _decode(m, j, 0)])
        for m in compared
    )
    saved = float(alone - entropy_too)
    claims = [
        # Where nothing follows from anything, exploring saves no more than what it explores beside
        # the sure tokens of the first round.
        results.Claim("independent tokens: rounds saved by exploring", saved, "<= 1", saved <= 1),
        *(
            results.at_least(
                f"exact chains: sure tokens a round, exploring by entropy over {other}",
                explored["sure_a_round"] / by_label[f"and the {other} one"]["sure_a_round"], 1.0,
            )
            for other in _EXPLORING[1:]
        ),
        results.at_least(
            "exact chains: rounds of sure tokens alone over those of exploring by entropy",
            by_label[ALONE]["rounds"] / explored["rounds"], 1.0,
        ),
        results.at_least(
            "exact chains: nats lost beside the most confident token over those beside the least",
            by_label["and the confident one"]["lost_nats"] / explored["lost_nats"], 1.0,
        ),
    ]  # fmt: skip
    figure = {
        "title": f"Rounds over information, exact chains of {_LENGTH} tokens",
        "x_label": "entropy of the chain, nats",
        "y_label": "rounds",
        "series": series,
        "table": table,
    }
    return figure, claims
