"""Named sizes have the published number of parameters and can be saved and read back."""

import math

import jax
import pytest

from models import hf_config, hf_names, sizes, transformer
from models.errors import InputError

# Parameters as Hugging Face reports them for the published weights (tied embeddings once).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "opt_125m": 125_239_296,
    "opt_1_3b": 1_315_758_080,
    "llada_8b": 8_015_581_184,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config = sizes.get(name)
    assert config.num_params() == PUBLISHED[name]
    # The same number from the checkpoint's side.
    table = hf_names.table(config)
    assert sum(math.prod(parameter.shape) for parameter in table.values()) == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in sizes.SIZES if name not in PUBLISHED])
def test_small_sizes_count_their_parameters(name):
    config = sizes.get(name)
    shapes = jax.tree.leaves(transformer.param_shapes(config))
    assert config.num_params() == sum(math.prod(leaf.shape) for leaf in shapes)
    if name.startswith("tiny"):
        assert (config.num_layers, config.embed_dim, config.vocab_size) == (2, 16, 256)


@pytest.mark.parametrize("name", sizes.SIZES)
def test_every_size_can_be_saved(name):
    config = sizes.get(name)
    assert hf_config.from_hf(hf_config.to_hf(config)) == config


def test_bench_sizes():
    small, large = sizes.get("bench_5m"), sizes.get("bench_85m")
    assert (small.num_layers, small.embed_dim, small.num_heads, small.mlp_dim) == (
        6, 256, 4, 688,
    )  # fmt: skip
    assert (large.num_layers, large.embed_dim, large.num_heads, large.mlp_dim) == (
        12, 768, 12, 2048,
    )  # fmt: skip
    for config in (small, large):
        assert (config.vocab_size, config.max_position) == (1024, 4096)
        assert config.tie_embeddings and config.eos_token_ids == ()


def test_unknown_name():
    with pytest.raises(InputError, match=r"size: 'llama3_8' is not known.*did you mean 'llama3"):
        sizes.get("llama3_8")
