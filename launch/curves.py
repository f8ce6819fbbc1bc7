"""Recorded searches over numbers of chips, together: one table a workload, and their chart.

A search is what `compile_check --search` and `--curve` record: {'per': 'round' or 'step',
'candidates': [`mesh_search.record`, ...]}, by a label that ends with the chip's name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError

Search = Mapping[str, Any]


def read(directories: Iterable[str], file: str) -> dict[str, Search]:
    """Searches of several work directories, each with its model's name in front of its label.

    What several directories have of one label is one search, of all their meshes; the last counts.

    Raises:
      InputError: a directory without such a file.
    """
    searches: dict[str, Any] = {}
    for directory in directories:
        path = Path(directory) / file
        if not path.is_file():
            raise InputError(f"merge: {directory!r} has no {file}; make it with --curve")
        record = json.loads(path.read_text())
        for label, found in record.get("searches", {}).items():
            label = f"{record['config']['model']}, {label}"
            kept = searches.setdefault(label, {"per": found["per"], "candidates": []})
            new = {_mesh(one) for one in found["candidates"]}
            others = [one for one in kept["candidates"] if _mesh(one) not in new]
            kept["candidates"] = others + found["candidates"]
    for kept in searches.values():
        mark_best(kept["candidates"])
    return searches


def _mesh(one: Mapping[str, Any]) -> tuple[int, ...]:
    return one["chips"], one["data"], one["model"], one["batch_size"]


def _fits(one: Mapping[str, Any]) -> bool:
    return one["report"] is not None and one["report"]["fits"]


def mark_best(candidates: Sequence[dict[str, Any]]) -> None:
    """Sets 'best' of each: of as many chips it fits and costs the fewest chip-seconds a row."""
    for count in {one["chips"] for one in candidates}:
        mine = [one for one in candidates if one["chips"] == count]
        best = min(filter(_fits, mine), key=lambda one: one["chip_seconds_per_row"], default=None)
        for one in mine:
            one["best"] = one is best


def tables(searches: Mapping[str, Search]) -> str:
    """Markdown: for each workload a line a mesh, and chips side by side; GB and ms of one device.

    The best mesh of each number of chips is in bold.
    """
    workloads = _by_workload(searches)
    return "\n".join(f"{name}\n\n{_table(mine)}\n" for name, mine in workloads.items())


def _by_workload(searches: Mapping[str, Search]) -> dict[str, dict[str, Search]]:
    """Searches by chip, for each workload."""
    workloads: dict[str, dict[str, Search]] = {}
    for label, found in searches.items():
        workload, _, chip = label.rpartition(", ")
        workloads.setdefault(workload, {})[chip] = found
    return workloads


def _table(by_chip: Mapping[str, Search]) -> str:
    per = next(iter(by_chip.values()))["per"]
    cells: dict[tuple[int, ...], dict[str, Mapping[str, Any]]] = {}
    for chip, found in by_chip.items():
        for one in found["candidates"]:
            cells.setdefault(_mesh(one), {})[chip] = one
    head = ["chips", "data x model", "rows of a part"]
    for chip in by_chip:
        head += [f"{chip}: peak", "compute, memory, network", f"ms a {per}", "chip-ms a row"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for (count, data, model, batch), mine in sorted(cells.items()):
        line = [str(count), f"{data}x{model}", f"{batch / data:g}"]
        for chip in by_chip:
            line += _cells(mine.get(chip))
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _cells(one: Mapping[str, Any] | None) -> list[str]:
    """Peak, the three times, their sum and the cost of a mesh on one kind of chip."""
    if one is None:
        return ["", "", "", ""]
    report = one["report"]
    if report is None or report["roofline"] is None:
        return ["**no**", one["reason"], "", ""]
    times = (report["roofline"][name] for name in ("compute", "memory", "network"))
    mark = "**" if one["best"] else ""
    return [
        f"{_short(report['peak'] / 1e9)}{'' if report['fits'] else ' **no**'}",
        ", ".join(_short(1e3 * time) for time in times),
        _short(1e3 * one["seconds"]),
        f"{mark}{_short(1e3 * one['chip_seconds_per_row'])}{mark}",
    ]


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def charts(searches: Mapping[str, Search]) -> list[dict[str, Any]]:
    """Specifications for `experiments.plots.panels`: for each workload time and cost over chips.

    A line is the best mesh of each number of chips of one kind; what fits nowhere has none.
    """
    specs = []
    workloads = _by_workload(searches)
    chips = dict.fromkeys(chip for mine in workloads.values() for chip in mine)
    for name, mine in workloads.items():
        # All chips in all charts, so that each has one colour.
        best: dict[str, list[Any]] = {chip: [] for chip in chips}
        for chip, found in mine.items():
            best[chip] = [one for one in found["candidates"] if one["best"]]
        per = next(iter(mine.values()))["per"]
        if any(best.values()):
            specs += [
                _chart(f"{name}: time", f"ms a {per}", "seconds", best),
                _chart(f"{name}: cost", f"chip-ms a row and {per}", "chip_seconds_per_row", best),
            ]
    return specs


def _chart(
    title: str, label: str, value: str, best: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    sizes = sorted({one["chips"] for found in best.values() for one in found})
    series = [
        {
            "label": chip,
            "x": [one["chips"] for one in found],
            "y": [1e3 * one[value] for one in found],
        }
        for chip, found in best.items()
    ]
    values = [y for line in series for y in line["y"]]
    scale = "log" if max(values) > 5 * min(values) else "linear"
    return {
        "title": title, "x_label": "chips", "y_label": label, "series": series,
        "x_scale": "log", "y_scale": scale, "x_ticks": sizes,
    }  # fmt: skip
