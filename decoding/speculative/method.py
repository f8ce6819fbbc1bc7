"""A drafter and a verification rule, composed into a decoding method."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import struct

from decoding import stats as work
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig
from decoding.speculative import scoring, verification
from decoding.speculative.drafting import Drafter
from decoding.speculative.tree import proposed_by_depth
from models import cache as kv
from models.config import TransformerConfig
from models.errors import InputError, check_choice


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
) -> Method:
    """Draft, score, verify, commit, observe: one target call a round.

    Args:
      name: the method's name.
      config: the target's architecture.
      drafter: where drafts come from.
      rule: a name in `verification.RULES`.
      sampling: the target's distribution.

    Raises:
      InputError: the rule does not keep the target's distribution with this drafter.
    """
    check_choice("rule", rule, verification.RULES)
    if rule in verification.NEEDS_LOG_Q and not drafter.samples:
        raise InputError(
            f"rule: {rule!r} needs drafts sampled from a known distribution, which this drafter "
            "does not give; allowed: exact_match"
        )
    verify = verification.RULES[rule]
    N, depth = drafter.num_nodes, drafter.max_depth

    def init(batch: int, slots: int) -> SpeculativeState:
        return SpeculativeState(kv.create(config, batch, slots), drafter.init(batch, slots))

    def read(
        params: ModelParams, inner: SpeculativeState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> SpeculativeState:
        return SpeculativeState(
            prefill(config, params["target"], inner.target, tokens, lengths),
            drafter.prefill(params, inner.drafter, tokens, lengths),
        )

    def step(params: ModelParams, state: DecodeState) -> tuple[SpeculativeState, Emission]:
        tree, drafter_state = drafter.propose(params, state.inner.drafter, state)
        out = scoring.score(config, params["target"], state.inner.target, tree)
        assert out.logits is not None and out.cache is not None
        logits = scoring.penalised_logits(out.logits, tree, state.tokens, state.lengths, sampling)
        verdict = verify(tree, logits, state.keys, state.lengths, sampling)
        count = jnp.where(state.active, verdict.count, 0)
        inner = SpeculativeState(
            scoring.commit(out.cache, tree, verdict.path, count),
            drafter.observe(drafter_state, tree, verdict, out, state.active),
        )
        reached = jnp.arange(1, depth + 1) < verdict.count[:, None]
        spent = work.round_work(
            len(count),
            depth,
            target_positions=N,
            draft_calls=drafter.calls,
            proposed=proposed_by_depth(tree),
            accepted=reached.astype(jnp.int32),
        )
        return inner, Emission(verdict.tokens, count, spent)

    return Method(name, ("target", *drafter.roles), depth, N, init, read, step)
