"""The filter of Learn2PD: trained on the greedy oracle's records, kept by content hash.

    directory = unmask_filter.ensure(FilterRecipe("arithmetic_mdlm", (Source("arithmetic"),)))
    python -m experiments.generate --method=learn2pd --method_params=DIRECTORY ...

arXiv 2509.25188, section 3: full batches, AdamW, binary cross-entropy over every position of a
block. The base model is not touched.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import struct

from decoding.unmasking import learned_filter
from decoding.unmasking.learned_filter import FilterConfig
from models import files, hf_checkpoint
from models.errors import InputError, check_choice
from models.tokenizer import Tokenizer
from training import artifacts, base_models, checkpoints, loop, unmask_records
from training.datasets import registry
from training.unmask_records import Records

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
RECORDS_FILE = "records.safetensors"
SUMMARY_FILE = "training_summary.json"
SPLITS = ("train", "validation", "test")
_SHARES = (0.8, 0.9)  # where the splits end
_SURE = 0.9  # what the false-positive rate is of (published)


@dataclasses.dataclass(frozen=True)
class FilterTraining:
    """How a filter is trained; defaults are as published.

    Attributes:
      depth: layers of the filter.
      num_steps: updates, each on all records.
      learning_rate, weight_decay: of AdamW.
      split_by: 'record' splits records 80/10/10 at random (published; a prompt's records can be in
        all of them), 'prompt' splits prompts.
      log_every, eval_every, checkpoint_every: updates.
      seed: of the split and of the initial parameters.
    """

    depth: int = 2
    num_steps: int = 40_000
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    split_by: str = "record"
    log_every: int = 100
    eval_every: int = 500
    checkpoint_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("split_by", self.split_by, ("record", "prompt"))
        for field in ("num_steps", "log_every", "eval_every", "checkpoint_every"):
            if (value := getattr(self, field)) < 1:
                raise InputError(f"{field}: {value} must be at least 1")


@struct.dataclass
class TrainState:
    """What an update reads and writes: its number int32 [], parameters, the optimiser's state."""

    step: jax.Array
    params: Any
    opt_state: Any


def split(records: Records, by: str, seed: int) -> dict[str, Records]:
    """Records by name of `SPLITS`, 80, 10 and 10 per cent; see `FilterTraining.split_by`."""
    rng = np.random.default_rng(seed)
    if by == "record":
        place = rng.permutation(len(records.step)) / len(records.step)
    else:
        prompts, number = np.unique(records.prompt, return_inverse=True)
        place = (rng.permutation(len(prompts)) / len(prompts))[number]
    which = np.digitize(place, _SHARES)
    return {name: records.of(which == i) for i, name in enumerate(SPLITS)}


def loss(params: Any, confidence: jax.Array, correct: jax.Array) -> jax.Array:
    """Mean binary cross-entropy over records and positions: confidence, correct [n, L] -> []."""
    logits = learned_filter.apply(params, confidence)
    return optax.sigmoid_binary_cross_entropy(logits, correct.astype(jnp.float32)).mean()


class _FullBatch:
    """The data never changes, so there is no position to keep."""

    def __next__(self) -> None:
        return None

    def get_state(self) -> None:
        return None

    def set_state(self, state: Any) -> None:
        del state


