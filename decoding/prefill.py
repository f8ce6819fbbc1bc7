"""Reading prompts into a cache."""

import jax
import jax.numpy as jnp

from models import cache as kv
from models import transformer
from models.config import TransformerConfig

# Tokens a call: bounds the scores that attention holds at once, [B, Q, chunk, S].
CHUNK = 256


def prefill(
    config: TransformerConfig,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
) -> kv.KVCache:
    """Puts the first `lengths` [B] of tokens [B, P] into an empty cache of at least P slots."""
    P = tokens.shape[1]
    chunk = next(size for size in range(min(P, CHUNK), 0, -1) if P % size == 0)

    def read(i: jnp.ndarray, cache: kv.KVCache) -> kv.KVCache:
        part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        cache = kv.truncate(cache, jnp.full_like(lengths, i * chunk))
        out = transformer.apply(config, params, part, cache=cache, with_logits=False)
        assert out.cache is not None
        return out.cache

    # Tokens beyond a row's length land in slots beyond it: hidden, and overwritten later.
    return kv.truncate(jax.lax.fori_loop(0, P // chunk, read, cache), lengths)
