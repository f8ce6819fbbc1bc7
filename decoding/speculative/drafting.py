"""What every drafter is: a bundle of pure functions around its own state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from decoding.loop import DecodeState, Memory, ModelParams
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from models import cache as kv
from models.transformer import Output


class Begun(struct.PyTreeNode):
    """The target's first layers on every node, where a drafter ran them itself.

    Attributes:
      hidden: [B, N, D], the residual stream of each node before layer `layer`.
      cache: the target's, `lengths` at the root, these layers' keys and values of node i in slot
        lengths + i.
      layer: how many layers were run.
    """

    hidden: jnp.ndarray
    cache: kv.KVCache
    layer: int = struct.field(pytree_node=False)


class Draft(struct.PyTreeNode):
    """What a drafter returns.

    Attributes:
      tree: the drafts.
      inner: the drafter's state.
      calls: draft-model calls it took: int32 [B], or a number for all rows.
      counters: the drafter's own work counters by name, int32 [B].
      begun: what the target's call need not do again; None where the drafter is not made of the
        target's layers.
    """

    tree: DraftTree
    inner: Any
    calls: jnp.ndarray | int = 0
    counters: dict[str, jnp.ndarray] = struct.field(default_factory=dict)
    begun: Begun | None = None


class Drafter(NamedTuple):
    """A source of draft trees. Compose with a rule in `decoding.speculative.method`.

    Attributes:
      roles: models it needs beside the target.
      num_nodes: N of its trees, root included.
      max_depth: deepest node.
      law: how drafts are made, one of `verification.LAWS`; which rules are right follows.
      init: (batch, slots) -> drafter state.
      prefill: (params, drafter state, tokens [B, P], lengths [B], *streams) -> drafter state.
      propose: (params, drafter state, decode state) -> Draft. The target's cache is the decode
        state's `inner.target`.
      observe: (drafter state, tree, verdict, target output, active [B]) -> drafter state, after
        verification; where a drafter learns from what the target said.
      scratch: cache slots it writes beyond those of the tree's nodes.
      counters: names of `Draft.counters`.
      memory: what it learns and may take into the next run; None if nothing.
      reads: layer counts of the target after which `prefill` is handed the prompts' residual
        streams [B, P, D].
    """

    roles: tuple[str, ...]
    num_nodes: int
    max_depth: int
    law: str
    init: Callable[[int, int], Any]
    prefill: Callable[..., Any]
    propose: Callable[[ModelParams, Any, DecodeState], Draft]
    observe: Callable[[Any, DraftTree, Verdict, Output, jnp.ndarray], Any]
    scratch: int = 0
    counters: tuple[str, ...] = ()
    memory: Memory | None = None
    reads: tuple[int, ...] = ()


def nothing(*_: Any) -> tuple[()]:
    """`init` and `prefill` of a drafter without state."""
    return ()


def observe_nothing(
    inner: Any, tree: DraftTree, verdict: Verdict, output: Output, active: jnp.ndarray
) -> Any:
    """For drafters that do not learn from verification."""
    return inner
