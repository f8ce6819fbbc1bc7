"""The image tokeniser's pipeline: images in, a vector-quantised autoencoder out.

Loss: mean squared error + codebook + beta * commitment (arXiv 1711.00937, equation 3). The
perceptual and adversarial terms of VQGAN are left out: they need networks trained elsewhere.
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

from models import vq
from models.errors import InputError, check_choice
from models.vq import VQConfig
from training import data_parallel, loop, optimizers
from training.data_parallel import RunConfig
from training.optimizers import OptimizerConfig

BETA_ON = ("commitment", "codebook")
_USAGE_DECAY = 0.95


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything but the data that determines a run.

    Attributes:
      model: see `VQConfig`.
      run: see `RunConfig`. Where sizes are mixed, `batch_size` is that of the largest.
      optimizer: see `OptimizerConfig`.
      beta: weight of the commitment loss.
      beta_on: 'commitment', as published; 'codebook' puts the weight on the codebook's own loss
        instead, as the legacy VQGAN code does.
      restart_every: steps between looks for dead codes, which are moved onto random latents of
        the batch; 0 for never.
      restart_below: a code is dead when its share of tokens, averaged over about 20 steps, is
        below this part of the uniform share.
    """

    model: VQConfig
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    beta: float = 0.25
    beta_on: str = "commitment"
    restart_every: int = 20
    restart_below: float = 0.05

    def __post_init__(self) -> None:
        check_choice("beta_on", self.beta_on, BETA_ON)
        if self.beta < 0:
            raise InputError(f"beta: {self.beta} must be at least 0")
        if self.restart_every < 0:
            raise InputError(f"restart_every: {self.restart_every} must be at least 0")


@struct.dataclass
class TrainState:
    """What a step reads and writes.

    Attributes:
      step: int32 [], batches seen.
      params: of the autoencoder.
      opt_state: the optimiser's.
      usage: float32 [K], each code's share of tokens, a running average.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    usage: jax.Array


def train(
    config: TrainConfig,
    *,
    train_batches: loop.Batches,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "vq",
) -> loop.Result:
    """Trains a tokeniser, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`.
      train_batches: endless; dicts with `images` float32 [B, H, W, C] in [0, 1]. Sizes may
        differ from batch to batch; each is compiled once.
      eval_batches: makes an iterator of such batches for an evaluation; None for none.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      identity: what identifies the data, as JSON can hold it.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (mean squared
      error), `eval_psnr` (dB) and `codebook_usage` (share of codes that occur).

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
    params = vq.init(config.model, jax.random.key(config.run.seed))
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    size = config.model.codebook_size
    usage = jnp.full((size,), 1 / size)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), usage)


def loss_fn(
    config: TrainConfig, params: Any, images: jax.Array
) -> tuple[jax.Array, tuple[vq.Reconstruction, jax.Array]]:
    """The loss [], and (the reconstruction, its mean squared error [])."""
    found = vq.reconstruct(config.model, params, images)
    error = jnp.mean((found.images - images) ** 2)
    weighted, plain = found.commitment_loss, found.codebook_loss
    if config.beta_on == "codebook":
        weighted, plain = plain, weighted
    return error + plain + config.beta * weighted, (found, error)


def train_step(
    config: TrainConfig, state: TrainState, batch: Mapping[str, jax.Array]
) -> tuple[TrainState, loop.Metrics]:
    """One update, to be jitted, and its loss, reconstruction error and number of dead codes."""
    grad_fn = jax.value_and_grad(functools.partial(loss_fn, config), has_aux=True)
    (loss, (found, error)), gradient = grad_fn(state.params, batch["images"])
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    size = config.model.codebook_size
    share = jnp.bincount(found.ids.ravel(), length=size) / found.ids.size
    usage = _USAGE_DECAY * state.usage + (1 - _USAGE_DECAY) * share
    dead = usage < config.restart_below / size
    if config.restart_every:
        now = (state.step + 1) % config.restart_every == 0
        key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
        codebook = restart(params["codebook"], dead & now, found.latents, key)
        params = {**params, "codebook": codebook}
        usage = jnp.where(dead & now, 1 / size, usage)
    metrics = {"loss": loss, "squared_error": error, "dead_codes": jnp.sum(dead)}
    return TrainState(state.step + 1, params, opt_state, usage), metrics


def restart(codebook: jax.Array, dead: jax.Array, latents: jax.Array, key: jax.Array) -> jax.Array:
    """Codes [K, Z] with those that are `dead` bool [K] moved onto random vectors of `latents`
    [..., Z]."""
    vectors = latents.reshape(-1, latents.shape[-1])
    picked = vectors[jax.random.randint(key, (codebook.shape[0],), 0, vectors.shape[0])]
    return jnp.where(dead[:, None], picked, codebook)


def _evaluator(
    model: VQConfig, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
) -> Callable[[TrainState], dict[str, float]]:
    @jax.jit
    def measure(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = vq.reconstruct(model, params, images)
        error = jnp.sum((jnp.clip(found.images, 0, 1) - images) ** 2)
        return error, jnp.bincount(found.ids.ravel(), length=model.codebook_size)

    def evaluate(state: TrainState) -> dict[str, float]:
        squares, values = 0.0, 0
        counts = np.zeros(model.codebook_size, np.int64)
        for batch in batches():
            error, found = jax.device_get(measure(state.params, batch["images"]))
            squares, values = squares + float(error), values + batch["images"].size
            counts += found
        if not values:
            raise InputError("eval_batches: there are none")
        mean = squares / values
        return {
            "eval_loss": mean,
            "eval_psnr": float(-10 * np.log10(max(mean, 1e-12))),
            "codebook_usage": float(np.mean(counts > 0)),
        }

    return evaluate
