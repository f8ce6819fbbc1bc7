"""Turns recorded results into one HTML page with plots; no network, no scripts.

python -m experiments.report --workdir=runs/quickstart
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from absl import flags

from experiments import cli, results
from models.errors import InputError

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory with results.json.", flag_values=FLAGS)
_TEMPLATES = Path(__file__).parent / "templates"


def markdown_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as a Markdown table."""
    lines = [
        "| method | temperature | batch | tokens/call | tokens/s | speed-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['label']} | {r['temperature']:g} | {r['batch_size']} "
        f"| {r['tokens_per_target_call']:.2f} | {r['tokens_per_second']:.0f} "
        f"| {r['speedup']:.2f}x |"
        for r in runs
    ]
    return "\n".join(lines)


def render(found: Mapping[str, Any]) -> str:
    """The report of one `results.json` as HTML."""
    from experiments import plots

    decoded: list[tuple[str, Any]] = []
    if found["runs"]:  # an experiment may decode nothing
        decoded = [
            ("Speed", plots.bars(found["runs"])),
            ("Acceptance", plots.acceptance(found["runs"])),
            ("Every repeat", plots.throughput(found["runs"])),
        ]
    figures = [
        *decoded,
        *((name.capitalize(), plots.lines(spec)) for name, spec in found["figures"].items()),
        ("Training", plots.training_curves(found["models"])),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        found=found, figures=[(title, plots.svg(figure)) for title, figure in figures if figure]
    )


def write(workdir: Path) -> Path:
    """Renders `results.json` of a work directory to `report.html` and `speed.png` beside it."""
    from experiments import plots

    path = workdir / "report.html"
    found = results.read(workdir)
    results.write_text(path, render(found))
    if found["runs"]:
        plots.write_png(plots.bars(found["runs"]), workdir / "speed.png")
    return path


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    if _WORKDIR.value is None:
        raise InputError("--workdir: missing")
    print(write(Path(_WORKDIR.value)))


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
