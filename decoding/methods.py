"""Every decoding method by name, with its options: what command lines and configs choose from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from decoding import randomness
from decoding.autoregressive import autoregressive
from decoding.loop import Method
from decoding.sampling import SamplingConfig
from decoding.speculative.draft_model import model_drafter
from decoding.speculative.method import speculative
from decoding.speculative.ngram import ngram_drafter
from models.config import TransformerConfig
from models.errors import InputError, check_choice, nearest

Configs = Mapping[str, TransformerConfig]


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
    """

    summary: str
    roles: tuple[str, ...]
    options: Mapping[str, Option]
    build: Callable[[Configs, SamplingConfig, Mapping[str, Any]], Method]


def _build_autoregressive(
    configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    return autoregressive(configs["target"], sampling)


def _build_prompt_lookup(
    configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    if options["min_ngram"] > options["max_ngram"]:
        raise InputError(
            f"min_ngram: {options['min_ngram']} must be at most max_ngram {options['max_ngram']}"
        )
    drafter = ngram_drafter(options["num_draft"], options["max_ngram"], options["min_ngram"])
    return speculative("prompt_lookup", configs["target"], drafter, "exact_match", sampling)


def _build_speculative_sampling(
    configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    # At temperature 0 both rules are one: keep the draft that equals the target's arg-max.
    rule = "exact_match" if sampling.greedy else options["rule"]
    drafting = sampling
    if not sampling.greedy and options["draft_temperature"] > 0:
        drafting = dataclasses.replace(sampling, temperature=options["draft_temperature"])
    purpose = randomness.SAMPLE if rule == "exact_match" else randomness.DRAFT
    drafter = model_drafter(configs["draft"], options["num_draft"], drafting, purpose)
    return speculative("speculative_sampling", configs["target"], drafter, rule, sampling)


_NUM_DRAFT = Option(5, "tokens drafted a round", minimum=1)

METHODS: dict[str, MethodSpec] = {
    "autoregressive": MethodSpec(
        "plain decoding: one target call a token",
        ("target",),
        {},
        _build_autoregressive,
    ),
    "prompt_lookup": MethodSpec(
        "drafts what followed the last n-gram earlier in the row; verified exactly (lossless)",
        ("target",),
        {
            "num_draft": _NUM_DRAFT,
            "max_ngram": Option(3, "longest suffix looked up", minimum=1),
            "min_ngram": Option(1, "shortest suffix looked up", minimum=1),
        },
        _build_prompt_lookup,
    ),
    "speculative_sampling": MethodSpec(
        "a draft model drafts a chain; rejection sampling keeps the target's law (lossless)",
        ("target", "draft"),
        {
            "num_draft": _NUM_DRAFT,
            "draft_temperature": Option(0.0, "of the draft; 0 for the target's", minimum=0.0),
            "rule": Option(
                "speculative_sampling",
                "verification rule; exact_match gives plain decoding's own tokens",
                choices=("speculative_sampling", "exact_match"),
            ),
        },
        _build_speculative_sampling,
    ),
}


def spec(name: str) -> MethodSpec:
    """The method called `name`; InputError with the nearest name otherwise."""
    check_choice("method", name, METHODS)
    return METHODS[name]


def parse_options(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Option values of a method, defaults filled in.

    Args:
      name: the method.
      values: by option name; strings are parsed as the default's type.

    Raises:
      InputError: an option that does not exist, or a value of the wrong type or range.
    """
    options = spec(name).options
    for key in values:
        if key not in options:
            allowed = ", ".join(sorted(options)) or "none"
            raise InputError(
                f"method {name} has no option {key!r}{nearest(key, options)}; allowed: {allowed}"
            )
    return {
        key: _parse(key, values[key], option) if key in values else option.default
        for key, option in options.items()
    }


def _parse(key: str, value: Any, option: Option) -> Any:
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


def build(
    name: str,
    configs: Configs,
    sampling: SamplingConfig,
    options: Mapping[str, Any] | None = None,
) -> Method:
    """A method ready for the loop.

    Args:
      name: a key of METHODS.
      configs: architectures by role ('target', 'draft').
      sampling: the target's distribution.
      options: the method's own; see `MethodSpec.options`.

    Raises:
      InputError: unknown method or option, a missing model, or vocabularies that differ.
    """
    method = spec(name)
    for role, config in configs.items():
        if not config.causal:
            raise InputError(
                f"method {name} writes from left to right; the {role} model ({config.family}) is "
                "bidirectional; allowed: causal models"
            )
    for role in method.roles:
        if role not in configs:
            raise InputError(f"method {name} needs a {role} model; given: {', '.join(configs)}")
        if configs[role].vocab_size != configs["target"].vocab_size:
            raise InputError(
                f"vocab_size: the {role} model has {configs[role].vocab_size} tokens, the target "
                f"{configs['target'].vocab_size}; they must be equal"
            )
    return method.build(configs, sampling, parse_options(name, options or {}))
