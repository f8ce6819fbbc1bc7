"""LLaDA2's checkpoints: grouped experts, leading rotary dimensions, one tensor for q, k and v.

The reference is written here in PyTorch and NumPy from the published description; transformers
has no such model.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from models import hf_checkpoint, hf_config, layers, masks, sharding, transformer
from models.config import GroupedExpertsConfig
from models.errors import InputError

FIELDS = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": 62,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 600000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "pad_token_id": 57,
    "eos_token_id": 57,
    "mask_token_id": 60,
}
BLOCK = 4


def tensors() -> dict[str, np.ndarray]:
    """Random tensors under the published names."""
    rng = np.random.default_rng(0)
    D, H, Q, K, E = 16, 8, 4, 2, 12

    def weight(out: int, inputs: int) -> np.ndarray:
        return (1.5 * rng.normal(size=(out, inputs)) * inputs**-0.5).astype(np.float32)

    def scale(size: int) -> np.ndarray:
        return (1 + 0.3 * rng.normal(size=size)).astype(np.float32)

    found = {
        "model.word_embeddings.weight": weight(62, D),
        "model.norm.weight": scale(D),
        "lm_head.weight": weight(62, D),
    }

    def network(prefix: str, width: int) -> None:
        found[f"{prefix}.gate_proj.weight"] = weight(width, D)
        found[f"{prefix}.up_proj.weight"] = weight(width, D)
        found[f"{prefix}.down_proj.weight"] = weight(D, width)

    for layer in range(3):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = scale(D)
        found[f"{at}.post_attention_layernorm.weight"] = scale(D)
        found[f"{at}.attention.query_key_value.weight"] = weight((Q + 2 * K) * H, D)
        found[f"{at}.attention.query_layernorm.weight"] = scale(H)
        found[f"{at}.attention.key_layernorm.weight"] = scale(H)
        found[f"{at}.attention.dense.weight"] = weight(D, Q * H)
        if layer == 0:
            network(f"{at}.mlp", 20)
            continue
        found[f"{at}.mlp.gate.weight"] = weight(E, D)
        found[f"{at}.mlp.gate.expert_bias"] = (0.3 * rng.normal(size=E)).astype(np.float32)
        for expert in range(E):
            network(f"{at}.mlp.experts.{expert}", 6)
        network(f"{at}.mlp.shared_experts", 12)
    return found


def route(logits: np.ndarray, bias: np.ndarray, *, groups: int, kept: int, k: int, scale: float):
    """Weights and experts of one token, by sorting."""
    scores = 1 / (1 + np.exp(-logits))
    size = len(logits) // groups
    score_of = {
        g: np.sort((scores + bias)[g * size : (g + 1) * size])[-2:].sum() for g in range(groups)
    }
    allowed = sorted(score_of, key=lambda g: -score_of[g])[:kept]
    among = [e for e in range(len(logits)) if e // size in allowed]
    chosen = sorted(among, key=lambda e: -(scores + bias)[e])[:k]
    weights = scores[chosen] / scores[chosen].sum() if k > 1 else scores[chosen]
    return scale * weights, chosen


def reference(stored: dict[str, np.ndarray], tokens: np.ndarray, visible: np.ndarray):
    """Logits [B, T, V] in PyTorch, expert by expert and token by token."""
    w = {name: torch.tensor(value, dtype=torch.float64) for name, value in stored.items()}
    H, Q, K = 8, 4, 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def network(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = x @ w[f"{name}.gate_proj.weight"].T, x @ w[f"{name}.up_proj.weight"].T
        return (torch.nn.functional.silu(gate) * up) @ w[f"{name}.down_proj.weight"].T

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Pairs (i, i + 2) of the first four dimensions; the other four stay."""
        T = x.shape[1]
        angle = torch.arange(T)[:, None] * 600000.0 ** (-torch.arange(2) / 2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., 0:2], x[..., 2:4]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 4:]], dim=-1)

    x = w["model.word_embeddings.weight"][torch.tensor(tokens)]
    B, T, _ = x.shape
    for layer in range(3):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm") @ w[f"{at}.attention.query_key_value.weight"].T
        y = y.view(B, T, Q + 2 * K, H)
        query = turn(norm(y[:, :, :Q], f"{at}.attention.query_layernorm"))
        key = turn(norm(y[:, :, Q : Q + K], f"{at}.attention.key_layernorm"))
        key, value = (part.repeat_interleave(Q // K, dim=2) for part in (key, y[:, :, Q + K :]))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * H**-0.5
        scores = scores.masked_fill(~torch.tensor(visible)[:, None], -torch.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).reshape(B, T, Q * H)
        x = x + mixed @ w[f"{at}.attention.dense.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        if layer == 0:
            x = x + network(y, f"{at}.mlp")
            continue
        logits = y @ w[f"{at}.mlp.gate.weight"].T
        out = network(y, f"{at}.mlp.shared_experts")
        for b in range(B):
            for t in range(T):
                bias = stored[f"{at}.mlp.gate.expert_bias"]
                weights, chosen = route(
                    logits[b, t].numpy(), bias, groups=4, kept=2, k=3, scale=2.5
                )
                for weight, expert in zip(weights, chosen, strict=True):
                    out[b, t] += weight * network(y[b, t], f"{at}.mlp.experts.{expert}")
        x = x + out
    return (norm(x, "model.norm") @ w["lm_head.weight"].T).numpy()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llada2")
    (path / "config.json").write_text(json.dumps(FIELDS))
    safetensors.numpy.save_file(tensors(), path / "model.safetensors")
    return path


def test_logits_under_a_block_mask(directory):
    config, params = hf_checkpoint.load(directory)
    assert not config.causal and config.mask_token_id == 60 and config.eos_token_ids == (57,)
    tokens = np.random.default_rng(1).integers(0, 62, (3, 12))
    index = jnp.arange(12)
    mask = jnp.broadcast_to(masks.block_diffusion(index[None], index, BLOCK), (3, 12, 12))
    expected = reference(tensors(), tokens, np.asarray(mask))
    found = jax.jit(lambda p: transformer.apply(config, p, tokens, mask=mask).logits)(params)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std(axis=-1).min() > 0.2


def test_saved_checkpoints_hold_the_same_tensors_and_config(directory, tmp_path):
    config, params = hf_checkpoint.load(directory)
    assert isinstance(config, GroupedExpertsConfig)
    hf_checkpoint.save(tmp_path / "again", config, params)
    stored = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == tensors().keys()
    for name, value in tensors().items():
        np.testing.assert_array_equal(stored[name], value)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    same = {name: value for name, value in FIELDS.items() if name != "norm_topk_prob"}
    assert {name: written[name] for name in same} == same
    assert hf_checkpoint.load_config(tmp_path / "again") == config
    assert config.num_params() == sum(value.size for value in tensors().values())


def test_parts_that_a_mesh_reads_on_its_own(directory):
    """Slices of the tensor that holds queries, keys and values."""
    mesh = sharding.make_mesh(1, 2)
    _, params = hf_checkpoint.load(directory)
    _, placed = hf_checkpoint.load(directory, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    kernel = placed["layers_1"]["moe"]["shared_mlp"]["gate_up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 2, 6)


@pytest.mark.parametrize(("groups", "kept", "k"), [(4, 2, 3), (1, 1, 2), (12, 5, 4), (3, 2, 1)])
def test_routing_against_sorting(groups, kept, k):
    rng = np.random.default_rng(groups)
    logits, bias = rng.normal(size=(40, 12)), 0.5 * rng.normal(size=12)
    config = GroupedExpertsConfig(
        vocab_size=8, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        mlp_dim=8, max_position=8, num_experts=12, experts_per_token=k, routed_dim=4,
        expert_groups=groups, groups_per_token=kept, routed_scale=1.5,
    )  # fmt: skip
    weights, experts = layers.grouped_top_k(
        config, jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32)
    )
    for row in range(40):
        expected, chosen = route(logits[row], bias, groups=groups, kept=kept, k=k, scale=1.5)
        assert experts[row].tolist() == chosen
        np.testing.assert_allclose(weights[row], expected, rtol=1e-5)


def test_the_published_mini_model():
    """Sizes of LLaDA2.0-mini and 2.1-mini: 16B parameters."""
    sizes = {
        "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120,
        "num_hidden_layers": 20, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 4, "num_experts": 256, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "n_group": 8, "moe_intermediate_size": 512, "topk_group": 4,
    }  # fmt: skip
    config = hf_config.from_hf({**FIELDS, **sizes, "mask_token_id": None})
    assert 16.0e9 < config.num_params() < 16.5e9
    without = {name: value for name, value in FIELDS.items() if name != "mask_token_id"}
    assert hf_config.from_hf(without).mask_token_id == 156895


def test_bad_configs(directory, tmp_path):
    for change, message in (
        ({"score_function": "softmax"}, "score_function: 'softmax' is not supported"),
        ({"use_qk_norm": False}, "use_qk_norm: False is not supported"),
        ({"n_group": 5}, "expert_groups: 5 must divide num_experts 12"),
        ({"topk_group": 5}, "groups_per_token: 5 must be between 1 and expert_groups 4"),
        ({"num_experts_per_tok": 7}, "experts_per_token: 7 must be at most the 6 experts"),
        ({"first_k_dense_replace": 4}, "dense_layers: 4 must be between 0 and 3"),
        ({"partial_rotary_factor": 0.4}, "rotary_share: 0.4 must make an even number"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size: missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(FIELDS | change))
        with pytest.raises(InputError, match=message):
            hf_checkpoint.load_config(tmp_path)
    config = hf_checkpoint.load_config(directory)
    with pytest.raises(InputError, match="family: 'llada2_moe' is for models with grouped experts"):
        hf_config.to_hf(config.without_experts())
