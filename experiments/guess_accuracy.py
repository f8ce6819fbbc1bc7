"""How often heads that guess ahead are right, by how far they guess, on the text they were
evaluated on when their training ended."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from decoding.loop import ModelParams
from experiments import results, trained_parts
from models.config import TransformerConfig
from training import target_features

_METRICS = {"agreement": "likeliest token right", "top5": "right among the five likeliest"}

Found = tuple[dict[str, Any], list[results.Claim]]


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Found:
    """How often a head's likeliest token is the data's, for every part that says so.

    With `config.guesses` of fields `better` and `worse`, names of parts, each head of the one is
    claimed to be right at least as often as the other's.
    """
    del configs, params, prompts
    return _shares("agreement", config)


def measure_five(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> Found:
    """As `measure`, for the five likeliest."""
    del configs, params, prompts
    return _shares("top5", config)


def _shares(metric: str, config: ConfigDict) -> Found:
    found: dict[str, list[float]] = {}
    for name in sorted({entry.part for entry in config.decode.methods if entry.get("part")}):
        path = trained_parts.directory_of(config, name) / target_features.SUMMARY_FILE
        summary = json.loads(path.read_text()) if path.is_file() else {}
        shares: list[float] = []
        while (share := summary.get(f"eval_{metric}_{len(shares)}")) is not None:
            shares.append(share)
        if shares:
            found[name] = shares
    figure = {
        "title": "Data's tokens guessed by each head",
        "x_label": "head",
        "y_label": _METRICS[metric],
        "series": [
            {"label": name, "x": list(range(1, len(shares) + 1)), "y": shares}
            for name, shares in found.items()
        ],
    }
    claims = []
    if pair := config.get("guesses"):
        both = zip(found[pair.better], found[pair.worse], strict=True)
        claims = [
            results.at_least(
                f"head {k}, {_METRICS[metric]}: {pair.better} less {pair.worse}", mine - other, 0.0
            )
            for k, (mine, other) in enumerate(both, start=1)
        ]
    return figure, claims
