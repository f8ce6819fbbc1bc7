"""The masked image models' pipeline: grids of token ids in, ENAT or the uniform network out.

Sections 3.2-3.4 of the method (arXiv 2411.06959; its official code): one number of masks a
batch, cross entropy with label smoothing on masked tokens, and, in half of the batches, features
to reuse that the averaged network makes of a part of the visible tokens.

What is masked is drawn on the host, so that lists of positions have few different lengths and
training computes on visible tokens only where the network does.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from models import enat
from models.enat import ENATConfig, Indices, TextENATConfig
from models.errors import InputError, check_choice
from training import data_parallel, loop, losses, optimizers
from training.data_parallel import RunConfig
from training.image_batches import ImageData
from training.optimizers import OptimizerConfig

MASK_RATIOS = ("beta", "cosine")
_BETA = (12.0, 3.0)
# Largest share of visible tokens of each padded length. Most batches have few.
_CAPACITIES = (1 / 4, 1 / 2, 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything but the data that determines a run. Defaults are the published ones.

    Attributes:
      model: see `ENATConfig`.
      run: see `RunConfig`.
      optimizer: see `OptimizerConfig`.
      mask_ratio: 'beta' for Beta(12, 3); 'cosine' for MaskGIT's cos(pi u / 2), u uniform.
      label_smoothing: share of a target's weight that is spread over all codes.
      reuse_probability: of a batch with features to reuse (disentangled network only).
      label_dropout: labels (or texts) that the data replaces by the null condition; the averaged
        network sees these too.
      embedder_dropout: labels that the network itself drops beside, in training only. Together
        1 - 0.85 * 0.9 = 0.235.
      ema_decay: of the averaged parameters, each step.
    """

    model: ENATConfig
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mask_ratio: str = "beta"
    label_smoothing: float = 0.1
    reuse_probability: float = 0.5
    label_dropout: float = 0.15
    embedder_dropout: float = 0.1
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        check_choice("mask_ratio", self.mask_ratio, MASK_RATIOS)
        for name in (
            "label_smoothing", "reuse_probability", "label_dropout", "embedder_dropout",
            "ema_decay",
        ):  # fmt: skip
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"{name}: {value} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class MaskedImageModel:
    """The recipe of a masked model of image tokens: ENAT or the uniform network.

    Attributes:
      data: labelled images of one size.
      train: the run.
      tokenizer: the tokeniser, by its name in `image_models.RECIPES` or as a directory.
      flip: train on mirror images too.
    """

    data: ImageData
    train: TrainConfig
    tokenizer: str = "digits_vq32"
    flip: bool = False

    @property
    def parents(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer}


