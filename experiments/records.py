"""What a comparison of methods records: a line a run, its table, and claims read off the lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from decoding import generation
from decoding.generation import Row
from experiments import results, timing
from models.errors import InputError
from models.tokenizer import Tokenizer

BASELINE = "autoregressive"
# A losslessness check fails by chance once in this many runs.
P_VALUE = 1e-3


def record(
    entry: ConfigDict,
    label: str,
    temperature: float,
    batch_size: int,
    measured: Mapping[str, Any],
    baseline: Mapping[str, Any],
) -> dict[str, Any]:
    """One line of the results: a method at a temperature and a batch size."""
    rows = measured["result"]
    total = generation.total_stats(rows)
    layers = total.get("layers_run")
    return {
        "label": label,
        "method": entry.method,
        "role": entry.get("role") or "target",
        "options": entry.options.to_dict(),
        "temperature": temperature,
        "batch_size": batch_size,
        "seconds": measured["seconds"],
        "tokens_per_second": total["tokens_emitted"] / measured["median"],
        "speedup": timing.speedup(baseline["seconds"], measured["seconds"]),
        "tokens_per_target_call": total["tokens_per_target_call"],
        "tokens_per_target_call_error": results.ratio_error(
            [row.stats["tokens_emitted"] for row in rows],
            [row.stats["target_calls"] for row in rows],
        ),
        "acceptance_by_depth": total["acceptance_by_depth"],
        **({} if layers is None else {"layers_per_token": layers / total["tokens_emitted"]}),
        "stats": {k: v for k, v in total.items() if k != "tokens_per_target_call"},
        "identical_rows": sum(
            a.token_ids == b.token_ids for a, b in zip(rows, baseline["result"], strict=True)
        ),
        "rows": len(rows),
        "agreement": agreement(rows, baseline["result"]),
    }


def exact_match(
    tokenizer: Tokenizer, ends: Sequence[int], rows: Sequence[Row], answers: Sequence[str]
) -> float:
    """Share of rows whose text, its end tokens aside, is the answer."""
    right = 0
    for row, answer in zip(rows, answers, strict=True):
        ids = [token for token in row.token_ids if token not in ends]
        right += tokenizer.decode(ids).strip() == answer.strip()
    return right / len(rows)


def agreement(rows: Sequence[Row], reference: Sequence[Row]) -> float:
    """Share of tokens that stand where the reference has them too."""
    same = total = 0
    for mine, theirs in zip(rows, reference, strict=True):
        pairs = list(zip(mine.token_ids, theirs.token_ids, strict=False))
        same += sum(a == b for a, b in pairs)
        total += max(len(mine.token_ids), len(theirs.token_ids))
    return same / max(total, 1)


def claims(config: ConfigDict, records: Sequence[Mapping[str, Any]]) -> list[results.Claim]:
    """Losslessness where it was checked, and the bounds of `config.claims`."""
    found = []
    for record in records:
        where = f"{record['label']}, temperature {record['temperature']:g}"
        first = record["batch_size"] == config.decode.batch_sizes[0]
        if first and record["method"] != BASELINE and "held" in record["lossless"]:
            found.append(
                results.Claim(
                    f"{where}: lossless ({record['lossless']['check']})",
                    record["lossless"].get("p_value", float(record["lossless"]["held"])),
                    f"> {P_VALUE}" if "p_value" in record["lossless"] else "identical",
                    record["lossless"]["held"],
                )
            )
        for bound in config.claims:
            if (bound.label, bound.temperature, bound.batch_size) == (
                record["label"], record["temperature"], record["batch_size"],
            ):  # fmt: skip
                name = f"{where}, batch {record['batch_size']}: {bound.metric}"
                measured = record[bound.metric]
                if bound.get("over"):
                    name += f" over that of {bound.over}"
                    measured /= _same_setting(records, record, bound.over)[bound.metric]
                found.append(results.at_least(name, measured, bound.at_least))
    return found


def _same_setting(
    records: Sequence[Mapping[str, Any]], record: Mapping[str, Any], label: str
) -> Mapping[str, Any]:
    """The record of another method at the same temperature and batch size."""
    for other in records:
        if other["label"] == label and all(
            other[field] == record[field] for field in ("temperature", "batch_size")
        ):
            return other
    raise InputError(f"config.claims: over: no method is labelled {label!r}")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The results as plain text, one line a run."""
    head = (
        "method", "T", "batch", "tokens/call", "tokens/s", "speed-up", "as plain", "exact match",
        "accepted by depth",
    )  # fmt: skip
    lines = [head]
    for r in records:
        depth = " ".join(f"{a:.2f}" for a in r["acceptance_by_depth"])
        lines.append(
            (
                r["label"], f"{r['temperature']:g}", str(r["batch_size"]),
                f"{r['tokens_per_target_call']:.2f}", f"{r['tokens_per_second']:.0f}",
                f"{r['speedup']:.2f}x", f"{r['agreement']:.0%}",
                f"{r['exact_match']:.0%}" if "exact_match" in r else "-", depth or "-",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