def train(
    config: FilterTraining,
    records: Records,
    *,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "filter",
) -> loop.Result:
    """Trains a filter on records, or goes on where `workdir` left off.

    Args:
      config: see `FilterTraining`.
      records: from `unmask_records.collect`.
      workdir: as `training.loop.run`.
      identity: what the records are of, as JSON can hold it.
      description: in front of the progress bar.

    Returns:
      A `TrainState` in `Result.state`; metrics of the validation split.

    Raises:
      InputError: a split without records; as `training.loop.run`.
      SystemExit: as `training.loop.run`.
    """
    parts = split(records, config.split_by, config.seed)
    for name, part in parts.items():
        if not len(part.step):
            raise InputError(f"records: {len(records.step)} leave none for the {name} split")
    data = {name: jax.device_put((p.confidence, p.correct)) for name, p in parts.items()}
    shape = FilterConfig(records.confidence.shape[1], config.depth)
    optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)

    def init() -> TrainState:
        params = learned_filter.init(shape, jax.random.key(config.seed))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    @jax.jit
    def update(state: TrainState, batch: Any) -> tuple[TrainState, loop.Metrics]:
        value, gradient = jax.value_and_grad(loss)(state.params, *batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": value}

    @jax.jit
    def judge(params: Any, batch: Any) -> dict[str, jax.Array]:
        sure = jax.nn.sigmoid(learned_filter.apply(params, batch[0])) > _SURE
        wrong = (sure & ~batch[1]).sum() / jnp.maximum(sure.sum(), 1)
        return {"eval_loss": loss(params, *batch), "eval_false_among_sure": wrong}

    def evaluate(state: TrainState) -> dict[str, float]:
        found = jax.device_get(judge(state.params, data["validation"]))
        return {name: float(value) for name, value in found.items()}

    return loop.run(
        lambda state, _: update(state, data["train"]),
        jax.jit(init),
        template=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), jax.jit(init)()
        ),
        batches=_FullBatch(),
        num_steps=config.num_steps,
        workdir=workdir,
        config={
            **dataclasses.asdict(config),
            "records": len(records.step),
            "identity": dict(identity or {}),
        },
        evaluate=evaluate,
        log_every=config.log_every,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        description=description,
    )


