"""Trees that grow where the drafter is sure and keep the surest nodes (EAGLE-2).

arXiv 2406.16858, section 4. *Expansion*: at each level the `width` nodes that are likeliest to be
reached, by the product of the drafter's probabilities along the path, are asked for their `width`
likeliest children. *Reranking*: of all children ever found, on whatever level, the `num_draft`
likeliest are put up. A path's probability never grows with its length, so that what is kept is a
tree. Nothing is sampled: the tree is a function of the text.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import top_k
from decoding.speculative import sources, verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.sources import Source
from decoding.speculative.tree import NO_PARENT, DraftTree
from models.errors import InputError


def grown_nodes(width: int, depth: int) -> int:
    """Nodes that the source is asked about, root included."""
    return 1 + width * depth


@functools.cache
def reranked_tree_drafter(
    source: Source,
    width: int,
    depth: int,
    num_draft: int,
    eos_ids: tuple[int, ...] = (),
) -> Drafter:
    """Pools width + depth * width^2 candidates and keeps `num_draft` of them.

    Args:
      source: draft distributions; `depth` + 1 calls a round. Its trees have `grown_nodes` nodes.
      width: nodes asked a level, and children each.
      depth: levels of nodes that are asked, the root's not counted; the tree may be one deeper.
      num_draft: nodes put up, the root not counted.
      eos_ids: tokens that are not drafted beyond.

    Raises:
      InputError: more nodes to be kept than there are candidates.
    """
    pool = width + depth * width * width
    if num_draft > pool:
        raise InputError(
            f"num_draft: {num_draft} must be at most {pool}, the candidates of width {width} and "
            f"depth {depth}"
        )
    asked, L = grown_nodes(width, depth), depth + 1

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        tree = sources.plant(pending_tokens(state), asked)
        log_q, inner = source.root(params, inner, state)
        B = len(log_q)
        frontier_score = jnp.zeros((B, 1))
        frontier_node = jnp.zeros((B, 1), jnp.int32)  # in `tree`
        frontier_entry = jnp.full((B, 1), NO_PARENT)  # in the pool
        log_q = log_q[:, None]
        tokens, scores, parents, depths = [], [], [], []
        for level in range(L):
            best, children = top_k(log_q, width)
            score = (frontier_score[..., None] + best).reshape(B, -1)
            tokens.append(children.reshape(B, -1).astype(jnp.int32))
            scores.append(score)
            parents.append(jnp.repeat(frontier_entry, width, axis=1))
            depths.append(jnp.full(score.shape, level + 1))
            if level == depth:
                break
            before = sum(part.shape[1] for part in scores[:-1])
            frontier_score, chosen = jax.lax.top_k(score, width)
            new_tokens = jnp.take_along_axis(tokens[-1], chosen, axis=1)
            parent_node = jnp.take_along_axis(
                jnp.repeat(frontier_node, width, axis=1), chosen, axis=1
            )
            first = 1 + level * width
            there = jnp.full((B,), first)
            tree = sources.add(tree, there, new_tokens, parent_node, jnp.ones(chosen.shape, bool))
            log_q, inner = source.nodes(params, inner, state, tree, there, width)
            if eos_ids:
                ended = jnp.isin(new_tokens, jnp.asarray(eos_ids))
                log_q = jnp.where(ended[..., None], -jnp.inf, log_q)
            frontier_node = jnp.broadcast_to(first + jnp.arange(width), chosen.shape)
            frontier_entry = (before + chosen).astype(jnp.int32)
        pools = (jnp.concatenate(parts, axis=1) for parts in (tokens, scores, parents, depths))
        return Draft(_rerank(state, *pools, num_draft=num_draft, max_depth=L), inner, L)

    return Drafter(
        roles=source.roles,
        num_nodes=num_draft + 1,
        max_depth=L,
        law=verification.DETERMINISTIC,
        init=source.init,
        prefill=source.prefill,
        propose=propose,
        observe=sources.keep_accepted(source),
        # The head's own nodes, and the root's call on all that may have been accepted.
        scratch=max(0, asked + L - num_draft),
        reads=source.reads,
    )


def _rerank(
    state: DecodeState,
    tokens: jnp.ndarray,
    scores: jnp.ndarray,
    parents: jnp.ndarray,
    depths: jnp.ndarray,
    *,
    num_draft: int,
    max_depth: int,
) -> DraftTree:
    """The best of a pool as a tree.

    Args:
      state: of the run.
      tokens, parents, depths: int32 [B, P]; parents are entries of the pool, NO_PARENT for the
        root, and come before their children.
      scores: float32 [B, P], never above a parent's; equal ones go to the earlier entry.
      num_draft: how many are kept.
      max_depth: of the pool.
    """
    B, P = scores.shape
    kept = jnp.sort(jax.lax.top_k(scores, num_draft)[1], axis=1)

    def pick(table: jnp.ndarray) -> jnp.ndarray:
        return jnp.take_along_axis(table, kept, axis=1)

    # Number of each entry among those that are kept, the root being 0.
    number = jnp.zeros((B, P), jnp.int32)
    number = jax.vmap(lambda row, at: row.at[at].set(jnp.arange(1, num_draft + 1)))(number, kept)
    above = pick(parents)
    parent = jnp.where(
        above == NO_PARENT, 0, jnp.take_along_axis(number, jnp.maximum(above, 0), axis=1)
    )
    root = jnp.zeros((B, 1), jnp.int32)
    return DraftTree(
        tokens=jnp.concatenate([pending_tokens(state)[:, None], pick(tokens)], axis=1),
        parent=jnp.concatenate([root + NO_PARENT, parent], axis=1),
        depth=jnp.concatenate([root, pick(depths)], axis=1),
        valid=jnp.concatenate([root == 0, jnp.isfinite(pick(scores))], axis=1),
        log_q=None,
        max_depth=max_depth,
        is_chain=False,
    )
