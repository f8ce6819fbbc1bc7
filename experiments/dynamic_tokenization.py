"""Dynamic tokenisation measured: how much shorter, at what loss, and with how large a vocabulary.

Merge curves over batch sizes; bits per byte and choices after merged contexts; adapters trained at
one granularity or at any; lengths over languages; decoding with a large vocabulary and an index.
See `experiments/configs/dynamic_tokenization.py`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from decoding.dynamic_vocabulary import merging, providers
from experiments import (
    dynamic_adapters,
    dynamic_parts,
    dynamic_tables,
    language_lengths,
    large_vocabulary_decoding,
    merged_scoring,
    plots,
    results,
)
from experiments.dynamic_parts import Setting
from models import token_tables
from models.errors import check_choice
from training import granularity


def merge_curves(setting: Setting, config: ConfigDict) -> list[dict[str, Any]]:
    """Both measures of reduction over merges, for batches of several sizes of the same text."""
    curve = config.curve
    texts = setting.texts(config.data.splits[0])
    held_out = merged_scoring.windows(
        texts, setting.source, context=curve.tokens, ending=1, count=curve.windows, seed=config.seed
    )
    found = []
    for size in curve.batch_sizes:
        rows = held_out.contexts
        batches = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
        begin = time.perf_counter()
        lengths = granularity.curve(batches, setting.valid)
        seconds = (time.perf_counter() - begin) / len(batches)
        at = merging.reductions(lengths, lengths[-1])
        found.append(
            {
                "batch_size": size,
                "word_level": at[-1].absolute,
                "merges": {
                    share: merging.merges_for(lengths, lengths[-1], share) for share in curve.shares
                },
                "milliseconds": 1000 * seconds,
                "relative": [point.relative for point in at],
                "absolute": [point.absolute for point in at],
            }
        )
    return found


def contexts(setting: Setting, config: ConfigDict) -> dict[str, Any]:
    """Endings scored after contexts that are merged more and more, by provider."""
    how = config.contexts
    held_out = merged_scoring.windows(
        setting.texts(config.data.splits[0]),
        setting.source,
        context=how.tokens,
        ending=how.ending,
        count=how.windows,
        seed=config.seed,
    )
    rows = held_out.contexts
    batches = [rows[at : at + how.batch_size] for at in range(0, len(rows), how.batch_size)]
    lengths = granularity.curve(batches, setting.valid)
    merges = [merging.merges_for(lengths, lengths[-1], share) for share in how.shares]
    alone = merged_scoring.alone(setting.model, setting.params, held_out, how.batch_size)
    found: dict[str, Any] = {"merges": merges, "curves": {}, "caches": {}}
    for name in setting.providers:
        make = setting.cache(name, how.capacity)
        points, cache = merged_scoring.score(
            setting.model, setting.params, make, setting.valid, held_out, merges, alone,
            batch_size=how.batch_size, choices=how.choices,
        )  # fmt: skip
        at = merging.reductions([p.length for p in points], lengths[-1])
        found["curves"][name] = [
            {**point._asdict(), "relative": r.relative, "absolute": r.absolute}
            for point, r in zip(points, at, strict=True)
        ]
        found["caches"][name] = vars(cache.counts)
        logging.info("%s: %s", name, found["curves"][name][-1])
    return found


def own_tokens_gap(setting: Setting, config: ConfigDict) -> dict[str, float]:
    """Bits per byte of text in the model's own tokens, all with a provider's rows in and out."""
    how = config.contexts
    end = setting.model.eos_token_ids[0]
    texts = setting.texts(config.data.splits[0])
    held_out = merged_scoring.windows(
        texts, setting.source, context=how.tokens, ending=how.ending, count=how.windows,
        seed=config.seed + 1,
    )  # fmt: skip
    rows = [[end, *(setting.source.tokens.index(t) for t in row)] for row in held_out.contexts]
    gaps = {}
    for name, provider in {"model": None, **setting.providers}.items():
        params = setting.params
        if provider is not None:
            tables = providers.in_chunks(
                provider, setting.source.tokens[: setting.model.vocab_size]
            )
            params = token_tables.with_tables(params, tables)
        gaps[name] = merged_scoring.text_bits_per_byte(
            setting.model, params, rows, setting.source.token_bytes, width=how.tokens + 1
        )
    return gaps


def languages(setting: Setting, config: ConfigDict) -> dict[str, Any]:
    """Lengths of the same content in many languages."""
    how = config.languages
    found = language_lengths.measure(
        setting.source, setting.valid, how.locales, names_a_row=how.names_a_row, budget=how.budget
    )
    stages = ("before", "merged", "words", "mixed")
    fair = {
        stage: language_lengths.fairness([getattr(row, stage) for row in found]) for stage in stages
    }
    return {"lengths": language_lengths.table(found), "fairness": fair}


MEASUREMENTS: dict[str, Callable[[Setting, ConfigDict], Any]] = {
    "merge curves": merge_curves,
    "contexts": contexts,
    "own tokens": own_tokens_gap,
    "languages": languages,
    "adapters": dynamic_adapters.measure,
}


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs what `config` describes; see `experiments/configs/dynamic_tokenization.py`."""
    begin = time.perf_counter()
    setting = dynamic_parts.load(config)
    found: dict[str, Any] = {"models": setting.summaries, "samples": [], "figures": {}}
    claims: list[results.Claim] = []
    measured: dict[str, Any] = {}
    for name in config.measurements:
        logging.info("measuring %s", name)
        check_choice("config.measurements", name, MEASUREMENTS)
        measured[name] = MEASUREMENTS[name](setting, config)
    runs: list[dict[str, Any]] = []
    if config.vocabulary.size:
        measured["large vocabulary"], runs = large_vocabulary_decoding.measure(
            setting, config, workdir
        )
    for name, value in measured.items():
        figures, more = summarise(name, value, config)
        found["figures"] |= figures
        claims += more
    found |= {"runs": runs, "claims": claims, "measured": measured}
    found["tables"] = dynamic_tables.tables(measured, runs)
    charts = list(found["figures"].values())
    plots.write_png(plots.panels(charts, own_legends=True), workdir / "charts.png")
    return found | {"seconds": time.perf_counter() - begin}


