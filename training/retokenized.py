"""Continued training of a language model whose tokeniser was exchanged (ZeTT, section 2.7).

Either the model alone, from tables that a heuristic made, or the model and its hypernetwork
together: then each step predicts the tables anew, and an auxiliary loss keeps them near what was
predicted at first. Learning rate constant, gradients clipped to 0.1; published: 50k steps of 32
rows of 512 tokens, 3e-6 with the hypernetwork and 6e-6 without.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import hypernetwork as network
from models import sharding, token_tables
from models.hypernetwork import HypernetworkConfig
from models.token_tables import Tables
from training import fitting, hypernetwork_losses, language_model, loop
from training.fitting import TrainConfig
from training.optimizers import OptimizerConfig


class Predicting(NamedTuple):
    """A hypernetwork that learns along with its language model.

    Attributes:
      config, params: it.
      source: [V_source, c], the table that it reads; it stays as it is.
      surfaces: int32 [V, L] of the new tokeniser's tokens.
      specials: int32 [s], ids of special tokens, whose rows stay the language model's.
      auxiliary_weight: of the distance to the rows predicted at first. Published: 0.5.
    """

    config: HypernetworkConfig
    params: Any
    source: jax.Array
    surfaces: np.ndarray
    specials: np.ndarray
    auxiliary_weight: float = 0.5


def optimizer(learning_rate: float) -> OptimizerConfig:
    """AdamW at a constant rate, clipped to 0.1."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        warmup_steps=0,
        final_fraction=1.0,
        weight_decay=0.01,
        clip_norm=0.1,
    )


def train(
    config: TrainConfig,
    params: Any,
    *,
    train_batches: loop.Batches,
    evaluate: Callable[[Any], dict[str, float]] | None,
    workdir: str | pathlib.Path,
    predicting: Predicting | None = None,
    identity: Mapping[str, Any] | None = None,
    description: str = "retokenized",
) -> Any:
    """Trains a left-to-right model on text in its new tokeniser, or goes on where it left off.

    Args:
      config: of the run; `model` has the new vocabulary.
      params: of the model, tables of the new tokeniser in it.
      train_batches, workdir, identity, description: as in `language_model.train`.
      evaluate: makes metrics of the model's parameters, `eval_loss` among them; None for none.
      predicting: None to train the model and its tables alone.

    Returns:
      Parameters of the model, its last tables in it.

    Raises:
      InputError, SystemExit: as `fitting.fit`.
    """
    mesh = sharding.make_mesh(*config.mesh)
    if predicting is None:
        loss: fitting.LossFn = functools.partial(language_model.loss_fn, config, None)
        initial, frozen = params, None
    else:
        initial = {"model": params, "hypernetwork": predicting.params}
        old = token_tables.tables(config.model, params)
        frozen = {
            "source": jnp.asarray(predicting.source, jnp.float32),
            "surfaces": jnp.asarray(predicting.surfaces),
            "specials": jnp.asarray(predicting.specials),
            "first": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), old),
        }
        loss = functools.partial(_joint_loss, config, predicting)

    def model_of(trained: Any) -> Any:
        if predicting is None:
            return trained
        tables = _tables(predicting.config, trained, frozen)
        return token_tables.with_tables(trained["model"], tables)

    measure = evaluate and (lambda state: evaluate(model_of(state.params)))
    found = fitting.fit(
        config,
        functools.partial(fitting.update, config, loss),
        prepare=lambda _, batch: language_model.put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=measure,
        workdir=workdir,
        recorded={"identity": identity, "joint": predicting is not None},
        mesh=mesh,
        initial_params=initial,
        frozen=frozen,
        description=description,
    )
    return model_of(found.state.params)


def _tables(config: HypernetworkConfig, params: Any, frozen: Any) -> Tables:
    """All tokens' rows as predicted, but for the special tokens, which keep theirs."""
    found = network.apply(config, params["hypernetwork"], frozen["source"], frozen["surfaces"])
    places = frozen["specials"]
    return token_tables.with_rows(found, frozen["first"], places, places)


def _joint_loss(
    config: TrainConfig,
    predicting: Predicting,
    params: Any,
    batch: Mapping[str, jax.Array],
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The language model's loss with predicted tables, and how far these went."""
    tables = _tables(predicting.config, params, frozen)
    changed = token_tables.with_tables(params["model"], tables)
    nats, _ = language_model.loss_fn(config, None, changed, batch, step, None)
    everyone = jnp.ones(tables.input.shape[0])
    auxiliary = hypernetwork_losses.distance(tables, frozen["first"], everyone)
    loss = nats + predicting.auxiliary_weight * auxiliary
    return loss, {"nats": nats, "auxiliary": auxiliary}
