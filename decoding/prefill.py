"""Reading prompts into a cache."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from models import cache as kv
from models import transformer
from models.config import TransformerConfig

# Tokens a call: bounds the scores that attention holds at once, [B, Q, chunk, S].
CHUNK = 256

Carry = TypeVar("Carry")


def prefill(
    config: TransformerConfig,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
) -> kv.KVCache:
    """Puts the first `lengths` [B] of tokens [B, P] into an empty cache of at least P slots."""
    return read(config, params, cache, tokens, lengths)[0]


def read(
    config: TransformerConfig,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
    collect: Sequence[int] = (),
) -> tuple[kv.KVCache, tuple[jnp.ndarray, ...]]:
    """As `prefill`, and residual streams [B, P, D] of the prompts after so many layers each."""
    B, P = tokens.shape[:2]  # or embeddings [B, P, D]
    empty = jnp.zeros((B, P, config.embed_dim), config.compute_dtype)

    def part(
        first: jnp.ndarray, size: int, carry: tuple[kv.KVCache, tuple[jnp.ndarray, ...]]
    ) -> tuple[kv.KVCache, tuple[jnp.ndarray, ...]]:
        cache, streams = carry
        out = transformer.apply(
            config,
            params,
            jax.lax.dynamic_slice_in_dim(tokens, first, size, axis=1),
            cache=kv.truncate(cache, jnp.full_like(lengths, first)),
            collect=collect,
            with_logits=False,
        )
        assert out.cache is not None
        streams = tuple(
            jax.lax.dynamic_update_slice_in_dim(stream, new, first, axis=1)
            for stream, new in zip(streams, out.collected, strict=True)
        )
        return out.cache, streams

    cache, streams = in_parts(P, part, (cache, (empty,) * len(collect)))
    # Tokens beyond a row's length land in slots beyond it: hidden, and overwritten later.
    return kv.truncate(cache, lengths), streams


def in_parts(total: int, part: Callable[[jnp.ndarray, int, Carry], Carry], carry: Carry) -> Carry:
    """Runs `part` (first, size, carry) -> carry over equal parts of 0..total-1, in order."""
    size = next(size for size in range(min(total, CHUNK), 0, -1) if total % size == 0)
    return jax.lax.fori_loop(0, total // size, lambda i, c: part(i * size, size, c), carry)
