"""The tables of a report on dynamic tokenisation, from what was measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = dict[str, Any]


def tables(measured: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One for each measurement that was made: title, columns, rows."""
    found = [_MAKERS[name](value) for name, value in measured.items() if name in _MAKERS]
    if "large vocabulary" in measured:
        found += _of_vocabulary(measured["large vocabulary"])
    return [*found, _of_decoding(runs)]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def _of_curves(found: Sequence[Mapping[str, Any]]) -> Table:
    shares = list(found[0]["merges"])
    columns = ["batch", "absolute, word level", *(f"merges to {s:.0%}" for s in shares), "ms"]
    return _table(
        "Merging",
        columns,
        [
            [c["batch_size"], c["word_level"], *c["merges"].values(), c["milliseconds"]]
            for c in found
        ],
    )


def _of_contexts(found: Mapping[str, Any]) -> Table:
    columns = [
        "rows of", "merges", "tokens", "relative", "absolute", "bits per byte", "right endings",
    ]  # fmt: skip
    rows = [
        [
            name, p["merges"], p["length"], p["relative"], p["absolute"], p["bits_per_byte"],
            p["accuracy"],
        ]
        for name, points in found["curves"].items()
        for p in points
    ]  # fmt: skip
    return _table("After merged contexts", columns, rows)


def _of_own_tokens(found: Mapping[str, float]) -> Table:
    return _table("No merges: rows of the model's own tokens", ["rows of", "bits per byte"],
                  list(found.items()))  # fmt: skip


def _of_adapters(found: Mapping[str, Any]) -> Table:
    points = next(iter(found["arms"].values()))
    columns = ["adapters", *(f"{p['relative']:.0%} ({p['merges']} merges)" for p in points)]
    rows = [[label, *(p["accuracy"] for p in arm)] for label, arm in found["arms"].items()]
    rows.append(["absolute reduction", *(p["absolute"] for p in points)])
    return _table("Accuracy of adapters by relative reduction", columns, rows)


def _of_languages(found: Mapping[str, Any]) -> Table:
    columns = [
        "locale", "script", "bytes", "tokens", "merged by language", "merged side by side",
        "word level", "absolute, word level",
    ]  # fmt: skip
    rows = [
        [
            r["locale"], r["script"], r["size"], r["before"], r["merged"], r["mixed"], r["words"],
            r["absolute"],
        ]
        for r in found["lengths"]
    ]  # fmt: skip
    for measure in ("mean_premium", "largest_premium", "gini"):
        values = [found["fairness"][s][measure] for s in ("before", "merged", "mixed", "words")]
        rows.append([measure.replace("_", " "), "", "", *values, ""])
    return _table("Tokens of the same names", columns, rows)


_MAKERS: dict[str, Callable[[Any], Table]] = {
    "merge curves": _of_curves,
    "contexts": _of_contexts,
    "own tokens": _of_own_tokens,
    "adapters": _of_adapters,
    "languages": _of_languages,
}


def _of_vocabulary(found: Mapping[str, Any]) -> list[Table]:
    losses = _table(
        f"The same text in {found['size']:,} tokens",
        ["vocabulary", "bits per byte", "bytes a token"],
        [[n, v["bits_per_byte"], v["bytes_per_token"]] for n, v in found["loss"].items()],
    )
    recalls = _table(
        "Search by lists",
        ["metric", "tokens", "lists searched", "rows compared", "arg-max found", "top mass found"],
        [
            [metric, entry["size"], p["probes"], p["compared"], p["recall"], p["mass"]]
            for metric, entries in found["search"].items()
            for entry in entries
            for p in entry["recall"]
        ],
    )
    times = _table(
        "Time of choosing a token",
        ["metric", "tokens", "of these predicted", "lists", "exhaustive, ms", "index, ms",
         "building, s"],
        [
            [
                metric, e["size"], e["predicted"], e["lists"], 1000 * e["seconds"]["exhaustive"],
                1000 * e["seconds"]["index"], e["build_seconds"],
            ]
            for metric, entries in found["search"].items()
            for e in entries
        ],
    )  # fmt: skip
    return [losses, recalls, times]


def _of_decoding(runs: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["decoding", "bytes/s", "tokens a byte", "tokens of a prompt", "as exact decoding"]
    rows = [
        [
            r["label"],
            r["bytes_per_second"],
            r["tokens_per_byte"],
            r["prompt_tokens"],
            r["agreement"],
        ]
        for r in runs
    ]
    return _table("Decoding", columns, rows)
