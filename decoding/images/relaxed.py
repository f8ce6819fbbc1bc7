"""Relaxed rules for drafts of image codes, where near codes are interchangeable.

Neither keeps the target's distribution. Both need a table of neighbours (`neighbourhoods`), so they
are functions that take it first; bound to it they are rules as in `verification`.
"""

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.images.neighbourhoods import pooled
from decoding.sampling import SamplingConfig, draw, log_probs
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict, rows


def pooled_threshold(
    table: jnp.ndarray,
    threshold: jnp.ndarray,
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """Accepts a draft while its neighbourhood has probability >= `threshold`; for a chain.

    MuLo-SD's test in raster order: the first draft that fails is replaced by the target's own
    token, drawn by the noise of plain decoding, and what follows is dropped.

    Args:
      table: int [K, k], codes that are pooled, the draft itself first.
      threshold: tau, float [].
      tree, logits, keys, positions, sampling: as in `verification.exact_match`.
    """
    probs = jax.nn.softmax(logits / (sampling.temperature or 1.0), axis=-1)
    passes = pooled(probs[:, :-1], tree.tokens[:, 1:], table) >= threshold
    kept = jnp.cumprod((passes & tree.valid[:, 1:]).astype(jnp.int32), axis=1)
    count = 1 + kept.sum(axis=1).astype(jnp.int32)
    final = draw(rows(logits, count - 1), keys, positions + count - 1, sampling)
    index = jnp.arange(tree.num_nodes)
    tokens = jnp.pad(tree.tokens[:, 1:], ((0, 0), (0, 1)))
    tokens = jnp.where(index == count[:, None] - 1, final[:, None], tokens)
    return Verdict(jnp.broadcast_to(index, tokens.shape), count, tokens)


def lantern(
    table: jnp.ndarray,
    delta: jnp.ndarray,
    clear: str,
    max_siblings: int,
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
) -> Verdict:
    """LANTERN: a draft is accepted with the probability of itself and some near codes.

    Jang et al., 'LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative
    Decoding', arXiv 2410.03355. For deterministic drafts: siblings are tried in their order, each
    accepted with probability p(v) + S, S being the mass of its nearest codes as long as the sum
    stays within delta; after a rejection p loses the draft and is normalised again. At delta = 0
    this is exact. After a rejection without a successor the token is drawn from what is left of p.

    Args:
      table: int [K, 1 + k], from `nearest_codes`; the first column, the code itself, is not used.
      delta: float [], most probability that neighbours may add to a draft; above 1, LANTERN++'s
        reading: at most (delta - 1) times the draft's own probability.
      clear: what a rejection clears besides the draft: 'used', the neighbours that were added
        (total variation from the target is then at most delta), or 'all', every neighbour of the
        table if any was added, as the official code does.
      max_siblings: children that a node has at most; 1 for a chain.
      tree, logits, keys, positions, sampling: as in `verification.exact_match`.
    """
    near = table[:, 1:]

    def attempt(carry: tuple, number: jnp.ndarray) -> tuple[tuple, jnp.ndarray]:
        p, taken, drafts, alive, u = carry
        draft, tried = drafts[:, number], alive[:, number] & ~taken
        own = jnp.take_along_axis(p, draft[:, None], axis=1)
        mass = jnp.take_along_axis(p, near[draft], axis=1)
        bound = jnp.where(delta <= 1, delta, (delta - 1) * own)
        # At 0 even neighbours without probability count for nothing, or they would be cleared.
        used = (jnp.cumsum(mass, axis=1) <= bound) & (delta > 0)
        chance = own[:, 0] + jnp.where(used, mass, 0.0).sum(axis=1)
        passes = tried & (u[:, number] < chance)
        cleared = used if clear == "used" else used.any(axis=1, keepdims=True)
        left = _without(p, draft[:, None], jnp.ones_like(draft, bool)[:, None])
        left = _without(left, near[draft], jnp.broadcast_to(cleared, mass.shape))
        total = left.sum(axis=1, keepdims=True)
        # A draft that stood for all of p is rejected by rounding only.
        left = jnp.where(total > 0, left / jnp.where(total > 0, total, 1.0), p)
        p = jnp.where((tried & ~passes)[:, None], left, p)
        return (p, taken | passes, drafts, alive, u), passes

    def descend(carry: tuple, depth: jnp.ndarray) -> tuple[tuple, tuple]:
        node, going = carry
        child = tree.valid & (tree.parent == node[:, None])
        # The children of the node in their order, those missing last.
        order = jnp.argsort(~child, axis=1, stable=True)[:, :max_siblings]
        alive = jnp.take_along_axis(child, order, axis=1)
        drafts = jnp.take_along_axis(tree.tokens, order, axis=1)
        p = jnp.exp(log_probs(rows(logits, node), sampling))
        at = randomness.at(keys, positions + depth, randomness.ACCEPT)
        u = randomness.uniform(randomness.several(at, max_siblings))
        start = (p, jnp.zeros(len(p), bool), drafts, alive, u)
        (p, taken, *_), passes = jax.lax.scan(attempt, start, jnp.arange(max_siblings))
        chosen = passes.T.argmax(axis=1)
        noise_keys = randomness.at(keys, positions + depth, randomness.RESIDUAL)
        noise = randomness.gumbel(noise_keys, p.shape[-1])
        own = jnp.argmax(jnp.log(p) + noise, axis=-1).astype(jnp.int32)
        token = jnp.where(taken, rows(drafts, chosen), own)
        further = going & taken
        next_node = jnp.where(further, rows(order, chosen), node).astype(jnp.int32)
        return (next_node, further), (node, token, going)

    B = len(positions)
    begin = (jnp.zeros(B, jnp.int32), jnp.ones(B, bool))
    _, steps = jax.lax.scan(descend, begin, jnp.arange(tree.max_depth + 1))
    path, tokens, reached = (step.swapaxes(0, 1) for step in steps)
    return Verdict(path, reached.sum(axis=1).astype(jnp.int32), tokens)


def _without(p: jnp.ndarray, codes: jnp.ndarray, which: jnp.ndarray) -> jnp.ndarray:
    """p [B, V] with those of codes [B, k] set to 0 for which `which` [B, k] holds."""
    place = jnp.where(which, codes, p.shape[1])
    return p.at[jnp.arange(len(p))[:, None], place].set(0.0, mode="drop")
