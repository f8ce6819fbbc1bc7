"""What every drafter is: a bundle of pure functions around its own state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from decoding.loop import DecodeState, Memory, ModelParams
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from models.transformer import Output


class Draft(struct.PyTreeNode):
    """What a drafter returns.

    Attributes:
      tree: the drafts.
      inner: the drafter's state.
      calls: draft-model calls it took: int32 [B], or a number for all rows.
      counters: the drafter's own work counters by name, int32 [B].
    """

    tree: DraftTree
    inner: Any
    calls: jnp.ndarray | int = 0
    counters: dict[str, jnp.ndarray] = struct.field(default_factory=dict)


class Drafter(NamedTuple):
    """A source of draft trees. Compose with a rule in `decoding.speculative.method`.

    Attributes:
      roles: models it needs beside the target.
      num_nodes: N of its trees, root included.
      max_depth: deepest node.
      law: how drafts are made, one of `verification.LAWS`; which rules are right follows.
      init: (batch, slots) -> drafter state.
      prefill: (params, drafter state, tokens [B, P], lengths [B]) -> drafter state.
      propose: (params, drafter state, decode state) -> Draft.
      observe: (drafter state, tree, verdict, target output, active [B]) -> drafter state, after
        verification; where a drafter learns from what the target said.
      scratch: cache slots it writes beyond those of the tree's nodes.
      counters: names of `Draft.counters`.
      memory: what it learns and may take into the next run; None if nothing.
    """

    roles: tuple[str, ...]
    num_nodes: int
    max_depth: int
    law: str
    init: Callable[[int, int], Any]
    prefill: Callable[[ModelParams, Any, jnp.ndarray, jnp.ndarray], Any]
    propose: Callable[[ModelParams, Any, DecodeState], Draft]
    observe: Callable[[Any, DraftTree, Verdict, Output, jnp.ndarray], Any]
    scratch: int = 0
    counters: tuple[str, ...] = ()
    memory: Memory | None = None


def nothing(*_: Any) -> tuple[()]:
    """`init` and `prefill` of a drafter without state."""
    return ()


def observe_nothing(
    inner: Any, tree: DraftTree, verdict: Verdict, output: Output, active: jnp.ndarray
) -> Any:
    """For drafters that do not learn from verification."""
    return inner
