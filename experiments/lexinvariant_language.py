"""Lexinvariant models of a language so small that the best of them, p', is known exactly."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import cipher_keys, results
from experiments.lexinvariant_measures import Table, curve, load_model, nats_by_position
from models.permutation_mixture import MarkovLanguage, log_probs, predictions
from training import lexinvariant_models


def measure(config: ConfigDict, found: dict[str, Any]) -> None:
    """Adds losses by position against p' and the true language, and the theorem's distances."""
    names = config.language
    spec: MarkovLanguage = lexinvariant_models.recipe(names.lexinvariant).data.language
    models = {
        role: load_model(names[role], f"language, {role}", dict(config.overrides))
        for role in ("lexinvariant", "standard")
    }
    found["models"] += [model.summary for model in models.values()]
    rows = spec.sample(names.rows, names.length + 1, seed=config.seed + 100)
    given = {"draws": config.draws, "batch_size": names.rows, "seed": config.seed}
    measured = {role: nats_by_position(model, rows, **given) for role, model in models.items()}
    # The same rows under a cipher each: a lexinvariant model's losses do not change by that.
    model, rng = models["standard"], np.random.default_rng(config.seed)
    hidden = cipher_keys.encrypt(rows, cipher_keys.random_keys(rng, model.config, len(rows)))
    measured["standard, enciphered rows"] = nats_by_position(model, hidden, **given)
    exact = -np.asarray(log_probs(spec.transition(), rows), np.float64)[:, 1:]
    true = -spec.log_probs(rows)[:, 1:]
    lines = {**measured, "exact p'": exact, "language": true}
    context = np.arange(1, names.length + 1)
    found["figures"]["language"] = curve(
        "Loss by position, six symbols", "nats a symbol",
        [(label, context, values.mean(axis=0)) for label, values in lines.items()],
    )  # fmt: skip
    bands = [(a, b) for a, b in ((0, 1), (1, 2), (2, 5), (5, 10), (10, 20), (20, names.length))]
    found["tables"].append(
        Table(
            "Nats a symbol by symbols of context",
            ["model", *(f"{a + 1}-{b}" for a, b in bands)],
            [
                [label, *(float(values[:, a:b].mean()) for a, b in bands)]
                for label, values in lines.items()
            ],
        )
    )
    found["claims"] += _language_claims(measured, exact, models["lexinvariant"].summary)
    found["figures"]["theorem"] = _theorem(config, spec)
    late = slice(3 * names.length // 4, None)
    found["scores"] = {
        f"nats a symbol, {where}": {
            label: float(values[:, part].mean()) for label, values in lines.items()
        }
        for where, part in (("one symbol of context", slice(0, 1)), ("last quarter", late))
    }


def _language_claims(
    measured: Mapping[str, np.ndarray], exact: np.ndarray, summary: Mapping[str, Any]
) -> list[results.Claim]:
    own, standard = measured["lexinvariant"], measured["standard"]
    excess = own - exact
    errors = np.array([_error(excess[:, t]) for t in range(excess.shape[1])])
    late = slice(3 * own.shape[1] // 4, None)
    evaluations = [line["eval_loss"] for line in summary["evaluations"]]
    return [
        results.at_least(
            "language: standard errors by which the loss is above exact p', least over positions",
            float((excess.mean(axis=0) / errors).min()),
            -3.0,
        ),
        results.at_most(
            "language: nats above exact p' with one symbol of context",
            float(excess[:, 0].mean()),
            0.1,
        ),
        results.at_least(
            "language: nats that the loss falls from one symbol of context to the last quarter",
            float(own[:, 0].mean() - own[:, late].mean()),
            0.3,
        ),
        results.at_most(
            "language: the same of the standard model",
            float(standard[:, 0].mean() - standard[:, late].mean()),
            0.1,
        ),
        results.at_least(
            "language: nats that the held-out loss, and so its excess over p', lost in training",
            evaluations[0] - evaluations[-1],
            0.1,
        ),
        results.at_most(
            "language: nats above exact p' in the last quarter",
            float(excess[:, late].mean()),
            0.35,
        ),
    ]


def _theorem(config: ConfigDict, spec: MarkovLanguage) -> dict[str, Any]:
    """Time-averaged L1 distance of p' from the language, over context (section 2's theorem)."""
    series = []
    for size in config.language.sizes:
        one = MarkovLanguage(size, spec.next_probs, spec.seed)
        rows = one.sample(64, config.language.theorem_length, seed=config.seed + 200)
        said = np.exp(np.asarray(predictions(one.transition(), rows)))[:, 1:]
        distance = np.abs(said - one.transition()[rows[:, :-1]]).sum(axis=2).mean(axis=0)
        average = distance.cumsum() / np.arange(1, len(distance) + 1)
        series.append((f"V = {size}", np.arange(1, len(distance) + 1), average))
    return curve("Exact p': average L1 distance from the language", "L1 distance", series)


def _error(values: np.ndarray) -> float:
    """Standard error of the mean over rows."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))
