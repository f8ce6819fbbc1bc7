"""Tiny random models, one for each switch of the architecture."""

import functools
from typing import Any

import jax
import numpy as np

from models import sharding, transformer
from models.config import RelativeBiasConfig, RopeConfig, TransformerConfig

BASE = TransformerConfig(
    vocab_size=64,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_position=64,
)

CASES: dict[str, TransformerConfig] = {
    "base": BASE,
    "multi_head": BASE.replace(num_kv_heads=4, qkv_bias=True, mlp_bias=True),
    "multi_query_tied": BASE.replace(num_kv_heads=1, tie_embeddings=True),
    "qk_norm": BASE.replace(qk_norm=True, rope=RopeConfig(kind="linear", factor=4.0)),
    "local": BASE.replace(
        num_layers=3,
        window=5,
        local_layers=(True, False, True),
        local_rope=RopeConfig(theta=100.0),
    ),
    "post_norms_softcaps": BASE.replace(
        norm_offset=1.0,
        post_norms=True,
        activation="gelu_tanh",
        attention_scale=0.3,
        attention_softcap=2.0,
        logit_softcap=3.0,
        embedding_scale=4.0,
        tie_embeddings=True,
    ),
    "experts": BASE.replace(num_experts=4, experts_per_token=2),
    "learned_positions": BASE.replace(
        num_kv_heads=4,
        norm="layernorm",
        activation="relu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        position_offset=2,
        tie_embeddings=True,
    ),
    "relative": RelativeBiasConfig(
        **vars(BASE) | {"positions": "t5"}, relative_buckets=8, relative_max_distance=12
    ),
}


@functools.cache
def params(config: TransformerConfig, seed: int = 0) -> Any:
    """Parameters drawn with NumPy: nothing is left at 0 or 1, so that nothing drops out unseen."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = sharding.path_string(path)
        noise = rng.normal(size=leaf.shape)
        if name.endswith("scale"):
            value = 1 - config.norm_offset + 0.3 * noise
        elif name.endswith("kernel"):
            contracted = slice(1, 2) if "/moe/" in name and "router" not in name else slice(0, 1)
            if "attention/out" in name:
                contracted = slice(0, 3)
            value = 1.5 * noise * np.prod(leaf.shape[contracted]) ** -0.5
        else:  # biases, embeddings, learned positions
            value = (1.0 if "embedder" in name else 0.3) * noise
        return jax.numpy.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, transformer.param_shapes(config))
