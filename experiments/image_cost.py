"""The cost model of multi-scale speculation beside measured times (MuLo-SD's section 2.6 here).

T / T_AR = (1 / r^2) (c_q / c_p) + (n_p / (r m)) c_v / (N c_p) + rho, with the time of a one-token
call of drafter and target, that of a window pass (scaling included), and the share of tokens that
take a call of their own. Unit times come from runs that have one kind of call only: plain decoding
of both models, and local verification at thresholds that keep everything and nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from decoding import randomness
from decoding.images import raster
from decoding.images.image_tokens import ImageSampler
from experiments import results, timing
from experiments.image_methods import Decoder, Models, build


def relative_time(
    *,
    factor: int,
    rows: int,
    side: int,
    draft_call: float,
    target_call: float,
    window_pass: float,
    rho: float,
) -> float:
    """T / T_AR of the formula above.

    Args:
      factor: r.
      rows: m.
      side: n_p; N = n_p^2.
      draft_call, target_call, window_pass: c_q, c_p and c_v, in one unit.
      rho: calls for single tokens, as a share of N.
    """
    drafting = draft_call / target_call / factor**2
    verifying = side / (factor * rows) * window_pass / (side**2 * target_call)
    return drafting + verifying + rho


def measure(
    config: ConfigDict,
    models: Models,
    records: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Unit times, and each local method's predicted and measured time relative to plain decoding.

    Each method is calibrated by itself at thresholds 0 and above 1; what is predicted is its time
    at the threshold in between.

    Args:
      config: the experiment's.
      models: what it decodes with.
      records: of the methods, with times.
    """
    r, n, N = models.target.side // models.draft.side, models.target.side, models.target.num_tokens
    count = config.decode.num_timed
    labels = [jnp.array([i % models.target.num_classes]) for i in range(count)]
    keys = [randomness.row_keys(config.seed, jnp.array([i])) for i in range(count)]

    def plain(sampler: ImageSampler, params: Any) -> None:
        for label, key in zip(labels, keys, strict=True):
            jax.block_until_ready(raster.generate(params, label, key, sampler=sampler))

    def at(decode: Decoder, threshold: float) -> None:
        for label, key in zip(labels, keys, strict=True):
            jax.block_until_ready(decode(label, key, threshold))

    runs: dict[str, Callable[[], None]] = {
        "target": functools.partial(plain, models.target, models.params["target"]),
        "draft": functools.partial(plain, models.draft, models.params["draft"]),
    }
    local = [entry for entry in config.decode.methods if entry.kind == "local"]
    for entry in local:
        decode = build(models, entry)
        for name, threshold in (("none", 0.0), ("all", 2.0), ("own", entry.threshold)):
            runs[f"{entry.label}/{name}"] = functools.partial(at, decode, threshold)
    measured = timing.side_by_side(runs, config.decode.repeats, label="cost model")
    seconds = {name: found["median"] / count for name, found in measured.items()}
    by_label = {record["label"]: record for record in records}
    target_call, draft_call = seconds["target"] / N, seconds["draft"] / models.draft.num_tokens
    lines, claims = [], []
    for entry in local:
        rows = entry.options.get("rows", 1)
        cycles = n // (r * rows)
        calls = by_label[entry.label]["timed_work"]["resample_calls"]
        window_pass = (seconds[f"{entry.label}/none"] - seconds["draft"]) / cycles
        own_call = (seconds[f"{entry.label}/all"] - seconds[f"{entry.label}/none"]) / (N - cycles)
        ratio = functools.partial(
            relative_time, factor=r, rows=rows, side=n, draft_call=draft_call,
            target_call=target_call, window_pass=window_pass,
        )  # fmt: skip
        actual = seconds[f"{entry.label}/own"] / seconds["target"]
        line = {
            "label": entry.label,
            "window_pass": window_pass,
            "resample_call": own_call,
            "measured": actual,
            # As written, a resampled token costs what a token of plain decoding costs.
            "predicted": ratio(rho=calls / N),
            "predicted_with_own_call": ratio(rho=calls / N * own_call / target_call),
            # Where reading the weights is what a call costs, as on accelerators at batch 1.
            "bandwidth_bound": relative_time(
                factor=r,
                rows=rows,
                side=n,
                draft_call=1.0,
                target_call=1.0,
                window_pass=1.5,
                rho=calls / N,
            ),
        }
        lines.append(line)
        for name, text in (("predicted", "as written"), ("predicted_with_own_call", "calibrated")):
            off = abs(line[name] / actual - 1)
            title = f"{entry.label}: cost model {text}, relative error of predicted time"
            claims.append(results.Claim(title, off, "<= 0.2", off <= 0.2))
    units = {"target_call": target_call, "draft_call": draft_call}
    return {"units": units, "methods": lines}, claims