@struct.dataclass
class TrainState:
    """What a step reads and writes: int32 [] step, parameters, their average, the optimiser's."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


class Corrupted:
    """Batches with what is masked in each, by a position that can be saved and restored.

    Adds `old`, `new` and `masked` int32 [B, .], lists of positions padded with N; see
    `corrupt`. Draws depend on the seed and the number of the batch.

    Args:
      config: of the run.
      batches: dicts with `ids` int32 [B, N] and `labels` int32 [B], or `text` float32 [B, E].
      process_index: draws which tokens; how many is the same in all processes.
    """

    def __init__(self, config: TrainConfig, batches: loop.Batches, *, process_index: int = 0):
        self._config, self._batches, self._process = config, batches, process_index
        self._count = 0

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        seed = (self._config.run.seed, self._count)
        shared = np.random.default_rng(seed)
        own = np.random.default_rng((*seed, 1 + self._process))
        self._count += 1
        return {**batch, **corrupt(self._config, len(batch["ids"]), shared, own)}

    def get_state(self) -> Any:
        return {"batches": self._batches.get_state(), "count": self._count}

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state["batches"])
        self._count = state["count"]


def num_masked(config: TrainConfig, rng: np.random.Generator) -> int:
    """Masked tokens of a batch, 1 to N - 1."""
    total = config.model.num_tokens
    if config.mask_ratio == "beta":
        ratio = rng.beta(*_BETA)
    else:
        ratio = math.cos(math.pi / 2 * rng.uniform())
    return int(np.clip(round(total * ratio), 1, total - 1))


def corrupt(
    config: TrainConfig, rows: int, shared: np.random.Generator, own: np.random.Generator
) -> dict[str, np.ndarray]:
    """Which tokens of a batch are masked, and which visible ones have features to reuse.

    Args:
      config: of the run.
      rows: B.
      shared: draws the number of masks, whether there is reuse, and the number of tokens that
        are visible but new.
      own: draws the positions of each row.

    Returns:
      `old`, `new` and `masked` int32 [B, .] of `enat.Indices`, padded with N to one of a few
      lengths. `old` is all padding in a batch without reuse.
    """
    total = config.model.num_tokens
    count = num_masked(config, shared)
    visible = total - count
    reuse = config.model.disentangled and shared.uniform() < config.reuse_probability
    new = round(visible * shared.uniform()) if reuse else visible
    shares = _CAPACITIES if config.model.disentangled else (1,)
    sizes = [max(1, math.ceil(total * share)) for share in shares]
    room = min(size for size in sizes if size >= visible)
    least = max([0, *(size for size in sizes if size < visible)])  # fewer have a smaller room
    order = own.permuted(np.tile(np.arange(total, dtype=np.int32), (rows, 1)), axis=1)

    def padded(part: np.ndarray, length: int) -> np.ndarray:
        filled = np.full((rows, length), total, np.int32)
        filled[:, : part.shape[1]] = np.sort(part, axis=1)
        return filled

    return {
        "old": padded(order[:, new:visible], room),
        "new": padded(order[:, :new], room),
        "masked": padded(order[:, visible:], total - least - 1),
    }


def train(
    config: TrainConfig,
    *,
    train_batches: loop.Batches,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "masked image model",
    text_statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> loop.Result:
    """Trains a masked image model, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`.
      train_batches: endless; dicts with `ids` int32 [B, N] and `labels` int32 [B], or `text`
        float32 [B, E] for a network that is conditioned on text, not corrupted.
      eval_batches: makes an iterator of such batches, each of which is masked the same way at
        every evaluation; None for none.
      workdir, identity, description: as in `vq_tokenizer.train`.
      text_statistics: for a network that is conditioned on text, the mean and deviation float32
        [E] of the training texts.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss`, nats a masked
      token of the averaged network without label smoothing.

    Raises:
      InputError, SystemExit: as `data_parallel.run`.
    """
    return data_parallel.run(
        config.run,
        functools.partial(train_step, config),
        functools.partial(init_state, config, text_statistics),
        batches=Corrupted(config, train_batches, process_index=jax.process_index()),
        settings={**dataclasses.asdict(config), "identity": identity},
        workdir=workdir,
        evaluate=_evaluator(config, eval_batches) if eval_batches else None,
        tokens_per_step=config.run.batch_size * config.model.num_tokens,
        description=description,
    )


def init_state(
    config: TrainConfig, text_statistics: tuple[np.ndarray, np.ndarray] | None = None
) -> TrainState:
    """The state of step 0; see `train`."""
    params = enat.init(config.model, jax.random.key(config.run.seed))
    if text_statistics is not None:
        params = enat.with_text_statistics(params, *text_statistics)
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    average = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def condition_of(config: TrainConfig, batch: Mapping[str, jax.Array]) -> jax.Array:
    """What the images of a batch are of: labels [B], or text vectors [B, E]."""
    return batch["text" if isinstance(config.model, TextENATConfig) else "labels"]


def drop_conditions(
    config: TrainConfig, conditions: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Conditions as the data hands them out, and as the trained network sees them."""
    rows = conditions.shape[0]
    null = enat.null_condition(config.model, rows)
    draws = jax.random.uniform(key, (2, rows))
    first, second = draws.reshape(2, rows, *[1] * (conditions.ndim - 1))
    given = jnp.where(first < config.label_dropout, null, conditions)
    return given, jnp.where(second < config.embedder_dropout, null, given)


