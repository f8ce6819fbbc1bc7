"""Verification rules: which drafts of a scored tree are kept, and what follows them.

Each rule is a pure function (tree, logits, keys, positions, sampling) -> Verdict. Which rule keeps
the target's distribution depends on how the drafts were made, their *law*; `rules.RULES` says which
rule is right for which law. Here are the two rules that a chain needs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding.sampling import SamplingConfig, draw, log_probs
from decoding.speculative.tree import DraftTree

# How drafts are made.
DETERMINISTIC = "deterministic"  # without noise, or with noise that the rule shares
CHAIN = "a sampled chain"
INDEPENDENT = "independent sampled sequences"
WITHOUT_REPLACEMENT = "siblings sampled without replacement"
LAWS = (DETERMINISTIC, CHAIN, INDEPENDENT, WITHOUT_REPLACEMENT)


class Verdict(struct.PyTreeNode):
    """What a rule decided.

    Attributes:
      path: int32 [B, M], accepted nodes from the root on, M = max_depth + 1; entries from
        `count` on are meaningless.
      count: int32 [B], accepted nodes, root included; also the number of emitted tokens.
      tokens: int32 [B, M], emitted tokens: accepted drafts, then the target's own token.
      counters: a rule's own work counters by name, int32 [B].
    """

    path: jnp.ndarray
    count: jnp.ndarray
    tokens: jnp.ndarray
    counters: dict[str, jnp.ndarray] = struct.field(default_factory=dict)


Rule = Callable[[DraftTree, jnp.ndarray, jax.Array, jnp.ndarray, SamplingConfig], Verdict]


# What a walk down the tree carries: the node [B] it stands at, and whether it still goes on [B];
# and what each depth gives: node, token, whether the depth was reached.
_Walk = tuple[jnp.ndarray, jnp.ndarray]
_Step = tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]


def rows(values: jnp.ndarray, index: jnp.ndarray) -> jnp.ndarray:
    """values[b, index[b]]: [B, N, ...] and int [B] -> [B, ...]."""
    return jax.vmap(lambda row, i: row[i])(values, index)


def exact_match(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """Draws the target's own token at each position and follows the child that equals it.

    The noise is that of plain decoding at the same position, so the text is token for token
    what plain decoding with the same keys gives, at any temperature.

    Args:
      tree: drafts; `log_q` is not used.
      logits: float32 [B, N, V] of the target, penalised where a penalty is used.
      keys: row keys [B].
      positions: int [B], position of the first token to emit (the row's length).
      sampling: how the target's token is drawn.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32) if sampling.greedy else None

    def descend(carry: _Walk, depth: jnp.ndarray) -> tuple[_Walk, _Step]:
        node, going = carry
        if greedy is not None:
            token = rows(greedy, node)
        else:
            token = draw(rows(logits, node), keys, positions + depth, sampling)
        match = tree.valid & (tree.parent == node[:, None]) & (tree.tokens == token[:, None])
        further = going & match.any(axis=1)
        next_node = jnp.where(further, match.argmax(axis=1), node).astype(jnp.int32)
        return (next_node, further), (node, token, going)

    start = (jnp.zeros(positions.shape, jnp.int32), jnp.ones(positions.shape, bool))
    # A loop, not a copy of the body a depth: a round is compiled in a fraction of the time.
    _, steps = jax.lax.scan(descend, start, jnp.arange(tree.max_depth + 1))
    path, tokens, reached = (step.swapaxes(0, 1) for step in steps)
    return Verdict(path, reached.sum(axis=1).astype(jnp.int32), tokens)


def speculative_sampling(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """Accepts a draft x with probability min(1, p(x) / q(x)), else draws from (p - q)+.

    Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318. For trees in
    which every node has at most one child, each sampled from `tree.log_q` at its parent.

    Args: as `exact_match`; `tree.log_q` is required.
    """
    if tree.log_q is None:
        raise ValueError("speculative_sampling needs a drafter that returns log_q")
    log_q_all = tree.log_q

    def descend(carry: _Walk, depth: jnp.ndarray) -> tuple[_Walk, _Step]:
        node, going = carry
        child = tree.valid & (tree.parent == node[:, None])
        next_node = child.argmax(axis=1).astype(jnp.int32)
        draft = rows(tree.tokens, next_node)
        log_p = rows(log_probs(rows(logits, node), sampling), draft)
        log_q = rows(rows(log_q_all, node), draft)
        u = randomness.uniform(randomness.at(keys, positions + depth, randomness.ACCEPT))
        further = going & child.any(axis=1) & (jnp.log(u) < log_p - log_q)
        return (jnp.where(further, next_node, node), further), (node, draft, further)

    start = (jnp.zeros(positions.shape, jnp.int32), jnp.ones(positions.shape, bool))
    (last, _), steps = jax.lax.scan(descend, start, jnp.arange(tree.max_depth))
    path, drafts, accepted = (step.swapaxes(0, 1) for step in steps)
    count = 1 + accepted.sum(axis=1).astype(jnp.int32)
    # The walk ended at `last`, whose child, if it has one, was rejected.
    log_p = log_probs(rows(logits, last), sampling)
    rejected = (tree.valid & (tree.parent == last[:, None])).any(axis=1)
    log_q = rows(log_q_all, jnp.minimum(last, log_q_all.shape[1] - 1))
    final = jnp.where(rejected[:, None], residual(log_p, log_q), log_p)
    noise_keys = randomness.at(keys, positions + count - 1, randomness.RESIDUAL)
    noise = randomness.gumbel(noise_keys, final.shape[-1])
    correction = jnp.argmax(final + noise, axis=-1).astype(jnp.int32)
    index = jnp.arange(tree.max_depth + 1)
    tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(index == count[:, None] - 1, correction[:, None], tokens)
    return Verdict(jnp.concatenate([path, last[:, None]], axis=1), count, tokens)


def residual(log_p: jnp.ndarray, log_q: jnp.ndarray) -> jnp.ndarray:
    """log of max(p - q, 0), not normalised: float32 [..., V]; p itself where q covers it.

    Where p <= q everywhere a rejection has probability 0 and only rounding leads here.
    """
    difference = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    empty = difference.sum(axis=-1, keepdims=True) <= 0
    return jnp.where(empty, log_p, jnp.log(difference))
