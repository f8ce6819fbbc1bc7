"""Training of up- and down-samplers of code grids (`models.row_causal`), around a frozen tokeniser.

The same image at two resolutions gives codes of both. Objectives: 'tokens', cross-entropy of the
other resolution's codes; 'pixels', squared error of the image that the frozen decoder makes of the
chosen codes, with the straight-through gradient, and a commitment term that keeps vectors near
codes (MuLo-SD, arXiv 2601.05149; its perceptual and adversarial terms need networks trained
elsewhere).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from models import row_causal, vq
from models.errors import InputError, check_choice
from models.row_causal import ResamplerConfig
from models.vq import VQConfig
from training import data_parallel, image_batches, loop, losses, optimizers
from training.data_parallel import RunConfig
from training.image_batches import ImageData
from training.image_language_model import CodeRows
from training.optimizers import OptimizerConfig

OBJECTIVES = ("tokens", "pixels")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything but the data that determines a run.

    Attributes:
      model: see `ResamplerConfig`.
      objective: see the module.
      commitment: weight of the mean squared distance between vectors and their codes ('pixels').
      run: see `RunConfig`.
      optimizer: see `OptimizerConfig`.
    """

    model: ResamplerConfig
    objective: str = "pixels"
    commitment: float = 0.25
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if self.commitment < 0:
            raise InputError(f"commitment: {self.commitment} must be at least 0")


@dataclasses.dataclass(frozen=True)
class SamplerModel:
    """The recipe of a resampler.

    Attributes:
      data: images of two sizes, small and large, `train.model.factor` apart.
      train: the run.
      tokenizer: a recipe of `training.image_models`, or the directory of a `models.vq` model.
      eval_images: of the validation split, at most.
    """

    data: ImageData
    train: TrainConfig
    tokenizer: str
    eval_images: int = 256

    def __post_init__(self) -> None:
        if (sizes := self.data.sizes)[1:] != (sizes[0] * self.train.model.factor,):
            raise InputError(
                f"data.sizes: {sizes} must be two sizes, the second {self.train.model.factor} "
                "times the first"
            )

    @property
    def parents(self) -> dict[str, str]:
        """Models that it is made from, by role."""
        return {"tokenizer": self.tokenizer}


@struct.dataclass
class TrainState:
    """Step int32 [], parameters of the resampler, and the optimiser's state."""

    step: jax.Array
    params: Any
    opt_state: Any


class Measures(struct.PyTreeNode):
    """What a pass over a batch shows, each float32 []: see `measure`."""

    loss: jax.Array
    cross_entropy: jax.Array
    accuracy: jax.Array
    squared_error: jax.Array


class PairedImages(Sequence):
    """A random-access source of {source: codes [N], target: codes [M], images: [H, W, C]}.

    The codes of one image at the resolution that is given and at the one that is wanted, and the
    image at the wanted one.

    Args:
      source, target: encoded images, index by index the same ones.
      images: as they are at the target's resolution.
    """

    def __init__(self, source: CodeRows, target: CodeRows, images: Sequence[Any]):
        if len(source) != len(target) or (source.labels != target.labels).any():
            raise InputError("data: the images of the two sizes are not the same ones")
        self._source, self._target, self._images = source, target, images

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return {
            "source": self._source.codes[index],
            "target": self._target.codes[index],
            "images": self._images[index]["images"],
        }


