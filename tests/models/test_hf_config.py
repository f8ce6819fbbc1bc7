"""config.json means here what it means to transformers, and what is not covered is named."""

import json

import pytest
import transformers

from models import hf_config, sizes
from models.config import RopeConfig, TransformerConfig
from models.errors import InputError
from models.hf_defaults import DEFAULTS
from tests.models import hf_fixtures

CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "opt": transformers.OPTConfig,
}


def from_hf(**fields) -> TransformerConfig:
    return hf_config.from_hf(fields)


@pytest.mark.parametrize("family", CLASSES)
def test_absent_fields_mean_transformers_defaults(family):
    spelled_out = json.loads(CLASSES[family]().to_json_string(use_diff=False))
    assert len(spelled_out) > 20
    assert from_hf(model_type=family) == hf_config.from_hf(spelled_out)


def test_every_family_has_a_default_test():
    assert set(CLASSES) == set(DEFAULTS) - {"llada", "llada2_moe"}


@pytest.mark.parametrize("name", hf_fixtures.CASES)
def test_round_trip_through_transformers(name, tmp_path):
    """transformers' file -> ours -> our file -> transformers' class -> ours: nothing changes."""
    path = tmp_path / "config.json"
    hf_fixtures.build(name).config.save_pretrained(tmp_path)
    config = hf_config.from_hf(json.loads(path.read_text()))
    path.write_text(json.dumps(hf_config.to_hf(config)))
    reread = transformers.AutoConfig.from_pretrained(tmp_path)
    assert reread.architectures == [type(hf_fixtures.build(name)).__name__]
    again = json.loads(reread.to_json_string(use_diff=False))
    assert hf_config.from_hf(again) == config


# Configs as published, in the older spelling, with what they must mean.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN2_5_0_5B = {
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_act": "gelu",  # in the file, but always meant as the tanh form
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
    "eos_token_id": 1,
}
LLADA_8B = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 126464,
    "weight_tying": False,
}


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        (LLAMA_3_2_1B, "llama3_2_1b"),
        (QWEN2_5_0_5B, "qwen2_5_0_5b"),
        (GEMMA_2B, "gemma_2b"),
        (LLADA_8B, "llada_8b"),
    ],
)
def test_published_configs(raw, size):
    assert hf_config.from_hf(raw) == sizes.get(size)


def test_published_gemma3_multimodal_config():
    """gemma-3-4b: the text part leaves almost everything to defaults."""
    config = from_hf(
        model_type="gemma3",
        eos_token_id=[1, 106],
        torch_dtype="bfloat16",
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        vision_config={"hidden_size": 1152},
    )
    assert (config.family, config.embed_dim, config.num_layers) == ("gemma3_text", 2560, 34)
    assert (config.num_heads, config.head_dim, config.vocab_size) == (8, 256, 262208)
    assert config.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert config.local_rope == RopeConfig(theta=1e4)
    assert config.window == 1024
    assert [layer for layer in range(34) if not config.is_local(layer)] == [5, 11, 17, 23, 29]
    assert config.eos_token_ids == (1, 106)
    assert config.dtype == "bfloat16"


def test_gemma3_layers():
    four = {"model_type": "gemma3_text", "num_hidden_layers": 4}
    assert from_hf(**four, sliding_window_pattern=2).local_layers == (True, False, True, False)
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert from_hf(**four, layer_types=types).local_layers == (False, True, False, False)
    assert from_hf(**four, sliding_window_pattern=1).local_layers == ()
    assert from_hf(**four, sliding_window_pattern=1).window is None


def test_gemma3_rope_parameters_by_layer_type():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = from_hf(model_type="gemma3_text", rope_parameters=nested)
    assert config.rope == RopeConfig(theta=5e5, kind="linear", factor=4.0)
    assert config.local_rope == RopeConfig(theta=2e4)


def test_qwen_windows():
    base = {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8}
    assert from_hf(**base, max_window_layers=2).local_layers == ()
    windowed = base | {"use_sliding_window": True}
    config = from_hf(**windowed, max_window_layers=3)
    assert (config.local_layers, config.window) == ((False, False, False, True), 8)
    types = ["sliding_attention", "full_attention"] * 2
    config = from_hf(**windowed, layer_types=types)
    assert config.local_layers == (True, False, True, False)
    assert from_hf(**windowed | {"sliding_window": None}, max_window_layers=0).window is None


def test_mistral_windows():
    assert from_hf(model_type="mistral").window == 4096
    assert all(from_hf(model_type="mistral").local_layers)
    without = from_hf(model_type="mistral", sliding_window=None)
    assert (without.window, without.local_layers) == (None, ())
    assert from_hf(model_type="mixtral").window is None


