"""Methods of drawing images as experiments name them: models by role, entries, jitted decoders."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import randomness
from decoding.images import (
    image_scaling,
    local_resampling,
    multi_scale,
    neighbourhoods,
    raster,
    raster_rejection,
    wavefront,
)
from decoding.images.image_tokens import ImageSampler
from decoding.sampling import SamplingConfig
from models import files, hf_checkpoint, image_classifier, row_causal, vq
from models.errors import InputError, check_choice
from training import base_models, image_models

KINDS = ("plain", "wavefront", "local", "raster")
PIXELS = "pixels"
_SUMMARY = ("eval_loss", "eval_bits_per_byte", "seconds", "curve", "evaluations")


def method(label: str, kind: str, threshold: float = 0.0, **options: Any) -> ConfigDict:
    """An entry of `config.decode.methods` or `config.curves`.

    Args:
      label: as reports show it.
      kind: 'plain' decoding; 'wavefront' (options width, first_row_serial); 'local' (those of
        `LocalConfig`) and 'raster' (those of `RasterConfig`), both with drafts from the small grid.
      threshold: of the test: tau, or delta.
      options: and for 'local' and 'raster' `neighbours` (k), `rows` (m), `draft_width`, and
        `scaling`: 'pixels', or the role of an up-sampler beside the one called 'down'.
    """
    return ConfigDict({"label": label, "kind": kind, "threshold": threshold, "options": options})


@dataclasses.dataclass(frozen=True)
class Models:
    """What a run decodes and measures with.

    Attributes:
      target, draft: image models of the two grids.
      params: of all, by role, and the nearest codes of each code.
      tokenizer: the architecture in `params['vq']`.
      resamplers: architectures of learned ones, by role.
      classifier: with its parameters.
      summaries: what a report shows.
    """

    target: ImageSampler
    draft: ImageSampler
    params: dict[str, Any]
    tokenizer: vq.VQConfig
    resamplers: dict[str, row_causal.ResamplerConfig]
    classifier: tuple[image_classifier.ClassifierConfig, Any]
    summaries: list[dict[str, Any]]


def load_models(config: ConfigDict) -> Models:
    """Loads every role of `config.models`: a recipe of `image_models`, trained if need be, or a
    directory."""
    cache = files.cache_root()
    found: dict[str, Path] = {}
    summaries = []
    for role, source in config.models.items():
        if not source:
            continue
        found[role] = image_models.resolve(source, cache)
        summary: dict[str, Any] = {"role": role, "source": source}
        recorded = found[role] / base_models.SUMMARY_FILE
        if recorded.exists() and role in ("target", "draft"):
            trained = json.loads(recorded.read_text())
            summary |= {name: trained[name] for name in _SUMMARY if name in trained}
        summaries.append(summary)
    tokenizer, vq_params = vq.load(found["tokenizer"])
    params: dict[str, Any] = {"vq": vq_params}
    samplers, resamplers = {}, {}
    for role in ("target", "draft"):
        architecture, params[role] = hf_checkpoint.load(found[role])
        samplers[role] = ImageSampler(
            architecture,
            tokenizer.codebook_size,
            config.sizes[role] // tokenizer.factor,
            SamplingConfig(config.decode.temperature, config.decode.top_k, config.decode.top_p),
            config.decode.guidance,
        )
    for role in found:
        if role.startswith(("up", "down")):
            resamplers[role], params[role] = row_causal.load(found[role])
    for summary in summaries:
        leaves = jax.tree.leaves(params.get(summary["role"], ()))
        summary["parameters"] = sum(leaf.size for leaf in leaves)
    return Models(
        samplers["target"],
        samplers["draft"],
        params,
        tokenizer,
        resamplers,
        image_classifier.load(found["classifier"]),
        summaries,
    )


def pair(models: Models, scaling: str) -> multi_scale.Pair:
    """Target, drafter and the way between them, see `method`."""
    if scaling == PIXELS:
        factor = models.target.side // models.draft.side
        up = image_scaling.through_pixels(models.tokenizer, float(factor))
        down = image_scaling.through_pixels(models.tokenizer, 1 / factor)
    else:
        check_choice("scaling", scaling, {PIXELS, *models.resamplers} - {"down"})
        if "down" not in models.resamplers:
            raise InputError(f"scaling: {scaling!r} needs models.down")
        up = image_scaling.learned(models.resamplers[scaling], scaling)
        down = image_scaling.learned(models.resamplers["down"], "down")
    return multi_scale.Pair(models.target, models.draft, up, down)


# (labels int [B], row keys [B], threshold) -> what was drawn.
Decoder = Callable[[jnp.ndarray, jax.Array, float], multi_scale.Result]


def build(models: Models, entry: ConfigDict) -> Decoder:
    """The method that an entry describes; jitted, the threshold being an argument.

    Raises:
      InputError: an unknown kind, or options that it does not have.
    """
    check_choice("kind", entry.kind, KINDS)
    options = entry.options.to_dict()
    if entry.kind in ("plain", "wavefront"):
        return _whole_grid(models, entry.kind, options)
    scaled = pair(models, options.pop("scaling", PIXELS))
    rows, width = options.pop("rows", 1), options.pop("draft_width", None)
    table = neighbourhoods.nearest_codes(
        vq.embeddings(models.params["vq"]), options.pop("neighbours", 1)
    )
    params = models.params | {"neighbours": table}
    height = scaled.factor * rows
    try:
        if entry.kind == "local":
            local = local_resampling.LocalConfig(**options)
            settle = local_resampling.local_resampling(models.target, height, local)
        else:
            rejection = raster_rejection.RasterConfig(**options)
            settle = raster_rejection.raster_rejection(models.target, height, rejection)
    except TypeError as error:
        raise InputError(f"{entry.label}: options: {error}") from None

    def decode(labels: jnp.ndarray, keys: jax.Array, threshold: float) -> multi_scale.Result:
        return multi_scale.generate(
            params, labels, keys, jnp.float32(threshold),
            pair=scaled, settle=settle, rows=rows, draft_width=width,
        )  # fmt: skip

    return decode


def _whole_grid(models: Models, kind: str, options: Mapping[str, Any]) -> Decoder:
    """Methods without a drafter, with their calls as window passes of one token each."""
    target, params = models.target, models.params["target"]
    steps, positions = target.num_tokens, 1
    run = functools.partial(raster.generate, sampler=target)
    if kind == "wavefront":
        order = wavefront.schedule(target.side, target.side, **options)
        steps, positions = order.steps, order.decides.shape[1]
        run = functools.partial(wavefront.generate, sampler=target, **options)

    def decode(labels: jnp.ndarray, keys: jax.Array, threshold: float) -> multi_scale.Result:
        codes = run(params, labels, keys)
        none = jnp.zeros(codes.shape, bool)
        work = multi_scale.no_work(len(labels)).add(
            resample_calls=steps, resample_positions=steps * positions, resampled=codes.shape[1]
        )
        return multi_scale.Result(codes, codes[:, :0], none, ~none, work)

    return decode


def draw(
    decode: Decoder, threshold: float, *, count: int, batch: int, num_classes: int, seed: int
) -> multi_scale.Result:
    """`count` images of the classes in turn, `batch` at a time, as NumPy arrays."""
    parts = []
    for first in range(0, count, batch):
        numbers = jnp.arange(first, first + batch)
        keys = randomness.row_keys(seed, numbers)
        parts.append(jax.device_get(decode(numbers % num_classes, keys, threshold)))
    merged: multi_scale.Result = jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
    return merged


def work_means(found: multi_scale.Result) -> dict[str, float]:
    """Work an image, averaged, and what follows from it."""
    means = {
        field.name: float(np.mean(getattr(found.work, field.name)))
        for field in dataclasses.fields(multi_scale.Work)
    }
    calls = means["window_passes"] + means["resample_calls"]
    tokens = found.codes.shape[1]
    return means | {
        "target_calls": calls,
        "tokens_per_target_call": tokens / calls,
        "rejection_rate": means["rejected"] / tokens,
        "rho": means["resampled"] / tokens,
    }
