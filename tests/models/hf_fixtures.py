"""Random tiny transformers models of every family, as references and as checkpoints."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

VOCAB = 97  # odd, so that nothing depends on a round number
torch.set_num_threads(1)  # more only costs at this size
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_WINDOW = 7  # shorter than every sequence of the tests
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# name -> (config class, what it sets beside _COMMON); the part of a name before '-' is the family
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-bias_tied": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "llama-linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("LlamaConfig", {"rope_scaling": _LLAMA3}),
    "llama-yarn": ("LlamaConfig", {"rope_scaling": _YARN}),
    "mistral": ("MistralConfig", {"sliding_window": _WINDOW}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": _WINDOW,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 12,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "opt": ("OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
}
FAMILIES = tuple(dict.fromkeys(name.split("-")[0] for name in CASES))


def build(name: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in evaluation mode, with weights large enough that outputs vary.

    Every parameter is random, norms and biases included, so that none can be dropped unseen.
    """
    config_class, extra = CASES[name]
    fields = _COMMON | extra
    if config_class == "OPTConfig":
        for unknown in ("intermediate_size", "num_key_value_heads"):
            fields.pop(unknown)
    config = getattr(transformers, config_class)(**fields, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.copy_((0.5 if name.startswith("gemma") else 1.0) + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in parameter_name:
                # Small beside what the layers add; a tied model would repeat its input.
                parameter.copy_(0.2 * noise)
            elif "embed_positions" in parameter_name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def save(model: Any, directory: Path, **options: Any) -> Path:
    """`save_pretrained`, without its progress bar."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, **options)
    return directory


def checkpoint(name: str, directory: Path) -> Path:
    return save(build(name), directory)


_LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "model.layers": "model.transformer.blocks",
}


def llada_checkpoint(llama: Any, directory: Path) -> Path:
    """A Llama's weights under LLaDA's names, with a `config.json` in LLaDA's words."""
    tensors = {}
    for name, tensor in llama.state_dict().items():
        for theirs, ours in _LLADA_NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = llama.config
    fields = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "activation_type": "silu",
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "mlp_hidden_size": config.intermediate_size,
        "max_sequence_length": config.max_position_embeddings,
        "layer_norm_type": "rms",
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_theta": config.rope_parameters["rope_theta"],
        "weight_tying": False,
        "mask_token_id": config.vocab_size - 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return directory
