"""A drafter and a verification rule, composed into a decoding method."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding import prefill
from decoding import stats as work
from decoding.loop import DecodeState, Emission, Memory, Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.speculative import rules, scoring
from decoding.speculative.drafting import Drafter
from decoding.speculative.tree import proposed_by_depth
from models import cache as kv
from models.config import TransformerConfig


class SpeculativeState(struct.PyTreeNode):
    """The target's cache and whatever the drafter keeps."""

    target: kv.KVCache
    drafter: Any


@functools.cache
def speculative(
    name: str,
    config: TransformerConfig,
    drafter: Drafter,
    rule: str,
    sampling: SamplingConfig,
    rule_options: tuple[tuple[str, float], ...] = (),
) -> Method:
    """Draft, score, verify, commit, observe: one target call a round.

    Args:
      name: the method's name.
      config: the target's architecture.
      drafter: where drafts come from.
      rule: a name in `rules.RULES`.
      sampling: the target's distribution.
      rule_options: keywords of the rule.

    Raises:
      InputError: the rule is not right for drafts made in the drafter's way.
    """
    spec = rules.check(rule, drafter.law)
    verify = functools.partial(spec.verify, **dict(rule_options))
    N, depth = drafter.num_nodes, drafter.max_depth

    def init(batch: int, slots: int) -> SpeculativeState:
        return SpeculativeState(kv.create(config, batch, slots), drafter.init(batch, slots))

    def read(
        params: ModelParams, inner: SpeculativeState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> SpeculativeState:
        target, streams = prefill.read(
            config, params["target"], inner.target, tokens, lengths, drafter.reads
        )
        return SpeculativeState(
            target, drafter.prefill(params, inner.drafter, tokens, lengths, *streams)
        )

    def step(params: ModelParams, state: DecodeState) -> tuple[SpeculativeState, Emission]:
        with jax.named_scope("draft"):
            draft = drafter.propose(params, state.inner.drafter, state)
        tree = draft.tree
        with jax.named_scope("target"):
            out = scoring.score(config, params["target"], state.inner.target, tree, draft.begun)
        assert out.logits is not None and out.cache is not None
        logits = out.logits
        if sampling.repetition_penalty != 1:
            logits = scoring.penalised_logits(
                logits, tree.ancestry, tree.tokens, state.tokens, state.lengths, sampling
            )
        with jax.named_scope("verify"):
            verdict = verify(tree, logits, state.keys, state.lengths, sampling)
        count = jnp.where(state.active, verdict.count, 0)
        with jax.named_scope("commit"):
            cache = scoring.commit(out.cache, tree, verdict.path, count)
        with jax.named_scope("draft"):
            drafts = drafter.observe(draft.inner, tree, verdict, out, state.active)
        inner = SpeculativeState(cache, drafts)
        reached = jnp.arange(1, depth + 1) < verdict.count[:, None]
        spent = work.round_work(
            len(count),
            depth,
            target_positions=N,
            draft_calls=draft.calls,
            proposed=proposed_by_depth(tree),
            accepted=reached.astype(jnp.int32),
            extra={**draft.counters, **verdict.counters},
        )
        return inner, Emission(verdict.tokens, count, spent)

    memory = None
    if (learned := drafter.memory) is not None:
        memory = Memory(
            take=lambda inner: learned.take(inner.drafter),
            put=lambda inner, value: inner.replace(drafter=learned.put(inner.drafter, value)),
        )
    return Method(
        name,
        ("target", *drafter.roles),
        depth,
        N + drafter.scratch,
        init,
        read,
        step,
        counters=(*drafter.counters, *spec.counters),
        memory=memory,
        lossless=spec.lossless,
    )
