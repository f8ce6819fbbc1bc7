"""Every decoding method by name: what command lines and configs choose from."""

from collections.abc import Mapping
from typing import Any

from decoding import (
    confident_exit,
    early_exit,
    hierarchical,
    lexical_units,
    lexinvariant,
    skip_decode,
    word_subwords,
)
from decoding.autoregressive import autoregressive
from decoding.dynamic_vocabulary import ann_vocabulary
from decoding.loop import Method
from decoding.method_spec import (
    ARCHITECTURES,
    Configs,
    MethodSpec,
    architecture_of,
    parse_value,
)
from decoding.sampling import SamplingConfig
from decoding.speculative import (
    accelerated,
    aded,
    bild,
    chain_systems,
    chimera,
    eagle,
    kangaroo,
    medusa,
    ppd,
    token_recycling,
    tree_systems,
)
from decoding.unmasking import ete, learn2pd, llada, llada21, window_diffusion
from models.errors import InputError, check_choice, nearest

METHODS: dict[str, MethodSpec] = {
    "autoregressive": MethodSpec(
        "plain decoding: one target call a token",
        ("target",),
        {},
        lambda configs, sampling, options: autoregressive(configs["target"], sampling),
    ),
    **chain_systems.SPECS,
    **tree_systems.SPECS,
    **eagle.SPECS,
    "aded": aded.SPEC,
    "ann_vocabulary": ann_vocabulary.SPEC,
    "bild": bild.SPEC,
    "byte2word": word_subwords.SPEC,
    "chimera": chimera.SPEC,
    "calm": confident_exit.SPEC,
    "hat": hierarchical.SPEC,
    "kangaroo": kangaroo.SPEC,
    "lud": lexical_units.SPEC,
    "m2r2": accelerated.SPEC,
    "m2r2_exit": early_exit.SPEC,
    "medusa": medusa.SPEC,
    "ppd": ppd.SPEC,
    "lexinvariant": lexinvariant.SPEC,
    "skip_decode": skip_decode.SPEC,
    "token_recycling": token_recycling.SPEC,
    **llada.SPECS,
    **llada21.SPECS,
    "ete": ete.SPEC,
    "learn2pd": learn2pd.SPEC,
    "window_diffusion": window_diffusion.SPEC,
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
        key: parse_value(key, values[key], option) if key in values else option.default
        for key, option in options.items()
    }


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
    parsed = parse_options(name, options or {})
    for role in method.roles_with(parsed):
        if role not in configs:
            raise InputError(f"method {name} needs a {role} model; given: {', '.join(configs)}")
        if (found := architecture_of(configs[role])) is not method.architecture:
            raise InputError(
                f"method {name}: the {role} model ({configs[role].family}) is one of the "
                f"{ARCHITECTURES[found]}; allowed: {ARCHITECTURES[method.architecture]}"
            )
        if configs[role].causal is method.bidirectional:
            does = "fills masks" if method.bidirectional else "writes from left to right"
            kinds = ("causal", "bidirectional")
            raise InputError(
                f"method {name} {does}; the {role} model ({configs[role].family}) is "
                f"{kinds[not configs[role].causal]}; allowed: {kinds[method.bidirectional]} models"
            )
        if configs[role].vocab_size != configs["target"].vocab_size:
            raise InputError(
                f"vocab_size: the {role} model has {configs[role].vocab_size} tokens, the target "
                f"{configs['target'].vocab_size}; they must be equal"
            )
    return method.build(configs, sampling, parsed)
