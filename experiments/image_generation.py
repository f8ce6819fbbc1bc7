"""Masked image models side by side: quality, work and time of their images, and their attention.

Trains what is missing, draws the same classes with every method, and measures the images in the
feature space of a classifier trained here. A method is a network of `config.models` and a
`SamplerConfig`; see `experiments/configs/enat.py`.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
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
from experiments import image_metrics, image_probes, image_sheet, pictures, results, timing
from models import enat, files, image_classifier, vq
from models.errors import InputError, check_choice
from training import base_models, image_models, image_tokens
from training.image_batches import ImageData, load_images

# Roles of `config.models` that are no network to compare.
_OTHERS = ("tokenizer", "classifier")
_SUMMARY = ("eval_loss", "seconds", "curve", "evaluations")


class Networks(NamedTuple):
    """What a run draws and measures with.

    Attributes:
      masked: networks by role, each a config and parameters.
      tokenizer, classifier: a config and parameters.
      data: of the images; of one size.
      tokenizer_directory: where the tokeniser lies.
      summaries: what a report shows.
    """

    masked: dict[str, tuple[enat.ENATConfig, Any]]
    tokenizer: tuple[vq.VQConfig, Any]
    classifier: tuple[image_classifier.ClassifierConfig, Any]
    data: ImageData
    tokenizer_directory: Path
    summaries: list[dict[str, Any]]

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return self.data.sizes[0] // self.tokenizer[0].factor


class Method(NamedTuple):
    """A line of the results: label, role of the network, sampler."""

    label: str
    model: str
    sampler: SamplerConfig


def load_networks(config: ConfigDict) -> Networks:
    """Every role of `config.models`: a recipe of `image_models`, trained if need be, or a
    directory."""
    cache = files.cache_root()
    masked, summaries, found = {}, [], {}
    # Networks learn from the config's dataset, through its tokeniser.
    given = {
        "tokenizer": config.models.tokenizer,
        "data.dataset": config.data.dataset,
        "data.options": config.data.builder_options.to_dict(),
        "data.data_dir": config.data.data_dir or None,
    }
    for role, source in config.models.items():
        if source in image_models.RECIPES and role not in _OTHERS:
            directory = image_models.ensure(source, cache_dir=cache, overrides=given)
        else:
            directory = image_models.resolve(source, cache)
        found[role] = directory
        load = {"tokenizer": vq.load, "classifier": image_classifier.load}.get(role, enat.load)
        loaded: Any = load(directory)
        masked[role] = loaded
        count = sum(x.size for x in jax.tree.leaves(loaded[1]))
        summary = {"role": role, "source": source, "parameters": count}
        path = directory / base_models.SUMMARY_FILE
        if path.exists():
            trained = json.loads(path.read_text())
            # The others' losses are no nats a token.
            kept = ("seconds",) if role in _OTHERS else _SUMMARY
            summary |= {name: trained[name] for name in kept if name in trained}
        summaries.append(summary)
    others = [masked.pop(role) for role in _OTHERS]
    data = ImageData(
        config.data.dataset,
        config.data.builder_options.to_dict(),
        (config.data.size,),
        train_split=config.data.train_split,
        eval_split=config.data.split,
        data_dir=config.data.data_dir or None,
    )
    return Networks(masked, others[0], others[1], data, found["tokenizer"], summaries)


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
) -> Sampled:
    """`count` images, classes in turn, on the host. Image i does not depend on the batch size."""
    model, params = network
    parts = []
    for first in range(0, count, batch_size):
        rows = jnp.arange(first, first + batch_size)  # the last ones may be more than are wanted
        keys = randomness.row_keys(seed, rows)
        found = mask_predict.sample(model, sampler, params, keys, rows % model.num_classes)
        parts.append(jax.device_get(found))
    ids: Any = np.concatenate([part.ids for part in parts])[:count]
    trace: Any = np.concatenate([part.trace for part in parts], axis=1)[:, :count]
    return Sampled(ids, trace, parts[0].stats)


def decoder(networks: Networks) -> Callable[[Any], np.ndarray]:
    """A function from ids int [n, N] to images float [n, H, W, C]."""
    (config, params), side = networks.tokenizer, networks.side
    decode = jax.jit(functools.partial(vq.decode, config))
    return lambda ids: np.asarray(decode(params, jnp.asarray(ids).reshape(-1, side, side)))


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the experiment that `config` describes; see `experiments/configs/enat.py`."""
    begin = time.perf_counter()
    networks = load_networks(config)
    methods = methods_of(config, networks)
    images_of = decoder(networks)
    measure = judge(config, networks, images_of)
    given = {"batch_size": config.quality.batch_size, "seed": config.seed}
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
    _time(config, networks, methods, records)
    analyses, figures, claims = {}, {}, []
    for name in config.analyses:
        check_choice("config.analyses", name, image_probes.PROBES)
        tokens = image_tokens.ensure(
            networks.tokenizer_directory, networks.data, config.data.split, files.cache_root()
        )
        analyses[name], figures[name], found_claims = image_probes.PROBES[name](
            networks.masked[config.baseline], tokens, config
        )
        claims += found_claims
    shown = _pictures(config, networks, methods, drawn, images_of)
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


