"""A smaller model drafts a chain, token by token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw, log_probs, penalise, seen_tokens
from decoding.speculative import verification
from decoding.speculative.drafting import Draft, Drafter, observe_nothing
from decoding.speculative.tree import chain
from models import cache as kv
from models import transformer
from models.config import TransformerConfig


def feed(
    config: TransformerConfig, params: transformer.Params, cache: kv.KVCache, tokens: jnp.ndarray
) -> tuple[jnp.ndarray, kv.KVCache]:
    """Runs and commits tokens int [B, T]: hidden states [B, T, D] and the longer cache."""
    out = transformer.apply(config, params, tokens, cache=cache, with_logits=False)
    assert out.cache is not None
    return out.hidden, kv.truncate(out.cache, out.cache.lengths + tokens.shape[1])


def feed_pending(
    config: TransformerConfig, params: transformer.Params, cache: kv.KVCache, state: DecodeState
) -> tuple[jnp.ndarray, kv.KVCache]:
    """Feeds each row's last two tokens again: hidden [B, D] after the last, all text cached.

    Whatever was accepted before, at most these two are missing, and writing them twice changes
    nothing.
    """
    first = jnp.maximum(state.lengths - 2, 0)
    last_two = jnp.take_along_axis(state.tokens, first[:, None] + jnp.arange(2), axis=1)
    hidden, cache = feed(config, params, kv.truncate(cache, first), last_two)
    # A row of one token has its root in the first of the two places.
    hidden = jnp.where((state.lengths >= 2)[:, None], hidden[:, 1], hidden[:, 0])
    return hidden, kv.truncate(cache, state.lengths)


@functools.cache
def model_drafter(
    config: TransformerConfig, num_draft: int, sampling: SamplingConfig, purpose: int
) -> Drafter:
    """Drafts `num_draft` tokens with the model of role 'draft'.

    The draft's cache is kept in step by `feed_pending` at each round.

    Args:
      config: the draft model's architecture.
      num_draft: E, length of the chain.
      sampling: how drafts are drawn; greedy drafts carry no `log_q`.
      purpose: noise stream of the draws: DRAFT for `speculative_sampling`; SAMPLE to share the
        target's own noise under `exact_match`, which makes equal draws likelier.
    """

    samples = purpose == randomness.DRAFT and not sampling.greedy

    def init(batch: int, slots: int) -> kv.KVCache:
        return kv.create(config, batch, slots)

    def read(
        params: ModelParams, cache: kv.KVCache, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> kv.KVCache:
        return prefill(config, params["draft"], cache, tokens, lengths)

    def propose(params: ModelParams, cache: kv.KVCache, state: DecodeState) -> Draft:
        lengths = state.lengths
        hidden, cache = feed_pending(config, params["draft"], cache, state)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, lengths, config.vocab_size)

        def decide(hidden: jnp.ndarray, seen: Any, i: Any) -> tuple[jnp.ndarray, Any, Any]:
            logits = transformer.unembed(config, params["draft"], hidden)
            if seen is not None:
                logits = penalise(logits, seen, sampling)
            token = draw(logits, state.keys, lengths + i, sampling, purpose)
            if seen is not None:
                seen = seen.at[jnp.arange(len(token)), token].set(True)
            return token, log_probs(logits, sampling) if samples else None, seen

        def extend(carry: Any, i: jnp.ndarray) -> tuple[Any, Any]:
            cache, token, seen = carry
            hidden, cache = feed(config, params["draft"], cache, token[:, None])
            token, log_q, seen = decide(hidden[:, 0], seen, i)
            return (cache, token, seen), (token, log_q)

        token, log_q, seen = decide(hidden, seen, 0)
        (cache, _, _), later = jax.lax.scan(extend, (cache, token, seen), jnp.arange(1, num_draft))
        drafts, log_q = jax.tree.map(
            lambda one, more: jnp.concatenate([one[:, None], more.swapaxes(0, 1)], axis=1),
            (token, log_q),
            later,
        )
        tree = chain(pending_tokens(state), drafts, jnp.ones(drafts.shape, bool), log_q)
        return Draft(tree, kv.truncate(cache, jnp.maximum(lengths - 1, 0)), num_draft)

    return Drafter(
        roles=("draft",),
        num_nodes=num_draft + 1,
        max_depth=num_draft,
        law=verification.CHAIN if samples else verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe_nothing,
    )
