"""Hugging Face's `config.json` to and from `TransformerConfig`.

Each family has a table of defaults in `models.hf_defaults`, one function that reads what is its
own and one that writes it.
"""

from collections.abc import Callable
from typing import Any

from models import hf_fields as hf
from models.config import GroupedExpertsConfig, RopeConfig, TransformerConfig
from models.errors import InputError, check_choice
from models.hf_defaults import DEFAULTS

# 'gemma3' is the multimodal model; its text part is read and saved as 'gemma3_text'.
FAMILIES = (*DEFAULTS, "gemma3")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "opt": "OPTForCausalLM",
    "llada": "LLaDAModelLM",
    "llada2_moe": "LLaDA2MoeModelLM",
}
# Fields that change the architecture in a way that no TransformerConfig expresses, with the
# values that leave it alone.
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
}
_WHOLE_HEADS: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (None, 1.0)}
_OPT_FIXED: dict[str, tuple[Any, ...]] = {
    "do_layer_norm_before": (True,),  # False: the post-norm 350m
    "_remove_final_layer_norm": (False,),
    "layer_norm_elementwise_affine": (True,),
}
_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (None, False),
    "include_bias": (False,),
    "include_qkv_bias": (None, False),
    "rope": (True,),
    "alibi": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "multi_query_attention": (None, False),
    "clip_qkv": (None,),
}
_LLADA2_FIXED: dict[str, tuple[Any, ...]] = {
    "use_qk_norm": (True,),
    "norm_head": (None, False),
    "norm_topk_prob": (True,),
    "score_function": (None, "sigmoid"),
    "moe_router_enable_expert_bias": (True,),
    "use_sliding_window": (None, False),
    "rope_scaling": (None,),
}


def from_hf(raw: hf.Fields) -> TransformerConfig:
    """The architecture that a parsed `config.json` describes.

    Both spellings of rotary settings are read: `rope_theta` with `rope_scaling`, and
    `rope_parameters` (transformers 5). Absent fields have transformers' defaults.

    Raises:
      InputError: an unknown `model_type`, activation or kind of rotary embedding; a variant that
        is not covered (OPT's post-norm 350m, quantised weights); a field of the wrong type.
    """
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise InputError(f"model_type: {family!r} must be one of {', '.join(sorted(FAMILIES))}")
    check_choice("model_type", family, FAMILIES)
    hf.check_fixed(raw, _FIXED | ({} if family == "llada2_moe" else _WHOLE_HEADS))
    if family == "gemma3":
        family, raw = "gemma3_text", _text_fields(raw)
    fields = DEFAULTS[family] | raw
    kwargs = hf.special_tokens(fields) | _READERS[family](fields)
    make = GroupedExpertsConfig if family == "llada2_moe" else TransformerConfig
    return make(family=family, **kwargs)


def to_hf(config: TransformerConfig) -> hf.Fields:
    """The `config.json` that transformers reads this architecture from.

    Raises:
      InputError: `config.family` cannot express a field, for example a window in a 'llama'.
    """
    check_choice("family", config.family, DEFAULTS)
    if not any(config.local_layers):
        config = config.replace(local_layers=(), window=None)
    eos = config.eos_token_ids
    fields = {
        "model_type": config.family,
        "architectures": [_ARCHITECTURES[config.family]],
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.dtype,
        **_WRITERS[config.family](config),
    }
    again = from_hf(fields)
    for name, value in vars(config).items():
        if getattr(again, name) != value:
            raise InputError(
                f"{name}: {value} cannot be saved as family {config.family!r}, which has "
                f"{getattr(again, name)}"
            )
    return fields


# Llama, Mistral, Mixtral


