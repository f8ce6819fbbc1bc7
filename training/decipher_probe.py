"""Training of the probe that deciphers (arXiv 2305.16349, section 4.2): the model stays frozen.

Rows are plain text; the model sees them under a fresh table each, as in its own training, and the
probe learns to name the plain token at every position. It can only do so from how the text goes.
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

from models import decipher_probe, sharding
from models import random_embeddings as lex
from models.decipher_probe import DecipherProbeConfig
from models.errors import InputError
from models.random_embeddings import LexinvariantConfig
from training import fitting, lexinvariant, loop, losses
from training.fitting import Batch, DeviceBatch, TrainConfig, TrainState

_EVALUATION = 2


def activations(
    model: LexinvariantConfig, params: Any, tokens: jnp.ndarray, keys: jax.Array
) -> jnp.ndarray:
    """Last activations [B, T, D], after the final norm, of rows int [B, T] under tables of keys."""
    table = lex.draw(model, params, keys)
    positions = jnp.arange(tokens.shape[1])[None]
    output = lex.apply(model, params, table, tokens, positions=positions, with_logits=False)
    return output.hidden


def nats(
    model: LexinvariantConfig,
    probe: Any,
    batch: DeviceBatch,
    key: jax.Array,
    frozen: Any,
) -> jax.Array:
    """Cross-entropy float32 [B, T] of every row's own tokens."""
    keys = lexinvariant.row_keys(key, batch["tokens"].shape[0])
    hidden = jax.lax.stop_gradient(activations(model, frozen, batch["tokens"], keys))
    return losses.cross_entropy(decipher_probe.apply(probe, hidden), batch["tokens"])


def train(
    config: TrainConfig,
    probe: DecipherProbeConfig,
    params: Any,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "train",
) -> loop.Result:
    """Trains a probe, or goes on where `workdir` left off; batches as in `lexinvariant.train`.

    Args:
      config: the run; `config.model` is the model that is probed.
      probe: sizes of the probe.
      params: the model's parameters, which nothing changes.

    Returns:
      The final `TrainState` with the probe's parameters; `Result.metrics` has `eval_loss` (nats a
      token) and `eval_accuracy`.

    Raises:
      InputError: as `loop.run`; a model that is no lexinvariant one, or a probe of other sizes.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    model = config.model
    if not isinstance(model, LexinvariantConfig) or model.table != "gaussian":
        raise InputError("model: a probe deciphers models whose table is 'gaussian'")
    if (probe.vocab_size, probe.embed_dim) != (model.vocab_size, model.embed_dim):
        raise InputError(
            f"probe: {probe.vocab_size} tokens of width {probe.embed_dim}; the model has "
            f"{model.vocab_size} of width {model.embed_dim}"
        )
    mesh = sharding.make_mesh(*config.mesh)

    def loss_fn(
        current: Any, batch: DeviceBatch, step: jax.Array, frozen: Any
    ) -> tuple[jax.Array, loop.Metrics]:
        values = nats(model, current, batch, fitting.step_key(config, step), frozen)
        return losses.masked_mean(values, batch["loss_mask"]), {}

    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss_fn),
        prepare=lambda _, batch: lexinvariant.put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=(
            evaluator(config, eval_batches, params, mesh) if eval_batches is not None else None
        ),
        workdir=workdir,
        recorded={"probe": dataclasses.asdict(probe), "identity": identity},
        mesh=mesh,
        initial_params=decipher_probe.init(probe, jax.random.key(config.seed)),
        frozen=params,
        description=description,
    )


def evaluator(
    config: TrainConfig, batches: Iterable[Batch], params: Any, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: `eval_loss` in nats and `eval_accuracy`, over all positions."""
    model = config.model
    assert isinstance(model, LexinvariantConfig)
    base = jax.random.fold_in(jax.random.key(config.seed), _EVALUATION)

    @jax.jit
    def sums(
        probe: Any, batch: DeviceBatch, number: jax.Array, params: Any
    ) -> tuple[jax.Array, ...]:
        keys = lexinvariant.row_keys(jax.random.fold_in(base, number), batch["tokens"].shape[0])
        logits = decipher_probe.apply(probe, activations(model, params, batch["tokens"], keys))
        mask = batch["loss_mask"]
        right = (logits.argmax(axis=-1) == batch["tokens"]) * mask
        values = losses.cross_entropy(logits, batch["tokens"]) * mask
        return jnp.sum(values), jnp.sum(right), jnp.sum(mask)

    def evaluate(state: TrainState) -> dict[str, float]:
        parts = [
            sums(state.params, lexinvariant.put(batch, config, mesh), np.int32(number), params)
            for number, batch in enumerate(batches)
        ]
        if not parts:
            raise InputError("eval_batches: there are none")
        total, right, tokens = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
        return {"eval_loss": float(total / tokens), "eval_accuracy": float(right / tokens)}

    return evaluate
