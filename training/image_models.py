"""Small image models that experiments share: trained once, kept by a hash of their recipe.

`ensure('digits_vq32')` returns a directory with config.json, model.safetensors and
training_summary.json, training the model if no run on this machine has done so. The hash covers
all fields of the recipe, the data's own content hash and `CODE_VERSION`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models import files, vq
from models.errors import InputError, check_choice
from models.vq import VQConfig
from training import artifacts, checkpoints, image_batches, loop, metric_writers, vq_tokenizer
from training.base_models import SUMMARY_FILE
from training.data_parallel import RunConfig
from training.datasets import registry
from training.image_batches import LabelledImages
from training.optimizers import OptimizerConfig

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Where images come from.

    Attributes:
      dataset: a name that `training.datasets.registry.load` knows, such as 'digit_scenes' or
        'imagenet2012'.
      options: of the dataset's builder, without `size`.
      sizes: pixels a side; each is a source of its own.
      train_split, eval_split: in tfds' notation.
      data_dir: where a public dataset is prepared; None for tfds' default. (Our own are kept in
        the cache.)
      image_field, label_field: names of the features.
    """

    dataset: str = "digit_scenes"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = (32,)
    train_split: str = "train"
    eval_split: str = "validation"
    data_dir: str | None = None
    image_field: str = "image"
    label_field: str = "label"

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"data.sizes: {self.sizes} must be positive numbers of pixels")


def load_images(data: ImageData, split: str, size: int, cache: pathlib.Path) -> LabelledImages:
    """One split at one size; our own datasets are drawn at that size, others cropped to it."""
    options, folder = dict(data.options), data.data_dir
    crop: int | None = size
    if data.dataset in registry.BUILDERS:
        options["size"], folder, crop = size, str(cache / "datasets"), None
    return LabelledImages(
        registry.load(data.dataset, split, data_dir=folder, **options),
        size=crop,
        image_field=data.image_field,
        label_field=data.label_field,
    )


def data_identity(data: ImageData, cache: pathlib.Path) -> list[str]:
    """What the images are, by content: a name for each size."""
    return [load_images(data, data.train_split, size, cache).identity for size in data.sizes]


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


RECIPES: dict[str, VQModel] = {
    # One codebook for the three sizes of the digits.
    "digits_vq32": VQModel(
        ImageData(sizes=(16, 32, 64)),
        vq_tokenizer.TrainConfig(
            model=VQConfig(),
            run=RunConfig(num_steps=600, batch_size=8, eval_every=150, checkpoint_every=150),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, weight_decay=0.0),
        ),
    ),
}


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> VQModel:
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


def ensure_recipe(name: str, chosen: VQModel, cache: pathlib.Path) -> pathlib.Path:
    """`ensure` for a recipe that has no name of its own; `name` labels its directory."""
    identity = {
        "recipe": dataclasses.asdict(chosen),
        "data": data_identity(chosen.data, cache),
        "code_version": CODE_VERSION,
    }
    final = cache / "models" / f"{name}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        trained = _train_vq(name, chosen, identity, cache, work / "run")
        vq.save(result, chosen.train.model, trained.state.params)
        write_summary(name, identity, trained, work / "run", result)

    return artifacts.cached(final, make)


def write_summary(
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


def _train_vq(
    name: str,
    chosen: VQModel,
    identity: Mapping[str, Any],
    cache: pathlib.Path,
    workdir: pathlib.Path,
) -> loop.Result:
    data, run, largest = chosen.data, chosen.train.run, max(chosen.data.sizes)
    train = [
        (load_images(data, data.train_split, size, cache), run.batch_size * largest // size)
        for size in data.sizes
    ]
    held_out = [load_images(data, data.eval_split, size, cache) for size in data.sizes]

    def evaluation() -> Any:
        for (_, rows), source in zip(train, held_out, strict=True):
            yield from image_batches.in_order(source, rows, chosen.eval_images)

    return vq_tokenizer.train(
        chosen.train,
        train_batches=image_batches.train_batches(train, seed=run.seed),
        eval_batches=evaluation,
        workdir=workdir,
        identity=identity,
        description=name,
    )
