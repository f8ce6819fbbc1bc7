"""The pipeline of hierarchical language models: packed words in, a trained model out.

Cross-entropy of all units of all words and of their ends, each word written from what the backbone
says after the words before it (HAT, arXiv 2501.10322, section 2.3); all words of a batch are
written in one call.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from models import hierarchical, sharding
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from training import fitting, loop, losses, word_batches
from training.fitting import Batch, DeviceBatch, TrainConfig, TrainState

FIELDS = (*word_batches.FIELDS, "segment_ids")


class Scores(struct.PyTreeNode):
    """Sums over a batch, each float32 [].

    Attributes:
      nats: of all units and ends.
      symbols: how many those are.
      bytes: of the text.
      unit_hits, units: units of words that are the most likely ones, and how many there are.
      word_hits, words: words all of whose units, and whose end, are the most likely ones; words.
    """

    nats: jnp.ndarray
    symbols: jnp.ndarray
    bytes: jnp.ndarray
    unit_hits: jnp.ndarray
    units: jnp.ndarray
    word_hits: jnp.ndarray
    words: jnp.ndarray


def run_config(config: HierarchicalConfig, **fields: Any) -> TrainConfig:
    """A `TrainConfig` for a hierarchical model; `sequence_length` counts words."""
    return TrainConfig(model=config.backbone, **fields)


def train(
    config: HierarchicalConfig,
    run: TrainConfig,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    initial_params: Any = None,
    description: str = "train",
) -> loop.Result:
    """Trains a hierarchical model, or goes on where `workdir` left off.

    Args:
      config: the model.
      run: from `run_config`.
      train_batches, eval_batches: of `training.word_batches`; no evaluation where None.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      identity: what identifies the data, as JSON can hold it.
      initial_params: where a fresh run starts, for continued training; None for random ones.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats a symbol),
      `eval_bits_per_byte`, `eval_word_accuracy` and `eval_unit_accuracy`.

    Raises:
      InputError: as `fitting.fit`; a run for another backbone, or with distillation or remat, which
        are not for this pipeline; batches that do not fit.
    """
    if run.model != config.backbone:
        raise InputError("model: the run's is not the model's backbone; see run_config")
    if run.distillation is not None or run.remat:
        raise InputError("distillation, remat: not for hierarchical models; allowed: neither")
    mesh = sharding.make_mesh(*run.mesh)
    if initial_params is None:
        initial_params = hierarchical.init(config, jax.random.key(run.seed))
    return fitting.fit(
        run,
        functools.partial(fitting.update, run, functools.partial(loss_fn, config, run)),
        prepare=lambda _, batch: put(batch, config, run, mesh),
        train_batches=train_batches,
        evaluate=evaluator(config, run, eval_batches, mesh) if eval_batches is not None else None,
        workdir=workdir,
        recorded={"hierarchical": dataclasses.asdict(config), "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        description=description,
    )


def loss_fn(
    config: HierarchicalConfig,
    run: TrainConfig,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The mean over all units of words and their ends, in nats, and the words' accuracy."""
    del step, frozen
    found = scores(config.replace(dtype=run.compute_dtype), params, batch)
    return found.nats / jnp.maximum(found.symbols, 1), {
        "word_accuracy": found.word_hits / jnp.maximum(found.words, 1)
    }


def scores(config: HierarchicalConfig, params: Any, batch: DeviceBatch) -> Scores:
    """What a model makes of a batch of `training.word_batches`."""
    logits = hierarchical.apply(
        config,
        params,
        batch["source"],
        batch["source_lengths"],
        batch["target"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    targets, is_unit, is_end = symbols(config, batch)
    counted = (is_unit | is_end).astype(jnp.float32)
    nats = losses.cross_entropy(logits, targets) * counted
    hit = logits.argmax(axis=-1) == targets
    is_word = (batch["segment_ids"] > 0) & (batch["target_bytes"] > 0)
    in_word = is_unit & is_word[..., None]
    right = (hit | ~(is_unit | is_end)).all(axis=-1) & is_word
    return Scores(
        nats=nats.sum(),
        symbols=counted.sum(),
        bytes=jnp.where(is_word, batch["target_bytes"], 0).sum().astype(jnp.float32),
        unit_hits=(hit & in_word).sum().astype(jnp.float32),
        units=in_word.sum().astype(jnp.float32),
        word_hits=right.sum().astype(jnp.float32),
        words=is_word.sum().astype(jnp.float32),
    )


def symbols(
    config: HierarchicalConfig, batch: DeviceBatch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is to be predicted at each place of each word.

    Returns:
      int32 [B, N, C]: units, then the end of the word; bool [B, N, C] where a unit is predicted,
      and where the end is. A word of C units ends without being told, and the end of a document
      has no end of its own.
    """
    k, lengths = jnp.arange(config.max_word), batch["target_lengths"][..., None]
    real = (batch["segment_ids"] > 0)[..., None]
    targets = jnp.where(k == lengths, config.word_end, batch["target"])
    closes_document = (batch["target"][..., :1] == config.document_end) & (lengths == 1)
    return targets, real & (k < lengths), real & (k == lengths) & ~closes_document


def evaluator(
    config: HierarchicalConfig, run: TrainConfig, batches: Iterable[Batch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: the metrics of `train`."""
    compute = config.replace(dtype=run.compute_dtype)
    score = jax.jit(functools.partial(scores, compute))

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = [score(state.params, put(batch, config, run, mesh)) for batch in batches]
        if not parts:
            raise InputError("eval_batches: there are none")
        total = jax.tree.map(lambda *x: float(np.sum(np.asarray(x, np.float64))), *parts)
        if not total.bytes:
            raise InputError("eval_batches: no word of theirs counts")
        return {
            "eval_loss": total.nats / total.symbols,
            "eval_bits_per_byte": losses.bits_per_byte(total.nats, total.bytes),
            "eval_word_accuracy": total.word_hits / total.words,
            "eval_unit_accuracy": total.unit_hits / total.units,
        }

    return evaluate


def put(
    batch: Batch, config: HierarchicalConfig, run: TrainConfig, mesh: Mesh
) -> dict[str, jax.Array]:
    """This process's rows on the mesh, split over its data axis.

    Raises:
      InputError: a field that is missing or of another shape, or a unit out of range.
    """
    rows = (run.batch_size // jax.process_count(), run.sequence_length)
    for field in FIELDS:
        if field not in batch:
            raise InputError(f"batch.{field}: missing; a batch has {', '.join(FIELDS)}")
        shape = (*rows, config.max_word) if field in ("source", "target") else rows
        if batch[field].shape != shape:
            raise InputError(f"batch.{field}: shape {batch[field].shape} must be {shape}")
        if field in ("source", "target"):
            low, high = int(batch[field].min()), int(batch[field].max())
            if low < 0 or high >= config.vocab_size:
                raise InputError(
                    f"batch.{field}: unit {low if low < 0 else high} is out of range; the model "
                    f"has {config.vocab_size}"
                )
    layout = sharding.batch_sharding(mesh)
    return {
        field: jax.make_array_from_process_local_data(layout, np.asarray(batch[field]))
        for field in FIELDS
    }
