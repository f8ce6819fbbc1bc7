"""Trained parts that methods of a comparison decode with: trained on first use, or from files."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from decoding.loop import ModelParams
from decoding.unmasking import learned_filter
from models.errors import InputError, check_choice
from training import unmask_filter
from training.unmask_filter import FilterRecipe, FilterTraining, Source


def directory_of(config: ConfigDict, name: str) -> Path:
    """The directory of a filter of `config.filters`, which is trained if no run has done so.

    An entry has a `directory`, or the fields of `training.unmask_filter.FilterRecipe`; its target
    is the comparison's.

    Raises:
      InputError: no filter has this name, a field is not known; as `unmask_filter.ensure`.
    """
    check_choice("filter", name, config.filters)
    entry: dict[str, Any] = config.filters[name].to_dict()
    if directory := entry.pop("directory", None):
        return Path(directory)
    try:
        sources = tuple(Source(**source) for source in entry.pop("sources"))
        training = FilterTraining(**entry.pop("training"))
        recipe = FilterRecipe(config.models.target, sources, training=training, **entry)
    except (KeyError, TypeError) as error:
        raise InputError(f"config.filters.{name}: {error}") from None
    return unmask_filter.ensure(recipe)


def filters(config: ConfigDict) -> dict[str, ModelParams]:
    """Parameters by role for each filter that a method of the comparison names."""
    names = {entry.get("filter") for entry in config.decode.methods} - {None, ""}
    return {
        name: {learned_filter.ROLE: learned_filter.load(directory_of(config, name))[1]}
        for name in sorted(names)
    }