def _read_llama(fields: hf.Fields) -> hf.Fields:
    """Llama's fields, which Mistral, Mixtral, Qwen and Gemma share."""
    heads = hf.need(fields, "num_attention_heads", int)
    kv_heads = hf.get(fields, "num_key_value_heads", int)
    head_dim = hf.get(fields, "head_dim", int)
    if head_dim is None:
        head_dim = hf.head_dim(fields, "hidden_size", "num_attention_heads")
    max_position = hf.need(fields, "max_position_embeddings", int)
    rope = hf.get(fields, "rope_scaling", dict) or hf.get(fields, "rope_parameters", dict)
    return {
        "vocab_size": hf.need(fields, "vocab_size", int),
        "embed_dim": hf.need(fields, "hidden_size", int),
        "num_layers": hf.need(fields, "num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "mlp_dim": hf.need(fields, "intermediate_size", int),
        "max_position": max_position,
        "norm_eps": hf.need(fields, "rms_norm_eps", float),
        "activation": hf.activation(fields, "hidden_act"),
        "qkv_bias": bool(hf.get(fields, "attention_bias", bool)),
        "out_bias": bool(hf.get(fields, "attention_bias", bool)),
        "mlp_bias": bool(hf.get(fields, "mlp_bias", bool)),
        "tie_embeddings": hf.need(fields, "tie_word_embeddings", bool),
        "rope": hf.read_rope(rope, hf.need(fields, "rope_theta", float), max_position),
    }


def _write_llama(config: TransformerConfig) -> hf.Fields:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": hf.WRITTEN_ACTIVATIONS[config.activation],
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": hf.write_rope(config.rope),
    }


def _read_mistral(fields: hf.Fields) -> hf.Fields:
    """Every layer is local when there is a window; there are no biases."""
    window = hf.get(fields, "sliding_window", int)
    kwargs = _read_llama(fields | {"attention_bias": False, "mlp_bias": False})
    if window is not None:
        kwargs |= {"window": window, "local_layers": (True,) * kwargs["num_layers"]}
    return kwargs


def _write_mistral(config: TransformerConfig) -> hf.Fields:
    fields = _write_llama(config) | {"sliding_window": config.window}
    return _without(fields, "attention_bias", "mlp_bias")


def _read_mixtral(fields: hf.Fields) -> hf.Fields:
    return _read_mistral(fields) | {
        "num_experts": hf.need(fields, "num_local_experts", int),
        "experts_per_token": hf.need(fields, "num_experts_per_tok", int),
    }


