"""Decoding with lexinvariant models: a table of token vectors for every request.

Huang et al., arXiv 2305.16349. A row's table is drawn once, from the row's own key, before its
prompt is read, and serves all of its calls; so cached keys and values stay valid, and a row's text
depends on its prompt, the seed and its row number, as with every other method. Tokens that are
nowhere in a row's context are the same to the model but for their random vectors: by symmetry each
is as likely as the other over draws of the table. End of text should therefore be one of the
model's `fixed_ids`, or stand in the context.

A model with a learned table, the standard one, is decoded by the same method.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding import stats as work
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import MethodSpec
from decoding.prefill import in_parts
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from models import cache as kv
from models import random_embeddings as lex
from models.random_embeddings import LexinvariantConfig


class LexinvariantState(struct.PyTreeNode):
    """What a run keeps beside its text.

    Attributes:
      cache: of the model.
      tables: each row's vectors, float32 [B, V, D]; None for a learned table.
    """

    cache: kv.KVCache
    tables: jnp.ndarray | None


@functools.cache
def lexinvariant(config: LexinvariantConfig, sampling: SamplingConfig) -> Method:
    """Plain decoding under tables of the rows' own; one target call a token.

    Args:
      config: the model.
      sampling: how tokens are chosen.
    """
    drawn = config.table == "gaussian"

    def init(batch: int, slots: int) -> LexinvariantState:
        shape = (batch, config.vocab_size, config.embed_dim)
        return LexinvariantState(
            kv.create(config, batch, slots), jnp.zeros(shape) if drawn else None
        )

    def begin(params: ModelParams, inner: LexinvariantState, keys: jax.Array) -> LexinvariantState:
        if not drawn:
            return inner
        own = randomness.at(keys, jnp.zeros(keys.shape, jnp.int32), randomness.TABLE)
        return inner.replace(tables=lex.draw(config, params["target"], own))

    def table(params: ModelParams, inner: LexinvariantState) -> jnp.ndarray:
        return params["target"]["fixed"]["embedding"] if inner.tables is None else inner.tables

    def read(
        params: ModelParams, inner: LexinvariantState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> LexinvariantState:
        def part(first: jnp.ndarray, size: int, cache: kv.KVCache) -> kv.KVCache:
            cut = jax.lax.dynamic_slice_in_dim(tokens, first, size, axis=1)
            cache = kv.truncate(cache, jnp.full_like(lengths, first))
            out = lex.apply(
                config, params["target"], table(params, inner), cut, cache=cache, with_logits=False
            )
            assert out.cache is not None
            return out.cache

        cache = in_parts(tokens.shape[1], part, inner.cache)
        return inner.replace(cache=kv.truncate(cache, lengths))

    def step(params: ModelParams, state: DecodeState) -> tuple[Any, Emission]:
        inner: LexinvariantState = state.inner
        pending = pending_tokens(state)[:, None]
        out = lex.apply(config, params["target"], table(params, inner), pending, cache=inner.cache)
        assert out.logits is not None and out.cache is not None
        logits = out.logits[:, 0]
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, config.vocab_size)
            logits = penalise(logits, seen, sampling)
        token = draw(logits, state.keys, state.lengths, sampling)
        count = state.active.astype(jnp.int32)
        cache = kv.truncate(out.cache, out.cache.lengths + count)
        emission = Emission(token[:, None], count, work.round_work(len(token), 0))
        return inner.replace(cache=cache), emission

    return Method("lexinvariant", ("target",), 0, 1, init, read, step, begin=begin)


SPEC = MethodSpec(
    "plain decoding under a table of random token vectors for each row (arXiv 2305.16349)",
    ("target",),
    {},
    lambda configs, sampling, options: lexinvariant(configs["target"], sampling),
    architecture=LexinvariantConfig,
)