def measure(
    config: TrainConfig,
    tokenizer: VQConfig,
    frozen: Any,
    params: Any,
    batch: Mapping[str, jax.Array],
) -> Measures:
    """A batch's loss (by the objective) and, for comparison, what both objectives look at.

    Args:
      config: the run.
      tokenizer, frozen: the VQ model and its parameters.
      params: of the resampler.
      batch: `source` int [B, N] and `target` int [B, M], codes of square grids, and `images`
        [B, H, W, C] at the target's resolution.
    """
    codebook = frozen["codebook"]
    side = round(batch["source"].shape[1] ** 0.5)
    source = codebook[batch["source"].reshape(-1, side, side)]
    found = row_causal.vectors(config.model, params, source)
    scores = row_causal.logits(params, codebook, found)
    target = batch["target"].reshape(scores.shape[:-1])
    nats = jnp.mean(losses.cross_entropy(scores, target))
    ids = jnp.argmax(scores, axis=-1)
    fixed = jax.lax.stop_gradient
    chosen = codebook[ids]
    images = vq.decode_embeddings(tokenizer, frozen, found + fixed(chosen - found))
    error = jnp.mean((images - batch["images"]) ** 2)
    loss = nats
    if config.objective == "pixels":
        loss = error + config.commitment * jnp.mean((found - fixed(chosen)) ** 2)
    return Measures(loss, nats, jnp.mean(ids == target), error)


def init_state(config: TrainConfig) -> TrainState:
    """The state of step 0."""
    params = row_causal.init(config.model, jax.random.key(config.run.seed))
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    config: TrainConfig,
    tokenizer: VQConfig,
    frozen: Any,
    state: TrainState,
    batch: Mapping[str, jax.Array],
) -> tuple[TrainState, loop.Metrics]:
    """One update, to be jitted, and its measures."""

    def loss_fn(params: Any) -> tuple[jax.Array, Measures]:
        found = measure(config, tokenizer, frozen, params, batch)
        return found.loss, found

    (_, found), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), dataclasses.asdict(found)


def train(
    chosen: SamplerModel, tokenizer: pathlib.Path, cache: pathlib.Path, **run: Any
) -> loop.Result:
    """Trains a resampler, or goes on where its work directory left off.

    Args:
      chosen: the recipe.
      tokenizer: directory of the tokeniser.
      cache: where our own datasets are kept.
      **run: workdir, identity and description of `data_parallel.run`.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss`,
      `eval_cross_entropy`, `eval_accuracy` (codes that are the wanted ones) and
      `eval_squared_error`, the mean over held-out images.

    Raises:
      InputError, SystemExit: as `data_parallel.run`; a codebook of another width.
    """
    config, (vq_config, frozen) = chosen.train, vq.load(tokenizer)
    if vq_config.embed_dim != config.model.embed_dim:
        raise InputError(
            f"train.model.embed_dim: {config.model.embed_dim} must be the tokeniser's "
            f"{vq_config.embed_dim}"
        )
    small, large = chosen.data.sizes
    given, wanted = (small, large) if config.model.direction == "up" else (large, small)

    def pairs(split: str, limit: int | None) -> PairedImages:
        images = {
            size: image_batches.load_images(chosen.data, split, size, cache)
            for size in (given, wanted)
        }
        source, target = (
            CodeRows(vq_config, frozen, images[size], limit) for size in (given, wanted)
        )
        return PairedImages(source, target, images[wanted])

    held_out = pairs(chosen.data.eval_split, chosen.eval_images)
    batches = image_batches.train_batches(
        [(pairs(chosen.data.train_split, None), config.run.batch_size)], seed=config.run.seed
    )
    return data_parallel.run(
        config.run,
        functools.partial(train_step, config, vq_config, frozen),
        functools.partial(init_state, config),
        batches=batches,
        settings={**dataclasses.asdict(config), "identity": run.pop("identity", None)},
        evaluate=_evaluator(
            config, vq_config, frozen, lambda: image_batches.in_order(held_out, 64)
        ),
        **run,
    )


def _evaluator(
    config: TrainConfig,
    tokenizer: VQConfig,
    frozen: Any,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> Callable[[TrainState], dict[str, float]]:
    run = jax.jit(functools.partial(measure, config, tokenizer, frozen))

    def evaluate(state: TrainState) -> dict[str, float]:
        sums: dict[str, float] = {}
        total = 0
        for batch in batches():
            rows = len(batch["images"])
            total += rows
            for name, value in dataclasses.asdict(run(state.params, batch)).items():
                sums[name] = sums.get(name, 0.0) + rows * float(value)
        if not total:
            raise InputError("eval_batches: there are none")
        return {f"eval_{name}": value / total for name, value in sums.items()}

    return evaluate