def _write_mixtral(config: TransformerConfig) -> hf.Fields:
    return _write_mistral(config) | {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


# Qwen


def _read_qwen(fields: hf.Fields) -> hf.Fields:
    """The sliding window, off unless `use_sliding_window`; the first layers stay global."""
    kwargs = _read_llama(fields | {"mlp_bias": False})
    if hf.get(fields, "use_sliding_window", bool):
        first = hf.need(fields, "max_window_layers", int)
        windowed = hf.get(fields, "sliding_window", int) is not None
        kwargs |= hf.read_layers(fields, lambda layer: windowed and layer >= first)
    return kwargs


def _write_qwen(config: TransformerConfig) -> hf.Fields:
    fields = _write_llama(config) | {"use_sliding_window": config.window is not None}
    return _without(fields | hf.write_layers(config), "mlp_bias")


def _read_qwen2(fields: hf.Fields) -> hf.Fields:
    """Query, key and value always have a bias, the output projection never."""
    return _read_qwen(fields | {"attention_bias": False}) | {"qkv_bias": True}


def _write_qwen2(config: TransformerConfig) -> hf.Fields:
    return _without(_write_qwen(config), "attention_bias", "head_dim")


def _read_qwen3(fields: hf.Fields) -> hf.Fields:
    return _read_qwen(fields) | {"qk_norm": True}


# Gemma


def _read_gemma(fields: hf.Fields) -> hf.Fields:
    """Scaled embeddings, norms that store scale - 1; 'gelu' has always meant its tanh form."""
    gelu = {"hidden_act": "gelu_pytorch_tanh"} if fields["hidden_act"] == "gelu" else {}
    kwargs = _read_llama(fields | {"mlp_bias": False} | gelu)
    return kwargs | {"norm_offset": 1.0, "embedding_scale": float(kwargs["embed_dim"]) ** 0.5}


def _write_gemma(config: TransformerConfig) -> hf.Fields:
    return _without(_write_llama(config), "mlp_bias")


def _read_gemma2(fields: hf.Fields) -> hf.Fields:
    """Norms around each sublayer, soft caps, even layers local."""
    kwargs = _read_gemma(fields | {"hidden_act": fields["hidden_activation"]})
    return kwargs | {
        "post_norms": True,
        "attention_scale": hf.need(fields, "query_pre_attn_scalar", float) ** -0.5,
        "attention_softcap": hf.get(fields, "attn_logit_softcapping", float),
        "logit_softcap": hf.get(fields, "final_logit_softcapping", float),
        **hf.read_layers(fields, lambda layer: layer % 2 == 0),
    }


def _write_gemma2(config: TransformerConfig) -> hf.Fields:
    scalar = config.scale**-2
    if abs(scalar - round(scalar)) < 1e-6:  # an integer in every published config
        scalar = round(scalar)
    fields = _write_gemma(config) | {
        "hidden_activation": hf.WRITTEN_ACTIVATIONS[config.activation],
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        **hf.write_layers(config),
    }
    return _without(fields, "hidden_act")


def _read_gemma3(fields: hf.Fields) -> hf.Fields:
    """As Gemma 2 with query/key norms, one global layer in six, and rotary settings of each."""
    nested = hf.get(fields, "rope_parameters", dict) or {}
    scaling = hf.get(fields, "rope_scaling", dict) or {}
    whole = (hf.get(nested, "full_attention", dict) or {}) | scaling
    local = hf.get(nested, "sliding_attention", dict)
    if hf.get(fields, "layer_types", list) is None:
        period = hf.get(fields, "sliding_window_pattern", int) or 6
        kinds = [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(hf.need(fields, "num_hidden_layers", int))
        ]
        fields = fields | {"layer_types": kinds}
    kwargs = _read_gemma2(fields | {"rope_scaling": None, "rope_parameters": None})
    longest = kwargs["max_position"]
    return kwargs | {
        "qk_norm": True,
        "rope": hf.read_rope(whole, hf.need(fields, "rope_theta", float), longest),
        "local_rope": hf.read_rope(local, hf.need(fields, "rope_local_base_freq", float), longest),
    }


def _write_gemma3(config: TransformerConfig) -> hf.Fields:
    local = config.local_rope or config.rope
    if local.kind != "default":
        raise InputError(f"local_rope.kind: {local.kind!r}; allowed when saving: 'default'")
    return _write_gemma2(config) | {"rope_local_base_freq": local.theta}


def _text_fields(raw: hf.Fields) -> hf.Fields:
    """The language model's part of a multimodal 'gemma3' config."""
    text = hf.need(raw, "text_config", dict)
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    return {name: raw[name] for name in shared if name in raw} | text


# OPT and LLaDA, which have their own names for everything


def _read_opt(fields: hf.Fields) -> hf.Fields:
    hf.check_fixed(fields, _OPT_FIXED)
    width = hf.need(fields, "hidden_size", int)
    hf.check_fixed(fields, {"word_embed_proj_dim": (width, None)})
    bias = hf.need(fields, "enable_bias", bool)
    heads = hf.need(fields, "num_attention_heads", int)
    return {
        "vocab_size": hf.need(fields, "vocab_size", int),
        "embed_dim": width,
        "num_layers": hf.need(fields, "num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hf.head_dim(fields, "hidden_size", "num_attention_heads"),
        "mlp_dim": hf.need(fields, "ffn_dim", int),
        "max_position": hf.need(fields, "max_position_embeddings", int),
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": hf.activation(fields, "activation_function"),
        "gated_mlp": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "positions": "learned",
        "position_offset": 2,
        "tie_embeddings": hf.need(fields, "tie_word_embeddings", bool),
    }


def _write_opt(config: TransformerConfig) -> hf.Fields:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "word_embed_proj_dim": config.embed_dim,
        "ffn_dim": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position,
        "activation_function": hf.WRITTEN_ACTIVATIONS[config.activation],
        "enable_bias": config.mlp_bias,
        "do_layer_norm_before": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_llada(fields: hf.Fields) -> hf.Fields:
    """A Llama with attention in both directions and OLMo's names (arXiv 2502.09992)."""
    hf.check_fixed(fields, _LLADA_FIXED)
    heads, kv_heads = hf.need(fields, "n_heads", int), hf.get(fields, "n_kv_heads", int)
    width = hf.need(fields, "d_model", int)
    mlp_dim = hf.get(fields, "mlp_hidden_size", int)
    rows = hf.get(fields, "embedding_size", int)
    return {
        "vocab_size": hf.need(fields, "vocab_size", int) if rows is None else rows,
        "embed_dim": width,
        "num_layers": hf.need(fields, "n_layers", int),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": hf.head_dim(fields, "d_model", "n_heads"),
        "mlp_dim": hf.need(fields, "mlp_ratio", int) * width if mlp_dim is None else mlp_dim,
        "max_position": hf.need(fields, "max_sequence_length", int),
        "norm_eps": hf.need(fields, "rms_norm_eps", float),
        "activation": hf.activation(fields, "activation_type"),
        "tie_embeddings": hf.need(fields, "weight_tying", bool),
        "rope": RopeConfig(theta=hf.need(fields, "rope_theta", float)),
        "causal": False,
        "mask_token_id": hf.get(fields, "mask_token_id", int),
    }


def _write_llada(config: TransformerConfig) -> hf.Fields:
    written = {name: allowed[0] for name, allowed in _LLADA_FIXED.items() if name != "clip_qkv"}
    return written | {
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "d_model": config.embed_dim,
        "mlp_hidden_size": config.mlp_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "max_sequence_length": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "activation_type": hf.WRITTEN_ACTIVATIONS[config.activation],
        "rope_theta": config.rope.theta,
        "weight_tying": config.tie_embeddings,
        "mask_token_id": config.mask_token_id,
    }


def _read_llada2(fields: hf.Fields) -> hf.Fields:
    """Ling 2.0's mixture of experts, in both directions (arXiv 2512.15745)."""
    hf.check_fixed(fields, _LLADA2_FIXED)
    own = {
        "attention_bias": False,
        "num_key_value_heads": hf.get(fields, "num_key_value_heads", int) or None,
    }
    routed = hf.need(fields, "moe_intermediate_size", int)
    return _read_llama(fields | own) | {
        "qkv_bias": hf.need(fields, "use_qkv_bias", bool),
        "out_bias": hf.need(fields, "use_bias", bool),
        "qk_norm": True,
        "num_experts": hf.need(fields, "num_experts", int),
        "experts_per_token": hf.need(fields, "num_experts_per_tok", int),
        "causal": False,
        "mask_token_id": hf.get(fields, "mask_token_id", int),
        "rotary_share": hf.need(fields, "partial_rotary_factor", float),
        "dense_layers": hf.need(fields, "first_k_dense_replace", int),
        "routed_dim": routed,
        "shared_dim": routed * (hf.get(fields, "num_shared_experts", int) or 0),
        "expert_groups": hf.need(fields, "n_group", int),
        "groups_per_token": hf.need(fields, "topk_group", int),
        "routed_scale": hf.need(fields, "routed_scaling_factor", float),
    }


def _write_llada2(config: TransformerConfig) -> hf.Fields:
    if not isinstance(config, GroupedExpertsConfig):
        raise InputError("family: 'llada2_moe' is for models with grouped experts")
    written = {name: allowed[0] for name, allowed in _LLADA2_FIXED.items()}
    llama = _without(_write_llama(config), "attention_bias", "mlp_bias")
    return (
        llama
        | written
        | {
            "use_qkv_bias": config.qkv_bias,
            "use_bias": config.out_bias,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "mask_token_id": config.mask_token_id,
            "partial_rotary_factor": config.rotary_share,
            "first_k_dense_replace": config.dense_layers,
            "moe_intermediate_size": config.routed_dim,
            "num_shared_experts": config.shared_dim // config.routed_dim,
            "n_group": config.expert_groups,
            "topk_group": config.groups_per_token,
            "routed_scaling_factor": config.routed_scale,
            "score_function": "sigmoid",
        }
    )


def _without(fields: hf.Fields, *names: str) -> hf.Fields:
    return {name: value for name, value in fields.items() if name not in names}


_READERS: dict[str, Callable[[hf.Fields], hf.Fields]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "mixtral": _read_mixtral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "gemma": _read_gemma,
    "gemma2": _read_gemma2,
    "gemma3_text": _read_gemma3,
    "opt": _read_opt,
    "llada": _read_llada,
    "llada2_moe": _read_llada2,
}
_WRITERS: dict[str, Callable[[TransformerConfig], hf.Fields]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "mixtral": _write_mixtral,
    "qwen2": _write_qwen2,
    "qwen3": _write_qwen,
    "gemma": _write_gemma,
    "gemma2": _write_gemma2,
    "gemma3_text": _write_gemma3,
    "opt": _write_opt,
    "llada": _write_llada,
    "llada2_moe": _write_llada2,
}
