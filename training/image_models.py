"""Small image models that experiments share: trained once, kept by a hash of their recipe.

`ensure('digits_vq32')` returns a directory with config.json, model.safetensors and
training_summary.json, training the model if no run on this machine has done so. The hash covers
all fields of the recipe, the data's own content hash, the models it is made from and
`CODE_VERSION`.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models import enat, files, hf_checkpoint, image_classifier, row_causal, vq
from models.enat import TextENATConfig
from models.errors import InputError, check_choice
from models.image_classifier import ClassifierConfig
from models.row_causal import ResamplerConfig
from models.vq import VQConfig
from training import (
    artifacts,
    base_models,
    checkpoints,
    image_batches,
    image_captions,
    image_language_model,
    image_samplers,
    image_tokens,
    loop,
    masked_image,
    masked_image_recipes,
    metric_writers,
    vq_tokenizer,
)
from training import image_classifier as classifier_training
from training.base_models import SUMMARY_FILE
from training.data_parallel import RunConfig
from training.image_batches import ImageData, data_identity, load_images
from training.image_captions import CaptionedImageModel, CaptionedTokens
from training.image_language_model import ImageLanguageModel
from training.image_samplers import SamplerModel
from training.language_model import TrainConfig as LanguageTrainConfig
from training.masked_image import MaskedImageModel
from training.optimizers import OptimizerConfig

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
# Of the validation split, at an evaluation of a masked model.
_EVAL_BATCHES = 16
# What a parent is, by content, by its role: weights, and for a text model its tokeniser too.
_CONTENT_OF = {"text_model": image_captions.fingerprint}


@dataclasses.dataclass(frozen=True)
class VQModel:
    """The recipe of a tokeniser.

    Attributes:
      data: images of one or several sizes, which share the codebook.
      train: the run. A batch has images of one size, in turn: `batch_size` of the largest, and
        of the others more in the proportion of their sides.
      eval_images: of each size, from the validation split.
    """

    data: ImageData
    train: vq_tokenizer.TrainConfig
    eval_images: int = 256


@dataclasses.dataclass(frozen=True)
class ClassifierModel:
    """The recipe of a classifier that generated images are measured with.

    Attributes:
      data: labelled images of one size.
      train: the run.
    """

    data: ImageData
    train: classifier_training.TrainConfig


def _autoregressive(size: int, *, batch_size: int, steps: int) -> ImageLanguageModel:
    """A class-conditional model of the digits' codes at one size; the same network at each."""
    side = size // 4
    train = LanguageTrainConfig(
        model=image_language_model.architecture(
            side=side, num_codes=64, num_classes=10, layers=4, width=96
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=30),
        num_steps=steps,
        batch_size=batch_size,
        sequence_length=side * side,
        eval_every=steps // 3,
        checkpoint_every=200,
    )
    return ImageLanguageModel(ImageData(sizes=(size,)), train, 10, "digits_vq32")


