"""Fine-tuning for a schedule of skipped layers (SkipDecode, arXiv 2307.02628, section 4).

Nothing is added to the model: it learns to do with the layers that the schedule leaves, by the
ordinary loss, on the graph that decoding computes (`models.layer_skipping.gated`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models import masks, sharding
from models.errors import InputError
from models.layer_skipping import SkipSchedule, gated
from training import fitting, language_model, loop, losses
from training.fine_tuned import Tuning
from training.fitting import Batch, DeviceBatch, TrainConfig


def train(
    config: TrainConfig,
    schedule: SkipSchedule,
    *,
    initial_params: Any,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    prompt_tokens: int | None = None,
    identity: Mapping[str, Any] | None = None,
    description: str = "skip",
) -> loop.Result:
    """Fine-tunes a model for a schedule, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`.
      schedule: see `SkipSchedule`.
      initial_params: of the model to fine-tune.
      train_batches, eval_batches, workdir, identity, description: as `language_model.train`.
      prompt_tokens: tokens at the start of each segment that count as the prompt; None where the
        batch's `loss_mask` says which are: those before the first that counts.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` in nats a token.

    Raises:
      InputError, SystemExit: as `language_model.train`; `SkipSchedule.check`.
    """
    schedule.check(config.model)
    if not config.model.causal:
        raise InputError("model.causal: False is not for this pipeline, which is left to right")
    mesh = sharding.make_mesh(*config.mesh)
    loss = functools.partial(loss_fn, config, schedule, prompt_tokens)
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss),
        prepare=lambda _, batch: language_model.put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=language_model.mean_evaluator(config, loss, eval_batches, mesh)
        if eval_batches is not None
        else None,
        workdir=workdir,
        recorded={"schedule": dataclasses.asdict(schedule), "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        description=description,
    )


def loss_fn(
    config: TrainConfig,
    schedule: SkipSchedule,
    prompt_tokens: int | None,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    frozen: None,
) -> tuple[jax.Array, loop.Metrics]:
    """The mean over the tokens of `loss_mask`, in nats."""
    del step, frozen
    logits = gated(
        fitting.compute_config(config),
        params,
        batch["tokens"],
        generated(batch, prompt_tokens),
        schedule,
        positions=batch["positions"],
        mask=masks.packed_causal(batch["segment_ids"]),
        remat=config.remat,
    )
    nats = losses.cross_entropy(logits, batch["targets"])
    return losses.masked_mean(nats, batch["loss_mask"]), {}


def generated(batch: DeviceBatch, prompt_tokens: int | None) -> jax.Array:
    """For each token how many were generated before the one it leads to: int32 [B, T].

    The last token of a prompt leads to the first generated one: 0. Before it numbers are negative.
    """
    positions = batch["positions"]
    if prompt_tokens is not None:
        return positions - (prompt_tokens - 1)
    counts = (batch["loss_mask"] > 0).astype(jnp.int32)
    total = jnp.cumsum(counts, axis=1)
    # What came before this segment does not count: its largest total is that at its first token.
    begins = positions == 0
    before = jax.lax.cummax(jnp.where(begins, total - counts, 0), axis=1)
    within = total - before
    return jnp.where(within > 0, within - 1, -1)


def tuning(schedule: SkipSchedule, prompt_tokens: int | None = None) -> Tuning:
    """For `fine_tuned.ensure`; `prompt_tokens` as `train`, None on answers."""
    settings = dataclasses.asdict(schedule)
    if prompt_tokens is not None:
        settings["prompt_tokens"] = prompt_tokens
    return Tuning(
        "skip_decode",
        settings,
        lambda config, **run: train(config, schedule, prompt_tokens=prompt_tokens, **run),
    )
