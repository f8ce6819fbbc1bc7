"""Plain decoding with another table of embeddings or another choice of the next token."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from decoding import stats as work
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.prefill import prefill
from models import cache as kv
from models import transformer
from models.config import TransformerConfig

# (params, ids int [B, T]) -> embeddings [B, T, D] as the first layer takes them.
Lookup = Callable[[ModelParams, jnp.ndarray], jnp.ndarray]
# (params, state, hidden [B, D] after the final norm) -> tokens int32 [B], counters by name [B].
Choose = Callable[
    [ModelParams, DecodeState, jnp.ndarray], tuple[jnp.ndarray, Mapping[str, jnp.ndarray]]
]


def row_writer(
    name: str,
    config: TransformerConfig,
    roles: tuple[str, ...],
    lookup: Lookup,
    choose: Choose,
    counters: tuple[str, ...] = (),
) -> Method:
    """One token a round, as `autoregressive`, on embeddings that `lookup` gives.

    Args:
      name, roles, counters: see `Method`.
      config: the target's architecture.
      lookup: see `Lookup`; prompts too go through it.
      choose: see `Choose`.
    """

    def init(batch: int, slots: int) -> kv.KVCache:
        return kv.create(config, batch, slots)

    def read(
        params: ModelParams, cache: kv.KVCache, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> kv.KVCache:
        return prefill(config, params["target"], cache, lookup(params, tokens), lengths)

    def step(params: ModelParams, state: DecodeState) -> tuple[Any, Emission]:
        inputs = lookup(params, pending_tokens(state)[:, None])
        out = transformer.apply(
            config, params["target"], inputs, cache=state.inner, with_logits=False
        )
        assert out.cache is not None
        token, counts = choose(params, state, out.hidden[:, 0])
        count = state.active.astype(jnp.int32)
        cache = kv.truncate(out.cache, out.cache.lengths + count)
        return cache, Emission(token[:, None], count, work.round_work(len(token), 0, extra=counts))

    return Method(name, roles, 0, 1, init, read, step, counters)


def own_rows(config: TransformerConfig, params: ModelParams, ids: jnp.ndarray) -> jnp.ndarray:
    """Embeddings [..., D] of the target's own tokens; ids beyond its vocabulary are clipped."""
    table = params["target"]["embedder"]["embedding"]
    rows = table[jnp.clip(ids, 0, config.vocab_size - 1)].astype(config.compute_dtype)
    scale = config.embedding_scale
    return rows if scale is None else rows * jnp.asarray(scale, rows.dtype)
