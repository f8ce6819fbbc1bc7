"""Unmasking policies on one trained model: rounds, positions computed, speed and quality.

All methods answer the same held-out questions on canvases of one size, side by side in one
process; an autoregressive model of equal size answers them too. A *round* is a model call; a
*position* is a token that the model was run on. Quality is the share of answers that are exact.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from experiments import comparison
from experiments.config_parts import comparison as comparison_config
from experiments.config_parts import method
from experiments.configs import learn2pd

BLOCK = 16
CANVAS = 96
BASELINE = "one token a round"
AUTOREGRESSIVE = "autoregressive"


def curves() -> dict[str, tuple[ConfigDict, ...]]:
    """Methods by the curve that they are points of, the baseline first."""
    return {
        "fixed steps": (
            _llada(BASELINE),
            _llada("two tokens a round", steps=BLOCK // 2),
            _llada("four tokens a round", steps=BLOCK // 4),
        ),
        "threshold": tuple(
            _llada(f"threshold {p:g}", rule="threshold", threshold=p) for p in (0.95, 0.9, 0.7, 0.5)
        ),
        "factor": tuple(_llada(f"factor {f:g}", rule="factor", factor=f) for f in (0.5, 1.0)),
        "prefix cache": (_llada("prefix cache", cache="prefix"),),
        "dual cache": (
            _llada("dual cache", cache="dual"),
            _llada("threshold 0.9, dual cache", rule="threshold", threshold=0.9, cache="dual"),
        ),
        "Learn2PD": (
            _filter("Learn2PD", 0.96, eotp=False),
            _filter("Learn2PD, 0.8", 0.8, eotp=False),
        ),
        "Learn2PD + EoTP": (_filter("Learn2PD + EoTP", 0.96), _filter("Learn2PD + EoTP, 0.8", 0.8)),
        "Learn2PD + EoTP + dual cache": (
            _filter("Learn2PD + EoTP + dual cache", 0.96, cache="dual"),
        ),
        "Window-Diffusion": (
            method("Window-Diffusion", "window_diffusion", early_stop=False),
            method("Window-Diffusion, adaptive", "window_diffusion", adaptive_length=True),
        ),
        "ETE": (method("ETE", "ete", block_length=BLOCK, early_stop=False),),
        "LLaDA2.1": (
            _editing("LLaDA2.1, S", mode="S"),
            _editing("LLaDA2.1, Q", mode="Q"),
            method("LLaDA2.0", "llada2", role="block", block_length=BLOCK),
        ),
        AUTOREGRESSIVE: (method(AUTOREGRESSIVE, "autoregressive", role="autoregressive"),),
    }


def _llada(label: str, **options: Any) -> ConfigDict:
    # The published samplers fill the whole canvas.
    return method(label, "llada", block_length=BLOCK, early_stop=False, **options)


def _filter(label: str, threshold: float, **options: Any) -> ConfigDict:
    return method(
        label,
        "learn2pd",
        part="2 layers",
        block_length=BLOCK,
        filter_threshold=threshold,
        early_stop=False,
        **options,
    )


def _editing(label: str, **options: Any) -> ConfigDict:
    # These models know 64 positions, so rows must end where their text does.
    return method(label, "llada21", role="editing", block_length=BLOCK, **options)


def config(repeats: int, num_prompts: int = 48, batch_size: int = 8) -> ConfigDict:
    """The comparison that the suite is; data, canvas and filter are Learn2PD's."""
    found = comparison_config("diffusion")
    offline = learn2pd.get_config("offline")
    found.data, found.parts = offline.data, offline.parts
    found.data.num_prompts = num_prompts
    found.models = ConfigDict(
        {
            "target": "arithmetic_mdlm",
            "block": "arithmetic_block_mdlm",
            "editing": "arithmetic_edit_mdlm",
            "autoregressive": "arithmetic_ar",
        }
    )
    found.decode.update(
        temperatures=(0.0,),
        batch_sizes=(batch_size,),
        max_new_tokens=CANVAS,
        repeats=repeats,
        stop_at_eos=True,
        traces=False,
        methods=tuple(entry for entries in curves().values() for entry in entries),
    )
    return found


def run(repeats: int, workdir: Path) -> list[dict[str, Any]]:
    """The records of `comparison.run`, each with its `curve`, `rounds` and `positions` a prompt."""
    records = comparison.run(config(repeats), workdir)["runs"]
    curve_of = {entry.label: curve for curve, entries in curves().items() for entry in entries}
    for record in records:
        record["curve"] = curve_of[record["label"]]
        record["rounds"] = record["stats"]["target_calls"] / record["rows"]
        record["positions"] = record["stats"]["target_positions"] / record["rows"]
    return records


def time_follows_positions(records: Sequence[Mapping[str, Any]]) -> float:
    """Rank correlation of positions computed and wall-clock time over the unmasking methods."""
    chosen = [r for r in records if r["label"] != AUTOREGRESSIVE]
    seconds = [float(np.median(r["seconds"])) for r in chosen]
    return float(stats.spearmanr([r["positions"] for r in chosen], seconds).statistic)


def charts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Quality over rounds and over positions, and time over positions, for `plots.panels`."""
    panels = (
        ("rounds", "model calls a prompt", "exact_match", "exact answers"),
        ("positions", "positions a prompt", "exact_match", "exact answers"),
        ("positions", "positions a prompt", "time", "seconds a prompt"),
    )
    timed = [{**r, "time": float(np.median(r["seconds"])) / r["rows"]} for r in records]
    found = []
    for x_field, x_label, y_field, y_label in panels:
        series = []
        for curve in dict.fromkeys(r["curve"] for r in records):
            points = sorted((r[x_field], r[y_field]) for r in timed if r["curve"] == curve)
            x, y = zip(*points, strict=True)
            series.append({"label": curve, "x": list(x), "y": list(y)})
        found.append(
            {
                "title": f"{y_label.capitalize()} over {x_label}",
                "x_label": x_label,
                "y_label": y_label,
                "x_scale": "log",
                "y_scale": "log" if y_field == "time" else "linear",
                "series": series,
            }
        )
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| policy | exact answers | calls a prompt | positions a prompt | tokens/s | speed-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['label']} | {r['exact_match']:.0%} | {r['rounds']:.1f} | {r['positions']:.0f} "
        f"| {r['tokens_per_second']:.0f} | {r['speedup']:.2f}x |"
        for r in records
    ]
    correlation = time_follows_positions(records)
    return "\n".join(
        [*lines, "", f"Rank correlation of positions and time, without AR: {correlation:.2f}."]
    )
