"""Models of a comparison that are fine-tuned copies of another: made on first use.

An entry of `config.models` is a named base model, a directory, `random:SIZE`, or what
`config_parts.fine_tuned` describes.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from models.errors import InputError, check_choice
from models.layer_skipping import SkipSchedule
from training import early_exit, fine_tuned, lexical_units, optimizers, skip_decode
from training.fine_tuned import Tuning
from training.lexical_units import Units
from training.target_features import PartRecipe

# What a copy may be trained for: settings -> tuning.
KINDS: dict[str, Callable[[dict[str, Any]], Tuning]] = {
    "early_exit": lambda settings: early_exit.tuning(**settings),
    "lexical_units": lambda settings: lexical_units.tuning(Units(**settings)),
    "skip_decode": lambda settings: skip_decode.tuning(
        prompt_tokens=settings.pop("prompt_tokens", None), schedule=SkipSchedule(**settings)
    ),
}


def source_of(model: str | Mapping[str, Any]) -> str:
    """Name or directory of an entry of `config.models`; a copy is trained if no run has done so.

    Raises:
      InputError: a kind or a field that is not known; as `fine_tuned.ensure`.
    """
    if isinstance(model, str):
        return model
    entry = model.to_dict() if isinstance(model, ConfigDict) else dict(model)
    kind = str(entry.pop("kind", None))
    check_choice("config.models: kind", kind, KINDS)
    try:
        tuning = KINDS[kind](entry.pop("settings", {}))
        if optimizer := entry.pop("optimizer", None):
            entry["optimizer"] = optimizers.from_fields(**optimizer)
        recipe = PartRecipe(entry.pop("start"), **entry)
    except (KeyError, TypeError) as error:
        raise InputError(f"config.models: {error}") from None
    return str(fine_tuned.ensure(recipe, tuning))


def describe(model: str | Mapping[str, Any]) -> str:
    """An entry in words, for reports."""
    return model if isinstance(model, str) else f"{model['start']}, {model['kind']}"
