"""Verification rules: which drafts of a scored tree are kept, and what follows them.

Each rule is a pure function (tree, logits, keys, positions, sampling) -> Verdict whose emitted
tokens follow the target's distribution exactly. Which rule is right depends on how the drafts were
made: `exact_match` for any drafter whose drafts do not depend on the noise of the rule itself,
`speculative_sampling` for drafts sampled from `tree.log_q`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding.sampling import SamplingConfig, draw, log_probs
from decoding.speculative.tree import DraftTree


class Verdict(struct.PyTreeNode):
    """What a rule decided.

    Attributes:
      path: int32 [B, M], accepted nodes from the root on, M = max_depth + 1; entries from
        `count` on are meaningless.
      count: int32 [B], accepted nodes, root included; also the number of emitted tokens.
      tokens: int32 [B, M], emitted tokens: accepted drafts, then the target's own token.
    """

    path: jnp.ndarray
    count: jnp.ndarray
    tokens: jnp.ndarray


Rule = Callable[[DraftTree, jnp.ndarray, jax.Array, jnp.ndarray, SamplingConfig], Verdict]


def _rows(values: jnp.ndarray, index: jnp.ndarray) -> jnp.ndarray:
    """values[b, index[b]]: [B, N, ...] and int [B] -> [B, ...]."""
    return jax.vmap(lambda row, i: row[i])(values, index)


def _collect(steps: list[tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]]) -> Verdict:
    """Stacks (node, token, going) of each depth; a depth counts while `going` [B] held."""
    nodes, tokens, going = (jnp.stack(part, axis=1) for part in zip(*steps, strict=True))
    return Verdict(nodes, going.sum(axis=1).astype(jnp.int32), tokens)


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
    node = jnp.zeros(tree.tokens.shape[:1], jnp.int32)
    going = jnp.ones(node.shape, bool)
    steps = []
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32) if sampling.greedy else None
    for depth in range(tree.max_depth + 1):
        if greedy is not None:
            token = _rows(greedy, node)
        else:
            token = draw(_rows(logits, node), keys, positions + depth, sampling)
        steps.append((node, token, going))
        match = tree.valid & (tree.parent == node[:, None]) & (tree.tokens == token[:, None])
        going = going & match.any(axis=1)
        node = jnp.where(going, match.argmax(axis=1), node).astype(jnp.int32)
    return _collect(steps)


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
    node = jnp.zeros(tree.tokens.shape[:1], jnp.int32)
    going = jnp.ones(node.shape, bool)
    steps = []
    for depth in range(tree.max_depth + 1):
        at = positions + depth
        log_p = log_probs(_rows(logits, node), sampling)
        if depth < tree.max_depth:
            child = tree.valid & (tree.parent == node[:, None])
            exists, next_node = child.any(axis=1), child.argmax(axis=1).astype(jnp.int32)
            draft = _rows(tree.tokens, next_node)
            log_q = _rows(tree.log_q, jnp.minimum(node, tree.log_q.shape[1] - 1))
            u = randomness.uniform(randomness.at(keys, at, randomness.ACCEPT))
            accepted = exists & (jnp.log(u) < _rows(log_p, draft) - _rows(log_q, draft))
            final = residual(log_p, jnp.where(exists[:, None], log_q, -jnp.inf))
        else:
            accepted, next_node, draft = jnp.zeros(node.shape, bool), node, node
            final = log_p
        noise = randomness.gumbel(randomness.at(keys, at, randomness.RESIDUAL), final.shape[-1])
        correction = jnp.argmax(final + noise, axis=-1).astype(jnp.int32)
        steps.append((node, jnp.where(accepted, draft, correction), going))
        going = going & accepted
        node = jnp.where(going, next_node, node)
    return _collect(steps)


def residual(log_p: jnp.ndarray, log_q: jnp.ndarray) -> jnp.ndarray:
    """log of max(p - q, 0), not normalised: float32 [..., V]; p itself where q covers it.

    Where p <= q everywhere a rejection has probability 0 and only rounding leads here.
    """
    difference = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    empty = difference.sum(axis=-1, keepdims=True) <= 0
    return jnp.where(empty, log_p, jnp.log(difference))


# Rules by name, and whether each one needs the drafter's distribution.
RULES: dict[str, Rule] = {
    "exact_match": exact_match,
    "speculative_sampling": speculative_sampling,
}
NEEDS_LOG_Q = frozenset({"speculative_sampling"})
