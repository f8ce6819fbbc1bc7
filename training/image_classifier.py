"""The classifier's pipeline: labelled images in, a network to measure generated images with out."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from models import image_classifier
from models.errors import InputError
from models.image_classifier import ClassifierConfig
from training import data_parallel, loop, losses, optimizers
from training.data_parallel import RunConfig
from training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything but the data that determines a run.

    Attributes:
      model: see `ClassifierConfig`.
      run: see `RunConfig`.
      optimizer: see `OptimizerConfig`.
    """

    model: ClassifierConfig
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@struct.dataclass
class TrainState:
    """What a step reads and writes: int32 [] step, parameters, the optimiser's state."""

    step: jax.Array
    params: Any
    opt_state: Any


def train(
    config: TrainConfig,
    *,
    train_batches: loop.Batches,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "classifier",
) -> loop.Result:
    """Trains a classifier, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`.
      train_batches: endless; dicts with `images` float32 [B, H, W, C] and `labels` int32 [B].
      eval_batches, workdir, identity, description: as in `vq_tokenizer.train`.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats an image)
      and `eval_accuracy`.

    Raises:
      InputError, SystemExit: as `data_parallel.run`.
    """
    return data_parallel.run(
        config.run,
        functools.partial(train_step, config),
        functools.partial(init_state, config),
        batches=train_batches,
        settings={**dataclasses.asdict(config), "identity": identity},
        workdir=workdir,
        evaluate=_evaluator(config.model, eval_batches) if eval_batches else None,
        description=description,
    )


def init_state(config: TrainConfig) -> TrainState:
    """The state of step 0."""
    params = image_classifier.init(config.model, jax.random.key(config.run.seed))
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    config: TrainConfig, state: TrainState, batch: Mapping[str, jax.Array]
) -> tuple[TrainState, loop.Metrics]:
    """One update, to be jitted, and its loss."""

    def loss_fn(params: Any) -> jax.Array:
        logits = image_classifier.apply(config.model, params, batch["images"]).logits
        return jnp.mean(losses.cross_entropy(logits, batch["labels"]))

    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"loss": loss}


def _evaluator(
    model: ClassifierConfig, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
) -> Callable[[TrainState], dict[str, float]]:
    @jax.jit
    def measure(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
        logits = image_classifier.apply(model, params, images).logits
        nats = losses.cross_entropy(logits, labels)
        return jnp.sum(nats), jnp.sum(jnp.argmax(logits, -1) == labels)

    def evaluate(state: TrainState) -> dict[str, float]:
        nats, right, total = 0.0, 0, 0
        for batch in batches():
            found = jax.device_get(measure(state.params, batch["images"], batch["labels"]))
            nats, right = nats + float(found[0]), right + int(found[1])
            total += len(batch["labels"])
        if not total:
            raise InputError("eval_batches: there are none")
        return {"eval_loss": nats / total, "eval_accuracy": right / total}

    return evaluate
