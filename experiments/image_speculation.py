"""Speculative decoding of images: methods on one target, their work, time and quality side by side.

Trains what is missing, draws the same classes with every method, and measures the images in the
feature space of a classifier trained here. Methods are entries of `config.decode.methods`, see
`image_methods.method`; thresholds are swept by `config.curves`.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding.images import multi_scale
from experiments import (
    image_cost,
    image_methods,
    image_metrics,
    image_sheet,
    pictures,
    results,
    timing,
)
from experiments.image_methods import Decoder, Models, build, draw, work_means
from models import files, vq
from models.errors import InputError
from training.image_batches import ImageData, load_images


class Judge:
    """Quality of codes: decoded, and compared with real images in the classifier's features."""

    def __init__(self, config: ConfigDict, models: Models):
        data = ImageData(
            config.data.dataset,
            config.data.builder_options.to_dict(),
            (config.sizes.target,),
            data_dir=config.data.data_dir or None,
        )
        real = load_images(data, config.data.split, config.sizes.target, files.cache_root())
        count = min(len(real), config.quality.num_real)
        images = np.stack([real[i]["images"] for i in range(count)])
        self._classifier = models.classifier
        self._real, logits = image_metrics.classify(*models.classifier, images)
        labels = np.array([real[i]["labels"] for i in range(count)])
        self.real_accuracy = image_metrics.class_accuracy(logits, labels)
        self._decode = jax.jit(functools.partial(vq.decode, models.tokenizer))
        self._vq, self._side = models.params["vq"], models.target.side
        self._num_classes = models.target.num_classes

    def images(self, codes: Any) -> np.ndarray:
        """Float [n, H, W, C] of codes int [n, N]."""
        grids = codes.reshape(-1, self._side, self._side)
        return np.asarray(self._decode(self._vq, jnp.asarray(grids)))

    def __call__(self, codes: Any) -> dict[str, float]:
        """Quality of codes int [n, N] of the classes in turn."""
        features, logits = image_metrics.classify(*self._classifier, self.images(codes))
        labels = np.arange(len(codes)) % self._num_classes
        precision, recall = image_metrics.precision_recall(self._real, features)
        return {
            "accuracy": image_metrics.class_accuracy(logits, labels),
            "frechet": image_metrics.frechet_distance(self._real, features),
            "precision": precision,
            "recall": recall,
        }


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the experiment that `config` describes; see `experiments/configs/mulo_sd.py`."""
    begin = time.perf_counter()
    models = image_methods.load_models(config)
    judge = Judge(config, models)
    given = {
        "count": config.quality.num_images,
        "batch": config.quality.batch_size,
        "num_classes": models.target.num_classes,
        "seed": config.seed,
    }
    entries = {entry.label: entry for entry in config.decode.methods}
    built = {label: build(models, entry) for label, entry in entries.items()}
    records, sheet = [], []
    baseline: multi_scale.Result | None = None
    for label, entry in entries.items():
        logging.info("quality of %s", label)
        found = draw(built[label], entry.threshold, **given)
        baseline = baseline or found
        records.append(_record(config, models, entry, found, baseline, judge))
        sheet.append((label, judge.images(found.codes[: given["num_classes"]]), found.resampled))
    _time(config, models, entries, built, records)
    curves = _curves(config, models, judge, given)
    costs, cost_claims = image_cost.measure(config, models, records)
    picture = image_sheet.png(sheet, models.target.side)
    results.write_bytes(workdir / "images.png", picture)
    title = "A class a column; red: what the target drew itself"
    return {
        "models": models.summaries,
        "runs": records,
        "samples": [],
        "pictures": [{"title": title, "source": pictures.data_uri(picture, "png")}],
        "claims": _claims(config, records, curves) + cost_claims,
        "figures": _figures(curves),
        "curves": curves,
        "costs": costs,
        "consistency": consistency(models, judge, baseline),
        "real_accuracy": judge.real_accuracy,
        "seconds": time.perf_counter() - begin,
    }


def consistency(models: Models, judge: Judge, drawn: multi_scale.Result | None) -> dict[str, float]:
    """Share of codes that come back from the way down and up, or up and down, by scaling.

    Down and up of the target's own images; up and down of what that gave.
    """
    assert drawn is not None
    n, rates = models.target.side, {}
    codes = jnp.asarray(drawn.codes.reshape(-1, n, n))
    for scaling in {image_methods.PIXELS, *models.resamplers} - {"down"}:
        ways = image_methods.pair(models, scaling)
        low = ways.down(models.params, codes, jnp.int32(n))
        high = ways.up(models.params, low, jnp.int32(models.draft.side))
        back = ways.down(models.params, high, jnp.int32(n))
        rates[f"{scaling}: up of down"] = float(jnp.mean(high == codes))
        rates[f"{scaling}: down of up"] = float(jnp.mean(back == low))
    return rates


def _record(
    config: ConfigDict,
    models: Models,
    entry: ConfigDict,
    found: multi_scale.Result,
    baseline: multi_scale.Result,
    judge: Judge,
) -> dict[str, Any]:
    """One line of the results, but for its times."""
    work = work_means(found)
    count = len(found.codes)
    same = found.codes == baseline.codes
    identical = int(same.all(axis=1).sum())
    exact = entry.kind == "plain" or entry.options.get("rule") == "exact_match"
    check: dict[str, Any] = {"check": f"not lossless by design; {same.mean():.0%} of codes agree"}
    if exact:
        check = {"check": "codes identical to plain decoding", "held": identical == count}
    height = models.target.side // models.draft.side * entry.options.get("rows", 1)
    kept = 1 - found.resampled.reshape(count, -1, height, models.target.side).mean(axis=(0, 1, 3))
    return {
        "label": entry.label,
        "method": entry.kind,
        "threshold": entry.threshold,
        "options": entry.options.to_dict(),
        "temperature": config.decode.temperature,
        "batch_size": 1,
        "tokens_per_target_call": work["tokens_per_target_call"],
        # Rows of a window take the place of draft depths.
        "acceptance_by_depth": [] if entry.kind in ("plain", "wavefront") else kept.tolist(),
        "work": work,
        "quality": judge(found.codes),
        "identical_rows": identical,
        "rows": count,
        "agreement": float(same.mean()),
        "lossless": check,
    }


def _time(
    config: ConfigDict,
    models: Models,
    entries: Mapping[str, ConfigDict],
    built: Mapping[str, Decoder],
    records: Sequence[dict[str, Any]],
) -> None:
    """Adds times at batch 1 to the records: the same few images with every method in turn."""
    count = config.decode.num_timed

    def images(label: str) -> multi_scale.Result:
        return draw(
            built[label], entries[label].threshold, count=count, batch=1,
            num_classes=models.target.num_classes, seed=config.seed,
        )  # fmt: skip

    runs = {label: functools.partial(images, label) for label in entries}
    measured = timing.side_by_side(runs, config.decode.repeats, label="time at batch 1")
    first = measured[next(iter(entries))]["seconds"]
    for record in records:
        mine = measured[record["label"]]
        tokens = count * models.target.num_tokens
        timed = work_means(mine["result"])
        record |= {
            "seconds": mine["seconds"],
            "seconds_per_image": mine["median"] / count,
            "tokens_per_second": tokens / mine["median"],
            "speedup": timing.speedup(first, mine["seconds"]),
            "timed_work": timed,
            "stats": {
                "tokens_emitted": tokens,
                "target_calls": round(timed["target_calls"] * count),
                "draft_calls": round(timed["drafter_calls"] * count),
            },
        }


def _curves(
    config: ConfigDict, models: Models, judge: Judge, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Work and quality of some methods at every threshold of `config.thresholds`."""
    curves = []
    for entry in config.curves:
        decode, points = build(models, entry), []
        for threshold in config.thresholds:
            logging.info("%s at threshold %g", entry.label, threshold)
            found = draw(decode, threshold, **given)
            points.append({"threshold": threshold, **work_means(found), **judge(found.codes)})
        curves.append({"label": entry.label, "points": points})
    return curves


