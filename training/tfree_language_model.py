"""The pipeline of TFree-HAT models: streams of bytes in which the splitting rule says where words
begin.

Rows are those of `training.word_batches` written out byte by byte; documents of a row follow each
other, each closed by its end, and are in sight of each other. Every byte but a row's first is
predicted, the ends of documents among them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import sharding, tfree_hat
from models.errors import InputError
from models.tfree_hat import TFreeConfig
from training import fitting, loop, losses
from training.fitting import Batch, DeviceBatch, TrainConfig, TrainState

FIELDS = ("units", "word_of", "weights", "target_bytes")


def to_stream(batch: Mapping[str, np.ndarray], num_bytes: int) -> Batch:
    """A batch of words as streams of bytes.

    Args:
      batch: of `training.word_batches`, [B, N, C] and [B, N].
      num_bytes: T; what a row has beyond them is cut off.

    Returns:
      units int32 [B, T]; word_of int32 [B, T], see `tfree_hat.apply`; weights float32 [B, T], 1
      where the next byte counts; target_bytes int32 [B, T], 1 where it is text.
    """
    lengths = np.where(batch["segment_ids"] > 0, batch["target_lengths"], 0)
    B = len(lengths)
    shape = (B, num_bytes)
    units, word_of = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights, text = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    inside = np.arange(batch["target"].shape[2]) < lengths[..., None]
    for row in range(B):
        stream = batch["target"][row][inside[row]][:num_bytes]
        real = lengths[row] > 0
        number = np.repeat(np.arange(real.sum()), lengths[row][real])[:num_bytes]
        is_text = np.repeat(batch["target_bytes"][row][real] > 0, lengths[row][real])[:num_bytes]
        n = len(stream)
        units[row, :n], word_of[row, :n] = stream, number
        word_of[row, n:] = number[-1] if n else 0
        weights[row, : max(n - 1, 0)] = 1
        text[row, : max(n - 1, 0)] = is_text[1:]
    return {"units": units, "word_of": word_of, "weights": weights, "target_bytes": text}


class Streams:
    """`to_stream` of an iterator of word batches, with its position."""

    def __init__(self, batches: Any, num_bytes: int):
        self._batches, self._num_bytes = batches, num_bytes
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return to_stream(next(self._batches), self._num_bytes)


def train(
    config: TFreeConfig,
    run: TrainConfig,
    *,
    num_words: int,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    initial_params: Any = None,
    description: str = "train",
) -> loop.Result:
    """Trains a TFree-HAT model, or goes on where `workdir` left off.

    Args:
      config: the model.
      run: its `model` is the encoder's architecture, `sequence_length` counts bytes.
      num_words: N of the rows.
      train_batches: `Streams`.
      eval_batches: of `to_stream`; None for no evaluation.
      workdir, identity, initial_params, description: as `word_language_model.train`.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats a byte) and
      `eval_bits_per_byte`.

    Raises:
      InputError: as `fitting.fit`; a run for another encoder.
    """
    if run.model != config.encoder:
        raise InputError("model: the run's is not the model's encoder")
    mesh = sharding.make_mesh(*run.mesh)
    if initial_params is None:
        initial_params = tfree_hat.init(config, jax.random.key(run.seed))
    place = functools.partial(fitting.place, config=run, mesh=mesh, fields=FIELDS, ids=("units",))
    return fitting.fit(
        run,
        functools.partial(fitting.update, run, functools.partial(loss_fn, config, num_words)),
        prepare=lambda _, batch: place(batch),
        train_batches=train_batches,
        evaluate=_evaluator(config, num_words, eval_batches, place) if eval_batches else None,
        workdir=workdir,
        recorded={"tfree_hat": dataclasses.asdict(config), "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        description=description,
    )


def loss_fn(
    config: TFreeConfig,
    num_words: int,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The mean over the bytes that count, in nats."""
    del step, frozen
    nats, count, _ = sums(config, num_words, params, batch)
    return nats / jnp.maximum(count, 1), {}


def sums(
    config: TFreeConfig, num_words: int, params: Any, batch: DeviceBatch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nats of the bytes that count, how many these are, and how many of them are text."""
    logits = tfree_hat.apply(config, params, batch["units"], batch["word_of"], num_words)
    targets = jnp.roll(batch["units"], -1, axis=1)
    nats = losses.cross_entropy(logits, targets) * batch["weights"]
    return nats.sum(), batch["weights"].sum(), (batch["target_bytes"] * batch["weights"]).sum()


def _evaluator(
    config: TFreeConfig,
    num_words: int,
    batches: Iterable[Batch],
    place: Callable[[Batch], DeviceBatch],
) -> Callable[[TrainState], dict[str, float]]:
    score = jax.jit(functools.partial(sums, config, num_words))

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = np.array([score(state.params, place(batch)) for batch in batches], np.float64)
        nats, count, size = parts.sum(axis=0)
        return {
            "eval_loss": float(nats / count),
            "eval_bits_per_byte": losses.bits_per_byte(float(nats), float(size)),
        }

    return evaluate
