"""What every pipeline of a Transformer shares: configuration, state, placement and the update.

A pipeline adds its loss and its batches. The same call trains on one device and on a mesh:
parameters and optimiser state lie as `models.sharding`'s table says, batches are split over the
data axis, and XLA derives the rest.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from models import distributed, placement, sharding, transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from training import loop, optimizers

T = TypeVar("T")

COMPUTE_DTYPES = ("float32", "bfloat16")
Batch = Mapping[str, np.ndarray]
DeviceBatch = Mapping[str, jax.Array]

# loss_fn(params, batch, step [], frozen) -> (loss [], further metrics, each []). Noise is drawn
# from `step_key`, so that a run that was killed goes on with the same.
LossFn = Callable[[Any, DeviceBatch, jax.Array, Any], tuple[jax.Array, loop.Metrics]]
# update_fn(state, batch, frozen) -> (state, metrics, each []); to be jitted.
UpdateFn = Callable[[Any, DeviceBatch, Any], tuple[Any, loop.Metrics]]

# Noise of steps is drawn from another key than the initial parameters are.
_NOISE = 1


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
      fsdp: split parameters and optimiser state over 'data' too, for models whose state no device
        can hold; see `sharding.tree_shardings`.
      distillation: None to learn from the text alone (`language_model` only).
      log_every, eval_every, checkpoint_every: steps.
      keep_checkpoints: newest ones kept, beside the one of least evaluation loss.
      seed: of the initial parameters and of a step's noise.
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
    fsdp: bool = False
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


def fit(
    config: TrainConfig,
    update_fn: UpdateFn,
    *,
    prepare: Callable[[TrainState, Batch], DeviceBatch],
    train_batches: loop.Batches,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    workdir: str | pathlib.Path,
    recorded: Mapping[str, Any],
    mesh: Mesh,
    initial_params: Any = None,
    frozen: Any = None,
    description: str = "train",
) -> loop.Result:
    """Updates parameters batch by batch, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`.
      update_fn: see `UpdateFn`; most often `update` with a loss.
      prepare: makes a batch of this process's rows one on the mesh, before the update.
      train_batches: endless iterator with `get_state` and `set_state`.
      evaluate: see `loop.run`.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      recorded: everything that determines the run beside `config`, as JSON can hold it.
      mesh: made of `config.mesh`.
      initial_params: where a fresh run starts, of whatever model; None for random ones of
        `config.model`.
      frozen: arrays that the update reads and nothing changes.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`.

    Raises:
      InputError: as `loop.run`; a mesh that does not fit the parameters.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    if distributed.several() and initial_params is not None:
        initial_params = distributed.on_host(initial_params)  # what a mesh of all can be made from
    init_fn = functools.partial(init, config)
    given = () if initial_params is None else (initial_params,)
    template = jax.eval_shape(lambda *given: init_fn(*map(_copy, given)), *given)
    shardings = sharding.tree_shardings(template, mesh, fsdp=config.fsdp)
    template = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        template,
        shardings,
    )
    first = jax.jit(init_fn, out_shardings=shardings)
    step = compiled(config, update_fn, mesh, shardings)
    return loop.run(
        lambda state, batch: step(state, prepare(state, batch), frozen),
        lambda: first(*map(_copy, given)),
        template=template,
        batches=train_batches,
        num_steps=config.num_steps,
        workdir=workdir,
        config={**dataclasses.asdict(config), **recorded},
        evaluate=evaluate and on_split_state(config, mesh, evaluate),
        tokens_per_step=config.batch_size * config.sequence_length,
        log_every=config.log_every,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        description=description,
    )


def compiled(config: TrainConfig, update_fn: UpdateFn, mesh: Mesh, shardings: Any) -> Any:
    """`update_fn` jitted; the state that it is given is donated, the new one lies as that did."""
    update_fn = on_split_state(config, mesh, update_fn)
    return jax.jit(update_fn, donate_argnums=0, out_shardings=(shardings, None))


def on_split_state(config: TrainConfig, mesh: Mesh, function: Callable[..., T]) -> Callable[..., T]:
    """A function of parameters: with `config.fsdp` layers gather what they use of them.

    To be jitted, or to call what is, as `evaluate` does.
    """
    if not config.fsdp:
        return function

    @functools.wraps(function)
    def placed(*args: Any) -> T:
        with placement.traced_for(mesh):
            return function(*args)

    return placed


def init(config: TrainConfig, params: Any = None) -> TrainState:
    """The state before the first step; random parameters where none are given."""
    if params is None:
        params = transformer.init(config.model, jax.random.key(config.seed))
    optimizer = optimizers.create(config.optimizer, config.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _copy(params: Any) -> Any:
    """In float32, in buffers of their own: the first update donates them."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)


def step_key(config: TrainConfig, step: jax.Array) -> jax.Array:
    """The key of everything random in one step: of (`config.seed`, step)."""
    noise = jax.random.fold_in(jax.random.key(config.seed), _NOISE)
    return jax.random.fold_in(noise, step)


def update(
    config: TrainConfig, loss_fn: LossFn, state: TrainState, batch: DeviceBatch, frozen: Any = None
) -> tuple[TrainState, loop.Metrics]:
    """One step down a loss's gradient: the new state, and loss, gradient norm and learning rate.

    The norm is of the gradient before clipping; the learning rate is the one of this step.
    """
    (loss, more), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, batch, state.step, frozen
    )
    optimizer = optimizers.create(config.optimizer, config.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        **more,
        "gradient_norm": optax.global_norm(gradient),
        "learning_rate": optimizers.schedule(config.optimizer, config.num_steps)(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics


def place(
    batch: Batch, config: TrainConfig, mesh: Mesh, *, fields: Sequence[str], ids: Sequence[str]
) -> dict[str, jax.Array]:
    """This process's rows on the mesh, split over its data axis.

    Args:
      batch: arrays [B, T].
      config: gives B over all processes, T and V.
      mesh: where to.
      fields: which arrays of the batch.
      ids: those fields that are token ids.

    Raises:
      InputError: a field that is missing or of another shape, or a token id out of range.
    """
    shape = (config.batch_size // jax.process_count(), config.sequence_length)
    for field in fields:
        if field not in batch:
            raise InputError(f"batch.{field}: missing; a batch has {', '.join(fields)}")
        if batch[field].shape != shape:
            raise InputError(f"batch.{field}: shape {batch[field].shape} must be {shape}")
    vocab_size = config.model.vocab_size
    for field in ids:
        low, high = int(batch[field].min()), int(batch[field].max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"batch.{field}: id {low if low < 0 else high} is out of range; model.vocab_size "
                f"is {vocab_size}"
            )
    rows = sharding.batch_sharding(mesh)
    return {
        field: jax.make_array_from_process_local_data(rows, np.asarray(batch[field]))
        for field in fields
    }


def compute_config(config: TrainConfig) -> TransformerConfig:
    """The architecture in the run's compute dtype."""
    return config.model.replace(dtype=config.compute_dtype)