def quality(score: np.ndarray, records: Records, bins: int = 10) -> dict[str, Any]:
    """How well a score in [0, 1] tells final predictions, on the positions that are masks.

    Args:
      score: [n, L], a filter's probabilities, or the confidences themselves.
      records: of n steps.
      bins: of the calibration curve, equal in width.

    Returns:
      `final`, the share of masks whose prediction is final; `thresholds` with `precision` and
      `recall` of score > threshold (precision 1 where nothing is); `bins` with the mean `score`,
      the share `final` and the `count` of each bin that is not empty; `calibration_error`, the
      mean over masks of their bin's |score - final|; `average_precision`, the mean of precision
      over the masks whose prediction is final, by falling score.
    """
    value, truth = score[records.masked], records.correct[records.masked]
    thresholds = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99)
    curve = []
    for least in thresholds:
        chosen = value > least
        right = int((chosen & truth).sum())
        curve.append(
            {
                "threshold": least,
                "precision": right / chosen.sum() if chosen.any() else 1.0,
                "recall": right / max(truth.sum(), 1),
            }
        )
    which = np.minimum((value * bins).astype(int), bins - 1)
    found = [
        {
            "score": float(value[which == i].mean()),
            "final": float(truth[which == i].mean()),
            "count": int((which == i).sum()),
        }
        for i in range(bins)
        if (which == i).any()
    ]
    ranked = truth[np.argsort(-value, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    gap = sum(abs(b["score"] - b["final"]) * b["count"] for b in found) / max(len(value), 1)
    return {
        "final": float(truth.mean()),
        "thresholds": curve,
        "bins": found,
        "calibration_error": gap,
        "average_precision": float(precision[ranked].mean()) if ranked.any() else 1.0,
    }


@dataclasses.dataclass(frozen=True)
class Source:
    """Prompts of one kind.

    Attributes:
      dataset, split: as `registry.load`.
      options: of the dataset's builder.
      field: of a document, which is the prompt.
      num_prompts: how many.
      prompt_tokens: a prompt is a random window of so many tokens of the field, of documents that
        are twice as long; 0 for the field itself.
    """

    dataset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    field: str = "question"
    split: str = "validation"
    num_prompts: int = 300
    prompt_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class FilterRecipe:
    """Everything that determines a filter; defaults of sizes are as published.

    Attributes:
      target: the model it is for: a named base model or a checkpoint directory.
      sources: a mixture of prompts.
      new_tokens: of a canvas.
      block_length: L.
      training: see `FilterTraining`.
    """

    target: str
    sources: tuple[Source, ...]
    new_tokens: int = 256
    block_length: int = 32
    training: FilterTraining = dataclasses.field(default_factory=FilterTraining)


def ensure(
    chosen: FilterRecipe, *, cache_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """The directory of a filter, which is trained first if it is not there yet.

    Records are kept for themselves, so that filters of other shapes reuse them; training that was
    killed goes on from its last checkpoint.

    Args:
      chosen: see `FilterRecipe`.
      cache_dir: where models, data and filters are kept; None for `files.cache_root()`.

    Returns:
      A directory with config.json and model.safetensors, for `learned_filter.load`, and
      training_summary.json: what was trained on, the oracle's steps a block, `quality` of the
      filter and of plain confidence on the test split.

    Raises:
      InputError: as `base_models.ensure`, `unmask_records.collect` and `train`.
      SystemExit: as `train`.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    held = records_of(chosen, cache_dir=cache)
    identity = {
        "records": held.name,
        "training": dataclasses.asdict(chosen.training),
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        records = unmask_records.load(held / RECORDS_FILE)
        trained = train(chosen.training, records, workdir=work / "run", identity=identity)
        params = jax.device_get(trained.state.params)
        depth = chosen.training.depth
        learned_filter.save(result, FilterConfig(chosen.block_length, depth), params)
        test = split(records, chosen.training.split_by, chosen.training.seed)["test"]
        logits = learned_filter.apply(params, jnp.asarray(test.confidence))
        score = np.asarray(jax.nn.sigmoid(logits))
        summary = {
            **dataclasses.asdict(chosen),
            **identity,
            **trained.metrics,
            "seconds": trained.seconds,
            "num_records": len(records.step),
            "oracle_steps_per_block": float(unmask_records.steps_per_block(records).mean()),
            "filter": quality(score, test),
            "confidence": quality(test.confidence, test),
        }
        with checkpoints.disk_errors("cannot write the summary", result):
            checkpoints.write_json(result / SUMMARY_FILE, summary)

    return artifacts.cached(cache / "filters" / f"filter-{artifacts.digest(identity)}", make)


def records_of(
    chosen: FilterRecipe, *, cache_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """The directory with the `RECORDS_FILE` of a recipe, collected first if it is not there."""
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    directory = pathlib.Path(chosen.target)
    if chosen.target in base_models.RECIPES:
        directory = base_models.ensure(chosen.target, cache_dir=cache)
    documents = [_documents(source, cache) for source in chosen.sources]
    identity = {
        "target": artifacts.content_hash(directory),
        "sources": [dataclasses.asdict(source) for source in chosen.sources],
        "data": [found.full_name for found in documents],
        "new_tokens": chosen.new_tokens,
        "block_length": chosen.block_length,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        config, params = hf_checkpoint.load(directory)
        tokenizer = Tokenizer.from_directory(directory, config)
        prompts = [
            ids
            for source, rows in zip(chosen.sources, documents, strict=True)
            for ids in _prompts(source, rows, tokenizer)
        ]
        logging.info("collecting the oracle's records of %d prompts", len(prompts))
        records = unmask_records.collect(
            config,
            params,
            prompts,
            block_length=chosen.block_length,
            new_tokens=chosen.new_tokens,
        )
        with checkpoints.disk_errors("cannot write records", result):
            result.mkdir(parents=True)
            unmask_records.save(result / RECORDS_FILE, records)
            checkpoints.write_json(result / "records.json", identity)

    return artifacts.cached(cache / "filters" / f"records-{artifacts.digest(identity)}", make)


def _documents(source: Source, cache: pathlib.Path) -> registry.Examples:
    own: dict[str, Any] = (
        {"data_dir": cache / "datasets"} if source.dataset in registry.BUILDERS else {}
    )
    return registry.load(source.dataset, source.split, **own, **dict(source.options))


def _prompts(source: Source, rows: registry.Examples, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of a source's prompts; InputError where there are too few."""
    order = np.random.default_rng(0)
    found: list[list[int]] = []
    for row in rows:
        if len(found) == source.num_prompts:
            break
        ids, width = tokenizer.encode_prompt(row[source.field]), source.prompt_tokens
        if not width:
            found.append(ids)
        elif len(ids) > 2 * width:
            first = int(order.integers(0, len(ids) - width))
            found.append(ids[first : first + width])
    if len(found) < source.num_prompts:
        raise InputError(
            f"num_prompts: {source.num_prompts} wanted, {source.dataset}/{source.split} has "
            f"{len(found)}"
        )
    return found
