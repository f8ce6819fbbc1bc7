"""The page of a sweep: its table, its charts, and what failed."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

SWEEP_FILE = "sweep.json"
TABLE_FILE = "sweep.csv"
_METRICS = {
    "tokens_per_target_call": "tokens per target call",
    "layers_per_token": "layers run for a token",  # of methods that can leave layers out
    "speedup": "speed-up",
}
ERROR = "tokens_per_target_call_error"
# What a method that is not lossless gives away for speed; 'exact_match' where answers are known.
QUALITY = {
    "exact_match": "exact match",
    "accuracy": "class accuracy",
    "own_choices": "the model's own choices",
    "agreement": "tokens as plain decoding",
}


def collect(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a sweep's page shows: every run's figures by setting."""
    names = ("label", "temperature", "batch_size", "role", "keeps_law", *_METRICS, ERROR)
    names += tuple(QUALITY)
    runs = []
    for one in found:
        for run in one["runs"]:
            measured = {**run.get("quality", {}), **run}
            kept = {name: measured[name] for name in names if name in measured}
            runs.append({"setting": one["name"], **kept})
    scores = {one["name"]: one["scores"] for one in found if one.get("scores")}
    return {"settings": [one["name"] for one in found], "runs": runs, "scores": scores}


def score_charts(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Charts of what experiments score beside runs: setting -> score -> label -> number."""
    charts = []
    for score in dict.fromkeys(name for one in scores.values() for name in one):
        mine = {setting: one[score] for setting, one in scores.items() if score in one}
        series = []
        for label in dict.fromkeys(label for one in mine.values() for label in one):
            points = {setting: one[label] for setting, one in mine.items() if label in one}
            series.append({"label": label, "x": list(points), "y": list(points.values())})
        charts.append({"title": score, "x_label": "setting", "y_label": score, "series": series})
    return charts


def figures(collected: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line chart a metric, temperature and batch size: methods over settings.

    Where a method gives away quality for speed, charts of quality over cost come first.
    """
    charts = score_charts(collected.get("scores", {})) + trade_offs(collected["runs"])
    where = dict.fromkeys((r["temperature"], r["batch_size"]) for r in collected["runs"])
    for metric, title in _METRICS.items():
        for temperature, batch in where:
            runs = [
                r
                for r in collected["runs"]
                if (r["temperature"], r["batch_size"]) == (temperature, batch)
            ]
            if not any(metric in r for r in runs):
                continue
            series = []  # one for every label, so that a label has one colour in all charts
            for label in dict.fromkeys(r["label"] for r in runs):
                mine = [r for r in runs if r["label"] == label and metric in r]
                points = {r["setting"]: r[metric] for r in mine}
                series.append({"label": label, "x": list(points), "y": list(points.values())})
            charts.append(
                {
                    "title": f"{title}, temperature {temperature:g}, batch {batch}",
                    "x_label": "setting",
                    "y_label": title,
                    "series": series,
                }
            )
    return charts


def trade_offs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Quality over target calls a token and over time a token; none if all keep the target's law.

    A method's points are joined in the order of its settings; one that is the same in every
    setting, as plain decoding is, is one point.
    """
    # Images say nothing of a law: their quality is measured.
    if all(r.get("keeps_law", False) for r in runs):  # none decode, or all do so without loss
        return []
    quality = next(name for name in QUALITY if all(name in r for r in runs))
    costs = {
        "target calls a token": lambda r: (
            0.0 if r.get("role") == "draft" else 1 / r["tokens_per_target_call"]
        ),
        "time a token (plain decoding: 1)": lambda r: 1 / r["speedup"],
    }
    charts = []
    for title, cost in costs.items():
        series = []
        for label in dict.fromkeys(r["label"] for r in runs):
            mine = [r for r in runs if r["label"] == label]
            if len({r[quality] for r in mine}) == 1 and mine[0].get("keeps_law", True):
                mine = mine[:1]
            series.append(
                {"label": label, "x": [cost(r) for r in mine], "y": [r[quality] for r in mine]}
            )
        charts.append(
            {
                "title": f"{QUALITY[quality]} over {title.partition(' (')[0]}",
                "x_label": title,
                "y_label": QUALITY[quality],
                "series": series,
            }
        )
    return charts


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as CSV: a line each, a column for whatever any of them has."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for run in runs for name in run))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    return text.getvalue()


_PAGE = """<!doctype html><meta charset=utf-8><title>{{ title }}</title>
<body style='font:15px system-ui;max-width:900px;margin:2rem auto'><h1>{{ title }}</h1>
{% for name, why in failed.items() %}<p><b>{{ name }}</b> failed: {{ why }}</p>{% endfor %}
{% for chart in charts %}{{ chart|safe }}{% endfor %}
<table style='font-size:13px;border-spacing:1em 0'>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></body>
"""


def write(workdir: Path, collected: Mapping[str, Any]) -> Path:
    """Writes `sweep.json`, the table `sweep.csv`, a picture of the charts, and a page of it all."""
    from experiments import plots, results

    results.write_text(workdir / SWEEP_FILE, json.dumps(collected, indent=1) + "\n")
    lines = table(collected["runs"])
    results.write_text(workdir / TABLE_FILE, lines)
    charts = figures(collected)
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    html = page.render(
        title=workdir.name,
        failed=collected.get("failed", {}),
        charts=[plots.svg(plots.lines(chart)) for chart in charts],
        rows=[[_short(cell) for cell in row] for row in csv.reader(io.StringIO(lines))],
    )
    results.write_text(workdir / "sweep.html", html)
    if charts:
        plots.write_png(plots.panels(charts), workdir / "sweep.png")
    return workdir / "sweep.html"


def _short(cell: str) -> str:
    """A number of the table with four digits; anything else as it is."""
    try:
        return f"{float(cell):.4g}"
    except ValueError:
        return cell


def quality(run: Mapping[str, Any]) -> str:
    """What a run that does not keep the target's law says of its quality, for its line."""
    if run.get("keeps_law", False) and run["role"] == "target":
        return ""
    return "".join(f"  {run[name]:.1%} {text}" for name, text in QUALITY.items() if name in run)
