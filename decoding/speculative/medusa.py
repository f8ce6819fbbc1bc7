"""Heads on the last hidden state guess ahead, without seeing each other's guesses (Medusa-1).

arXiv 2401.10774, section 2.1: candidates of distance k are the likeliest tokens of head k at the
token that was accepted last, the same for every path; a fixed tree says which combinations are put
up. The baseline of heads that do see what was drafted.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig, top_k
from decoding.speculative import verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.method import speculative
from decoding.speculative.tree import NO_PARENT, DraftTree
from models import medusa_heads, transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.medusa_heads import ROLE

# The 25 nodes that EAGLE-1 and Chimera ship, by ranks from the root.
TREE_25 = (
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)


class MedusaState(struct.PyTreeNode):
    """What the drafter keeps.

    Attributes:
      hidden: [B, D], what the target's head read at the token before the pending one.
      ready: bool [B], whether there is such a token.
    """

    hidden: jnp.ndarray
    ready: jnp.ndarray


def paths_of(text: str, depth: int) -> tuple[tuple[int, ...], ...]:
    """Paths of a tree written as in `TREE_25`, those up to a depth.

    Raises:
      InputError: anything but digits, a path twice, or one whose parent is not there before it.
    """
    found: list[tuple[int, ...]] = []
    for word in text.split():
        if not word.isdigit():
            raise InputError(f"tree: {word!r} must be digits, the ranks from the root on")
        path = tuple(map(int, word))
        if path in found or (len(path) > 1 and path[:-1] not in found):
            raise InputError(f"tree: {word!r} is there twice, or its parent is not before it")
        found.append(path)
    kept = tuple(path for path in found if len(path) <= depth)
    if not kept:
        raise InputError(f"tree: {text!r} has no nodes")
    return kept


@functools.cache
def medusa_drafter(config: TransformerConfig, paths: tuple[tuple[int, ...], ...]) -> Drafter:
    """Drafts a fixed tree with the heads of params['medusa_heads'].

    Args:
      config: the target's architecture.
      paths: ranks from the root, a parent before its children.

    Raises:
      InputError: a rank beyond the vocabulary; when it is run, a tree deeper than there are heads.
    """
    number = {(): 0} | {path: i + 1 for i, path in enumerate(paths)}
    parent = np.array([NO_PARENT, *(number[path[:-1]] for path in paths)], np.int32)
    depth = np.array([0, *map(len, paths)], np.int32)
    rank = np.array([0, *(path[-1] for path in paths)], np.int32)
    L, N, most = int(depth.max()), len(parent), int(rank.max()) + 1
    D = config.embed_dim
    if most > config.vocab_size:
        raise InputError(f"tree: rank {most - 1} in a vocabulary of {config.vocab_size}")

    def init(batch: int, slots: int) -> MedusaState:
        del slots
        return MedusaState(jnp.zeros((batch, D), config.compute_dtype), jnp.zeros((batch,), bool))

    def read(
        params: ModelParams,
        inner: MedusaState,
        tokens: jnp.ndarray,
        lengths: jnp.ndarray,
        streams: jnp.ndarray,
    ) -> MedusaState:
        del tokens, inner
        last = verification.rows(streams, jnp.maximum(lengths - 1, 0))
        hidden = transformer.final_norm(config, params["target"], last)
        return MedusaState(hidden, lengths > 0)

    def propose(params: ModelParams, inner: MedusaState, state: DecodeState) -> Draft:
        logits = medusa_heads.apply(config, params["target"], params[ROLE], inner.hidden)
        if (heads := logits.shape[1]) < L:
            raise InputError(f"heads: a tree of {L} levels needs as many; these are {heads}")
        lists = top_k(logits[:, :L], most)[1].astype(jnp.int32)
        tokens = lists[:, np.maximum(depth - 1, 0), rank]
        shape = tokens.shape
        valid = jnp.broadcast_to(inner.ready[:, None], shape).at[:, 0].set(True)
        tree = DraftTree(
            tokens=tokens.at[:, 0].set(pending_tokens(state)),
            parent=jnp.broadcast_to(jnp.asarray(parent), shape),
            depth=jnp.broadcast_to(jnp.asarray(depth), shape),
            valid=valid,
            log_q=None,
            max_depth=L,
            is_chain=N == L + 1,
        )
        return Draft(tree, inner, 0)

    def observe(
        inner: MedusaState,
        tree: DraftTree,
        verdict: verification.Verdict,
        output: Any,
        active: jnp.ndarray,
    ) -> MedusaState:
        del tree
        last = verification.rows(verdict.path, verdict.count - 1)
        hidden = jax.vmap(lambda row, at: row[at])(output.hidden, last)
        return MedusaState(jnp.where(active[:, None], hidden, inner.hidden), inner.ready | active)

    return Drafter(
        roles=(ROLE,),
        num_nodes=N,
        max_depth=L,
        law=verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe,
        reads=(config.num_layers,),
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    drafter = medusa_drafter(configs["target"], paths_of(options["tree"], options["heads"]))
    return speculative("medusa", configs["target"], drafter, "exact_match", sampling)


SPEC = MethodSpec(
    "heads on the last hidden state guess ahead, each on its own (lossless)",
    ("target",),
    {
        "heads": Option(4, "heads that are used, at most as many as were trained", minimum=1),
        "tree": Option(TREE_25, "nodes as ranks from the root, a parent before its children"),
    },
    _build,
    parts=(ROLE,),
)
