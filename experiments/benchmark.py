"""Measures speed side by side in one process.

    python -m experiments.benchmark --suite=baseline --workdir=runs/benchmark
    python -m experiments.benchmark --suite=trees --workdir=runs/trees
    python -m experiments.benchmark --suite=diffusion --workdir=runs/diffusion
    python -m experiments.benchmark --suite=tokens --workdir=runs/tokens
    python -m experiments.benchmark --suite=self_drafting --workdir=runs/self_drafting

Prints a Markdown table and records `results.json` in the work directory.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from models.errors import InputError, check_choice

FLAGS = flags.FlagValues()
_SUITE = flags.DEFINE_string(
    "suite",
    "baseline",
    "Which suite: baseline, trees, diffusion, tokens or self_drafting.",
    flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where to record results.json; default nowhere.", flag_values=FLAGS
)
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["bench_5m", "bench_85m"],
    "Named sizes that the baseline suite measures (models/sizes.py).",
    flag_values=FLAGS,
)
_PARTS = flags.DEFINE_list(
    "parts",
    ["budgets", "overhead", "memory", "verification"],
    "What the trees suite measures: methods at equal node budgets on the trained pair; on random "
    "weights, the share of a round outside model calls, its memory, and one call on 64 nodes.",
    flag_values=FLAGS,
)
_LINES = flags.DEFINE_list(
    "lines",
    [],
    "Methods of the self_drafting suite or of the trees suite's budgets, by label; default all.",
    flag_values=FLAGS,
)
_TARGET = flags.DEFINE_string(
    "target", "bench_85m", "Size of the trees suite's random target.", flag_values=FLAGS
)
_DRAFT = flags.DEFINE_string(
    "draft", "bench_5m", "Size of the trees suite's random draft.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_string(
    "dtype", None, "Of both; default the target size's own.", flag_values=FLAGS
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed repeats of each measurement.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    check_choice(
        "suite", _SUITE.value, ("baseline", "trees", "diffusion", "tokens", "self_drafting")
    )
    if _REPEATS.value < 1:
        raise InputError(f"repeats: {_REPEATS.value} must be at least 1")
    from experiments import results
    from experiments.benchmarks import baseline
    from models import sizes

    # A wrong name is told before anything is measured.
    for name in (*_SHAPES.value, _TARGET.value, _DRAFT.value):
        sizes.get(name)
    found = results.header("benchmark", {"suite": _SUITE.value, "flags": FLAGS.flag_values_dict()})
    if _SUITE.value == "trees":
        measured, table = _trees()
        found |= measured
    elif _SUITE.value == "tokens":
        measured, table = _tokens()
        found |= measured
    elif _SUITE.value == "self_drafting":
        measured, table = _self_drafting()
        found |= measured
    elif _SUITE.value == "diffusion":
        measured, table = _diffusion()
        found |= measured
    else:
        found |= baseline.run(_SHAPES.value, _REPEATS.value)
        table = baseline.table(found)
    if _WORKDIR.value:
        results.write(Path(_WORKDIR.value), found)
    print(f"{found['machine']['cpu']}, {found['machine']['cores']} cores, {found['date']}\n")
    print(table)


def _diffusion() -> tuple[dict[str, Any], str]:
    """The diffusion suite and its table."""
    from experiments import plots
    from experiments.benchmarks import diffusion

    records = diffusion.run(_REPEATS.value, Path(_WORKDIR.value or "."))
    if _WORKDIR.value:
        Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
        chart = plots.panels(diffusion.charts(records), columns=3)
        plots.write_png(chart, Path(_WORKDIR.value) / "diffusion.png")
    return {"runs": records}, diffusion.table(records)


def _tokens() -> tuple[dict[str, Any], str]:
    """The tokens suite and its tables."""
    from experiments import plots
    from experiments.benchmarks import tokens

    measured = tokens.run(_REPEATS.value)
    if _WORKDIR.value:
        Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
        chart = plots.panels(tokens.charts(measured), columns=2, own_legends=True)
        plots.write_png(chart, Path(_WORKDIR.value) / "tokens.png")
    return measured, tokens.table(measured)


def _self_drafting() -> tuple[dict[str, Any], str]:
    """The self-drafting suite and its table."""
    from experiments import plots
    from experiments.benchmarks import self_drafting

    records = self_drafting.run(_REPEATS.value, _LINES.value)
    if _WORKDIR.value:
        Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
        chart = plots.panels(self_drafting.charts(records), columns=2)
        plots.write_png(chart, Path(_WORKDIR.value) / "self_drafting.png")
    return {"runs": records}, self_drafting.table(records)


def _trees() -> tuple[dict[str, Any], str]:
    """The chosen parts of the trees suite, and their tables."""
    from experiments.benchmarks import tree_cost, trees

    parts, repeats = _PARTS.value, _REPEATS.value
    for part in parts:
        check_choice("parts", part, ("budgets", "overhead", "memory", "verification"))
    found: dict[str, Any] = {}
    text = ""
    if "budgets" in parts:
        found["budgets"] = trees.run(repeats, _LINES.value)
        text += trees.table(found["budgets"])
        if _WORKDIR.value:
            from experiments import plots

            Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
            chart = plots.panels(trees.charts(found["budgets"]), columns=3)
            plots.write_png(chart, Path(_WORKDIR.value) / "trees.png")
    if "memory" in parts:
        found["memory"] = tree_cost.memory(
            tree_cost.configs(_TARGET.value, _DRAFT.value, _DTYPE.value)
        )
    if {"overhead", "verification"} & set(parts):
        configs = tree_cost.configs(_TARGET.value, _DRAFT.value, _DTYPE.value)
        params = tree_cost.weights(configs)
        if "overhead" in parts:
            found["overhead"] = tree_cost.overhead(configs, params, repeats)
        if "verification" in parts:
            found["verification"] = tree_cost.verification(configs, params, repeats)
    return found, text + "\n" + tree_cost.table(found)


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
