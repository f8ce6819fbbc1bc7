"""What every drafter is: a bundle of pure functions around its own state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from decoding.loop import DecodeState, ModelParams
from decoding.speculative.tree import DraftTree
from decoding.speculative.verification import Verdict
from models.transformer import Output


class Drafter(NamedTuple):
    """A source of draft trees. Compose with a rule in `decoding.speculative.method`.

    Attributes:
      roles: models it needs beside the target.
      num_nodes: N of its trees, root included.
      max_depth: deepest node.
      calls: draft-model calls a round.
      samples: whether drafts are sampled from `log_q`; rules check their validity by it.
      init: (batch, slots) -> drafter state.
      prefill: (params, drafter state, tokens [B, P], lengths [B]) -> drafter state.
      propose: (params, drafter state, decode state) -> (tree, drafter state).
      observe: (drafter state, tree, verdict, target output, active [B]) -> drafter state, after
        verification; where a drafter learns from what the target said.
    """

    roles: tuple[str, ...]
    num_nodes: int
    max_depth: int
    calls: int
    samples: bool
    init: Callable[[int, int], Any]
    prefill: Callable[[ModelParams, Any, jnp.ndarray, jnp.ndarray], Any]
    propose: Callable[[ModelParams, Any, DecodeState], tuple[DraftTree, Any]]
    observe: Callable[[Any, DraftTree, Verdict, Output, jnp.ndarray], Any]


def observe_nothing(
    inner: Any, tree: DraftTree, verdict: Verdict, output: Output, active: jnp.ndarray
) -> Any:
    """For drafters that do not learn from verification."""
    return inner
