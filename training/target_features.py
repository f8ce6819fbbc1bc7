"""Small parts that learn from a frozen target: what their pipelines share.

Adapters, heads and drafters of self-drafting methods read the target's residual streams and learn
to say what the target says. The streams are computed on the fly from packed text, so that nothing
large is stored; the target's parameters are read, never written.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

from models import cache as kv
from models import files, hf_checkpoint, masks, sharding, transformer
from models.cache import KVCache
from models.config import TransformerConfig
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import artifacts, base_models, batches, checkpoints, fitting, language_model, loop
from training.datasets import registry
from training.fitting import Batch, DeviceBatch, TrainConfig
from training.optimizers import OptimizerConfig

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
SUMMARY_FILE = "training_summary.json"


class Features(struct.PyTreeNode):
    """What the target computes on a batch.

    Attributes:
      streams: [B, T, D] each, residual streams after the layers that the part asked for.
      hidden: [B, T, D], after the final norm, which the head reads.
      mask: bool [B, T, T], attention within packed segments.
      cache: keys and values of the batch's own tokens, in T slots; None for parts that read none.
    """

    streams: tuple[jax.Array, ...]
    hidden: jax.Array
    mask: jax.Array
    cache: KVCache | None = None


class Part(NamedTuple):
    """What is trained.

    Attributes:
      name: of directories and progress bars.
      init: (target's config, key) -> parameters.
      loss: (target's config, parameters, features, batch, target's parameters, key) -> (loss [],
        further metrics, each []); means over `batch['loss_mask']`.
      save: (directory, parameters) -> None.
      settings: what determines it beside the target, as JSON can hold it.
      collect: layer counts of the streams that it reads; None for 0 to all.
      cache: whether it reads the target's keys and values.
      begin: (target's config, target's parameters, parameters) -> those that training begins with,
        for parts that copy something of their target; None to begin with `init`'s.
    """

    name: str
    init: Callable[[TransformerConfig, jax.Array], Any]
    loss: Callable[..., tuple[jax.Array, loop.Metrics]]
    save: Callable[[pathlib.Path, Any], None]
    settings: Mapping[str, Any]
    collect: tuple[int, ...] | None = ()
    cache: bool = False
    begin: Callable[[TransformerConfig, Any, Any], Any] | None = None


def features(
    config: TransformerConfig,
    params: Any,
    batch: DeviceBatch,
    collect: tuple[int, ...] | None,
    with_cache: bool = False,
) -> Features:
    """Runs the target on packed rows without gradient."""
    mask = masks.packed_causal(batch["segment_ids"])
    if collect is None:
        collect = tuple(range(config.num_layers + 1))
    out = transformer.apply(
        config,
        jax.lax.stop_gradient(params),
        batch["tokens"],
        positions=batch["positions"],
        mask=mask,
        key_positions=batch["positions"],
        cache=kv.create(config, *batch["tokens"].shape) if with_cache else None,
        collect=collect,
        with_logits=False,
    )
    return Features(out.collected, out.hidden, mask, out.cache)


def train(
    config: TrainConfig,
    part: Part,
    target_params: Any,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
) -> loop.Result:
    """Trains a part, or goes on where `workdir` left off; the target stays as it is.

    Args:
      config: see `TrainConfig`; `model` is the target.
      part: see `Part`.
      target_params: the target's.
      train_batches, eval_batches, workdir, identity: as `language_model.train`.

    Returns:
      The final `TrainState`, of the part's parameters, in `Result.state`; `Result.metrics` has
      the loss and every metric of the part on the held-out batches, `eval_` before their names.

    Raises:
      InputError, SystemExit: as `language_model.train`.
    """
    if not config.model.causal:
        raise InputError("model.causal: False is not for this pipeline, which is left to right")
    mesh = sharding.make_mesh(*config.mesh)
    frozen = jax.device_put(target_params, sharding.param_shardings(config.model, mesh))
    loss_fn = functools.partial(_loss, config, part)
    initial = part.init(config.model, jax.random.key(config.seed))
    if part.begin is not None:
        initial = part.begin(config.model, target_params, initial)
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss_fn),
        prepare=lambda _, batch: language_model.put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=language_model.mean_evaluator(config, loss_fn, eval_batches, mesh, frozen)
        if eval_batches
        else None,
        workdir=workdir,
        recorded={"part": part.name, "identity": identity},
        mesh=mesh,
        initial_params=initial,
        frozen=frozen,
        description=part.name,
    )


def _loss(
    config: TrainConfig, part: Part, params: Any, batch: DeviceBatch, step: jax.Array, frozen: Any
) -> tuple[jax.Array, loop.Metrics]:
    model = fitting.compute_config(config)
    found = features(model, frozen, batch, part.collect, part.cache)
    return part.loss(model, params, found, batch, frozen, fitting.step_key(config, step))


@dataclasses.dataclass(frozen=True)
class PartRecipe:
    """What a part is trained on and how; defaults are for the embedded models.

    Attributes:
      target: a named base model or a checkpoint directory.
      dataset, dataset_options, text_field: as `registry.load`; splits 'train' and 'validation'.
      loss_on: 'all' tokens, or those of the 'response'; see `batches.TokenizedDocuments`.
      num_steps, batch_size, sequence_length, optimizer, seed: as `TrainConfig`.
      eval_batches: held-out batches of an evaluation.
    """

    target: str
    dataset: str = "stdlib_code"
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_field: str | None = None
    loss_on: str = "all"
    num_steps: int = 400
    batch_size: int = 8
    sequence_length: int = 256
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, weight_decay=0.0)
    )
    eval_batches: int = 8
    seed: int = 0


def ensure(
    recipe: PartRecipe,
    part: Part,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """The directory of a trained part, which is trained first if it is not there yet.

    Args:
      recipe: see `PartRecipe`.
      part: see `Part`; its settings are part of the hash.
      cache_dir: where models and data are kept; None for `files.cache_root()`.

    Returns:
      What `part.save` wrote, beside training_summary.json.

    Raises:
      InputError: as `base_models.ensure` and `train`.
      SystemExit: as `train`.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    source = open_source(recipe, cache)
    identity = {"part": part.name, **part.settings, **source.identity, "code_version": CODE_VERSION}

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        config, params, data = prepare(recipe, source)
        trained = train(config, part, params, **data, workdir=work / "run", identity=identity)
        part.save(result, jax.device_get(trained.state.params))
        with checkpoints.disk_errors("cannot write the summary", result):
            checkpoints.write_json(
                result / SUMMARY_FILE,
                {**identity, **trained.metrics, "seconds": trained.seconds},
            )

    return artifacts.cached(cache / "parts" / f"{part.name}-{artifacts.digest(identity)}", make)


class PartSource(NamedTuple):
    """What a recipe names, found.

    Attributes:
      directory: of the target.
      examples: by split, 'train' and 'validation'.
      identity: what determines a training, as JSON can hold it.
    """

    directory: pathlib.Path
    examples: Mapping[str, registry.Examples]
    identity: Mapping[str, Any]


def open_source(recipe: PartRecipe, cache: pathlib.Path) -> PartSource:
    """The target, which is trained first if it has to be, and the text; errors as `ensure`."""
    directory = pathlib.Path(recipe.target)
    if recipe.target in base_models.RECIPES:
        directory = base_models.ensure(recipe.target, cache_dir=cache)
    examples = {split: _examples(recipe, split, cache) for split in ("train", "validation")}
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "target": artifacts.content_hash(directory),
        "data": examples["train"].full_name,
    }
    return PartSource(directory, examples, identity)