def judge(
    config: ConfigDict, networks: Networks, images_of: Callable[[Any], np.ndarray]
) -> Callable[[np.ndarray | None], dict[str, float]]:
    """A function from ids int [n, N] of classes in turn, or None for the tokeniser's own images
    of held-out ones, to quality by name."""
    data = networks.data
    source = load_images(data, data.eval_split, data.sizes[0], files.cache_root())
    count = min(len(source), config.quality.num_real)
    examples = [source[i] for i in range(count)]
    features, logits = image_metrics.classify(
        *networks.classifier, np.stack([example["images"] for example in examples])
    )
    labels = np.array([example["labels"] for example in examples])
    tokens = image_tokens.ensure(
        networks.tokenizer_directory, data, data.eval_split, files.cache_root()
    )
    real = np.asarray(tokens.ids[:count])
    side, codes = networks.side, networks.tokenizer[0].codebook_size

    def measure(ids: np.ndarray | None) -> dict[str, float]:
        mine = real if ids is None else ids
        wanted = labels if ids is None else np.arange(len(ids)) % _num_classes(networks)
        found, found_logits = image_metrics.classify(*networks.classifier, images_of(mine))
        precision, recall = image_metrics.precision_recall(features, found)
        quality = {
            "accuracy": image_metrics.class_accuracy(found_logits, wanted),
            "frechet": image_metrics.frechet_distance(features, found),
            "precision": precision,
            "recall": recall,
            "bigram_kl": image_metrics.bigram_divergence(
                real.reshape(-1, side, side), mine.reshape(-1, side, side), codes
            ),
        }
        if ids is None:
            quality["classifier_accuracy"] = image_metrics.class_accuracy(logits, labels)
        return quality

    return measure


def _num_classes(networks: Networks) -> int:
    return next(iter(networks.masked.values()))[0].num_classes


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
        "accuracy": quality["accuracy"],
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
    records: Sequence[dict[str, Any]],
) -> None:
    """Adds times to the records: a batch of images with every method in turn."""
    batch = config.decode.batch_size

    def images(method: Method) -> Sampled:
        network = networks.masked[method.model]
        return draw(network, method.sampler, count=batch, batch_size=batch, seed=config.seed)

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
) -> list[dict[str, Any]]:
    """A grid of each method's images, a column a class, and an animation of one unmasking."""
    columns = min(_num_classes(networks), config.pictures.columns)
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
    at_least: float | None = None,
    at_most: float | None = None,
) -> ConfigDict:
    """An entry of `config.claims`: a metric of one method over that of another.

    Args:
      text: the claim in words.
      metric: of `quality` or `work`: 'frechet', 'accuracy', 'mmacs_per_image', ...
      label, over: labels of methods.
      at_least, at_most: one of these.
    """
    bound = at_least if at_least is not None else at_most
    return ConfigDict(
        {
            "claim": text, "metric": metric, "label": label, "over": over,
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
        value = by_label[wanted.label][wanted.metric] / by_label[wanted.over][wanted.metric]
        held = value >= wanted.bound if wanted.at_least else value <= wanted.bound
        name = f"{wanted.claim}: {wanted.metric} of {wanted.label} over that of {wanted.over}"
        sign = ">=" if wanted.at_least else "<="
        found.append(results.Claim(name, float(value), f"{sign} {wanted.bound:g}", bool(held)))
    return found