def reused_features(
    config: TrainConfig, ema: Any, ids: jax.Array, conditions: jax.Array, old: jax.Array
) -> jax.Array:
    """Features [B, N, d] of the `old` tokens from the averaged network, without gradient.

    Zero, and not computed, in a batch without any.
    """
    shape = (*ids.shape, config.model.embed_dim)
    return jax.lax.stop_gradient(
        jax.lax.cond(
            jnp.any(old < config.model.num_tokens),
            lambda: enat.encode_visible(config.model, ema, ids, conditions, old).astype(
                jnp.float32
            ),
            lambda: jnp.zeros(shape, jnp.float32),
        )
    )


def loss_fn(
    config: TrainConfig,
    params: Any,
    batch: Mapping[str, jax.Array],
    conditions: jax.Array,
    reused: jax.Array | None,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Mean over masked tokens: the loss with label smoothing [], and the cross entropy []."""
    model = config.model
    indices = Indices(batch["old"], batch["new"], batch["masked"])
    hidden = enat.scatter(
        batch["ids"], indices.masked, jnp.full_like(indices.masked, model.mask_id)
    )
    output = enat.apply(
        model,
        params,
        hidden,
        conditions,
        indices,
        reused=reused,
        padded=True,
        dropout_key=dropout_key,
    )
    safe = jnp.minimum(indices.masked, model.num_tokens - 1)
    targets = jnp.take_along_axis(batch["ids"], safe, axis=1)
    nats = losses.cross_entropy(output.logits, targets)
    spread = jax.nn.logsumexp(output.logits, -1) - output.logits.mean(-1)
    smooth = (1 - config.label_smoothing) * nats + config.label_smoothing * spread
    real = indices.masked < model.num_tokens
    return losses.masked_mean(smooth, real), losses.masked_mean(nats, real)


def train_step(
    config: TrainConfig, state: TrainState, batch: Mapping[str, jax.Array]
) -> tuple[TrainState, loop.Metrics]:
    """One update, to be jitted; compiled once for each length of the lists."""
    key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    drop_key, dropout_key = jax.random.split(key)
    given, seen = drop_conditions(config, condition_of(config, batch), drop_key)
    reused = None
    if config.model.disentangled:
        reused = reused_features(config, state.ema, batch["ids"], given, batch["old"])

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        return loss_fn(config, params, batch, seen, reused, dropout_key)

    (loss, nats), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    optimizer = optimizers.create(config.optimizer, config.run.num_steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - config.ema_decay)
    metrics = {"loss": loss, "nats": nats, "gradient_norm": optax.global_norm(gradient)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def _evaluator(
    config: TrainConfig, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
) -> Callable[[TrainState], dict[str, float]]:
    plain = dataclasses.replace(config, reuse_probability=0.0)

    @jax.jit
    def measure(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reused = jnp.zeros((*batch["ids"].shape, config.model.embed_dim))
        _, nats = loss_fn(plain, params, batch, condition_of(plain, batch), reused, None)
        count = jnp.sum(batch["masked"] < config.model.num_tokens)
        return nats * count, count

    def evaluate(state: TrainState) -> dict[str, float]:
        total, tokens = 0.0, 0
        for number, batch in enumerate(batches()):
            rng = np.random.default_rng(number)
            masks = corrupt(plain, len(batch["ids"]), rng, rng)
            nats, count = jax.device_get(measure(state.ema, {**batch, **masks}))
            total, tokens = total + float(nats), tokens + int(count)
        if not tokens:
            raise InputError("eval_batches: there are none")
        return {"eval_loss": total / tokens}

    return evaluate