def _figures(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Line charts of the threshold's curves."""
    panels = (
        ("tokens per target call", "threshold", "tokens_per_target_call"),
        ("class accuracy", "tokens_per_target_call", "accuracy"),
        ("Fréchet distance in classifier features", "tokens_per_target_call", "frechet"),
        ("share of tokens drawn again", "threshold", "rho"),
    )
    figures = {}
    for title, x, y in panels if curves else ():
        series = [
            {
                "label": curve["label"],
                "x": [point[x] for point in curve["points"]],
                "y": [point[y] for point in curve["points"]],
            }
            for curve in curves
        ]
        x_label = "threshold" if x == "threshold" else "tokens per target call"
        figures[title] = {"title": title, "x_label": x_label, "y_label": title, "series": series}
    return figures


def _claims(
    config: ConfigDict,
    records: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
) -> list[results.Claim]:
    """Losslessness where promised, then the config's own; see `experiments/configs/mulo_sd.py`."""
    claims = [
        results.Claim(
            f"{record['label']}: {record['lossless']['check']}",
            record["identical_rows"] / record["rows"],
            "identical",
            record["lossless"]["held"],
        )
        for record in records[1:]
        if "held" in record["lossless"]
    ]
    by_label = {record["label"]: record for record in records}
    for wanted in config.claims:
        mine, other = (by_label[name] for name in (wanted.label, wanted.over))
        value = _metric(mine, wanted.metric) - _metric(other, wanted.metric)
        if wanted.ratio:
            value = _metric(mine, wanted.metric) / _metric(other, wanted.metric)
        kind = "over" if wanted.ratio else "minus"
        name = f"{wanted.claim}: {wanted.metric} of {wanted.label} {kind} that of {wanted.over}"
        held = value >= wanted.bound if wanted.at_least else value <= wanted.bound
        sign = ">=" if wanted.at_least else "<="
        claims.append(results.Claim(name, float(value), f"{sign} {wanted.bound:g}", bool(held)))
    for curve in curves:
        calls = [point["tokens_per_target_call"] for point in curve["points"]]
        drops = float(np.mean(np.diff(calls) <= 1e-9)) if len(calls) > 1 else 1.0
        name = (
            f"{curve['label']}: tokens per target call fall as the threshold rises, share of steps"
        )
        claims.append(results.at_least(name, drops, 1.0))
        distances = [point["frechet"] for point in curve["points"]]
        falls = float(np.mean(np.diff(distances) <= 0)) if len(calls) > 1 else 1.0
        name = (
            f"{curve['label']}: the Fréchet distance falls as the threshold rises, share of steps"
        )
        claims.append(results.at_least(name, falls, 1.0))
    return claims


def _metric(record: Mapping[str, Any], name: str) -> float:
    for holder in (record, record["quality"], record["work"]):
        if name in holder:
            return float(holder[name])
    raise InputError(f"config.claims: metric: {name!r} is not measured")


def claim(
    text: str,
    metric: str,
    label: str,
    over: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    ratio: bool = True,
) -> ConfigDict:
    """An entry of `config.claims`: a metric of one method over (or minus) that of another.

    Args:
      text: the claim in words.
      metric: 'speedup', 'tokens_per_target_call', 'frechet', 'accuracy', 'resample_calls', ...
      label, over: labels of methods.
      at_least, at_most: one of these.
      ratio: False for the difference.
    """
    return ConfigDict(
        {
            "claim": text, "metric": metric, "label": label, "over": over,
            "at_least": at_least is not None,
            "bound": float(at_least if at_least is not None else at_most or 0.0), "ratio": ratio,
        }
    )  # fmt: skip
