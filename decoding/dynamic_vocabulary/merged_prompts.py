"""Decoding after merged prompts: fewer cache slots and a shorter prefill, ordinary tokens after.

Feher et al., arXiv 2411.18553, section 2.4 of the sheet; with a cache of keys and values, where the
published code runs the whole prefix again for every token.
"""

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from decoding import sampling as drawing
from decoding.dynamic_vocabulary import row_writer
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from decoding.loop import DecodeState, Method, ModelParams
from decoding.sampling import SamplingConfig
from models import transformer
from models.config import TransformerConfig

# The rows of merged tokens among a method's parameters: `EmbeddingCache.table`.
ROLE = "merged"


def prompt_ids(
    cache: EmbeddingCache,
    batch: Sequence[Sequence[str]],
    vocab_size: int,
    own: Mapping[str, int] | None = None,
) -> list[list[int]]:
    """Merged prompts as ids: V + s for the token whose embedding is row s of the cache's table.

    Args:
      cache: asked for what it does not hold; its table is the parameter `ROLE`.
      batch: token strings of each prompt, after `merging.merge`.
      vocab_size: V of the model.
      own: ids of tokens that keep the model's own embedding; None for none.
    """
    own = own or {}
    others = [[token for token in row if token not in own] for row in batch]
    slots = iter([slot for row in cache.slots(others) for slot in row])
    return [
        [own[token] if token in own else vocab_size + next(slots) for token in row] for row in batch
    ]


@functools.cache
def merged_prompts(config: TransformerConfig, sampling: SamplingConfig) -> Method:
    """Plain decoding in which ids from V on are rows of params['merged'] [C, D].

    Such ids are for prompts: what is drawn are tokens of the model's own vocabulary. A text has as
    many cache slots as its prompt has merged tokens.
    """
    V = config.vocab_size

    def lookup(params: ModelParams, ids: jnp.ndarray) -> jnp.ndarray:
        own = row_writer.own_rows(config, params, ids)
        made = params[ROLE][jnp.maximum(ids - V, 0)].astype(own.dtype)
        return jnp.where((ids < V)[..., None], own, made)

    def choose(
        params: ModelParams, state: DecodeState, hidden: jnp.ndarray
    ) -> tuple[jnp.ndarray, dict[str, jnp.ndarray]]:
        logits = transformer.unembed(config, params["target"], hidden)
        if sampling.repetition_penalty != 1:
            seen = drawing.seen_tokens(state.tokens, state.lengths, V)
            logits = drawing.penalise(logits, seen, sampling)
        return drawing.draw(logits, state.keys, state.lengths, sampling), {}

    return row_writer.row_writer("merged_prompts", config, ("target", ROLE), lookup, choose)
