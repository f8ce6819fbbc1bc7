"""The language-model pipeline: packed batches in, a trained Transformer out.

The same call trains on one device and on a mesh: parameters and optimiser state lie as
`models.sharding`'s table says, batches are split over the data axis, and XLA derives the rest.
"""

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
from jax.sharding import Mesh

from models import masks, sharding, transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from training import loop, losses, optimizers

COMPUTE_DTYPES = ("float32", "bfloat16")
Batch = Mapping[str, np.ndarray]

_FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "target_bytes")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Learning from a frozen target's distributions beside the text itself.

    Attributes:
      weight: of the target's distributions, 0 to 1; the rest is the weight of the text.
      temperature: softens both distributions.
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"distillation.weight: {self.weight} must be between 0 and 1")
        if self.temperature <= 0:
            raise InputError(f"distillation.temperature: {self.temperature} must be positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything but the data that determines a run.

    Attributes:
      model: the architecture; its own `dtype` is for decoding and not read here.
      optimizer: see `OptimizerConfig`.
      num_steps: batches in all.
      batch_size: rows a batch [B], over all processes.
      sequence_length: tokens a row [T].
      compute_dtype: 'float32' or 'bfloat16'; parameters, optimiser state, logits and losses are
        float32 in both (mixed precision).
      remat: recompute each block in the backward pass: less memory for a third more work.
      mesh: devices along (data, model).
      distillation: None to learn from the text alone.
      log_every, eval_every, checkpoint_every: steps.
      keep_checkpoints: newest ones kept, beside the one of least evaluation loss.
      seed: of the initial parameters.
    """

    model: TransformerConfig
    optimizer: optimizers.OptimizerConfig = dataclasses.field(
        default_factory=optimizers.OptimizerConfig
    )
    num_steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    compute_dtype: str = "float32"
    remat: bool = False
    mesh: tuple[int, int] = (1, 1)
    distillation: Distillation | None = None
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        positive = (
            "num_steps", "batch_size", "sequence_length", "log_every", "eval_every",
            "checkpoint_every", "keep_checkpoints",
        )  # fmt: skip
        for field in positive:
            if (value := getattr(self, field)) < 1:
                raise InputError(f"{field}: {value} must be at least 1")
        if not self.model.causal:
            raise InputError("model.causal: False is not for this pipeline, which is left to right")
        if self.sequence_length > self.model.max_position:
            raise InputError(
                f"sequence_length: {self.sequence_length} exceeds model.max_position "
                f"{self.model.max_position}"
            )
        if self.batch_size % self.mesh[0]:
            raise InputError(
                f"batch_size: {self.batch_size} must be a multiple of the {self.mesh[0]} devices "
                "along mesh axis 'data'"
            )


@struct.dataclass
class TrainState:
    """What a step reads and writes.

    Attributes:
      step: int32 [], batches seen.
      params: float32 parameters of the Transformer.
      opt_state: the optimiser's.
    """

    step: jax.Array
    params: Any
    opt_state: Any


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
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats a token)
      and `eval_bits_per_byte`.

    Raises:
      InputError: as `loop.run`; a batch of the wrong shape or with ids out of range; a target of
        another vocabulary; a mesh that does not fit devices or parameters.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    _check_target(config, target)
    mesh = sharding.make_mesh(*config.mesh)
    init_fn = functools.partial(_init, config)
    template = jax.eval_shape(init_fn)
    shardings = sharding.tree_shardings(template, mesh)
    template = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        template,
        shardings,
    )
    if target is not None:
        target = _place_target(target, mesh)
    update = jax.jit(
        functools.partial(train_step, config, target.config if target else None),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )

    def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, loop.Metrics]:
        return update(state, put(batch, config, mesh), target.params if target else None)

    return loop.run(
        step_fn,
        jax.jit(init_fn, out_shardings=shardings),
        template=template,
        batches=train_batches,
        num_steps=config.num_steps,
        workdir=workdir,
        config={**dataclasses.asdict(config), "identity": identity},
        evaluate=evaluator(config, eval_batches, mesh) if eval_batches is not None else None,
        tokens_per_step=config.batch_size * config.sequence_length,
        log_every=config.log_every,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        description=description,
    )


def _init(config: TrainConfig) -> TrainState:
    params = transformer.init(config.model, jax.random.key(config.seed))
    optimizer = optimizers.create(config.optimizer, config.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    config: TrainConfig,
    target_config: TransformerConfig | None,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    target_params: Any,
) -> tuple[TrainState, loop.Metrics]:
    """One update, to be jitted: the new state, and the loss, gradient norm and learning rate.

    The loss is a mean over the tokens of `loss_mask`; the norm is of the gradient before
    clipping; the learning rate is the one of this step.
    """
    soft = None
    if config.distillation is not None:
        assert target_config is not None
        soft = _logits(target_config, target_params, batch)

    def loss_fn(params: Any) -> jax.Array:
        logits = _logits(_compute(config), params, batch, remat=config.remat)
        if soft is None:
            nats = losses.cross_entropy(logits, batch["targets"])
        else:
            assert config.distillation is not None
            nats = losses.distillation(
                logits,
                soft,
                batch["targets"],
                weight=config.distillation.weight,
                temperature=config.distillation.temperature,
            )
        return losses.masked_mean(nats, batch["loss_mask"])

    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    optimizer = optimizers.create(config.optimizer, config.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.global_norm(gradient),
        "learning_rate": optimizers.schedule(config.optimizer, config.num_steps)(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics


def evaluator(
    config: TrainConfig, batches: Iterable[Batch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: `eval_loss` in nats a token and `eval_bits_per_byte`."""

    @jax.jit
    def sums(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        logits = _logits(_compute(config), params, batch)
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


def put(batch: Batch, config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows on the mesh, split over its data axis.

    Raises:
      InputError: a field that is missing or of another shape, or a token id out of range.
    """
    shape = (config.batch_size // jax.process_count(), config.sequence_length)
    for field in _FIELDS:
        if field not in batch:
            raise InputError(f"batch.{field}: missing; a batch has {', '.join(_FIELDS)}")
        if batch[field].shape != shape:
            raise InputError(f"batch.{field}: shape {batch[field].shape} must be {shape}")
    vocab_size = config.model.vocab_size
    for field in ("tokens", "targets"):
        low, high = int(batch[field].min()), int(batch[field].max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"batch.{field}: id {low if low < 0 else high} is out of range; model.vocab_size "
                f"is {vocab_size}"
            )
    place = sharding.batch_sharding(mesh)
    return {
        field: jax.make_array_from_process_local_data(place, np.asarray(batch[field]))
        for field in _FIELDS
    }


def _compute(config: TrainConfig) -> TransformerConfig:
    return config.model.replace(dtype=config.compute_dtype)


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
