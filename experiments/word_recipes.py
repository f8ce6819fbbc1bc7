"""What a config of word readers says, as recipes of `training.word_models`."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from models.errors import InputError, check_choice
from training import optimizers, word_tasks
from training.word_masked_lm import Objective
from training.word_models import Corpus, Pretraining, RunSizes, Task
from training.word_rows import RowShape


def pretraining(config: ConfigDict, role: str) -> Pretraining:
    """The recipe of one of `config.models`: what all models share, and its own fields.

    Raises:
      InputError: an unknown role or field.
    """
    check_choice("config.models", role, config.models)
    mine = config.models[role].to_dict()
    objective = mine.pop("objective", "masked")
    run = run_sizes(config.run, config.seed)
    run = dataclasses.replace(run, num_steps=mine.pop("num_steps", run.num_steps))
    shared = config.pretraining.to_dict()
    try:
        corpora = tuple(Corpus(**entry) for entry in config.corpora.to_dict().values())
        rows = RowShape(**config.rows.to_dict(), end_of_text=objective == "causal")
        return Pretraining(
            corpora=corpora,
            rows=rows,
            objective=Objective(objective, mask_rate=config.mask_rate),
            run=run,
            **{**shared, **mine},
        )
    except TypeError as error:
        raise InputError(f"config.models: {role}: {error}") from None


def run_sizes(run: ConfigDict, seed: int) -> RunSizes:
    """`RunSizes` of a part of a config."""
    fields = run.to_dict()
    return RunSizes(
        optimizer=optimizers.from_fields(**fields.pop("optimizer")), seed=seed, **fields
    )


def task(config: ConfigDict, name: str, cache: pathlib.Path) -> Task:
    """One of `config.tasks`, its texts read.

    Raises:
      InputError: an unknown task, source or option; as the source.
    """
    check_choice("config.tasks", name, config.tasks)
    entry: Mapping[str, Any] = config.tasks[name].to_dict()
    check_choice(f"config.tasks.{name}.source", entry["source"], _SOURCES)
    shared = {key: config.rows[key] for key in ("width", "num_slots")}
    try:
        rows = RowShape(**shared, **entry["rows"])
        return _SOURCES[entry["source"]](rows, cache, name, entry["options"])
    except TypeError as error:
        raise InputError(f"config.tasks.{name}: {error}") from None


def _labelled(rows: RowShape, _: pathlib.Path, name: str, options: Mapping[str, Any]) -> Task:
    return word_tasks.labelled(rows, name=name, **options)


_SOURCES: dict[str, Callable[[RowShape, pathlib.Path, str, Mapping[str, Any]], Task]] = {
    "sections": lambda rows, cache, _, options: word_tasks.sections(rows, cache, **options),
    "names": lambda rows, cache, _, options: word_tasks.names(rows, cache, **options),
    "labelled": _labelled,
}
