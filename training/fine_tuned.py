"""Fine-tuned copies of a model: trained once, kept by what they are made from.

A method may need a model that has been trained for it, whole: for placeholders, for a schedule of
layers, for exits. Such a copy is a checkpoint in Hugging Face's format like any other.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from models import files, hf_checkpoint
from training import artifacts, checkpoints, loop, metric_writers, target_features
from training.target_features import SUMMARY_FILE, PartRecipe

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1


class Tuning(NamedTuple):
    """What a copy is trained for.

    Attributes:
      name: of directories and progress bars.
      settings: what determines it beside model and text, as JSON can hold it.
      train: a pipeline without its settings: (config, *, initial_params, train_batches,
        eval_batches, workdir, identity, description) -> result.
    """

    name: str
    settings: Mapping[str, Any]
    train: Callable[..., loop.Result]


def ensure(
    recipe: PartRecipe, tuning: Tuning, *, cache_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """The directory of a copy, which is trained first if it is not there yet.

    Args:
      recipe: `target` is the model that training starts from; the rest as for a part.
      tuning: see `Tuning`.
      cache_dir: where models and data are kept; None for `files.cache_root()`.

    Returns:
      A directory with config.json, model.safetensors, the tokeniser of the model that it was made
      from, and training_summary.json (loss curve, evaluations, seconds).

    Raises:
      InputError, SystemExit: as `base_models.ensure` and the pipeline.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    source = target_features.open_source(recipe, cache)
    identity = {
        "tuning": tuning.name,
        "settings": dict(tuning.settings),
        **source.identity,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        config, params, data = target_features.prepare(recipe, source)
        trained = tuning.train(
            config,
            initial_params=params,
            **data,
            workdir=work / "run",
            identity=identity,
            description=tuning.name,
        )
        hf_checkpoint.save(
            result,
            config.model,
            jax.device_get(trained.state.params),
            tokenizer_from=source.directory,
        )
        lines = metric_writers.read_metrics(work / "run" / metric_writers.METRICS_FILE)
        summary = {
            **identity,
            "tokens": config.num_steps * config.batch_size * config.sequence_length,
            "seconds": trained.seconds,
            **trained.metrics,
            "curve": [line for line in lines if "loss" in line],
            "evaluations": [line for line in lines if "eval_loss" in line],
        }
        with checkpoints.disk_errors("cannot write the summary", result):
            checkpoints.write_json(result / SUMMARY_FILE, summary)

    name = f"{source.directory.name}-{tuning.name}-{artifacts.digest(identity)}"
    return artifacts.cached(cache / "models" / name, make)