def _line(label: str, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    return {"label": label, "x": list(x), "y": list(y)}


def _chart(title: str, x: str, y: str, series: Sequence[Mapping[str, Any]], **more: Any) -> Any:
    return {"title": title, "x_label": x, "y_label": y, "series": list(series), **more}


def at_most(name: str, measured: float, bound: float) -> results.Claim:
    """A claim that holds when `measured` <= `bound`."""
    return results.Claim(name, float(measured), f"<= {bound:g}", bool(measured <= bound))


Summary = tuple[dict[str, Any], list[results.Claim]]


def _of_curves(found: Sequence[Mapping[str, Any]], config: ConfigDict) -> Summary:
    del config
    series = [
        _line(f"batch {c['batch_size']}", range(len(c["relative"])), c["relative"]) for c in found
    ]
    chart = _chart(
        "Merging", "merges of a batch (and one)", "relative reduction",
        [{**line, "x": [m + 1 for m in line["x"]]} for line in series], x_scale="log",
    )  # fmt: skip
    claims = []
    for c in found:
        half, full = c["merges"][0.5], c["merges"][1.0]
        name = f"batch {c['batch_size']}: share of the merges to word level not needed for half"
        claims.append(results.at_least(name, 1 - half / full, 0.5))
    small, large = found[0], found[-1]
    claims.append(
        results.at_least(
            "merges to half of word level, largest batch over smallest",
            large["merges"][0.5] / max(small["merges"][0.5], 1), 1.0,
        )
    )  # fmt: skip
    return {"merging": chart}, claims


def _of_contexts(found: Mapping[str, Any], config: ConfigDict) -> Summary:
    del config
    curves = found["curves"]
    figures = {}
    for field, label in (("bits_per_byte", "bits per byte"), ("accuracy", "right endings")):
        figures[f"{label} after merged contexts"] = _chart(
            f"{label.capitalize()} after merged contexts", "relative reduction", label,
            [
                _line(name, [p["relative"] for p in points], [p[field] for p in points])
                for name, points in curves.items()
            ],
        )  # fmt: skip
    claims = []
    for name, points in curves.items():
        start, end = points[0], points[-1]
        half = min(points, key=lambda p: abs(p["relative"] - 0.5))
        lost = half["bits_per_byte"] / start["bits_per_byte"] - 1
        claims.append(at_most(f"{name}: share of loss added at half of word level", lost, 0.01))
        lost = end["bits_per_byte"] / start["bits_per_byte"] - 1
        shorter = f"{end['absolute']:.0%} shorter"
        claims.append(at_most(f"{name}: share of loss added at word level ({shorter})", lost, 0.02))
    best = "own rows, hypernetwork"
    if best in curves:
        for name in ("hypernetwork", best):
            gain = curves["fvt"][-1]["bits_per_byte"] - curves[name][-1]["bits_per_byte"]
            claims.append(
                results.at_least(f"word level: bits per byte that {name} saves over FVT", gain, 0.0)
            )
    return figures, claims


def _of_own_tokens(found: Mapping[str, float], config: ConfigDict) -> Summary:
    del config
    gaps = [
        at_most(
            f"no merges: share of loss added by {name} rows for the model's own tokens",
            found[name] / found["model"] - 1, 0.05,
        )
        for name in ("fvt", "hypernetwork") if name in found
    ]  # fmt: skip
    return {}, gaps


def _of_languages(found: Mapping[str, Any], config: ConfigDict) -> Summary:
    del config
    rows = sorted(found["lengths"], key=lambda row: row["before"])
    names = [row["locale"] for row in rows]
    english = next(row for row in found["lengths"] if row["locale"] == "en")
    chart = _chart(
        "Tokens of the same names", "language", "tokens",
        [
            _line(label, names, [row[field] for row in rows])
            for field, label in (
                ("before", "as the model has them"), ("merged", "merged by language"),
                ("mixed", "merged side by side"), ("words", "word level"),
            )
        ],
    )  # fmt: skip
    fair = found["fairness"]
    others = [row for row in rows if row["script"] != english["script"]]
    least = min(row["absolute"] for row in others)
    claims = [
        results.at_least(
            "languages: least absolute reduction at word level",
            min(row["absolute"] for row in rows), 0.2,
        ),
        results.at_least(
            "languages of other scripts: reduction at word level over English",
            least - english["absolute"], 0.0,
        ),
        results.at_least(
            "languages: Gini coefficient of lengths, before over merged by language",
            fair["before"]["gini"] / fair["merged"]["gini"], 1.0,
        ),
        results.at_least(
            "languages: mean premium over English, before over merged side by side",
            fair["before"]["mean_premium"] / fair["mixed"]["mean_premium"], 1.0,
        ),
    ]  # fmt: skip
    return {"languages": chart}, claims


_SUMMARIES: dict[str, Callable[[Any, ConfigDict], Summary]] = {
    "merge curves": _of_curves,
    "contexts": _of_contexts,
    "own tokens": _of_own_tokens,
    "languages": _of_languages,
    "adapters": dynamic_adapters.summarise,
    "large vocabulary": large_vocabulary_decoding.summarise,
}


def summarise(name: str, found: Any, config: ConfigDict) -> Summary:
    """Charts and claims of one measurement."""
    return _SUMMARIES[name](found, config)
