"""Plain decoding: one target call a token. The baseline of every comparison."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from decoding import stats as work
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from models import cache as kv
from models import transformer
from models.config import TransformerConfig


def pending_tokens(state: DecodeState) -> jnp.ndarray:
    """Each row's last token, int32 [B]: in the text, not yet in a cache."""
    return jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)[:, 0]


@functools.cache
def autoregressive(config: TransformerConfig, sampling: SamplingConfig) -> Method:
    """One token a round from the target's distribution.

    Args:
      config: the target's architecture.
      sampling: how tokens are chosen.
    """

    def init(batch: int, slots: int) -> kv.KVCache:
        return kv.create(config, batch, slots)

    def read(
        params: ModelParams, cache: kv.KVCache, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> kv.KVCache:
        return prefill(config, params["target"], cache, tokens, lengths)

    def step(params: ModelParams, state: DecodeState) -> tuple[Any, Emission]:
        pending = pending_tokens(state)
        with jax.named_scope("target"):
            out = transformer.apply(config, params["target"], pending[:, None], cache=state.inner)
        assert out.logits is not None and out.cache is not None
        logits = out.logits[:, 0]
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, config.vocab_size)
            logits = penalise(logits, seen, sampling)
        with jax.named_scope("verify"):
            token = draw(logits, state.keys, state.lengths, sampling)
        count = state.active.astype(jnp.int32)
        cache = kv.truncate(out.cache, out.cache.lengths + count)
        return cache, Emission(token[:, None], count, work.round_work(len(token), 0))

    return Method("autoregressive", ("target",), 0, 1, init, read, step)
