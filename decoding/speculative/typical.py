"""Typical acceptance: keeps drafts that are likely enough; the text is not a sample of p."""

import jax
import jax.numpy as jnp

from decoding.sampling import SamplingConfig, draw, log_probs
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict, exact_match, rows


def typical_acceptance(
    tree: DraftTree,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    sampling: SamplingConfig,
    *,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Verdict:
    """Accepts draft x where p(x) > min(epsilon, delta exp(-H(p))); keeps the deepest such path.

    Cai et al., 'Medusa', arXiv 2401.10774, section 2.3.1. Not lossless: accepted tokens are not
    samples of p. At temperature 0 it is `exact_match`.

    Args:
      tree, logits, keys, positions, sampling: as `verification.exact_match`.
      epsilon: threshold where the target is sure.
      delta: scale of the threshold where it is not; published: sqrt(epsilon).
    """
    if sampling.greedy:
        return exact_match(tree, logits, keys, positions, sampling)
    log_p = log_probs(logits, sampling)
    entropy = -jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0).sum(axis=-1)
    threshold = jnp.minimum(jnp.log(epsilon), jnp.log(delta) - entropy)
    parent = jnp.maximum(tree.parent, 0)
    # log p of each draft, and the threshold, both at its parent: [B, N].
    of_draft = jax.vmap(lambda table, node, token: table[node, token])(log_p, parent, tree.tokens)
    likely = of_draft > jnp.take_along_axis(threshold, parent, axis=1)
    allowed = tree.valid & (likely | (tree.parent < 0))
    # A node is accepted when no node on its path is refused.
    accepted = ~(tree.ancestry & ~allowed[:, None, :]).any(axis=2)
    last = jnp.where(accepted, tree.depth, -1).argmax(axis=1)  # the first of the deepest
    count = rows(tree.depth, last) + 1
    on_path = rows(tree.ancestry, last)
    M = tree.max_depth + 1
    # Node numbers increase along a path: the path is its nodes in order.
    nodes = jnp.where(on_path, jnp.arange(tree.num_nodes), tree.num_nodes)
    path = jnp.minimum(jnp.sort(nodes, axis=1)[:, :M], tree.num_nodes - 1)
    final = draw(rows(logits, last), keys, positions + count - 1, sampling)
    drafts = jnp.pad(jnp.take_along_axis(tree.tokens, path, axis=1)[:, 1:], ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(M) == count[:, None] - 1, final[:, None], drafts)
    return Verdict(path.astype(jnp.int32), count.astype(jnp.int32), tokens)
