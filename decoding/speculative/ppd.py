"""Prompt tokens that guess ahead: parallel prompt decoding (PPD, arXiv 2405.18628).

A few trained embeddings stand behind a token as if they were the next ones; what the target says
at the k-th of them is a guess at the token k + 1 further on. Every node of a draft tree carries
some, so that the call which verifies the last round's guesses makes the next ones too: whichever
node is accepted last, its prompt tokens give the candidates, and how many it carried says how deep
the next tree may be. Prompt tokens are nodes of the tree that can never be accepted.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig, top_k
from decoding.speculative import prompt_trees, verification
from decoding.speculative.drafting import Begun, Draft, Drafter
from decoding.speculative.method import speculative
from decoding.speculative.prompt_trees import SparseTree
from decoding.speculative.tree import NO_PARENT, DraftTree
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.prompt_tokens import MASKS, ROLE


class PromptState(struct.PyTreeNode):
    """What the drafter keeps.

    Attributes:
      lists: int32 [B, n, K], candidates for the token after the next, the one after that, ...; from
        the prompt tokens of the node that was accepted last.
      state: int32 [B], how many of the lists there are: the depth of the next tree; 0 before the
        first round, in which nothing but prompt tokens is put up.
    """

    lists: jnp.ndarray
    state: jnp.ndarray


class _Layout(NamedTuple):
    """Trees of all states, each in N places: root, nodes, prompt tokens; state 0 has no nodes.

    Attributes:
      parent, depth: int [n + 1, N]; unused places hang on the root.
      rank: int [n + 1, N], place in its list of a node at depth d, list d - 1; 0 elsewhere.
      is_node: bool [n + 1, N], what may be accepted, root included.
      prompt: int [n + 1, N], which embedding of the prompt tokens stands there; -1 where none does.
      first_prompt: int [n + 1, N], where a node's prompt tokens begin; they stand together.
      prompts: int [n + 1, N], how many it has, each of m embeddings.
    """

    parent: np.ndarray
    depth: np.ndarray
    rank: np.ndarray
    is_node: np.ndarray
    prompt: np.ndarray
    first_prompt: np.ndarray
    prompts: np.ndarray


def _layout(trees: tuple[SparseTree, ...], ensemble: int, mask: str) -> _Layout:
    n, m = len(trees), ensemble
    everything = (SparseTree((), ()), *trees)
    N = max(1 + n * m + sum(1 + k * m for k in tree.prompts) for tree in everything)
    shape = (n + 1, N)
    found = _Layout(
        parent=np.zeros(shape, np.int32),
        depth=np.ones(shape, np.int32),
        rank=np.zeros(shape, np.int32),
        is_node=np.zeros(shape, bool),
        prompt=np.full(shape, -1, np.int32),
        first_prompt=np.zeros(shape, np.int32),
        prompts=np.zeros(shape, np.int32),
    )
    # How far before an embedding the one is that it hangs on, and sees with all that this one sees.
    back = {"ensemble": m, "decoder": 1, "independent": n * m}[mask]
    for s, tree in enumerate(everything):
        number = {(): 0} | {path: i + 1 for i, path in enumerate(tree.paths)}
        place = len(number)
        for path, node in number.items():
            found.parent[s, node] = number[path[:-1]] if path else NO_PARENT
            found.depth[s, node] = len(path)
            found.rank[s, node] = path[-1] if path else 0
            found.is_node[s, node] = True
            found.first_prompt[s, node] = place
            carried = tree.prompts[node - 1] if path else n
            found.prompts[s, node] = carried
            for i in range(carried * m):
                found.parent[s, place] = node if i < back else place - back
                found.depth[s, place] = len(path) + 1 + i // m
                found.prompt[s, place] = i
                place += 1
    return found


@functools.cache
def prompt_drafter(
    config: TransformerConfig,
    trees: tuple[SparseTree, ...],
    candidates: int,
    ensemble: int = 1,
    mask: str = "ensemble",
) -> Drafter:
    """Trees of `trees[s - 1]` where the last accepted node carried s prompt tokens.

    Args:
      config: the target's architecture.
      trees: of states 1 .. n, n being the prompt tokens of params['prompt_tokens'].
      candidates: K, length of a list.
      ensemble: m, embeddings for each prompt token, whose logits are averaged.
      mask: which of a node's prompt tokens each one sees; see `models.prompt_tokens`.

    Raises:
      InputError: a tree deeper than its state, a node without its parent, or a rank beyond K.
    """
    n, m = len(trees), ensemble
    for s, tree in enumerate(trees, start=1):
        for path, carried in zip(tree.paths, tree.prompts, strict=True):
            if len(path) > s or (len(path) > 1 and path[:-1] not in tree.paths):
                raise InputError(f"trees: path {path} does not fit the tree of state {s}")
            if max(path) >= candidates or not 1 <= carried <= n:
                raise InputError(
                    f"trees: path {path} with {carried} prompt tokens; ranks are below "
                    f"{candidates}, prompt tokens 1 to {n}"
                )
    layout = _layout(trees, ensemble, mask)
    N = layout.parent.shape[1]
    # Ancestors of prompt tokens; no text ever ends at one.
    deepest = n + (n * m if mask == "decoder" else n)
    states = tuple(f"rounds_in_state_{s}" for s in range(1, n + 1))
    tables = jax.tree.map(jnp.asarray, layout)

    def init(batch: int, slots: int) -> PromptState:
        del slots
        return PromptState(
            jnp.zeros((batch, n, candidates), jnp.int32), jnp.zeros((batch,), jnp.int32)
        )

    def read(
        params: ModelParams, inner: PromptState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> PromptState:
        del params, tokens, lengths
        return inner

    def propose(params: ModelParams, inner: PromptState, state: DecodeState) -> Draft:
        mine = jax.tree.map(lambda table: table[inner.state], tables)
        level = jnp.clip(mine.depth - 1, 0, n - 1)
        guess = jax.vmap(lambda lists, at, rank: lists[at, rank])(inner.lists, level, mine.rank)
        tokens = jnp.where(mine.is_node, guess, 0).at[:, 0].set(pending_tokens(state))
        cache = state.inner.target
        embeddings = transformer.token_embeddings(config, params["target"], tokens)
        soft = params[ROLE]["embedding"][jnp.maximum(mine.prompt, 0)]
        embeddings = jnp.where(
            (mine.prompt >= 0)[..., None], soft.astype(embeddings.dtype), embeddings
        )
        tree = DraftTree(
            tokens=tokens,
            parent=mine.parent,
            depth=mine.depth,
            valid=mine.is_node,
            log_q=None,
            max_depth=deepest,
            is_chain=False,
        )
        counters = {"tree_nodes": mine.is_node.sum(axis=1) - 1}
        for s, name in enumerate(states, start=1):
            counters[name] = (inner.state == s).astype(jnp.int32)
        return Draft(tree, inner, 0, counters, Begun(embeddings, cache, 0))

    def observe(
        inner: PromptState,
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> PromptState:
        del tree
        assert output.logits is not None
        last = verification.rows(verdict.path, verdict.count - 1)
        mine = jax.tree.map(lambda table: table[inner.state], tables)
        first = verification.rows(mine.first_prompt, last)
        carried = verification.rows(mine.prompts, last)
        where = jnp.minimum(first[:, None] + jnp.arange(n * m), N - 1)
        logits = jax.vmap(lambda row, at: row[at])(output.logits, where)
        logits = logits.reshape(len(logits), n, m, -1).mean(axis=2)
        lists = top_k(logits, candidates)[1].astype(jnp.int32)
        return PromptState(
            jnp.where(active[:, None, None], lists, inner.lists),
            jnp.where(active, carried, inner.state),
        )

    return Drafter(
        roles=(ROLE,),
        num_nodes=N,
        max_depth=deepest,
        law=verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe,
        counters=("tree_nodes", *states),
    )


def plan_of(options: Mapping[str, Any], vocab_size: int) -> prompt_trees.TreePlan:
    """The trees that a method's options ask for; errors as `prompt_trees.plan`."""
    if options["marginals"] == MARGINALS_OF_PART:
        raise InputError(
            f"marginals: {MARGINALS_OF_PART!r} needs trained prompt tokens (--method_params)"
        )
    marginals = prompt_trees.read_marginals(options["marginals"])
    marginals = tuple(row[:vocab_size] for row in marginals)
    return prompt_trees.shaped(options["tree"], marginals, options["limit"], options["ensemble"])


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    target = configs["target"]
    trees = plan_of(options, target.vocab_size).trees
    candidates = 1 + max(rank for tree in trees for path in tree.paths for rank in path)
    drafter = prompt_drafter(target, trees, candidates, options["ensemble"], options["mask"])
    return speculative("ppd", target, drafter, "exact_match", sampling)


# Marginals that were measured with the trained part itself.
MARGINALS_OF_PART = "part"

SPEC = MethodSpec(
    "trained prompt tokens guess ahead in the call that verifies (lossless)",
    ("target",),
    {
        "limit": Option(
            60,
            "nodes and their prompt tokens a round, the root's aside; in experiments, 0 for what "
            "is fastest by a measured latency curve",
            minimum=0,
        ),
        "marginals": Option(
            "vicuna_7b",
            "chances of candidates, from which trees are made: published ones "
            f"({', '.join(prompt_trees.PUBLISHED)}), a directory with measured ones, or "
            f"{MARGINALS_OF_PART!r} for those of --method_params",
        ),
        "tree": Option(
            "dynamic",
            "prompt tokens where they serve most; controls: as many at every node, at random, or "
            "a chain of the likeliest candidates",
            choices=tuple(prompt_trees.SHAPES),
        ),
        "ensemble": Option(1, "embeddings for each prompt token, as trained", minimum=1),
        "mask": Option("ensemble", "what prompt tokens see, as trained", choices=MASKS),
    },
    _build,
    parts=(ROLE,),
)
