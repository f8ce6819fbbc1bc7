"""Keys and values of layers that a token did not run: from the stream that it left the model with.

State propagation of CALM (Schuster et al., arXiv 2207.07061, section 3.1): later tokens attend to a
token at every layer, so a layer that it skipped gets the keys and values that it would have from
the token's last hidden state. Two of a layer's products in the place of all.
"""

from typing import Any

import jax.numpy as jnp

from models import cache as kv
from models import rope
from models.config import TransformerConfig
from models.layers import Dense, Norm


def propagate(
    config: TransformerConfig,
    params: Any,
    x: jnp.ndarray,
    cache: kv.KVCache,
    layer: int,
) -> kv.KVCache:
    """Writes one layer's keys and values of x [B, T, D] at each row's `lengths`, which stay.

    Args:
      config, params: the model.
      x: the residual stream that the tokens left with.
      cache: of all layers.
      layer: which of them.
    """
    G, K, H = config.queries_per_kv, config.num_kv_heads, config.head_dim
    block = params[f"layers_{layer}"]
    y = Norm(config).apply({"params": block["attention_norm"]}, x)
    # Of the fused matrix the columns of keys and values alone.
    fused = {name: leaf[..., G:, :] for name, leaf in block["attention"]["qkv"].items()}
    projection = Dense((K, 2, H), use_bias=config.qkv_bias)
    both: Any = projection.apply({"params": fused}, y)
    keys, values = both[..., 0, :], both[..., 1, :]
    if config.qk_norm:
        keys = Norm(config).apply({"params": block["attention"]["key_norm"]}, keys)
    if config.positions == "rope":
        table = config.rope
        if config.is_local(layer) and config.local_rope is not None:
            table = config.local_rope
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1])
        keys = rope.rotate(keys, *rope.angles(table, config.rotary_dim, positions))

    def written(stores: tuple[jnp.ndarray, ...], new: jnp.ndarray) -> tuple[jnp.ndarray, ...]:
        store = kv.write(stores[layer], new.swapaxes(1, 2), cache.lengths)
        return (*stores[:layer], store, *stores[layer + 1 :])

    return cache.replace(keys=written(cache.keys, keys), values=written(cache.values, values))
