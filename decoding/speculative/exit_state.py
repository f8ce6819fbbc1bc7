"""The target's first layers and an adapter, as a drafter keeps them in step with the text.

Kangaroo, arXiv 2404.18911. What its chain and its tree have in common.
"""

import jax
import jax.numpy as jnp
from flax import struct

from decoding import prefill
from decoding.loop import ModelParams
from decoding.speculative import verification
from models import cache as kv
from models import exit_adapter
from models.config import TransformerConfig
from models.errors import InputError
from models.exit_adapter import ROLE


class ExitState(struct.PyTreeNode):
    """What a drafter keeps.

    Attributes:
      cache: the adapter's keys and values, one layer.
      carry: [B, D], the residual stream of the last token before the pending one. It is fed to the
        adapter again with the pending token's: after a round whose drafts were all kept the
        adapter has not seen it, and twice changes nothing.
    """

    cache: kv.KVCache
    carry: jnp.ndarray


def check_exit(config: TransformerConfig, exit_layer: int) -> None:
    """Raises InputError where the exit leaves no layer above it, or none below."""
    if not 1 <= exit_layer < config.num_layers:
        raise InputError(
            f"exit_layer: {exit_layer} must be between 1 and {config.num_layers - 1}, below the "
            f"target's {config.num_layers} layers"
        )


def create(config: TransformerConfig, batch: int, slots: int) -> ExitState:
    """Nothing read yet."""
    return ExitState(
        kv.create(config, batch, slots, num_layers=1),
        jnp.zeros((batch, config.embed_dim), config.compute_dtype),
    )


def adapt(
    config: TransformerConfig,
    params: ModelParams,
    x: jnp.ndarray,
    cache: kv.KVCache,
    first: jnp.ndarray,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """The adapter on streams x [B, T, D] of positions first [B] on."""
    found, written = exit_adapter.apply(
        config,
        params[ROLE],
        x,
        positions=first[:, None] + jnp.arange(x.shape[1]),
        cache=kv.truncate(cache, first),
    )
    assert written is not None
    return found, written


def read(
    config: TransformerConfig,
    params: ModelParams,
    inner: ExitState,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
    streams: jnp.ndarray,
) -> ExitState:
    """`Drafter.prefill`: the adapter on prompts' streams [B, P, D] after the exit layer."""
    del tokens

    def part(first: jnp.ndarray, size: int, cache: kv.KVCache) -> kv.KVCache:
        x = jax.lax.dynamic_slice_in_dim(streams, first, size, axis=1)
        return adapt(config, params, x, cache, jnp.full_like(lengths, first))[1]

    before = jnp.maximum(lengths - 1, 0)
    cache = prefill.in_parts(streams.shape[1], part, inner.cache)
    return ExitState(kv.truncate(cache, before), verification.rows(streams, before))


def at_pending(
    config: TransformerConfig,
    params: ModelParams,
    inner: ExitState,
    stream: jnp.ndarray,
    base: jnp.ndarray,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """The adapter's output [B, D] at the pending token, the token before it being fed again.

    Args:
      config, params, inner: the target, parameters, and what was kept.
      stream: [B, D], of the pending token.
      base: int [B], where it stands.
    """
    # A row of one token has its pending token in the first of the two places.
    alone = (base == 0)[:, None]
    both = jnp.stack([jnp.where(alone, stream, inner.carry), stream], axis=1)
    hidden, cache = adapt(config, params, both, inner.cache, jnp.maximum(base - 1, 0))
    return jnp.where(alone, hidden[:, 0], hidden[:, 1]), cache
