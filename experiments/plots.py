"""The figures of a report. One look for all of them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

# Okabe and Ito's palette: distinct for colour-blind readers too.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
    "#000000", "#882255", "#999999",
)  # fmt: skip
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "tokenloom",
    }
)


def _figure(columns: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, columns, figsize=(4.6 * columns, height), layout="constrained", squeeze=False
    )
    return figure, list(axes[0])


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, and closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_png(figure: Figure, path: Path) -> None:
    """The figure as a picture file, and closes it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["label"] for run in runs))


def _settings(runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    return sorted({(run["temperature"], run["batch_size"]) for run in runs})


def bars(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Speed-up and tokens per target call, grouped by temperature and batch size."""
    figure, axes = _figure(2)
    labels, settings = _labels(runs), _settings(runs)
    by_key = {(r["label"], r["temperature"], r["batch_size"]): r for r in runs}
    width = 0.8 / len(labels)
    panels = (
        (axes[0], "speedup", "Wall-clock speed-up over plain decoding", "{:.2f}x"),
        (axes[1], "tokens_per_target_call", "Tokens per target call", "{:.2f}"),
    )
    for axis, field, title, form in panels:
        for i, label in enumerate(labels):
            places = [j + (i - (len(labels) - 1) / 2) * width for j in range(len(settings))]
            values = [by_key[(label, *setting)][field] for setting in settings]
            drawn = axis.bar(
                places, values, width * 0.92, label=label, color=COLOURS[i % len(COLOURS)]
            )
            axis.bar_label(drawn, [form.format(v) for v in values], fontsize=7.5, padding=1)
        axis.axhline(1, color="#555555", linewidth=0.9, linestyle="--")
        axis.set_xticks(range(len(settings)))
        axis.set_xticklabels([f"T={t:g}\nbatch {b}" for t, b in settings])
        axis.set_title(title)
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.15)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure


def acceptance(runs: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Share of rounds in which a draft at each depth was accepted, one panel a temperature.

    None where nothing was drafted.
    """
    drafted = [run for run in runs if run["acceptance_by_depth"]]
    if not drafted:
        return None
    first_batch = min(run["batch_size"] for run in runs)
    temperatures = sorted({run["temperature"] for run in drafted})
    figure, axes = _figure(len(temperatures))
    labels = _labels(runs)
    for axis, temperature in zip(axes, temperatures, strict=True):
        for run in drafted:
            if (run["temperature"], run["batch_size"]) != (temperature, first_batch):
                continue
            values = run["acceptance_by_depth"]
            colour = COLOURS[labels.index(run["label"]) % len(COLOURS)]
            axis.plot(
                range(1, len(values) + 1), values, "o-", color=colour, label=run["label"],
                markersize=4,
            )  # fmt: skip
        axis.set_ylim(0, 1)
        axis.set_xlabel("draft depth")
        axis.set_ylabel("accepted / proposed")
        axis.set_title(f"Acceptance by depth, temperature {temperature:g}")
    axes[-1].legend(loc="upper right")
    return figure


def throughput(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens per second of every repeat, so that the noise can be seen."""
    figure, axes = _figure(len(_settings(runs)), height=2.9)
    labels = _labels(runs)
    for axis, (temperature, batch) in zip(axes, _settings(runs), strict=True):
        for i, label in enumerate(labels):
            for run in runs:
                if (run["label"], run["temperature"], run["batch_size"]) == (
                    label, temperature, batch,
                ):  # fmt: skip
                    tokens = run["stats"]["tokens_emitted"]
                    values = [tokens / second for second in run["seconds"]]
                    colour = COLOURS[i % len(COLOURS)]
                    axis.plot([i] * len(values), values, "o", color=colour, alpha=0.6)
                    axis.hlines(run["tokens_per_second"], i - 0.25, i + 0.25, color=colour, lw=2)
        axis.set_xticks(range(len(labels)))
        axis.set_xticklabels([label.replace(" ", "\n") for label in labels])
        axis.set_xlim(-0.5, len(labels) - 0.5)
        axis.set_ylim(bottom=0)
        axis.set_title(f"Tokens/s, T={temperature:g}, batch {batch}")
        axis.grid(axis="x", visible=False)
    return figure


def _draw_bars(axis: Axes, spec: Mapping[str, Any]) -> None:
    """Groups of bars: a group an x, in the order of the first series."""
    names = spec["series"][0]["x"]
    width = 0.8 / len(spec["series"])
    for i, series in enumerate(spec["series"]):
        places = [j + (i - (len(spec["series"]) - 1) / 2) * width for j in range(len(names))]
        colour = COLOURS[i % len(COLOURS)]
        axis.bar(places, series["y"], width * 0.92, label=series["label"], color=colour)
    axis.set_xticks(range(len(names)), [str(name).replace(", ", "\n") for name in names])
    axis.set_title(spec["title"])
    axis.set_xlabel(spec["x_label"])
    axis.set_ylabel(spec["y_label"])


def _draw_lines(axis: Axes, spec: Mapping[str, Any]) -> None:
    if spec.get("form") == "bars":
        _draw_bars(axis, spec)
        return
    for i, series in enumerate(spec["series"]):
        alone = len(series["x"]) == 1
        # Many named settings are a list, not an axis: points are not joined.
        named = len(series["x"]) > 6 and isinstance(series["x"][0], str)
        # When colours are used up, other marks tell the series apart.
        single, mark = ("D", "o") if i < len(COLOURS) else ("P", "s")
        axis.plot(
            series["x"], series["y"], single if alone else mark if named else f"{mark}-",
            color=COLOURS[i % len(COLOURS)], label=series["label"], ms=7 if alone else 4,
        )  # fmt: skip
    if "x_scale" in spec:
        axis.set_xscale(spec["x_scale"])
    if "y_scale" in spec:
        axis.set_yscale(spec["y_scale"])
        if spec["y_scale"] == "log":  # a decade alone would leave most charts with one tick
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.minorticks_off()
    if "x_ticks" in spec:
        axis.set_xticks(spec["x_ticks"], [str(tick) for tick in spec["x_ticks"]])
        axis.xaxis.minorticks_off()
    elif any(isinstance(x, str) and len(x) > 6 for series in spec["series"] for x in series["x"]):
        axis.tick_params(axis="x", rotation=30, labelsize=8)
        for text in axis.get_xticklabels():
            text.set_horizontalalignment("right")
    axis.set_title(spec["title"])
    axis.set_xlabel(spec["x_label"])
    axis.set_ylabel(spec["y_label"])


def lines(spec: Mapping[str, Any]) -> Figure:
    """A line chart: title, x_label, y_label and series of label, x and y.

    A series of one point is drawn as a diamond. `x_scale`, `y_scale` and `x_ticks` are optional, as
    is `form`, which may be 'bars'.
    """
    figure, (axis,) = _figure(1)
    figure.set_size_inches(6.4, 3.8)
    _draw_lines(axis, spec)
    axis.legend(fontsize=8)
    return figure


def panels(
    specs: Sequence[Mapping[str, Any]], columns: int = 2, *, own_legends: bool = False
) -> Figure:
    """Several line charts (see `lines`) in a grid: of one set of labels, with one legend, or each
    with its own."""
    columns = min(columns, len(specs))
    rows = -(-len(specs) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 3.4 * rows), layout="constrained", squeeze=False
    )
    places = grid.flatten()
    for axis, spec in zip(places, specs, strict=False):
        _draw_lines(axis, spec)
    for axis in places[len(specs) :]:
        axis.set_visible(False)
    if own_legends:
        for axis in places[: len(specs)]:
            axis.legend(fontsize=7)
        return figure
    named = dict(zip(*places[0].get_legend_handles_labels()[::-1], strict=True))
    across = 3 if max(map(len, named)) < 24 else 2  # labels a panel's width holds
    most = min(len(named), across * columns)
    figure.legend(named.values(), named, loc="outside lower center", ncols=most)
    return figure


def training_curves(models: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Training and evaluation loss of the models that this project trained; None without any."""
    trained = [model for model in models if model.get("curve")]
    if not trained:
        return None
    figure, axes = _figure(2, height=3.0)
    for i, model in enumerate(trained):
        colour = COLOURS[i % len(COLOURS)]
        train = [(p["step"], p["loss"]) for p in model["curve"]]
        # Image models have no bytes.
        evals = [
            (p["step"], p["eval_bits_per_byte"])
            for p in model["evaluations"]
            if "eval_bits_per_byte" in p
        ]
        if train:
            axes[0].plot(*zip(*train, strict=True), color=colour, label=model["role"])
        if evals:
            axes[1].plot(*zip(*evals, strict=True), "o-", color=colour, label=model["role"])
    axes[0].set_title("Training objective (drafts: half distillation)")
    axes[0].set_ylabel("nats per token")
    axes[1].set_title("Held-out loss")
    axes[1].set_ylabel("bits per byte")
    for axis in axes:
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend()
    return figure