def _sampler(direction: str, small: int, large: int, objective: str, steps: int) -> SamplerModel:
    """Between two sizes of the digits; batches of about a thousand codes of the large grid."""
    train = image_samplers.TrainConfig(
        model=ResamplerConfig(direction, factor=large // small, width=64),
        objective=objective,
        run=RunConfig(num_steps=steps, batch_size=max(4, 64 * 16 // large), eval_every=steps // 2),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.01),
    )
    return SamplerModel(ImageData(sizes=(small, large)), train, "digits_vq32")


RECIPES: dict[str, Any] = {
    # One codebook for the three sizes of the digits.
    "digits_vq32": VQModel(
        ImageData(sizes=(16, 32, 64)),
        vq_tokenizer.TrainConfig(
            model=VQConfig(),
            run=RunConfig(num_steps=600, batch_size=8, eval_every=150, checkpoint_every=150),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, weight_decay=0.0),
        ),
    ),
    **{
        f"digits_classifier{size}": ClassifierModel(
            ImageData(sizes=(size,)),
            classifier_training.TrainConfig(
                model=ClassifierConfig(size=size),
                run=RunConfig(num_steps=400, batch_size=64, eval_every=200),
                optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.01),
            ),
        )
        for size in (16, 32, 64)
    },
    "digits_ar16": _autoregressive(16, batch_size=128, steps=600),
    "digits_ar32": _autoregressive(32, batch_size=48, steps=900),
    "digits_ar64": _autoregressive(64, batch_size=12, steps=600),
    **{
        f"digits_{direction}_{small}_{large}{suffix}": _sampler(
            direction, small, large, objective, 400
        )
        for direction in ("up", "down")
        for small, large in ((16, 32), (32, 64), (16, 64))
        for objective, suffix in (("pixels", ""), ("tokens", "_tokens"))
    },
    **masked_image_recipes.RECIPES,
}


@dataclasses.dataclass(frozen=True)
class Making:
    """Where a model is made.

    Attributes:
      cache: root of what is kept.
      parents: directories of the models that it is made from, by role.
      run: work directory, identity and description of the training run.
      result: directory to save the model in.
    """

    cache: pathlib.Path
    parents: Mapping[str, pathlib.Path]
    run: Mapping[str, Any]
    result: pathlib.Path


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The recipe called `name`, with dotted fields replaced, as {'train.run.num_steps': 20}.

    Raises:
      InputError: an unknown name or field, naming the nearest.
    """
    check_choice("image model", name, RECIPES)
    return artifacts.replace_fields(RECIPES[name], overrides or {})


def ensure(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """The directory of a named model, which is trained first if it is not there yet.

    As `base_models.ensure`: the directory appears whole or not at all, callers wait for each
    other, and training that was killed goes on from its last checkpoint.

    Args:
      name: a key of `RECIPES`.
      cache_dir: where models and data are kept; None for `files.cache_root()`.
      overrides: see `recipe`.

    Raises:
      InputError: an unknown name or field; the disk is full; the loss is not finite.
      SystemExit: `training.loop.TERMINATED`, after SIGTERM.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    return ensure_recipe(name, recipe(name, overrides), cache)


def ensure_recipe(name: str, chosen: Any, cache: pathlib.Path) -> pathlib.Path:
    """`ensure` for a recipe that need not be in `RECIPES`; `name` labels its directory."""
    parents = {role: resolve(source, cache) for role, source in _parents(chosen).items()}
    identity = {
        "recipe": dataclasses.asdict(chosen),
        "data": data_identity(chosen.data, cache),
        "parents": {
            role: _CONTENT_OF.get(role, artifacts.content_hash)(directory)
            for role, directory in parents.items()
        },
        "code_version": CODE_VERSION,
    }
    final = cache / "models" / f"{name}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        run = {"workdir": work / "run", "identity": identity, "description": name}
        trained = MAKERS[type(chosen)](chosen, Making(cache, parents, run, result))
        _write_summary(name, identity, trained, work / "run", result)

    return artifacts.cached(final, make)


def resolve(source: str, cache: pathlib.Path) -> pathlib.Path:
    """The directory of a model: of the recipe called `source`, trained if need be, or `source`."""
    if source in base_models.RECIPES:
        return base_models.ensure(source, cache_dir=cache)
    return ensure(source, cache_dir=cache) if source in RECIPES else pathlib.Path(source)


def _parents(chosen: Any) -> Mapping[str, str]:
    return getattr(chosen, "parents", {})


def _write_summary(
    name: str,
    identity: Mapping[str, Any],
    trained: loop.Result,
    run: pathlib.Path,
    result: pathlib.Path,
) -> None:
    """Records in `result` how a model came to be."""
    lines = metric_writers.read_metrics(run / metric_writers.METRICS_FILE)
    summary = {
        "name": name,
        **identity,
        "seconds": trained.seconds,
        **trained.metrics,
        "curve": [line for line in lines if "loss" in line],
        "evaluations": [line for line in lines if "eval_loss" in line],
    }
    with checkpoints.disk_errors("cannot write the summary", result):
        checkpoints.write_json(result / SUMMARY_FILE, summary)


def _make_vq(chosen: VQModel, making: Making) -> loop.Result:
    data, run, largest = chosen.data, chosen.train.run, max(chosen.data.sizes)
    train = [
        (load_images(data, data.train_split, size, making.cache), run.batch_size * largest // size)
        for size in data.sizes
    ]
    held_out = [load_images(data, data.eval_split, size, making.cache) for size in data.sizes]

    def evaluation() -> Any:
        for (_, rows), source in zip(train, held_out, strict=True):
            yield from image_batches.in_order(source, rows, chosen.eval_images)

    trained = vq_tokenizer.train(
        chosen.train,
        train_batches=image_batches.train_batches(train, seed=run.seed),
        eval_batches=evaluation,
        **making.run,
    )
    vq.save(making.result, chosen.train.model, trained.state.params)
    return trained


def _make_classifier(chosen: ClassifierModel, making: Making) -> loop.Result:
    data, run = chosen.data, chosen.train.run
    train, held_out = (
        load_images(data, split, data.sizes[0], making.cache)
        for split in (data.train_split, data.eval_split)
    )
    trained = classifier_training.train(
        chosen.train,
        train_batches=image_batches.train_batches([(train, run.batch_size)], seed=run.seed),
        eval_batches=lambda: image_batches.in_order(held_out, run.batch_size),
        **making.run,
    )
    image_classifier.save(making.result, chosen.train.model, trained.state.params)
    return trained


def _make_autoregressive(chosen: ImageLanguageModel, making: Making) -> loop.Result:
    tokenizer = making.parents["tokenizer"]
    trained = image_language_model.train(chosen, tokenizer, making.cache, **making.run)
    hf_checkpoint.save(making.result, chosen.train.model, trained.state.params)
    return trained


def _make_sampler(chosen: SamplerModel, making: Making) -> loop.Result:
    trained = image_samplers.train(chosen, making.parents["tokenizer"], making.cache, **making.run)
    row_causal.save(making.result, chosen.train.model, trained.state.params)
    return trained


def _make_masked(chosen: MaskedImageModel, making: Making) -> loop.Result:
    data, run, model = chosen.data, chosen.train.run, chosen.train.model
    tokenizer, _ = vq.load(making.parents["tokenizer"])
    given = (model.num_codes, model.num_tokens)
    fitting = (tokenizer.codebook_size, (data.sizes[0] // tokenizer.factor) ** 2)
    if given != fitting:
        raise InputError(
            f"train.model.num_codes, num_tokens: {given} must be {fitting}, of {chosen.tokenizer} "
            f"at {data.sizes[0]} pixels"
        )
    train, held_out = (
        _tokens(chosen, making, split) for split in (data.train_split, data.eval_split)
    )
    trained = masked_image.train(
        chosen.train,
        train_batches=image_batches.train_batches([(train, run.batch_size)], seed=run.seed),
        eval_batches=lambda: itertools.islice(
            image_batches.in_order(held_out, run.batch_size), _EVAL_BATCHES
        ),
        text_statistics=(
            image_captions.statistics(train.captions)
            if isinstance(train, CaptionedTokens)
            else None
        ),
        **making.run,
    )
    enat.save(making.result, model, trained.state.ema)
    return trained


def _tokens(chosen: MaskedImageModel, making: Making, split: str) -> Sequence[Any]:
    """What a masked model learns from: token ids with labels, or with vectors of captions."""
    tokens = image_tokens.ensure(
        making.parents["tokenizer"], chosen.data, split, making.cache, flip=chosen.flip
    )
    if not isinstance(chosen, CaptionedImageModel):
        return tokens
    found = image_captions.ensure(
        making.parents["text_model"], chosen.captions, chosen.data, split, making.cache
    )
    model, width = chosen.train.model, found.vectors.shape[1]
    if isinstance(model, TextENATConfig) and model.text_dim != width:
        raise InputError(
            f"train.model.text_dim: {model.text_dim} must be {width}, of "
            f"{chosen.captions.text_model}"
        )
    return CaptionedTokens(tokens, found)


# How a recipe's model is made: trains it and saves it in `Making.result`.
MAKERS: dict[type, Callable[[Any, Making], loop.Result]] = {
    VQModel: _make_vq,
    ClassifierModel: _make_classifier,
    MaskedImageModel: _make_masked,
    CaptionedImageModel: _make_masked,
    ImageLanguageModel: _make_autoregressive,
    SamplerModel: _make_sampler,
}
