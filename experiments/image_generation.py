"""Masked image models side by side: quality, work and time of their images, and their attention.

Trains what is missing, draws the same classes or captions with every method, and measures the
images in the feature space of a classifier trained here. A method is a network of `config.models`
and a `SamplerConfig`; see `experiments/configs/enat.py`.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding import randomness
from decoding.images import mask_predict
from decoding.images.mask_predict import Sampled, SamplerConfig
from experiments import image_judge, image_probes, image_sheet, pictures, results, timing
from experiments.image_networks import Networks, decoder, load_networks
from models import enat, files
from models.errors import InputError, check_choice
from training import image_tokens


class Method(NamedTuple):
    """A line of the results: label, role of the network, sampler."""

    label: str
    model: str
    sampler: SamplerConfig


def methods_of(config: ConfigDict, networks: Networks) -> list[Method]:
    """The methods of `config.decode.methods`, checked."""
    found = []
    for entry in config.decode.methods:
        check_choice("config.decode.methods: model", entry.model, networks.masked)
        options = {**config.decode.sampler.to_dict(), **entry.options.to_dict()}
        try:
            found.append(Method(entry.label, entry.model, SamplerConfig(**options)))
        except TypeError as error:
            raise InputError(f"config.decode.methods: {entry.label}: {error}") from None
    return found


def draw(
    network: tuple[enat.ENATConfig, Any],
    sampler: SamplerConfig,
    *,
    count: int,
    batch_size: int,
    seed: int,
    conditions: np.ndarray | None = None,
) -> Sampled:
    """`count` images on the host, of the n `conditions` in turn (None: of the classes).

    Image i does not depend on the batch size.
    """
    model, params = network
    given = jnp.arange(model.num_classes) if conditions is None else jnp.asarray(conditions)
    parts = []
    for first in range(0, count, batch_size):
        rows = jnp.arange(first, first + batch_size)  # the last ones may be more than are wanted
        keys = randomness.row_keys(seed, rows)
        found = mask_predict.sample(model, sampler, params, keys, given[rows % len(given)])
        parts.append(jax.device_get(found))
    ids: Any = np.concatenate([part.ids for part in parts])[:count]
    trace: Any = np.concatenate([part.trace for part in parts], axis=1)[:, :count]
    return Sampled(ids, trace, parts[0].stats)


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the experiment that `config` describes; see `experiments/configs/enat.py`."""
    begin = time.perf_counter()
    networks = load_networks(config)
    methods = methods_of(config, networks)
    images_of = decoder(networks)
    wanted = image_judge.asked(networks)
    measure = image_judge.judge(config, networks, wanted, images_of)
    given = {
        "batch_size": config.quality.batch_size,
        "seed": config.seed,
        "conditions": wanted.conditions,
    }
    drawn: dict[str, Sampled] = {}
    records = []
    for method in methods:
        logging.info("images of %s", method.label)
        network = networks.masked[method.model]
        found = draw(network, method.sampler, count=config.quality.num_images, **given)
        drawn[method.label] = found
        first = drawn[methods[0].label]
        quality = measure(np.asarray(found.ids))
        records.append(_record(config, method, network[0], found, first, quality))
    _time(config, networks, methods, wanted.conditions, records)
    analyses: dict[str, Any] = {}
    figures, claims = {}, []
    if wanted.texts:
        analyses["captions"] = wanted.texts[: config.pictures.columns * config.pictures.rows]
    for name in config.analyses:
        check_choice("config.analyses", name, image_probes.PROBES)
        tokens = image_tokens.ensure(
            networks.tokenizer_directory, networks.data, config.data.split, files.cache_root()
        )
        analyses[name], figures[name], found_claims = image_probes.PROBES[name](
            networks.masked[config.baseline], tokens, config
        )
        claims += found_claims
    columns = min(len(wanted.conditions), config.pictures.columns)
    shown = _pictures(config, networks, methods, drawn, images_of, columns)
    rows = [
        (label, images_of(found.ids[: config.pictures.columns]), None)
        for label, found in drawn.items()
    ]
    results.write_bytes(workdir / "images.png", image_sheet.png(rows, networks.side))
    return {
        "models": networks.summaries,
        "runs": records,
        "samples": [],
        "claims": claims_of(config, records) + claims,
        "figures": {"quality over work": _trade_off(records), **figures},
        "analyses": analyses,
        "real": measure(None),
        "pictures": shown,
        "seconds": time.perf_counter() - begin,
    }


def _record(
    config: ConfigDict,
    method: Method,
    model: enat.ENATConfig,
    found: Sampled,
    first: Sampled,
    quality: Mapping[str, float],
) -> dict[str, Any]:
    """One line of the results, but for its times; `first` are the first method's images."""
    work = {name: int(value[0]) for name, value in found.stats.extra.items()}
    calls = int(found.stats.target_calls[0])
    macs = mask_predict.macs(model, method.sampler) / 1e6
    same = found.ids == first.ids
    return {
        "label": method.label,
        "method": method.model,
        "options": vars(method.sampler),
        "temperature": method.sampler.sampling_temperature,
        "batch_size": config.decode.batch_size,
        "tokens_per_target_call": model.num_tokens / calls,
        "acceptance_by_depth": [],
        "work": {**work, "network_calls": calls, "mmacs_per_image": macs},
        "quality": dict(quality),
        **({"accuracy": quality["accuracy"]} if "accuracy" in quality else {}),
        "role": "target",
        "keeps_law": False,
        "identical_rows": int(same.all(1).sum()),
        "rows": len(found.ids),
        "agreement": float(same.mean()),
        "lossless": {"check": "images are compared by their quality"},
    }