def prepare(recipe: PartRecipe, source: PartSource) -> tuple[TrainConfig, Any, dict[str, Any]]:
    """The run, the target's parameters, and `train_batches` and `eval_batches` of packed text."""
    model, params = hf_checkpoint.load(source.directory)
    tokenizer = Tokenizer.from_directory(source.directory, model)
    documents = {
        split: batches.TokenizedDocuments(rows, tokenizer, loss_on=recipe.loss_on)
        for split, rows in source.examples.items()
    }
    size: dict[str, Any] = {"batch_size": recipe.batch_size, "seq_len": recipe.sequence_length}
    config = TrainConfig(
        model=model,
        optimizer=recipe.optimizer,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
    )
    held_out = list(batches.eval_batches(documents["validation"], **size))
    return (
        config,
        params,
        {
            "train_batches": batches.train_batches(documents["train"], seed=recipe.seed, **size),
            "eval_batches": held_out[:: max(1, len(held_out) // recipe.eval_batches)],
        },
    )


def _examples(recipe: PartRecipe, split: str, cache: pathlib.Path) -> registry.Examples:
    own: dict[str, Any] = (
        {"data_dir": cache / "datasets"} if recipe.dataset in registry.BUILDERS else {}
    )
    return registry.load(
        recipe.dataset,
        split,
        text_field=recipe.text_field,
        **own,
        **dict(recipe.dataset_options),
    )
