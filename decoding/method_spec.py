"""How a decoding method is described to users: options, the models it needs, how it is built."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from decoding.loop import Method
from decoding.sampling import SamplingConfig
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.hierarchical import HierarchicalConfig
from models.masked_words import ReaderConfig
from models.random_embeddings import LexinvariantConfig

# By role: `TransformerConfig`s, or the `HierarchicalConfig` of a hierarchical method.
Configs = Mapping[str, Any]


# Architectures that are not a Transformer of tokens, each with methods of its own.
ARCHITECTURES: dict[type, str] = {
    HierarchicalConfig: "models of words",
    ReaderConfig: "models that read words from bytes",
    LexinvariantConfig: "models that are given their token table (lexinvariant)",
    TransformerConfig: "models of tokens",
}


def architecture_of(config: Any) -> type:
    """The class of `ARCHITECTURES` that a config is of."""
    return next(kind for kind in ARCHITECTURES if isinstance(config, kind))


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
      default: also gives the type that text is parsed as.
      help: one line.
      minimum: smallest allowed value of a number.
      choices: allowed values of a string.
    """

    default: int | float | str | bool
    help: str
    minimum: float | None = None
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method as users see it.

    Attributes:
      summary: one line.
      roles: models it needs.
      options: by name.
      build: (configs by role, sampling, option values) -> Method.
      model_free: (option, value) with which it needs no model but the target; None if it always
        needs all of `roles`.
      bidirectional: whether it fills the masks of a bidirectional model; else it writes from left
        to right and needs causal ones.
      parts: its own trained parts, by the role that their parameters are given under.
      parts_with: (option, value) with which alone it needs its parts; None if it always does.
      architecture: class of its models' configs: a `TransformerConfig` of tokens, or one of
        `ARCHITECTURES`.
    """

    summary: str
    roles: tuple[str, ...]
    options: Mapping[str, Option]
    build: Callable[[Configs, SamplingConfig, Mapping[str, Any]], Method]
    model_free: tuple[str, str] | None = None
    bidirectional: bool = False
    parts: tuple[str, ...] = ()
    parts_with: tuple[str, str] | None = None
    architecture: type = TransformerConfig

    def trained_parts(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Parts it needs with these option values, as `parse_options` returns them."""
        if self.parts_with is not None and options[self.parts_with[0]] != self.parts_with[1]:
            return ()
        return self.parts

    def roles_with(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Models it needs with these option values, as `parse_options` returns them."""
        if self.model_free is not None and options[self.model_free[0]] == self.model_free[1]:
            return ("target",)
        return self.roles


def parse_value(key: str, value: Any, option: Option) -> Any:
    """The value of an option; text is parsed as the default's type. Raises InputError."""
    kind = type(option.default)
    try:
        if kind is bool and isinstance(value, str):
            parsed: Any = {"true": True, "false": False}[value.lower()]
        elif kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        else:
            parsed = kind(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{key}: {value!r} is not of type {kind.__name__}") from None
    if option.choices:
        check_choice(key, parsed, option.choices)
    if option.minimum is not None and not parsed >= option.minimum:
        raise InputError(f"{key}: {parsed} must be at least {option.minimum:g}")
    return parsed
