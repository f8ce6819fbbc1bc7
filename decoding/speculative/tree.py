"""The draft tree: what a drafter proposes and a verification rule judges.

Node 0 is the root: the row's pending token, committed but in no cache, so that one target call
scores it together with all drafts. Nodes are numbered so that a parent comes before its children,
and siblings are in the order in which a rule must try them. A chain is a tree.
"""

import jax.numpy as jnp
from flax import struct

from models import masks

NO_PARENT = -1


class DraftTree(struct.PyTreeNode):
    """A batch of draft trees of equal size.

    Attributes:
      tokens: int32 [B, N].
      parent: int32 [B, N], index of each node's parent; NO_PARENT at the root.
      depth: int32 [B, N], 0 at the root.
      valid: bool [B, N]; an invalid node can neither be accepted nor have accepted descendants.
      log_q: float32 [B, I, V] or None: the drafter's distribution over the children of node i,
        for the first I nodes (all that have children). None for deterministic drafters.
      sequences: int32 [B, K, max_depth] or None: for drafts that are K sequences sampled
        independently, the node of each at each depth. Sequences with a common prefix may share
        its nodes.
      max_depth: depth of the deepest node the shape allows.
      is_chain: every node's parent is the node before it; accepted paths then need no move.
    """

    tokens: jnp.ndarray
    parent: jnp.ndarray
    depth: jnp.ndarray
    valid: jnp.ndarray
    log_q: jnp.ndarray | None
    max_depth: int = struct.field(pytree_node=False)
    is_chain: bool = struct.field(pytree_node=False)
    sequences: jnp.ndarray | None = None

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return self.tokens.shape[1]

    @property
    def ancestry(self) -> jnp.ndarray:
        """Whether node j is i or an ancestor of i: bool [B, N, N]."""
        return masks.ancestors(self.parent, self.max_depth)


def chain(
    root: jnp.ndarray, drafts: jnp.ndarray, valid: jnp.ndarray, log_q: jnp.ndarray | None = None
) -> DraftTree:
    """A single draft sequence as a tree.

    Args:
      root: int32 [B], pending tokens.
      drafts: int32 [B, E].
      valid: bool [B, E]; what follows an invalid draft is invalid too.
      log_q: float32 [B, E, V], the distribution each draft was sampled from.

    Returns:
      A tree of E + 1 nodes.
    """
    B, E = drafts.shape
    index = jnp.broadcast_to(jnp.arange(E + 1, dtype=jnp.int32), (B, E + 1))
    usable = jnp.cumprod(valid.astype(jnp.int32), axis=1).astype(bool)
    return DraftTree(
        tokens=jnp.concatenate([root[:, None], drafts], axis=1),
        parent=index - 1,
        depth=index,
        valid=jnp.concatenate([jnp.ones((B, 1), bool), usable], axis=1),
        log_q=log_q,
        max_depth=E,
        is_chain=True,
        sequences=index[:, None, 1:],
    )


def proposed_by_depth(tree: DraftTree) -> jnp.ndarray:
    """Whether any valid node stands at depth 1..max_depth: int32 [B, max_depth]."""
    depths = jnp.arange(1, tree.max_depth + 1)
    at_depth = (tree.depth[:, None, :] == depths[:, None]) & tree.valid[:, None, :]
    return at_depth.any(axis=2).astype(jnp.int32)
