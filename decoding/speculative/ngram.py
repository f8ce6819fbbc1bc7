"""N-gram prompt lookup: the continuation of the text's own last tokens, where they stood before.

Saxena, 'Prompt lookup decoding' (2023). No model, no training: where the text repeats itself, what
followed last time is proposed again.
"""

import functools
from typing import Any

import jax.numpy as jnp

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.speculative import verification
from decoding.speculative.drafting import Draft, Drafter, nothing, observe_nothing
from decoding.speculative.tree import chain


def find_continuation(
    tokens: jnp.ndarray, lengths: jnp.ndarray, num_draft: int, max_ngram: int, min_ngram: int
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """What followed an earlier occurrence of the longest matching suffix.

    Of several occurrences the latest one that `num_draft` tokens follow is taken, or else the
    earliest: in text of period p the latest of all would offer p tokens only.

    Args:
      tokens: int32 [B, M].
      lengths: int32 [B].
      num_draft: E, tokens to propose.
      max_ngram: longest suffix tried first.
      min_ngram: shortest suffix tried.

    Returns:
      Drafts int32 [B, E] and which of them exist, bool [B, E].
    """
    B, M = tokens.shape
    start = jnp.arange(M)
    found = jnp.zeros((B,), bool)
    begin = jnp.zeros((B,), jnp.int32)
    for n in range(max_ngram, min_ngram - 1, -1):
        match = (start + n)[None, :] < lengths[:, None]  # something follows, suffix excluded
        for j in range(n):
            suffix = jnp.take_along_axis(tokens, jnp.maximum(lengths[:, None] - n + j, 0), axis=1)
            match = match & (jnp.roll(tokens, -j, axis=1) == suffix)
        match = match & (lengths > n)[:, None]
        whole = match & ((start + n + num_draft)[None, :] <= lengths[:, None])
        latest = M - 1 - jnp.argmax(whole[:, ::-1], axis=1)
        place = jnp.where(whole.any(axis=1), latest, jnp.argmax(match, axis=1))
        hit = match.any(axis=1) & ~found
        begin = jnp.where(hit, place + n, begin).astype(jnp.int32)
        found = found | hit
    index = begin[:, None] + jnp.arange(num_draft)
    drafts = jnp.take_along_axis(tokens, jnp.minimum(index, M - 1), axis=1)
    return drafts, found[:, None] & (index < lengths[:, None])


@functools.cache
def ngram_drafter(num_draft: int, max_ngram: int, min_ngram: int) -> Drafter:
    """Drafts a chain of `num_draft` tokens by looking the last n-gram up in the row's own text."""

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        drafts, valid = find_continuation(
            state.tokens, state.lengths, num_draft, max_ngram, min_ngram
        )
        return Draft(chain(pending_tokens(state), drafts, valid), ())

    return Drafter(
        roles=(),
        num_nodes=num_draft + 1,
        max_depth=num_draft,
        law=verification.DETERMINISTIC,
        init=nothing,
        prefill=nothing,
        propose=propose,
        observe=observe_nothing,
    )