def _time(
    config: ConfigDict,
    networks: Networks,
    methods: Sequence[Method],
    conditions: np.ndarray,
    records: Sequence[dict[str, Any]],
) -> None:
    """Adds times to the records: a batch of images with every method in turn."""
    batch = config.decode.batch_size

    def images(method: Method) -> Sampled:
        network = networks.masked[method.model]
        given = {"batch_size": batch, "seed": config.seed, "conditions": conditions}
        return draw(network, method.sampler, count=batch, **given)

    runs = {method.label: functools.partial(images, method) for method in methods}
    measured = timing.side_by_side(runs, config.decode.repeats, label="time")
    first = measured[methods[0].label]["seconds"]
    for record, method in zip(records, methods, strict=True):
        mine = measured[record["label"]]
        tokens = batch * networks.masked[method.model][0].num_tokens
        record |= {
            "seconds": mine["seconds"],
            "tokens_per_second": tokens / mine["median"],
            "speedup": timing.speedup(first, mine["seconds"]),
            "stats": {
                "tokens_emitted": tokens,
                "target_calls": batch * record["work"]["network_calls"],
                "draft_calls": 0,
            },
        }
        record["work"]["milliseconds_per_image"] = 1e3 * mine["median"] / batch


def _trade_off(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The Fréchet distance over multiply-accumulates, a point a method."""
    return {
        "title": "Fréchet distance in classifier features over work",
        "x_label": "million multiply-accumulates an image",
        "y_label": "Fréchet distance",
        "series": [
            {
                "label": r["label"],
                "x": [r["work"]["mmacs_per_image"]],
                "y": [r["quality"]["frechet"]],
            }
            for r in records
        ],
    }


def _pictures(
    config: ConfigDict,
    networks: Networks,
    methods: Sequence[Method],
    drawn: Mapping[str, Sampled],
    images_of: Any,
    columns: int,
) -> list[dict[str, Any]]:
    """A grid of each method's images, a column a class or caption, and an animation of one
    unmasking."""
    count = columns * config.pictures.rows
    shown: list[dict[str, Any]] = []
    for method in methods:
        ids = drawn[method.label].ids[:count]
        source = pictures.data_uri(pictures.png(pictures.tile(images_of(ids), columns)), "png")
        shown.append({"title": method.label, "source": source})
    label = config.pictures.animated
    check_choice("config.pictures.animated", label, drawn)
    model = networks.masked[next(m.model for m in methods if m.label == label)][0]
    frames = []
    for ids in drawn[label].trace[:, :count]:
        images = images_of(np.where(ids == model.mask_id, 0, ids))
        hidden = (ids == model.mask_id).reshape(-1, networks.side, networks.side, 1)
        factor = networks.tokenizer[0].factor
        hidden = hidden.repeat(factor, 1).repeat(factor, 2)
        frames.append(pictures.tile(np.where(hidden, 0.5, images), columns))
    source = pictures.data_uri(pictures.gif(frames), "gif")
    shown.append({"title": f"{label}, step by step (masked: grey)", "source": source})
    return shown


def claim(
    text: str,
    metric: str,
    label: str,
    over: str,
    *,
    over_metric: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> ConfigDict:
    """An entry of `config.claims`: a metric of one method over that, or one, of another.

    Args:
      text: the claim in words.
      metric: of `quality` or `work`: 'frechet', 'accuracy', 'mmacs_per_image', ...
      label, over: labels of methods.
      over_metric: of the other method, where it is not `metric`.
      at_least, at_most: one of these.
    """
    bound = at_least if at_least is not None else at_most
    return ConfigDict(
        {
            "claim": text, "metric": metric, "label": label, "over": over,
            "over_metric": over_metric or metric,
            "at_least": at_least is not None, "bound": bound,
        }
    )  # fmt: skip


def claims_of(config: ConfigDict, records: Sequence[Mapping[str, Any]]) -> list[results.Claim]:
    """The config's claims with what was measured."""
    by_label = {record["label"]: {**record["quality"], **record["work"]} for record in records}
    found = []
    for wanted in config.claims:
        for label in (wanted.label, wanted.over):
            check_choice("config.claims: label", label, by_label)
        check_choice("config.claims: metric", wanted.metric, by_label[wanted.label])
        check_choice("config.claims: over_metric", wanted.over_metric, by_label[wanted.over])
        value = by_label[wanted.label][wanted.metric] / by_label[wanted.over][wanted.over_metric]
        held = value >= wanted.bound if wanted.at_least else value <= wanted.bound
        same = wanted.over_metric == wanted.metric
        other = f"{'that' if same else wanted.over_metric} of {wanted.over}"
        name = f"{wanted.claim}: {wanted.metric} of {wanted.label} over {other}"
        sign = ">=" if wanted.at_least else "<="
        found.append(results.Claim(name, float(value), f"{sign} {wanted.bound:g}", bool(held)))
    return found
