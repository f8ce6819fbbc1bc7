"""Masked diffusion language models: rows with hidden tokens in, a bidirectional Transformer out.

One loss covers LLaDA's pre-training and fine-tuning (arXiv 2502.09992), block diffusion (arXiv
2503.09573) with a schedule of block sizes (LLaDA2.0, arXiv 2512.15745), and the token editing of
LLaDA2.1 (arXiv 2602.08676); `Objective` says which.
"""

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
from models.errors import InputError, check_choice
from training import corruption, diffusion_losses, fitting, loop, losses
from training.corruption import Noisy
from training.fitting import Batch, DeviceBatch, TrainConfig, TrainState

_FIELDS = ("tokens", "segment_ids", "positions", "changeable")
# Evaluations draw this many mask ratios a row, the same ones each time.
_EVAL_DRAWS = 4


@dataclasses.dataclass(frozen=True)
class Editing:
    """Learning to overwrite wrong tokens (LLaDA2.1); the paper gives no numbers for it.

    Attributes:
      corruption: greatest share of visible answer tokens that are replaced by random ones.
      corrupted_weight, kept_weight: of the losses at wrong and at right visible tokens.
      turns: 2 adds a turn on rows whose masks are filled with the model's own tokens, so that it
        learns to mend its own mistakes; no gradient flows through them.
      remask: probability that a mask is left in the second turn.
    """

    corruption: float = 0.15
    corrupted_weight: float = 1.0
    kept_weight: float = 0.1
    turns: int = 1
    remask: float = 0.5

    def __post_init__(self) -> None:
        for field in ("corruption", "remask"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise InputError(f"editing.{field}: {value} must be between 0 and 1")
        for field in ("corrupted_weight", "kept_weight"):
            if (value := getattr(self, field)) < 0:
                raise InputError(f"editing.{field}: {value} must be at least 0")
        if self.turns not in (1, 2):
            raise InputError(f"editing.turns: {self.turns} must be 1 or 2")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is hidden, and how its recovery is weighed. The default is LLaDA's fine-tuning.

    Attributes:
      mask_ratio: band that a row's mask ratio t is drawn from; LLaDA (0, 1), LLaDA2.0's
        fine-tuning (0.3, 0.8).
      floor: least masking probability, LLaDA's epsilon: p = (1 - floor) t + floor.
      weighting: 'elbo' or 'mean', see `diffusion_losses.denoising`.
      truncated: share of rows that are cut to a random length; LLaDA's pre-training 0.01.
      block_schedule: pairs of the step that a block size begins at and the size in tokens, the
        first at step 0; empty for attention over the whole row. A size of at least the row's length
        is the whole row as one block.
      editing: None to learn from masks alone.
      confidence_weight: of `diffusion_losses.confidence`.
    """

    mask_ratio: tuple[float, float] = (0.0, 1.0)
    floor: float = 1e-3
    weighting: str = "elbo"
    truncated: float = 0.0
    block_schedule: tuple[tuple[int, int], ...] = ()
    editing: Editing | None = None
    confidence_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice("objective.weighting", self.weighting, diffusion_losses.WEIGHTINGS)
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"objective.mask_ratio: {self.mask_ratio} must be a band between 0 and 1"
            )
        if not 0 < self.floor < 1:
            raise InputError(f"objective.floor: {self.floor} must be above 0 and below 1")
        if not 0 <= self.truncated <= 1:
            raise InputError(f"objective.truncated: {self.truncated} must be between 0 and 1")
        if self.confidence_weight < 0:
            raise InputError(
                f"objective.confidence_weight: {self.confidence_weight} must be at least 0"
            )
        starts = [start for start, _ in self.block_schedule]
        sizes = [size for _, size in self.block_schedule]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or min(sizes) < 1):
            raise InputError(
                f"objective.block_schedule: {self.block_schedule} must be pairs of step and block "
                "size, the steps rising from 0 and the sizes at least 1"
            )


def train(
    config: TrainConfig,
    objective: Objective,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    initial_params: Any = None,
    description: str = "train",
) -> loop.Result:
    """Trains a masked diffusion model, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`; `config.model` is bidirectional and has a mask token.
      objective: see `Objective`.
      train_batches: endless iterator with `get_state` and `set_state`, over batches of
        `training.canvas_batches` (prompts are never hidden) or of `training.batches` (all is).
      eval_batches: iterated from its start at every evaluation; None for no evaluation.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      identity: what identifies the data and the initial parameters, as JSON can hold it.
      initial_params: where a fresh run starts, such as a model of another block size.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (an upper bound on
      the nats a token of the answers, end-of-text included) and `eval_accuracy` (of masked
      tokens, at mask ratios spread over (0, 1)), both with the last block size of the schedule.

    Raises:
      InputError: as `loop.run`; a model that is left to right or has no mask token; distillation;
        a batch of the wrong shape or with ids out of range.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    check(config)
    mesh = sharding.make_mesh(*config.mesh)
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, functools.partial(loss_fn, config, objective)),
        prepare=lambda _, batch: put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=(
            evaluator(config, objective, eval_batches, mesh) if eval_batches is not None else None
        ),
        workdir=workdir,
        recorded={"objective": dataclasses.asdict(objective), "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        description=description,
    )


def put(batch: Batch, config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """A canvas batch or a packed batch on the mesh: [B, T] each.

    tokens, segment_ids and positions int32; changeable bool: where tokens may be hidden.

    Raises:
      InputError: a field that is missing or of another shape, or a token id out of range.
    """
    if "tokens" not in batch:
        raise InputError("batch.tokens: missing")
    tokens = batch["tokens"]
    if "prompt_lengths" in batch:
        index = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
        lengths = batch["prompt_lengths"]
        if lengths.shape != tokens.shape[:1]:
            raise InputError(
                f"batch.prompt_lengths: shape {lengths.shape} must be {tokens.shape[:1]}"
            )
        rows: Batch = {
            "tokens": tokens,
            "segment_ids": np.ones_like(tokens),
            "positions": index,
            "changeable": index >= lengths[:, None],
        }
    else:
        rows = dict(batch)
        if "segment_ids" in batch:
            rows["changeable"] = batch["segment_ids"] > 0
    return fitting.place(rows, config, mesh, fields=_FIELDS, ids=("tokens",))


def loss_fn(
    config: TrainConfig,
    objective: Objective,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    frozen: None = None,
) -> tuple[jax.Array, loop.Metrics]:
    """The objective on a batch, float32 [], and its parts."""
    del frozen
    model, key = fitting.compute_config(config), fitting.step_key(config, step)
    tokens = batch["tokens"]
    batch = truncate(batch, key, objective.truncated)
    changeable = batch["changeable"]
    hidden = mask_id(model)
    probability = corruption.mask_probabilities(
        key, tokens.shape[0], objective.mask_ratio, objective.floor
    )
    noisy = corruption.mask(key, tokens, changeable, probability, hidden)
    editing = objective.editing
    if editing is not None:
        noisy = corruption.corrupt(key, noisy, editing.corruption, model.vocab_size, hidden)
    block = block_size(objective, step)
    logits = predict(model, params, batch, noisy.tokens, block, remat=config.remat)
    loss, metrics = _loss(objective, logits, tokens, noisy, changeable)
    if editing is not None and editing.turns == 2:
        fills = jax.lax.stop_gradient(jnp.argmax(logits.at[..., hidden].set(-jnp.inf), axis=-1))
        noisy = corruption.fill(key, noisy, fills, tokens, editing.remask)
        logits = predict(model, params, batch, noisy.tokens, block, remat=config.remat)
        second, more = _loss(objective, logits, tokens, noisy, changeable)
        loss = loss + second
        metrics |= {f"second_{name}": value for name, value in more.items()}
    return loss, metrics


def _loss(
    objective: Objective,
    logits: jnp.ndarray,
    tokens: jnp.ndarray,
    noisy: Noisy,
    changeable: jnp.ndarray,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One turn's loss and its parts."""
    nats = losses.cross_entropy(logits, tokens)
    loss = diffusion_losses.denoising(nats, noisy, changeable, objective.weighting)
    metrics = {"denoising": loss}
    if (editing := objective.editing) is not None:
        metrics["editing"] = diffusion_losses.editing(
            nats, noisy, editing.corrupted_weight, editing.kept_weight
        )
        loss = loss + metrics["editing"]
    if objective.confidence_weight:
        metrics["confidence"] = diffusion_losses.confidence(logits, tokens, noisy)
        loss = loss + objective.confidence_weight * metrics["confidence"]
    return loss, metrics


def block_size(objective: Objective, step: jax.Array | int) -> jax.Array | None:
    """Tokens of a block at a step, int32 []; None for attention over the whole row."""
    if not objective.block_schedule:
        return None
    starts, sizes = (jnp.array(column, jnp.int32) for column in zip(*objective.block_schedule))
    return sizes[jnp.searchsorted(starts, step, side="right") - 1]


def predict(
    model: TransformerConfig,
    params: Any,
    batch: DeviceBatch,
    noisy_tokens: jnp.ndarray,
    block: jax.Array | int | None,
    *,
    remat: bool = False,
) -> jnp.ndarray:
    """Logits float32 [B, T, V] for every position of the noisy rows.

    Args:
      model: the architecture.
      params: its parameters.
      batch: tokens (the clean rows), segment_ids and positions, int [B, T].
      noisy_tokens: int [B, T].
      block: None for attention over the whole row; else each block is seen with the clean
        blocks before it, all in one pass over [x_t ; x_0] (`masks.noisy_and_clean`).
      remat: recompute blocks of the network in the backward pass.
    """
    segments, positions = batch["segment_ids"], batch["positions"]
    inputs, mask = noisy_tokens, masks.segments(segments, segments)
    length = inputs.shape[1]
    if block is not None:
        inputs = jnp.concatenate([inputs, batch["tokens"]], axis=1)
        mask = masks.noisy_and_clean(positions, segments, block)
        positions = jnp.tile(positions, (1, 2))
    hidden = transformer.apply(
        model, params, inputs, positions=positions, mask=mask, with_logits=False, remat=remat
    ).hidden
    return transformer.unembed(model, params, hidden[:, :length])


def evaluator(
    config: TrainConfig, objective: Objective, batches: Iterable[Batch], mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: `eval_loss` and `eval_accuracy`, see `train`."""
    model = fitting.compute_config(config)
    block = objective.block_schedule[-1][1] if objective.block_schedule else None

    @jax.jit
    def sums(params: Any, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, ...]:
        tokens, changeable = batch["tokens"], batch["changeable"]
        probability = corruption.mask_probabilities(
            key, tokens.shape[0], (0.0, 1.0), objective.floor
        )
        noisy = corruption.mask(key, tokens, changeable, probability, mask_id(model))
        logits = predict(model, params, batch, noisy.tokens, block)
        nats = jnp.where(noisy.masked, losses.cross_entropy(logits, tokens), 0.0)
        right = noisy.masked & (jnp.argmax(logits, axis=-1) == tokens)
        weighted = (nats / probability).sum()
        return weighted, changeable.sum(), right.sum(), noisy.masked.sum()

    def evaluate(state: TrainState) -> dict[str, float]:
        keys = jax.random.split(jax.random.key(config.seed), _EVAL_DRAWS)
        parts = [
            sums(state.params, placed, jax.random.fold_in(key, index))
            for index, batch in enumerate(batches)
            for placed in [put(batch, config, mesh)]
            for key in keys
        ]
        if not parts:
            raise InputError("eval_batches: there are none")
        nats, tokens, right, masked = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
        if not masked:
            raise InputError("eval_batches: no token of theirs was hidden")
        return {"eval_loss": float(nats / tokens), "eval_accuracy": float(right / masked)}

    return evaluate


def truncate(batch: DeviceBatch, key: jax.Array, share: float) -> DeviceBatch:
    """Rows a share of which are cut; what lies beyond the cut becomes padding."""
    if not share:
        return batch
    rows, length = batch["tokens"].shape
    inside = jnp.arange(length) < corruption.truncated_lengths(key, rows, length, share)
    return {
        **batch,
        "segment_ids": jnp.where(inside, batch["segment_ids"], 0),
        "changeable": batch["changeable"] & inside,
    }


def check(config: TrainConfig) -> None:
    """Raises InputError where a run's model is not one of masked diffusion."""
    if config.model.causal:
        raise InputError("model.causal: True is not for this pipeline, which sees both sides")
    if config.model.mask_token_id is None:
        raise InputError("model.mask_token_id: None; masked diffusion needs a mask token")
    if config.distillation is not None:
        raise InputError("distillation: masked diffusion has none")


def mask_id(model: TransformerConfig) -> int:
    """The mask token of a model that has one."""
    assert model.mask_token_id is not None
    return model.mask_token_id
