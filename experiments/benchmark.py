"""Measures speed side by side in one process.

    python -m experiments.benchmark --suite=baseline --workdir=runs/benchmark

Prints a Markdown table and records `results.json` in the work directory.
"""

from pathlib import Path

from absl import flags

from experiments import cli
from models.errors import InputError, check_choice

FLAGS = flags.FlagValues()
_SUITE = flags.DEFINE_string(
    "suite", "baseline", "Which suite: baseline or trees.", flag_values=FLAGS
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
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed repeats of each measurement.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    check_choice("suite", _SUITE.value, ("baseline", "trees"))
    if _REPEATS.value < 1:
        raise InputError(f"repeats: {_REPEATS.value} must be at least 1")
    from experiments import results
    from experiments.benchmarks import baseline, trees
    from models import sizes

    for name in _SHAPES.value:
        sizes.get(name)  # a wrong name is told before anything is measured
    found = results.header("benchmark", {"suite": _SUITE.value, "shapes": _SHAPES.value})
    if _SUITE.value == "trees":
        found |= trees.run(_REPEATS.value)
        table = trees.table(found)
    else:
        found |= baseline.run(_SHAPES.value, _REPEATS.value)
        table = baseline.table(found)
    if _WORKDIR.value:
        results.write(Path(_WORKDIR.value), found)
    print(f"{found['machine']['cpu']}, {found['machine']['cores']} cores, {found['date']}\n")
    print(table)


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
