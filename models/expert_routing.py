"""Which experts a layer's router chooses, and which it would choose from another stream (M2R2).

For the mixture of `layers.MoE` with softmax routing, as Mixtral has it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import transformer
from models.cache import KVCache
from models.config import GroupedExpertsConfig, TransformerConfig
from models.errors import InputError
from models.layers import Norm


def check(config: TransformerConfig) -> None:
    """Raises InputError for a model without experts, or with another routing."""
    if not config.num_experts or isinstance(config, GroupedExpertsConfig):
        raise InputError(
            f"num_experts: {config.num_experts} ({config.family}); expert loading needs a mixture "
            "of experts with softmax routing, such as Mixtral's"
        )


def true_logits(
    config: TransformerConfig,
    params: transformer.Params,
    layer: int,
    stream: jnp.ndarray,
    *,
    positions: jnp.ndarray,
    mask: jnp.ndarray,
    key_positions: jnp.ndarray | None = None,
    cache: KVCache | None = None,
) -> jnp.ndarray:
    """What the router of a layer says: float32 [B, T, E].

    The layer is run as it is, and the router's output is read off: what else it computes is not
    used, so that XLA leaves the experts out.

    Args:
      config, params: the model.
      layer: its number.
      stream: [B, T, D], the residual stream before it.
      positions, mask, key_positions, cache: as `transformer.apply`.
    """
    module = transformer.Transformer(config)
    keys = positions if key_positions is None else key_positions
    slots = None if cache is None else cache.lengths
    call = (stream, positions, mask, keys, cache, slots, layer, layer + 1, ())
    _, found = module.apply(
        {"params": params},
        *call,
        method="run",
        capture_intermediates=lambda of, _: isinstance(of, nn.Module) and of.name == "router",
        mutable=["intermediates"],
    )
    logits = found["intermediates"][f"layers_{layer}"]["moe"]["router"]["__call__"][0]
    return logits.astype(jnp.float32).reshape(*stream.shape[:2], config.num_experts)


def predicted_logits(
    config: TransformerConfig, params: transformer.Params, layer: int, stream: jnp.ndarray
) -> jnp.ndarray:
    """What a layer's router says of a stream [..., D] put straight into its norm: [..., E].

    The layer's attention is left out (M2R2, section 2.6).
    """
    block = params[f"layers_{layer}"]
    y: Any = Norm(config).apply({"params": block["mlp_norm"]}, stream)
    kernel = block["moe"]["router"]["kernel"].astype(y.dtype)
    return (y @ kernel).astype(jnp.float32)


def chosen(config: TransformerConfig, logits: jnp.ndarray, extra: int = 0) -> jnp.ndarray:
    """The experts of a token, and so many more: int32 [..., K + extra], the likeliest first."""
    return jax.lax.top_k(logits, min(config.num_experts, config.experts_per_token + extra))[1]
