"""Fine-tuning for exits at any layer: the baseline CALM-DEC (Schuster et al., arXiv 2207.07061).

Every layer learns to say the next token through the model's own final norm and head; later layers
count for more.
"""

import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from models import masks, sharding, transformer
from models.errors import InputError
from training import fitting, language_model, loop, losses
from training.fine_tuned import Tuning
from training.fitting import Batch, DeviceBatch, TrainConfig


def train(
    config: TrainConfig,
    *,
    initial_params: Any,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "exits",
) -> loop.Result:
    """Fine-tunes a model for exits, or goes on where `workdir` left off.

    Args: as `skip_decode.train`.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss`, and the loss of
      the last layer alone as `eval_last_loss`, nats a token.

    Raises:
      InputError, SystemExit: as `language_model.train`.
    """
    if not config.model.causal:
        raise InputError("model.causal: False is not for this pipeline, which is left to right")
    mesh = sharding.make_mesh(*config.mesh)
    loss = functools.partial(loss_fn, config)
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss),
        prepare=lambda _, batch: language_model.put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=language_model.mean_evaluator(config, loss, eval_batches, mesh)
        if eval_batches is not None
        else None,
        workdir=workdir,
        recorded={"exits": "all", "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        description=description,
    )


def loss_fn(
    config: TrainConfig, params: Any, batch: DeviceBatch, step: jax.Array, frozen: None
) -> tuple[jax.Array, loop.Metrics]:
    """sum_l w_l loss_l with w_l = l / sum_j j, each a mean over the tokens of `loss_mask`."""
    del step, frozen
    model = fitting.compute_config(config)
    L = model.num_layers
    out = transformer.apply(
        model,
        params,
        batch["tokens"],
        positions=batch["positions"],
        mask=masks.packed_causal(batch["segment_ids"]),
        collect=range(1, L + 1),
        with_logits=False,
        remat=config.remat,
    )
    total = last = jax.numpy.zeros(())
    for layer, stream in enumerate(out.collected, start=1):
        hidden = transformer.final_norm(model, params, stream)
        nats = losses.cross_entropy(transformer.unembed(model, params, hidden), batch["targets"])
        last = losses.masked_mean(nats, batch["loss_mask"])
        total += 2 * layer / (L * (L + 1)) * last
    return total, {"last_loss": last}


def tuning() -> Tuning:
    """For `fine_tuned.ensure`."""
    return Tuning("early_exit", {}, train)
