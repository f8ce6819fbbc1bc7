"""Trained parts that methods of a comparison decode with: trained on first use, or from files.

An entry of `config.parts` has a `kind`, and a `directory` or what the kind's pipeline needs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from decoding import methods
from decoding.loop import ModelParams
from decoding.unmasking import learned_filter
from experiments import fine_tuned_models, method_parts
from models import accelerated_residual as accelerated_residual_model
from models import chimera_heads as chimera_heads_model
from models import exit_adapter as exit_adapter_model
from models import feature_head as feature_head_model
from models import medusa_heads as medusa_heads_model
from models import prompt_tokens as prompt_tokens_model
from models.accelerated_residual import AcceleratorConfig
from models.chimera_heads import ChimeraConfig
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.exit_adapter import ExitAdapterConfig
from models.feature_head import FeatureHeadConfig
from models.medusa_heads import MedusaConfig
from models.prompt_tokens import PromptTokensConfig
from training import (
    accelerated_residual,
    chimera_heads,
    exit_adapter,
    feature_head,
    medusa_heads,
    prompt_marginals,
    prompt_tokens,
    target_features,
    unmask_filter,
)
from training.optimizers import OptimizerConfig
from training.target_features import PartRecipe
from training.unmask_filter import FilterRecipe, FilterTraining, Source


class _Kind(NamedTuple):
    """A kind of part.

    Attributes:
      role: of its parameters.
      ensure: (target's source, entry without kind and directory) -> directory; raises KeyError or
        TypeError for fields that are missing or unknown.
    """

    role: str
    ensure: Callable[[str, dict[str, Any]], Path]


def _filter(target: str, entry: dict[str, Any]) -> Path:
    sources = tuple(Source(**source) for source in entry.pop("sources"))
    training = FilterTraining(**entry.pop("training"))
    return unmask_filter.ensure(FilterRecipe(target, sources, training=training, **entry))


def _adapter(target: str, entry: dict[str, Any]) -> Path:
    adapter = ExitAdapterConfig(**entry.pop("adapter"))
    return target_features.ensure(_recipe(target, entry), exit_adapter.part(adapter))


def _accelerator(target: str, entry: dict[str, Any]) -> Path:
    config = AcceleratorConfig(**entry.pop("accelerator"))
    objective = accelerated_residual.Objective(**entry.pop("objective", {}))
    return target_features.ensure(
        _recipe(target, entry), accelerated_residual.part(config, objective)
    )


def _head(target: str, entry: dict[str, Any]) -> Path:
    head = FeatureHeadConfig(**entry.pop("head"))
    objective = feature_head.Objective(**entry.pop("objective", {}))
    return target_features.ensure(_recipe(target, entry), feature_head.part(head, objective))


def _prompts(target: str, entry: dict[str, Any]) -> Path:
    prompts = PromptTokensConfig(**entry.pop("prompts"))
    objective = prompt_tokens.Objective(**entry.pop("objective"))
    return prompt_marginals.ensure(_recipe(target, entry), prompts, objective)


def _medusa(target: str, entry: dict[str, Any]) -> Path:
    heads = MedusaConfig(**entry.pop("heads"))
    return target_features.ensure(_recipe(target, entry), medusa_heads.part(heads))


def _chimera(target: str, entry: dict[str, Any]) -> Path:
    heads = ChimeraConfig(**entry.pop("heads"))
    objective = chimera_heads.Objective(**entry.pop("objective", {}))
    return target_features.ensure(_recipe(target, entry), chimera_heads.part(heads, objective))


def _recipe(target: str, entry: dict[str, Any]) -> PartRecipe:
    if optimizer := entry.pop("optimizer", None):
        entry["optimizer"] = OptimizerConfig(**optimizer)
    return PartRecipe(target, **entry)


KINDS = {
    "filter": _Kind(learned_filter.ROLE, _filter),
    "accelerator": _Kind(accelerated_residual_model.ROLE, _accelerator),
    "exit_adapter": _Kind(exit_adapter_model.ROLE, _adapter),
    "feature_head": _Kind(feature_head_model.ROLE, _head),
    "medusa_heads": _Kind(medusa_heads_model.ROLE, _medusa),
    "chimera_heads": _Kind(chimera_heads_model.ROLE, _chimera),
    "prompt_tokens": _Kind(prompt_tokens_model.ROLE, _prompts),
}


def directory_of(config: ConfigDict, name: str) -> Path:
    """The directory of a part of `config.parts`, which is trained if no run has done so.

    Raises:
      InputError: no part has this name, a kind or a field is not known; as the pipeline.
    """
    check_choice("part", name, config.parts)
    entry: dict[str, Any] = config.parts[name].to_dict()
    kind = entry.pop("kind", None)
    check_choice(f"config.parts.{name}: kind", kind, KINDS)
    if directory := entry.pop("directory", None):
        return Path(directory)
    try:
        return KINDS[kind].ensure(fine_tuned_models.source_of(config.models.target), entry)
    except (KeyError, TypeError) as error:
        raise InputError(f"config.parts.{name}: {error}") from None


def load(
    config: ConfigDict, configs: Mapping[str, TransformerConfig], kind: str | None = None
) -> dict[str, ModelParams]:
    """Parameters by role for each part (of a kind) that a method of the comparison names."""
    entries = {entry.part: entry for entry in config.decode.methods if entry.get("part")}
    found: dict[str, ModelParams] = {}
    for name, entry in sorted(entries.items()):
        directory, of = directory_of(config, name), config.parts[name].kind
        if kind in (None, of):
            options = methods.parse_options(entry.method, entry.options.to_dict())
            role = KINDS[of].role
            found[name] = {
                role: method_parts.load_part(role, directory, options, configs["target"])
            }
    return found
