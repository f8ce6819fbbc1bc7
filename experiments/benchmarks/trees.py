"""Draft trees: tokens per target call and speed-up at equal node budgets, on the trained pair.

Every method drafts as many nodes as the others, so that one target call costs all of them the
same. What trees cost beside model calls is in `tree_cost`. Times are medians over repeats taken in
turn.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from experiments import comparison, results, timing
from experiments.config_parts import comparison as comparison_config
from models.errors import check_choice

TEMPERATURES = (0.0, 0.6, 1.0)
# Nodes that the target scores beside the root: SpecTr's and RSD-S's width x depth, RSD-C's tree.
BUDGETS: dict[int, tuple[tuple[int, int], str]] = {
    8: ((2, 4), "2-1-1-1"),
    16: ((4, 4), "4-1-1-1"),
    32: ((4, 8), "2-3-2-1"),
    64: ((8, 8), "4-3-2-1"),
}
NUM_PROMPTS = 4
PROMPT_TOKENS = 121  # with what follows, every loop is compiled for one size of cache: 256 slots
NEW_TOKENS = 64
HOT = ("Token Recycling",)  # one table for all prompts, as published


def entries(budget: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods with their options at a budget of drafted nodes, by label."""
    (width, depth), branching = BUDGETS[budget]
    beam = {"width": width, "depth": depth}
    return {
        "plain": ("autoregressive", {}),
        "chain": ("speculative_sampling", {"num_draft": budget}),
        "SpecTr": ("spectr", {"num_sequences": width, "length": depth}),
        "RSD-C": ("rsd_c", {"branching": branching}),
        "RSD-S": ("rsd_s", beam),
        "DySpec": ("dyspec", {"budget": budget}),
        "DySpec heap": ("dyspec", {"budget": budget, "construction": "heap"}),
        "top tree": ("top_tree", {"branching": branching}),
        "RSD-S n-grams": ("rsd_s", {**beam, "source": "ngram"}),
        "Token Recycling": ("token_recycling", {"template": f"nodes{budget}"}),
    }


def run(repeats: int, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One record a method, temperature and budget, on the trained pair; batch 1.

    Args:
      repeats: timed ones, after a first run that compiles and gives the figures but times.
      labels: keys of `entries`; none for all. Plain decoding is always among them.
    """
    for label in labels:
        check_choice("lines", label, entries(8))
    config: ConfigDict = comparison_config("trees")
    config.data.update(num_prompts=NUM_PROMPTS, prompt_tokens=PROMPT_TOKENS)
    models = comparison.load_models(config)
    prompts = comparison.held_out_prompts(config, models.tokenizer).ids
    stop = generation.stop_config(models.configs["target"], NEW_TOKENS, ())
    records = []
    for temperature in TEMPERATURES:
        sampling = SamplingConfig(temperature=temperature)
        for budget in BUDGETS:
            runs: dict[str, Callable[[], Any]] = {}
            for label, (name, options) in entries(budget).items():
                if labels and label not in ("plain", *labels):
                    continue
                method = methods.build(name, models.configs, sampling, options)
                runs[label] = functools.partial(
                    timing.decode_all,
                    models.params,
                    prompts,
                    method,
                    stop,
                    batch_size=1,
                    hot=label in HOT,
                )
            where = f"temperature {temperature:g}, {budget} nodes"
            measured = timing.side_by_side(runs, repeats, label=where)
            plain = measured["plain"]["seconds"]
            records += [
                _record(label, temperature, budget, entry, plain)
                for label, entry in measured.items()
            ]
            # Some hundred loaded programs use up the memory maps that a process may have.
            jax.clear_caches()
    return records


def _record(
    label: str,
    temperature: float,
    budget: int,
    measured: Mapping[str, Any],
    plain: Sequence[float],
) -> dict[str, Any]:
    total = generation.total_stats(measured["result"])
    return {
        "label": label,
        "temperature": temperature,
        "budget": budget,
        "tokens_per_target_call": total["tokens_per_target_call"],
        "speedup": timing.speedup(plain, measured["seconds"]),
        "error": results.ratio_error(
            [row.stats["tokens_emitted"] for row in measured["result"]],
            [row.stats["target_calls"] for row in measured["result"]],
        ),
        "tokens": total["tokens_emitted"],
        "target_calls": total["target_calls"],
        "draft_calls": total["draft_calls"],
    }


def charts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per target call over nodes, one line chart (`plots.lines`) a temperature."""
    found = []
    labels = [label for label in dict.fromkeys(r["label"] for r in records) if label != "plain"]
    for temperature in dict.fromkeys(r["temperature"] for r in records):
        series = []
        for label in labels:
            points = {
                r["budget"]: r["tokens_per_target_call"]
                for r in records
                if (r["label"], r["temperature"]) == (label, temperature)
            }
            series.append({"label": label, "x": list(points), "y": list(points.values())})
        found.append(
            {
                "title": f"Tokens per target call, temperature {temperature:g}",
                "x_label": "drafted nodes",
                "y_label": "tokens per target call",
                "x_ticks": list(dict.fromkeys(r["budget"] for r in records)),
                "x_scale": "log",
                "series": series,
            }
        )
    return found


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown, one table a temperature."""
    labels = dict.fromkeys(r["label"] for r in records)
    budgets = dict.fromkeys(r["budget"] for r in records)
    lines = []
    for temperature in dict.fromkeys(r["temperature"] for r in records):
        lines += [
            f"### temperature {temperature:g}: tokens per target call (speed-up over plain)",
            "",
            "| method | " + " | ".join(f"{budget} nodes" for budget in budgets) + " |",
            "| --- |" + " --- |" * len(budgets),
        ]
        for label in labels:
            cells = [
                f"{r['tokens_per_target_call']:.2f} ({r['speedup']:.2f}x)"
                for r in records
                if (r["temperature"], r["label"]) == (temperature, label)
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
