"""Runs the sweep of a config: each setting is an experiment of its own, then one page for all.

    python -m experiments.sweep --config=experiments/configs/rsd.py:offline --workdir=runs/rsd_sweep
    python -m experiments.sweep --config=... --workdir=... --workers=4   # four processes at a time
    python -m experiments.sweep --config=... --workdir=... --setting=3   # one, elsewhere perhaps
    python -m experiments.sweep --config=... --workdir=... --collect     # and the page of all

The config file's `sweep()` returns a list of overrides (dotted field -> value; `name` labels the
setting). Settings that have results already are not run again, so a sweep that was stopped goes on.
A setting that fails is named at the end, and the exit status is then 1; the others are run all the
same.

One worker runs all settings in this process, which keeps what it has loaded and compiled. More are
a process for each setting, whose output is in `NNN.log` of the work directory. They share a GPU's
memory, and only one process at a time can have a TPU.
"""

import csv
import importlib.util
import io
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from absl import flags, logging
from ml_collections import ConfigDict

from experiments import cli
from models.errors import InputError

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
    "config", None, "Config file, optionally with a preset: x.py:preset.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all results.", flag_values=FLAGS)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Settings run at a time; above 1, in processes.", 1, 1024, flag_values=FLAGS
)
_SETTING = flags.DEFINE_integer(
    "setting", None, "Run this setting only, by number from 0; no page.", 0, flag_values=FLAGS
)
_COLLECT = flags.DEFINE_bool(
    "collect", False, "Run nothing; write the page of what has results.", flag_values=FLAGS
)

SWEEP_FILE = "sweep.json"
TABLE_FILE = "sweep.csv"
FAILED = 1  # exit status when a setting failed
# What JAX takes of a GPU's memory when nothing else is said; workers share it.
_GPU_MEMORY_SHARE = 0.75
_METRICS = {"tokens_per_target_call": "tokens per target call", "speedup": "speed-up"}
_ERROR = "tokens_per_target_call_error"
# What a method that is not lossless gives away for speed; 'exact_match' where answers are known.
_QUALITY = {
    "exact_match": "exact match",
    "accuracy": "class accuracy",
    "own_choices": "tokens as the model's own choice",
    "agreement": "tokens as plain decoding",
}


def settings(argument: str) -> list[ConfigDict]:
    """The configs of a sweep, in its order.

    Args:
      argument: FILE or FILE:PRESET, as for `--config` of `experiments.run`.

    Raises:
      InputError: the file has no `sweep()`, or an override names no field of the config.
    """
    base = cli.load_config_file(argument)
    path = Path(argument.partition(":")[0])
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sweep: Callable[[], Sequence[Mapping[str, Any]]] | None = getattr(module, "sweep", None)
    if sweep is None:
        raise InputError(f"config: {path} has no function sweep")
    configs = []
    for number, overrides in enumerate(sweep()):
        config = ConfigDict(base.to_dict())
        config.name = f"{base.name} {number}"
        for field, value in overrides.items():
            _set(config, field, value)
        configs.append(config)
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise InputError(f"config: sweep of {path}: two settings share a name; given: {names}")
    return configs


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *above, last = field.split(".")
    holder = config
    for part in above:
        holder = holder[part] if part in holder else _unknown(field)
    if last not in holder:
        _unknown(field)
    holder[last] = value


def _unknown(field: str) -> Any:
    raise InputError(f"config: sweep: no field {field!r} in the config")