def test_rope_in_both_formats():
    scaling = {"type": "linear", "factor": 2}
    old = from_hf(model_type="llama", rope_theta=5e5, rope_scaling=scaling)
    new = from_hf(
        model_type="llama",
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    )
    assert old == new
    assert old.rope == RopeConfig(theta=5e5, kind="linear", factor=2.0)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config = from_hf(model_type="qwen3", rope_scaling=yarn)
    assert config.rope.original_max_position == config.max_position
    config = from_hf(model_type="llama", rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 0.5})
    reference = transformers.LlamaConfig(rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 0.5})
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    assert config.rope.attention_factor == pytest.approx(init(reference, "cpu")[1], rel=1e-12)


def test_end_of_sequence_ids():
    assert from_hf(model_type="llama").eos_token_ids == (2,)
    assert from_hf(model_type="llama", eos_token_id=None).eos_token_ids == ()
    assert from_hf(model_type="llama", eos_token_id=[5, 7]).eos_token_ids == (5, 7)


def test_head_dim_is_derived():
    config = from_hf(
        model_type="qwen2", hidden_size=24, num_attention_heads=6, num_key_value_heads=2
    )
    assert config.head_dim == 4
    assert from_hf(model_type="qwen3").head_dim == 128


def test_biases():
    llama = from_hf(model_type="llama", attention_bias=True)
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias) == (True, True, False)
    qwen = from_hf(model_type="qwen2")
    assert (qwen.qkv_bias, qwen.out_bias, qwen.mlp_bias) == (True, False, False)
    opt = from_hf(model_type="opt", enable_bias=False)
    assert (opt.qkv_bias, opt.out_bias, opt.mlp_bias) == (False, False, False)


REFUSED = [
    ({}, "model_type: None must be one of gemma, gemma2"),
    ({"model_type": "lama"}, "model_type: 'lama' is not known (did you mean 'llama'?); allowed:"),
    (
        {"model_type": "bert"},
        "allowed: gemma, gemma2, gemma3, gemma3_text, llada, llada2_moe, llama",
    ),
    ({"model_type": "llama", "hidden_act": "mish"}, "hidden_act: 'mish' is not known"),
    (
        {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type: 'dynamic' is not known; allowed: default, linear",
    ),
    (
        {"model_type": "qwen2", "rope_scaling": {"type": "longrope", "factor": 2.0}},
        "rope_scaling.rope_type: 'longrope' is not known",
    ),
    (
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear"}},
        "rope_scaling.factor: missing",
    ),
    (
        {"model_type": "llama", "partial_rotary_factor": 0.5},
        "partial_rotary_factor: 0.5 is not supported; allowed: None or 1.0",
    ),
    (
        {"model_type": "llama", "quantization_config": {"bits": 4}},
        "quantization_config: given is not supported",
    ),
    ({"model_type": "llama", "hidden_size": "big"}, "hidden_size: 'big' must be of type int"),
    ({"model_type": "llama", "hidden_size": None}, "hidden_size: missing"),
    ({"model_type": "llama", "vocab_size": True}, "vocab_size: True must be of type int"),
    ({"model_type": "llama", "num_attention_heads": 31}, "31 must divide hidden_size 4096"),
    ({"model_type": "llama", "eos_token_id": "</s>"}, "eos_token_id: '</s>' must be an integer"),
    ({"model_type": "llama", "torch_dtype": "float64"}, "torch_dtype: 'float64' is not known"),
    (
        {"model_type": "opt", "do_layer_norm_before": False},
        "do_layer_norm_before: False is not supported; allowed: True",
    ),
    (
        {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512},
        "word_embed_proj_dim: 512 is not supported; allowed: 1024",
    ),
    (
        {"model_type": "gemma2", "layer_types": ["chunked_attention"] * 26},
        "layer_types: 'chunked_attention' is not known",
    ),
    (
        {"model_type": "gemma2", "layer_types": ["full_attention", "sliding_attention"]},
        "local_layers: 2 entries for 26 layers",
    ),
    ({"model_type": "gemma2", "sliding_window": None}, "window: None must be positive"),
    (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention: True is not supported",
    ),
    (
        {"model_type": "qwen3", "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        "rope_scaling.full_attention: settings for one kind of layer",
    ),
    ({"model_type": "llada"}, "n_heads: missing"),
    (LLADA_8B | {"block_type": "sequential"}, "block_type: 'sequential' is not supported"),
    ({"model_type": "gemma3"}, "text_config: missing"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED)
def test_refused(raw, message):
    with pytest.raises(InputError) as excinfo:
        hf_config.from_hf(raw)
    assert message in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


def test_saving_what_a_family_cannot_express():
    llama = sizes.get("tiny_llama")
    for changes, field in [
        ({"window": 8, "local_layers": (True, False)}, "window"),
        ({"causal": False}, "causal"),
        ({"qk_norm": True}, "qk_norm"),
        ({"qkv_bias": True}, "qkv_bias"),
    ]:
        with pytest.raises(InputError, match=f"{field}: .* cannot be saved as family 'llama'"):
            hf_config.to_hf(llama.replace(**changes))
    with pytest.raises(InputError, match="family: 'bert' is not known"):
        hf_config.to_hf(llama.replace(family="bert"))
