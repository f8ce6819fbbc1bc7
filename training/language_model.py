"""The language-model pipeline: packed batches in, a trained Transformer out."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models import masks, sharding, transformer
from models.config import TransformerConfig
from models.errors import InputError
from training import fitting, loop, losses
from training.fitting import Batch, DeviceBatch, Distillation, TrainConfig, TrainState

__all__ = ["Distillation", "Target", "TrainConfig", "TrainState", "evaluator", "put", "train"]

_FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "target_bytes")


@dataclasses.dataclass(frozen=True)
class Target:
    """A frozen model to distil from: its architecture and parameters."""

    config: TransformerConfig
    params: Any


def train(
    config: TrainConfig,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    target: Target | None = None,
    initial_params: Any = None,
    description: str = "train",
) -> loop.Result:
    """Trains a language model, or goes on where `workdir` left off.

    Batches are dicts of arrays of this process's rows, [B, T] each: tokens, targets, segment_ids,
    positions and target_bytes int32, loss_mask float32; `training.batches` makes them.

    Args:
      config: see `TrainConfig`.
      train_batches: endless iterator with `get_state` and `set_state`.
      eval_batches: iterated from its start at every evaluation; None for no evaluation.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      identity: what identifies the data and the target, as JSON can hold it: part of the run's
        config, so that a run never goes on with other data.
      target: needed when `config.distillation` is given.
      initial_params: where a fresh run starts; None for random ones.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats a token)
      and `eval_bits_per_byte`.

    Raises:
      InputError: as `loop.run`; a bidirectional model; a batch of the wrong shape or with ids out
        of range; a target of another vocabulary; a mesh that does not fit devices or parameters.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    if not config.model.causal:
        raise InputError("model.causal: False is not for this pipeline, which is left to right")
    _check_target(config, target)
    mesh = sharding.make_mesh(*config.mesh)
    if target is not None:
        target = _place_target(target, mesh)
    return fitting.fit(
        config,
        functools.partial(
            fitting.update,
            config,
            functools.partial(loss_fn, config, target.config if target else None),
        ),
        prepare=lambda _, batch: put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=evaluator(config, eval_batches, mesh) if eval_batches is not None else None,
        workdir=workdir,
        recorded={"identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        frozen=target.params if target else None,
        description=description,
    )


def loss_fn(
    config: TrainConfig,
    target_config: TransformerConfig | None,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    target_params: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The mean over the tokens of `loss_mask`, in nats."""
    del step
    logits = _logits(fitting.compute_config(config), params, batch, remat=config.remat)
    if config.distillation is None:
        nats = losses.cross_entropy(logits, batch["targets"])
    else:
        assert target_config is not None
        nats = losses.distillation(
            logits,
            _logits(target_config, target_params, batch),
            batch["targets"],
            weight=config.distillation.weight,
            temperature=config.distillation.temperature,
        )
    return losses.masked_mean(nats, batch["loss_mask"]), {}


def evaluator(
    config: TrainConfig, batches: Iterable[Batch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: `eval_loss` in nats a token and `eval_bits_per_byte`."""

    @jax.jit
    def sums(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        logits = _logits(fitting.compute_config(config), params, batch)
        mask = batch["loss_mask"]
        nats = losses.cross_entropy(logits, batch["targets"])
        return jnp.sum(nats * mask), jnp.sum(mask), jnp.sum(batch["target_bytes"] * mask)

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = [sums(state.params, put(batch, config, mesh)) for batch in batches]
        if not parts:
            raise InputError("eval_batches: there are none")
        nats, tokens, size = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
        if not tokens or not size:
            raise InputError("eval_batches: no token of theirs counts")
        return {
            "eval_loss": float(nats / tokens),
            "eval_bits_per_byte": losses.bits_per_byte(float(nats), float(size)),
        }

    return evaluate


def mean_evaluator(
    config: TrainConfig,
    loss_fn: fitting.LossFn,
    batches: Iterable[Batch],
    mesh: Mesh,
    frozen: Any = None,
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: a pipeline's own loss and metrics on held-out text.

    Means over batches, weighted by the tokens that count, 'eval_' before each name. A batch is
    measured with the noise of the step that has its number.
    """
    measure = jax.jit(loss_fn)

    def evaluate(state: TrainState) -> dict[str, float]:
        found, weights = [], []
        for number, batch in enumerate(batches):
            loss, metrics = measure(
                state.params, put(batch, config, mesh), np.int32(number), frozen
            )
            found.append(jax.device_get({"loss": loss, **metrics}))
            weights.append(float(np.sum(batch["loss_mask"])))
        if not sum(weights):
            raise InputError("eval_batches: no token of theirs counts")
        return {
            f"eval_{name}": float(np.average([one[name] for one in found], weights=weights))
            for name in found[0]
        }

    return evaluate


def put(batch: Batch, config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows on the mesh, split over its data axis; errors as `fitting.place`."""
    return fitting.place(batch, config, mesh, fields=_FIELDS, ids=("tokens", "targets"))


def _logits(
    model: TransformerConfig, params: Any, batch: Mapping[str, jax.Array], *, remat: bool = False
) -> jax.Array:
    """Float32 [B, T, V], attention staying inside each segment of a packed row."""
    output = transformer.apply(
        model,
        params,
        batch["tokens"],
        positions=batch["positions"],
        mask=masks.packed_causal(batch["segment_ids"]),
        remat=remat,
    )
    assert output.logits is not None
    return output.logits


def _check_target(config: TrainConfig, target: Target | None) -> None:
    if (config.distillation is None) != (target is None):
        raise InputError("distillation: needs a target model, and a target needs distillation")
    if target is not None and target.config.vocab_size != config.model.vocab_size:
        raise InputError(
            f"distillation: the target's vocab_size {target.config.vocab_size} differs from "
            f"model.vocab_size {config.model.vocab_size}"
        )


def _place_target(target: Target, mesh: Mesh) -> Target:
    params = jax.device_put(target.params, sharding.param_shardings(target.config, mesh))
    return Target(target.config, params)
