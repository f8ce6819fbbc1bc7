"""Draft trees grown level by level: independent sequences, siblings without replacement, beams.

All nodes of a level go to the source in one call, so a tree of depth L takes L calls whatever its
width. How a level grows out of the one above is an `Expansion`; the tree around it is the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import top_k
from decoding.speculative import sources, verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.sources import Source
from decoding.speculative.tree import DraftTree


class Level(NamedTuple):
    """New nodes as an expansion returns them.

    Attributes:
      tokens: int32 [B, W'].
      parent: int [B, W'], index of the parent within the level above.
      valid: bool [B, W'].
      carry: what the next expansion receives.
    """

    tokens: jnp.ndarray
    parent: jnp.ndarray
    valid: jnp.ndarray
    carry: Any


# (log_q [B, W, V] after the level above, carry, keys [B] of the positions of the new tokens,
# width of the new level) -> Level. Siblings must come in draw order.
Expansion = Callable[[jnp.ndarray, Any, jax.Array, int], Level]


def independent(log_q: jnp.ndarray, carry: Any, keys: jax.Array, width: int) -> Level:
    """One token a node, the root's being `width` of them: K sequences sampled independently.

    Sun et al., arXiv 2310.15141: duplicates stay, as trials of their own.
    """
    B, W, V = log_q.shape
    parent = jnp.broadcast_to(jnp.arange(width) % W, (B, width))
    noise = randomness.gumbel(randomness.several(keys, width), V)
    tokens = jnp.argmax(log_q[:, parent[0]] + noise, axis=-1)
    return Level(tokens.astype(jnp.int32), parent, jnp.ones((B, width), bool), carry)


def without_replacement(log_q: jnp.ndarray, carry: Any, keys: jax.Array, width: int) -> Level:
    """width / W children a node by Gumbel top-k, in draw order (RSD-C, arXiv 2402.14160).

    Children beyond the support of q are not valid.
    """
    _B, W, V = log_q.shape
    noise = randomness.gumbel(randomness.several(keys, W), V)
    return _best(log_q + noise, carry, width)


def most_likely(log_q: jnp.ndarray, carry: Any, keys: jax.Array, width: int) -> Level:
    """The width / W most likely children of each node: deterministic."""
    del keys
    return _best(log_q, carry, width)


def _best(values: jnp.ndarray, carry: Any, width: int) -> Level:
    B, W, _ = values.shape
    best, tokens = top_k(values, width // W)
    parent = jnp.repeat(jnp.arange(W), width // W)
    return Level(
        tokens.reshape(B, width).astype(jnp.int32),
        jnp.broadcast_to(parent, (B, width)),
        jnp.isfinite(best).reshape(B, width),
        carry,
    )


class Beam(NamedTuple):
    """Of each path in a stochastic beam: float32 [B, W] each.

    Attributes:
      phi: log-probability under q.
      psi: the same, perturbed by Gumbel noise; the maximum over its continuations' psi.
    """

    phi: jnp.ndarray
    psi: jnp.ndarray


def conditional_gumbel(perturbed: jnp.ndarray, maximum: jnp.ndarray) -> jnp.ndarray:
    """Gumbel variables shifted so that their maximum is a given one, stably.

    Kool et al., 'Stochastic beams and where to find them', arXiv 1903.06059, appendix B.3:
    -log(exp(-T) - exp(-Z) + exp(-G)) with Z the maximum of G.

    Args:
      perturbed: G, float32 [..., V]; -inf for what cannot be drawn.
      maximum: T, float32 [...].
    """
    highest = perturbed.max(axis=-1, keepdims=True)
    target = maximum[..., None]
    gap = jnp.where(perturbed == -jnp.inf, -jnp.inf, perturbed - highest)
    # The arg-max gets the maximum itself: log1p(-exp(0)) is -inf and drops out.
    c = target - jnp.where(perturbed == -jnp.inf, 0.0, perturbed) + jnp.log1p(-jnp.exp(gap))
    shifted = target - jnp.maximum(c, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(c)))
    return jnp.where(perturbed == -jnp.inf, -jnp.inf, shifted)


def stochastic_beam(log_q: jnp.ndarray, carry: Beam | None, keys: jax.Array, width: int) -> Level:
    """The `width` paths of largest perturbed log-probability: whole sequences without replacement.

    RSD-S, arXiv 2402.14160, algorithm 5. A level's nodes come in descending order of psi, so the
    children of a node do too, which is their draw order.
    """
    B, W, V = log_q.shape
    if carry is None:
        carry = Beam(jnp.zeros((B, W)), jnp.zeros((B, W)))
    # A beam that is not there, or cannot go on, must not come back.
    phi = carry.phi[..., None] + log_q
    noise = randomness.gumbel(randomness.several(keys, W), V)
    there = carry.psi > -jnp.inf
    psi = conditional_gumbel(jnp.where(there[..., None], phi + noise, -jnp.inf), carry.psi)
    psi = jnp.where(there[..., None], psi, -jnp.inf).reshape(B, W * V)
    best, index = jax.lax.top_k(psi, width)
    valid = best > -jnp.inf
    chosen = jnp.take_along_axis(phi.reshape(B, W * V), index, axis=1)
    return Level(
        (index % V).astype(jnp.int32),
        index // V,
        valid,
        Beam(jnp.where(valid, chosen, 0.0), best),
    )


EXPANSIONS: dict[str, tuple[Expansion, str]] = {
    "independent": (independent, verification.INDEPENDENT),
    "without_replacement": (without_replacement, verification.WITHOUT_REPLACEMENT),
    "stochastic_beam": (stochastic_beam, verification.WITHOUT_REPLACEMENT),
    "most_likely": (most_likely, verification.DETERMINISTIC),
}


@functools.cache
def tree_drafter(
    source: Source,
    expansion: str,
    widths: tuple[int, ...],
    eos_ids: tuple[int, ...] = (),
    merge: bool = False,
) -> Drafter:
    """Grows a tree of `widths[l]` nodes at depth l + 1.

    Args:
      source: draft distributions.
      expansion: a key of `EXPANSIONS`.
      widths: nodes of each level; for expansions by children each a multiple of the one before,
        for independent sequences all equal.
      eos_ids: tokens that are not drafted beyond.
      merge: for independent sequences: those with a common prefix share its nodes.
    """
    expand, law = EXPANSIONS[expansion]
    # Level l is nodes offsets[l] .. offsets[l + 1] - 1; level 0 is the root.
    offsets = np.cumsum([0, 1, *widths])
    N, L = int(offsets[-1]), len(widths)
    sampled = law != verification.DETERMINISTIC
    sequential = law == verification.INDEPENDENT

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        lengths = state.lengths
        tree = sources.plant(pending_tokens(state), N)
        log_q, inner = source.root(params, inner, state)
        log_q = log_q[:, None]
        carry = None
        everything = [log_q]
        sequences: list[jnp.ndarray] = []
        for level, width in enumerate(widths):
            keys = randomness.at(state.keys, lengths + level, randomness.DRAFT)
            grown = expand(log_q, carry, keys, width)
            above, here = int(offsets[level]), int(offsets[level + 1])
            parent = above + grown.parent
            if merge and sequences:
                parent = sequences[-1]
            usable = grown.valid & jnp.take_along_axis(tree.valid, parent, axis=1)
            ended = jnp.isin(jnp.take_along_axis(tree.tokens, parent, axis=1), jnp.asarray(eos_ids))
            usable &= ~ended if eos_ids and level else True
            node = here + jnp.arange(width)
            if merge:
                # The first sequence with this parent and token stands for all of them.
                same = (parent[:, :, None] == parent[:, None]) & (
                    grown.tokens[:, :, None] == grown.tokens[:, None]
                )
                node = here + same.argmax(axis=2)
                sequences.append(node)
                usable &= node == here + jnp.arange(width)
            else:
                sequences.append(jnp.broadcast_to(node, usable.shape))
            first = jnp.full(lengths.shape, here)
            tree = sources.add(tree, first, grown.tokens, parent, usable)
            carry = grown.carry
            if isinstance(carry, Beam):
                carry = carry._replace(psi=jnp.where(usable, carry.psi, -jnp.inf))
            if level + 1 < L:
                log_q, inner = source.nodes(params, inner, state, tree, first, width)
                everything.append(log_q)
                if merge:  # a sequence goes on from the node that stands for it
                    log_q = jax.vmap(lambda row, at: row[at])(log_q, node - here)
        drafted = DraftTree(
            tokens=tree.tokens,
            parent=tree.parent,
            depth=tree.depth,
            valid=tree.valid,
            log_q=jnp.concatenate(everything, axis=1) if sampled else None,
            max_depth=L,
            is_chain=N == L + 1,
            sequences=jnp.stack(sequences, axis=2).astype(jnp.int32) if sequential else None,
        )
        counters = {"tree_nodes": tree.valid.sum(axis=1) - 1}
        return Draft(drafted, inner, L if source.is_model else 0, counters)

    return Drafter(
        roles=source.roles,
        num_nodes=N,
        max_depth=L,
        law=law,
        init=source.init,
        prefill=source.prefill,
        propose=propose,
        observe=sources.keep_accepted(source),
        reads=source.reads,
        counters=("tree_nodes",),
    )
