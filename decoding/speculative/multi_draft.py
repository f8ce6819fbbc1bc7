"""Verification rules for trees in which a node has several sampled children.

`k_seq` and `multi_round` are for sequences sampled independently of each other, where the same
token may be drafted twice and counts as two trials; `recursive_rejection` is for siblings sampled
without replacement, tried in the order in which they were drawn. Each touches the distributions
[B, V] of the nodes on its way only, never those of the whole tree.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.sampling import SamplingConfig, log_probs
from decoding.speculative import transport
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict, residual, rows


def _draw(log_weights: jnp.ndarray, keys: jax.Array, positions: jnp.ndarray) -> jnp.ndarray:
    """One token a row from unnormalised log weights [B, V], by the noise of a rejection."""
    noise_keys = randomness.at(keys, positions, randomness.RESIDUAL)
    noise = randomness.gumbel(noise_keys, log_weights.shape[-1])
    return jnp.argmax(log_weights + noise, axis=-1).astype(jnp.int32)


def _trials(keys: jax.Array, positions: jnp.ndarray, count: int) -> jnp.ndarray:
    """Uniforms [B, count] of the acceptance tests at one position."""
    return randomness.uniform(
        randomness.several(randomness.at(keys, positions, randomness.ACCEPT), count)
    )


def _log_q(tree: DraftTree, node: jnp.ndarray) -> jnp.ndarray:
    """The drafter's distribution [B, V] after node [B]; after a leaf, some other node's."""
    if tree.log_q is None:
        raise ValueError("this rule needs a drafter that returns log_q")
    return rows(tree.log_q, jnp.minimum(node, tree.log_q.shape[1] - 1))


class _Trial(NamedTuple):
    """The outcome of trying the drafts of one position."""

    accepted: jnp.ndarray  # bool [B, K], which draft is taken, at most one a row
    residual: jnp.ndarray  # [B, V], log weights to draw from where none is


# (log_p [B, V], log_q [B, V], drafts [B, K], alive [B, K], uniforms [B, K]) -> _Trial
_TrialRule = Callable[[jnp.ndarray, jnp.ndarray, jnp.ndarray, jnp.ndarray, jnp.ndarray], _Trial]


def _k_seq_trial(
    log_p: jnp.ndarray, log_q: jnp.ndarray, drafts: jnp.ndarray, alive: jnp.ndarray, u: jnp.ndarray
) -> _Trial:
    """K-SEQ at one position: every draft is tried with its ratio deflated by rho."""
    p, q, k = jnp.exp(log_p), jnp.exp(log_q), alive.sum(axis=1)
    rho = transport.deflation(q, p, k)
    ratio = jnp.take_along_axis(log_p - log_q, drafts, axis=1)
    passes = alive & (jnp.log(u) + jnp.log(rho)[:, None] < ratio)
    first = passes & (jnp.cumsum(passes, axis=1) == 1)
    left = jnp.maximum(transport.k_seq_residual(q, p, k, rho), 0.0)
    empty = left.sum(axis=-1, keepdims=True) <= 0
    return _Trial(first, jnp.where(empty, log_p, jnp.log(left)))


def _multi_round_trial(
    log_p: jnp.ndarray, log_q: jnp.ndarray, drafts: jnp.ndarray, alive: jnp.ndarray, u: jnp.ndarray
) -> _Trial:
    """Ordinary rejection, again and again: after each, what is left of p becomes the target."""

    def attempt(carry: tuple, k: jnp.ndarray) -> tuple[tuple, jnp.ndarray]:
        log_left, taken = carry
        draft = jax.lax.dynamic_slice_in_dim(drafts, k, 1, axis=1)
        ratio = jnp.take_along_axis(log_left - log_q, draft, axis=1)[:, 0]
        tried = alive[:, k] & ~taken
        passes = tried & (jnp.log(u[:, k]) < ratio)
        after = jax.nn.log_softmax(residual(log_left, log_q), axis=-1)
        log_left = jnp.where((tried & ~passes)[:, None], after, log_left)
        return (log_left, taken | passes), passes

    start = (log_p, jnp.zeros(alive.shape[0], bool))
    (log_left, _), accepted = jax.lax.scan(attempt, start, jnp.arange(alive.shape[1]))
    return _Trial(accepted.T, log_left)


def _walk_sequences(
    trial: _TrialRule,
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """Descends with the sequences that agree with what was accepted so far."""
    if tree.sequences is None:
        raise ValueError("this rule needs a drafter that samples whole sequences")
    sequences = tree.sequences
    B, K, L = sequences.shape

    def descend(carry: tuple, depth: jnp.ndarray) -> tuple[tuple, tuple]:
        node, alive, going = carry
        nodes = jax.lax.dynamic_index_in_dim(sequences, depth, axis=2, keepdims=False)
        drafts = jnp.take_along_axis(tree.tokens, nodes, axis=1)
        alive = alive & jnp.take_along_axis(tree.valid, nodes, axis=1)
        log_p = log_probs(rows(logits, node), sampling)
        u = _trials(keys, positions + depth, K)
        outcome = trial(log_p, _log_q(tree, node), drafts, alive, u)
        further = going & outcome.accepted.any(axis=1)
        chosen = jnp.take_along_axis(drafts, outcome.accepted.argmax(axis=1)[:, None], axis=1)
        correction = _draw(
            jnp.where(alive.any(axis=1)[:, None], outcome.residual, log_p), keys, positions + depth
        )
        token = jnp.where(further, chosen[:, 0], correction)
        alive = alive & (drafts == token[:, None])
        below = rows(nodes, alive.argmax(axis=1))
        next_node = jnp.where(further, below, node)
        return (next_node, alive, further), (node, token, going)

    start = (
        jnp.zeros(B, jnp.int32),
        jnp.ones((B, K), bool),
        jnp.ones(B, bool),
    )
    (last, _, going), steps = jax.lax.scan(descend, start, jnp.arange(L))
    path, tokens, reached = (step.swapaxes(0, 1) for step in steps)
    count = reached.sum(axis=1).astype(jnp.int32) + going
    bonus = _draw(log_probs(rows(logits, last), sampling), keys, positions + L)
    return Verdict(
        jnp.concatenate([path, last[:, None]], axis=1),
        count,
        jnp.concatenate([tokens, bonus[:, None]], axis=1),
    )


def k_seq(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """K-SEQ: tries the k drafts that are alive with ratios p / (rho q), rho chosen for this k.

    Sun et al., arXiv 2310.15141, section 4. With one sequence it is `speculative_sampling`.

    Args: as `verification.exact_match`; `tree.log_q` and `tree.sequences` are required.
    """
    return _walk_sequences(_k_seq_trial, tree, logits, keys, positions, sampling)


def multi_round(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """Recursive rejection with replacement: each draft is tried against what the last one left.

    Miao et al., 'SpecInfer', arXiv 2305.09781, multi-step speculative sampling.

    Args: as `k_seq`.
    """
    return _walk_sequences(_multi_round_trial, tree, logits, keys, positions, sampling)


class _Search(NamedTuple):
    """A walk of `recursive_rejection`, between two candidates; [B, ...] each."""

    node: jnp.ndarray  # where the walk stands
    cursor: jnp.ndarray  # last node that was a candidate
    rank: jnp.ndarray  # siblings tried at this node
    p: jnp.ndarray  # [B, V], what is left of the target's distribution
    q: jnp.ndarray  # [B, V], the drafter's without the siblings tried
    accepted: jnp.ndarray  # accepted nodes, root included
    path: jnp.ndarray  # [B, M]
    done: jnp.ndarray


def recursive_rejection(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """Recursive rejection sampling over siblings drawn without replacement, in draw order.

    Jeon et al., 'Recursive speculative decoding', arXiv 2402.14160, algorithm 2: accept child y
    with probability P(y) / Q(y), else P becomes the normalised (P - Q)+ and Q loses y. Where the
    drafter's mass is used up the walk stops at once (DySpec, arXiv 2410.11744, algorithm 3).
    One loop over candidates, so that work follows the siblings tried, not the tree's size.

    Args: as `verification.exact_match`; `tree.log_q` is required.
    """
    B, N = tree.tokens.shape
    M = tree.max_depth + 1
    index = jnp.arange(N)

    def propose(search: _Search) -> tuple[jnp.ndarray, jnp.ndarray]:
        """The next sibling to try [B], and whether there is one."""
        child = tree.valid & (tree.parent == search.node[:, None])
        child &= index > search.cursor[:, None]
        return child.argmax(axis=1).astype(jnp.int32), child.any(axis=1)

    def proceed(search: _Search) -> jnp.ndarray:
        return ~search.done.all()

    def attempt(search: _Search) -> _Search:
        candidate, exists = propose(search)
        token = rows(tree.tokens, candidate)
        here = positions + search.accepted - 1
        trial = randomness.at(keys, here, randomness.ACCEPT)
        # The first sibling's noise is a chain's.
        trial = jnp.where(search.rank == 0, trial, jax.vmap(jax.random.fold_in)(trial, search.rank))
        u = randomness.uniform(trial)
        trying = exists & ~search.done & (search.q.sum(axis=1) > 0)
        passes = trying & (u * rows(search.q, token) < rows(search.p, token))
        fails = trying & ~passes
        # Accepted: the distributions after the new node. Rejected: what is left of both.
        next_p = jnp.exp(log_probs(rows(logits, candidate), sampling))
        next_q = jnp.exp(_log_q(tree, candidate))
        left_p = jnp.maximum(search.p - search.q, 0.0)
        mass = left_p.sum(axis=1, keepdims=True)
        left_p = jnp.where(mass > 0, left_p / jnp.maximum(mass, 1e-30), search.p)
        left_q = jnp.where(jnp.arange(search.q.shape[1]) == token[:, None], 0.0, search.q)
        left_q /= jnp.maximum(left_q.sum(axis=1, keepdims=True), 1e-30)

        def pick(accepted: jnp.ndarray, rejected: jnp.ndarray, same: jnp.ndarray) -> jnp.ndarray:
            wide = (slice(None), *(None,) * (same.ndim - 1))
            return jnp.where(passes[wide], accepted, jnp.where(fails[wide], rejected, same))

        return _Search(
            node=jnp.where(passes, candidate, search.node),
            cursor=jnp.where(trying, candidate, search.cursor),
            rank=jnp.where(passes, 0, search.rank + 1),
            p=pick(next_p, left_p, search.p),
            q=pick(next_q, left_q, search.q),
            accepted=search.accepted + passes,
            path=jnp.where(
                passes[:, None] & (jnp.arange(M) == search.accepted[:, None]),
                candidate[:, None],
                search.path,
            ),
            done=~trying,
        )

    root = jnp.zeros(B, jnp.int32)
    start = _Search(
        node=root,
        cursor=root,
        rank=root,
        p=jnp.exp(log_probs(logits[:, 0], sampling)),
        q=jnp.exp(_log_q(tree, root)),
        accepted=root + 1,
        path=jnp.zeros((B, M), jnp.int32),
        done=jnp.zeros(B, bool),
    )
    search = jax.lax.while_loop(proceed, attempt, start)
    final = _draw(jnp.log(search.p), keys, positions + search.accepted - 1)
    drafts = jnp.take_along_axis(tree.tokens, search.path, axis=1)
    tokens = jnp.pad(drafts[:, 1:], ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(M) == search.accepted[:, None] - 1, final[:, None], tokens)
    return Verdict(search.path, search.accepted, tokens)
