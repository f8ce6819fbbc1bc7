"""Trained parts of decoding methods, and what methods have learned: from a directory to parameters.

A part is named by the role that its parameters are given under; a method names its parts
(`MethodSpec.parts`).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from decoding import methods
from decoding.dynamic_vocabulary import inverted_lists
from decoding.loop import ModelParams
from decoding.speculative import ppd, prompt_trees
from decoding.unmasking import learned_filter
from models import (
    accelerated_residual,
    chimera_heads,
    exit_adapter,
    exit_router,
    feature_head,
    medusa_heads,
    prompt_tokens,
)
from models.errors import InputError

Directory = str | os.PathLike[str]


class _Part(NamedTuple):
    """How a part is had.

    Attributes:
      load: (directory, the method's options, the target's architecture) -> parameters.
      untrained: (the method's options, the target's architecture) -> random ones.
    """

    load: Callable[[Directory, Mapping[str, Any], Any], Any]
    untrained: Callable[[Mapping[str, Any], Any], Any]


def _no_index(options: Mapping[str, Any], target: Any) -> Any:
    raise InputError(
        "untrained_parts: an index is made of a model's own rows; give --method_params"
    )


def _adapter(directory: Directory, options: Mapping[str, Any], target: Any) -> Any:
    config, params = exit_adapter.load(directory, target)
    if config.exit_layer != (wanted := options["exit_layer"]):
        raise InputError(
            f"exit_layer: {wanted} given, but the adapter of {str(directory)!r} is for "
            f"{config.exit_layer}"
        )
    return params


def _prompts(directory: Directory, options: Mapping[str, Any], target: Any) -> Any:
    config, params = prompt_tokens.load(directory, target)
    for name in ("ensemble", "mask"):
        if (mine := getattr(config, name)) != (wanted := options[name]):
            raise InputError(
                f"{name}: {wanted!r} given, but prompt tokens of {str(directory)!r} have {mine!r}"
            )
    source = with_directory("ppd", options, directory)["marginals"]
    if (n := len(prompt_trees.read_marginals(source))) != config.distances:
        raise InputError(
            f"marginals: {source!r} are of {n} distances, prompt tokens of {str(directory)!r} of "
            f"{config.distances}"
        )
    return params


def with_directory(
    method: str, options: Mapping[str, Any], directory: Directory | None
) -> dict[str, Any]:
    """A method's options, with a part's directory where they ask for what was measured with it."""
    options = dict(options)
    if method == "ppd" and directory and options.get("marginals") == ppd.MARGINALS_OF_PART:
        options["marginals"] = str(directory)
    return options


def _accelerator(directory: Directory, options: Mapping[str, Any], target: Any) -> Any:
    config, params = accelerated_residual.load(directory, target)
    for name in ("intervals", "restart"):
        if name in options and (mine := getattr(config, name)) != (wanted := options[name]):
            raise InputError(
                f"{name}: {wanted!r} given, but the adapters of {str(directory)!r} have {mine!r}"
            )
    if options.get("router") in exit_router.ROUTERS and not config.router_width:
        raise InputError(f"router: {str(directory)!r} has adapters without routers")
    return params


_KEY = 0
_PARTS = {
    learned_filter.ROLE: _Part(
        lambda at, options, target: learned_filter.load(at)[1],
        lambda options, target: learned_filter.init(
            learned_filter.FilterConfig(options["block_length"]), jax.random.key(_KEY)
        ),
    ),
    inverted_lists.ROLE: _Part(
        lambda at, options, target: inverted_lists.load(at)[1],
        _no_index,
    ),
    exit_adapter.ROLE: _Part(
        _adapter,
        lambda options, target: exit_adapter.init(
            exit_adapter.ExitAdapterConfig(options["exit_layer"]), target, jax.random.key(_KEY)
        ),
    ),
    accelerated_residual.ROLE: _Part(
        _accelerator,
        lambda options, target: accelerated_residual.init(
            accelerated_residual.AcceleratorConfig(options["intervals"]),
            target,
            jax.random.key(_KEY),
        ),
    ),
    feature_head.ROLE: _Part(
        lambda at, options, target: feature_head.load(at, target)[1],
        lambda options, target: feature_head.init(
            feature_head.FeatureHeadConfig(), target, jax.random.key(_KEY)
        ),
    ),
    medusa_heads.ROLE: _Part(
        lambda at, options, target: medusa_heads.load(at, target)[1],
        lambda options, target: medusa_heads.init(
            medusa_heads.MedusaConfig(options["heads"]), target, jax.random.key(_KEY)
        ),
    ),
    chimera_heads.ROLE: _Part(
        lambda at, options, target: chimera_heads.ChimeraHeads(*chimera_heads.load(at, target)),
        lambda options, target: chimera_heads.fresh(
            chimera_heads.ChimeraConfig(options["heads"]), target, jax.random.key(_KEY)
        ),
    ),
    prompt_tokens.ROLE: _Part(
        _prompts,
        lambda options, target: prompt_tokens.init(
            prompt_tokens.PromptTokensConfig(
                len(prompt_trees.read_marginals(options["marginals"])),
                options["ensemble"],
                options["mask"],
            ),
            target,
            jax.random.key(_KEY),
        ),
    ),
}


def _trigrams(path: Path) -> Any:
    from training import trigrams

    return trigrams.load(path)


# Methods that can begin with what was learned before: the file in a directory, and its reader.
MEMORIES = {"aded": ("trigrams.safetensors", _trigrams)}


def load_method_params(
    method: str,
    directory: Directory | None,
    untrained: bool,
    options: Mapping[str, Any] | None = None,
    target: Any = None,
) -> ModelParams:
    """Parameters of a method's own trained parts, by role, to be added to the models'.

    Args:
      method: its name.
      directory: where a training pipeline saved them.
      untrained: allow random ones instead.
      options: the method's own.
      target: the target's architecture, for parts that are made for one.

    Raises:
      InputError: either is given for a method that has no trained parts (with these options);
        neither, or both, for one that has; what the directory holds is something else. What a
        method has learned is `load_memory`'s.
    """
    spec, parsed = methods.spec(method), methods.parse_options(method, options or {})
    if parts := spec.trained_parts(parsed):
        if (directory is None) is not untrained:
            raise InputError(
                f"method_params: {str(directory)!r} with untrained_parts={untrained}; method "
                f"{method} has trained parts ({', '.join(parts)}): give one of the two"
            )
        if directory is None:
            return {role: _PARTS[role].untrained(parsed, target) for role in parts}
        return {role: load_part(role, directory, parsed, target) for role in parts}
    if method in MEMORIES:
        directory = None
    for flag, given in (("method_params", directory), ("untrained_parts", untrained or None)):
        if given is not None:
            raise InputError(
                f"{flag}: {str(given)!r} given, but method {method} has no trained parts; "
                f"leave --{flag} out"
            )
    return {}


def load_part(role: str, directory: Directory, options: Mapping[str, Any], target: Any) -> Any:
    """Parameters of one part; errors as its own `load`.

    Args:
      role: that of its parameters.
      directory: where a training pipeline saved it.
      options: the method's own, all of them.
      target: the target's architecture.
    """
    return _PARTS[role].load(directory, options, target)


def load_memory(method: str, directory: Directory | None) -> Any:
    """What a method begins with, as a `HotStart.value`; None for nothing.

    Args:
      method: its name.
      directory: where what it has learned, or a corpus' counts, were saved: for aded, a directory
        of `training.corpus_stores`, or any with `trigrams.STORE_FILE`.

    Raises:
      InputError: the file is missing or holds something else.
    """
    if directory is None or method not in MEMORIES:
        return None
    file, load = MEMORIES[method]
    return load(Path(directory) / file)
