"""What the measurements of lexinvariant models share: models, losses by position, figures."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import random_embeddings as lex
from models.random_embeddings import LexinvariantConfig
from training import base_models, lexinvariant_models, losses
from training import lexinvariant as training

_SUMMARY = ("eval_loss", "eval_accuracy", "seconds", "curve", "evaluations")


class Model(NamedTuple):
    """A trained model: its directory, architecture, parameters and summary."""

    directory: Path
    config: LexinvariantConfig
    params: Any
    summary: dict[str, Any]


class Table(NamedTuple):
    """A table of the report: title, columns and rows of names and numbers."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def load_model(name: str, role: str, overrides: Mapping[str, Any]) -> Model:
    """A recipe of `lexinvariant_models`, trained if need be."""
    directory = lexinvariant_models.ensure(name, overrides=overrides)
    config, params = lex.load(directory)
    trained = json.loads((directory / base_models.SUMMARY_FILE).read_text())
    summary = {"role": role, "source": name, "parameters": config.num_params()}
    summary |= {field: trained[field] for field in _SUMMARY if field in trained}
    return Model(directory, config, params, summary)


@functools.cache
def _scorer(config: LexinvariantConfig) -> Any:
    def run(params: Any, rows: jnp.ndarray, keys: jax.Array) -> jnp.ndarray:
        table_of = functools.partial(lex.draw, config, keys=keys)
        logits = training.row_logits(config, params, table_of, rows[:, :-1])
        return losses.cross_entropy(logits, rows[:, 1:])

    return jax.jit(run)


def nats_by_position(
    model: Model, rows: np.ndarray, *, draws: int, batch_size: int, seed: int
) -> np.ndarray:
    """Nats of every next token float64 [N, T] of rows int [N, T + 1].

    With several draws of the table, those of the mean of the probabilities. N must be a multiple
    of `batch_size`.
    """
    found = []
    for first in range(0, len(rows), batch_size):
        part, each = rows[first : first + batch_size], []
        for draw in range(draws):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw), first)
            keys = jax.random.split(key, batch_size)
            each.append(np.asarray(_scorer(model.config)(model.params, part, keys), np.float64))
        found.append(-np.logaddexp.reduce(-np.array(each), axis=0) + np.log(draws))
    return np.concatenate(found)


def smooth(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions float [M] and means of `values` [T] over `window` of them around each."""
    window = min(window, len(values))
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(len(means)) + (window + 1) / 2, means


def curve(title: str, y_label: str, series: Sequence[tuple[str, Any, Any]]) -> dict[str, Any]:
    """A figure for `plots.lines` of (label, x, y)."""
    return {
        "title": title,
        "x_label": "symbols of context",
        "y_label": y_label,
        "series": [
            {"label": label, "x": np.asarray(x).tolist(), "y": np.asarray(y).tolist()}
            for label, x, y in series
        ],
    }
