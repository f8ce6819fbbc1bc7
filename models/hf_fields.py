"""Reading and writing single fields of a Hugging Face `config.json`, with their types checked.

Families differ in which of these they use; `models.hf_config` puts them together.
"""

import math
from collections.abc import Callable
from typing import Any

from models.config import DTYPES, ROPE_KINDS, RopeConfig, TransformerConfig
from models.errors import InputError, check_choice

ACTIVATIONS = {  # the first name of each is the one written
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
WRITTEN_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

Fields = dict[str, Any]


def get(fields: Fields, name: str, kind: type) -> Any:
    """The field, or None when it is absent or null; raises InputError for another type."""
    value = fields.get(name)
    if value is None:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name}: {value!r} must be of type {kind.__name__}")
    return value


def need(fields: Fields, name: str, kind: type) -> Any:
    """The field; raises InputError when it is absent, null or of another type."""
    value = get(fields, name, kind)
    if value is None:
        raise InputError(f"{name}: missing; must be of type {kind.__name__}")
    return value


def check_fixed(fields: Fields, fixed: dict[str, tuple[Any, ...]]) -> None:
    """Raises InputError for a field that is present with a value other than the allowed."""
    for name, allowed in fixed.items():
        if name in fields and fields[name] not in allowed:
            value = "given" if isinstance(fields[name], dict) else repr(fields[name])
            choices = " or ".join(repr(choice) for choice in allowed)
            raise InputError(f"{name}: {value} is not supported; allowed: {choices}")


def activation(fields: Fields, name: str) -> str:
    """The field as one of `models.config.ACTIVATIONS`."""
    value = need(fields, name, str)
    check_choice(name, value, ACTIVATIONS)
    return ACTIVATIONS[value]


def read_eos(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: an int, a list of ints or null in the files."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"eos_token_id: {value!r} must be an integer, a list of them or null")
    return tuple(ids)


def special_tokens(fields: Fields) -> Fields:
    """Special tokens and dtype, which every family spells alike."""
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    dtype = dtype.removeprefix("torch.")
    check_choice("torch_dtype", dtype, DTYPES)
    return {
        "bos_token_id": get(fields, "bos_token_id", int),
        "eos_token_ids": read_eos(fields.get("eos_token_id")),
        "pad_token_id": get(fields, "pad_token_id", int),
        "dtype": dtype,
    }


def head_dim(fields: Fields, width: str, heads: str) -> int:
    """Width over heads, for configs that do not give the size of a head."""
    D, Q = need(fields, width, int), need(fields, heads, int)
    if Q < 1 or D % Q:
        raise InputError(f"{heads}: {Q} must divide {width} {D} when head_dim is not given")
    return D // Q


def read_rope(params: Fields | None, theta: float, max_position: int) -> RopeConfig:
    """One set of rotary settings: `rope_scaling`, or (part of) `rope_parameters`."""
    named = {f"rope_scaling.{name}": value for name, value in (params or {}).items()}
    if nested := [name for name, value in named.items() if isinstance(value, dict)]:
        raise InputError(f"{nested[0]}: settings for one kind of layer; allowed: one for all")

    def number(name: str, default: float | None = None) -> Any:
        value = get(named, f"rope_scaling.{name}", float)
        if value is None and default is None:
            raise InputError(f"rope_scaling.{name}: missing; must be a number")
        return default if value is None else value

    kind = named.get("rope_scaling.rope_type") or named.get("rope_scaling.type") or "default"
    check_choice("rope_scaling.rope_type", str(kind), ROPE_KINDS)
    check_fixed(named, {"rope_scaling.partial_rotary_factor": (None, 1.0)})
    theta = number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=number("factor"))
    original = get(named, "rope_scaling.original_max_position_embeddings", int) or max_position
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=number("factor"),
            original_max_position=original,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    factor = number("factor", max_position / original)
    attention_factor = get(named, "rope_scaling.attention_factor", float)
    mscale, all_dim = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if attention_factor is None and mscale and all_dim and factor > 1:
        log = 0.1 * math.log(factor)
        attention_factor = (mscale * log + 1) / (all_dim * log + 1)
    truncate = get(named, "rope_scaling.truncate", bool)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=True if truncate is None else truncate,
    )


def write_rope(rope: RopeConfig) -> Fields | None:
    """`rope_scaling`, which transformers 4 and 5 both read beside `rope_theta`."""
    original = {"original_max_position_embeddings": rope.original_max_position}
    if rope.kind == "default":
        return None
    fields: Fields = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        fields |= original | {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    elif rope.kind == "yarn":
        fields |= original | {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
        if rope.attention_factor is not None:
            fields["attention_factor"] = rope.attention_factor
    return fields


def read_layers(fields: Fields, is_local: Callable[[int], bool]) -> Fields:
    """Window and local layers, from `layer_types` or else the family's rule."""
    types = get(fields, "layer_types", list)
    if types is None:
        types = [
            "sliding_attention" if is_local(layer) else "full_attention"
            for layer in range(need(fields, "num_hidden_layers", int))
        ]
    for kind in types:
        check_choice("layer_types", str(kind), ("sliding_attention", "full_attention"))
    local = tuple(kind == "sliding_attention" for kind in types)
    if not any(local):
        return {}
    return {"window": get(fields, "sliding_window", int), "local_layers": local}


def write_layers(config: TransformerConfig) -> Fields:
    """`sliding_window` and `layer_types`, the inverse of `read_layers`."""
    types = [
        "sliding_attention" if config.is_local(layer) else "full_attention"
        for layer in range(config.num_layers)
    ]
    return {"sliding_window": config.window, "layer_types": types}