def collect(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a sweep's page shows: every run's figures by setting."""
    names = ("label", "temperature", "batch_size", "role", "keeps_law", *_METRICS, _ERROR)
    names += tuple(_QUALITY)
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
            labels = dict.fromkeys(r["label"] for r in runs)
            series = []
            for label in labels:
                points = {r["setting"]: r[metric] for r in runs if r["label"] == label}
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
    quality = next(name for name in _QUALITY if all(name in r for r in runs))
    costs = {
        "target calls a token": lambda r: (
            1 / r["tokens_per_target_call"] if r.get("role", "target") == "target" else 0.0
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
                "title": f"{_QUALITY[quality]} over {title}",
                "x_label": title,
                "y_label": _QUALITY[quality],
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


def directory_of(workdir: Path, number: int) -> Path:
    """The work directory of a setting."""
    return workdir / f"{number:03d}"


def finished(configs: Sequence[ConfigDict], workdir: Path) -> dict[int, dict[str, Any]]:
    """The results of the settings that have any, by number.

    Raises:
      InputError: results in the work directory are of another config.
    """
    from experiments import results

    found = {}
    for number, config in enumerate(configs):
        directory = directory_of(workdir, number)
        if (directory / results.RESULTS_FILE).exists():
            found[number] = results.read(directory)
            if found[number]["config"] != json.loads(config.to_json()):
                raise InputError(f"workdir: {directory} holds results of another config")
    return found


def run_here(
    configs: Sequence[ConfigDict], numbers: Sequence[int], workdir: Path
) -> dict[int, str]:
    """Runs settings in this process, one after another; returns why some failed, by number."""
    import jax

    from experiments import run

    failed = {}
    for number in numbers:
        logging.info("setting %d of %d: %s", number + 1, len(configs), configs[number].name)
        try:
            run.execute(configs[number], directory_of(workdir, number))
        except Exception as error:  # whatever it is, the other settings are not to blame
            failed[number] = f"{type(error).__name__}: {error}".splitlines()[0]
            if not isinstance(error, InputError):
                logging.error("setting %d failed\n%s", number, traceback.format_exc())
        # Some hundred loaded programs use up the memory maps that a process may have.
        jax.clear_caches()
    return failed


def run_apart(
    argument: str,
    configs: Sequence[ConfigDict],
    numbers: Sequence[int],
    workdir: Path,
    workers: int,
) -> dict[int, str]:
    """As `run_here`, with a process for every setting and so many `workers` at a time."""
    from experiments import sweep_workers

    module = ("-m", "experiments.sweep", f"--config={argument}", f"--workdir={workdir}")
    tasks = {
        number: sweep_workers.Task(
            sweep_workers.python(*module, f"--setting={number}"),
            workdir / f"{number:03d}.log",
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_GPU_MEMORY_SHARE / workers:.3f}"},
        )
        for number in numbers
    }

    def done(number: int, status: int) -> None:
        logging.info("setting %d, %s: exit status %d", number, configs[number].name, status)

    statuses = sweep_workers.run(tasks, workers, done)
    return {
        number: f"exit status {status}: {sweep_workers.last_words(tasks[number].log)}"
        for number, status in sorted(statuses.items())
        if status
    }


def execute(
    configs: Sequence[ConfigDict],
    workdir: Path,
    *,
    argument: str | None = None,
    workers: int = 1,
    collect_only: bool = False,
) -> dict[str, Any]:
    """Runs every setting that has no results yet, and writes the sweep's page.

    Args:
      configs: of `settings`.
      workdir: of the sweep; a setting's own is `directory_of` it.
      argument: what `configs` were read from; needed for more than one worker.
      workers: settings at a time; above 1, each in a process of its own.
      collect_only: run nothing.

    Returns:
      What `collect` makes of all results, and `failed`: why, by the setting's name.
    """
    missing = sorted(set(range(len(configs))) - set(finished(configs, workdir)))
    failed: dict[int, str] = {}
    if missing and not collect_only:
        if workers == 1:
            failed = run_here(configs, missing, workdir)
        else:
            assert argument is not None
            failed = run_apart(argument, configs, missing, workdir, workers)
    collected = collect(list(finished(configs, workdir).values()))
    if failed:
        collected["failed"] = {configs[number].name: why for number, why in failed.items()}
    write(workdir, collected)
    return collected


def _quality(run: Mapping[str, Any]) -> str:
    if run.get("keeps_law", False) and run["role"] == "target":
        return ""
    return "".join(f"  {run[name]:.1%} {text}" for name, text in _QUALITY.items() if name in run)


def _run_one(configs: Sequence[ConfigDict], number: int, workdir: Path) -> None:
    """One setting, unless it has results; its error is this program's."""
    from experiments import run

    if number >= len(configs):
        raise InputError(f"setting: {number} is not there; allowed: 0 to {len(configs) - 1}")
    if number not in finished(configs, workdir):
        run.execute(configs[number], directory_of(workdir, number))


def main(argv: list[str]) -> int | None:
    cli.no_arguments(argv)
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise InputError(f"--{'config' if _CONFIG.value is None else 'workdir'}: missing")
    workdir = Path(_WORKDIR.value)
    configs = settings(_CONFIG.value)
    if _SETTING.value is not None:
        _run_one(configs, _SETTING.value, workdir)
        return None
    collected = execute(
        configs,
        workdir,
        argument=_CONFIG.value,
        workers=_WORKERS.value,
        collect_only=_COLLECT.value,
    )
    for r in collected["runs"]:
        print(
            f"{r['setting']:<20} {r['label']:<28} T={r['temperature']:<4g} "
            f"{r['tokens_per_target_call']:.2f} +- {r.get(_ERROR, 0):.2f} tokens/call  "
            f"{r['speedup']:.2f}x" + _quality(r)
        )
    for setting, scores in collected["scores"].items():
        for score, labels in scores.items():
            told = "  ".join(f"{label} {value:.4g}" for label, value in labels.items())
            print(f"{setting:<20} {score}: {told}")
    print(f"report: {workdir / 'sweep.html'}")
    for name, why in collected.get("failed", {}).items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return FAILED if collected.get("failed") else None


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
