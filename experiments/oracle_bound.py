"""What a filter for unmasking could reach, and how well it tells final predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding.loop import ModelParams
from decoding.unmasking import learned_filter
from experiments import results, trained_parts
from models.config import TransformerConfig
from training import unmask_filter, unmask_records

_PROMPTS = 48
# Steps a block that the paper's oracle takes are about two; small models need a few more.
_FEW_STEPS = 4.0
_GAP = 0.05


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Precision over recall of filters and of plain confidence on the oracle's steps.

    The oracle (EGP) answers the comparison's own prompts, which no filter has seen; its steps a
    block are the bound for every rule that writes only what is final.
    """
    chosen = trained_parts.load(config, configs, "filter")
    names = sorted(chosen)
    length = chosen[names[0]][learned_filter.ROLE]["layer_0"]["kernel"].shape[0]
    records = unmask_records.collect(
        configs["target"],
        params["target"],
        prompts[:_PROMPTS],
        block_length=length,
        new_tokens=config.decode.max_new_tokens // length * length,
        batch_size=min(16, len(prompts)),
    )
    steps = float(unmask_records.steps_per_block(records).mean())
    confidence = jnp.asarray(records.confidence)
    scores = {"confidence": records.confidence}
    for name in names:
        logits = learned_filter.apply(chosen[name][learned_filter.ROLE], confidence)
        scores[f"filter, {name}"] = np.asarray(jax.nn.sigmoid(logits))
    found = {label: unmask_filter.quality(score, records) for label, score in scores.items()}
    figure = {
        "title": f"Which predictions are final (oracle: {steps:.1f} steps a block)",
        "x_label": "recall",
        "y_label": "precision",
        "series": [
            {
                "label": label,
                "x": [point["recall"] for point in quality["thresholds"]],
                "y": [point["precision"] for point in quality["thresholds"]],
            }
            for label, quality in found.items()
        ],
    }
    claims = [
        results.Claim("oracle: steps a block", steps, f"<= {_FEW_STEPS:g}", steps <= _FEW_STEPS)
    ]
    plain = found.pop("confidence")
    for label, quality in found.items():
        claims.append(
            results.at_least(
                f"{label}: average precision over that of confidence",
                quality["average_precision"] / plain["average_precision"],
                1.0,
            )
        )
        gap = quality["calibration_error"]
        name = f"{label}: calibration error (of confidence: {plain['calibration_error']:.3f})"
        claims.append(results.Claim(name, gap, f"<= {_GAP:g}", gap <= _GAP))
        at = next(t for t in quality["thresholds"] if t["threshold"] == 0.96)
        claims.append(
            results.at_least(
                f"{label}: precision at 0.96 (recall {at['recall']:.2f})", at["precision"], 0.96
            )
        )
    return figure, claims
