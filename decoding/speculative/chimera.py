"""Heads that see what was drafted before them, in a fixed tree (Chimera, arXiv 2402.15758).

The drafter keeps two entries for every position of the text, both keys and values of its encoder's
one layer: of the target's state there, and of the trigram that ends there. Drafting goes down the
tree level by level, one encoder call for all nodes of a level that have children; what the encoder
says at a node stands for the target's state there until the target has computed it. After a round
the entries of its drafts are thrown away; those of accepted tokens are made of the target's own
states. The published code has no decoding; this is its training turned round.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding import prefill
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig, top_k
from decoding.speculative import template as templates
from decoding.speculative import trigram_states, verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.medusa import TREE_25, paths_of
from decoding.speculative.method import speculative
from decoding.speculative.template import Template
from decoding.speculative.tree import DraftTree
from decoding.speculative.trigram_states import TrigramStates
from models import cache as kv
from models import chimera_heads, masks, transformer
from models.chimera_heads import ROLE, ChimeraHeads
from models.config import TransformerConfig
from models.errors import InputError

# Which "layer" of the encoder's cache holds which entries.
_STATES, _TRIGRAMS = 0, 1


class ChimeraState(struct.PyTreeNode):
    """What the drafter keeps.

    Attributes:
      cache: entries of states and of trigrams, as two layers; slot p is position p.
      fresh: [B, M, D], the target's states of the tokens that were accepted last, which have no
        entries yet; the last of them stands before the pending token.
      count: int32 [B], how many they are.
      table: states of trigrams seen; None without one.
    """

    cache: kv.KVCache
    fresh: jnp.ndarray
    count: jnp.ndarray
    table: TrigramStates | None


class _Work(struct.PyTreeNode):
    """The encoder in the middle of a round: its cache, its table and what that was asked.

    Attributes:
      cache, table: as in `ChimeraState`.
      asked, found: int32 [B], trigrams needed this round, and those that the table had.
    """

    cache: kv.KVCache
    table: TrigramStates | None
    asked: jnp.ndarray
    found: jnp.ndarray


def _put(
    cache: kv.KVCache, layer: int, entries: tuple[jnp.ndarray, ...], start: jnp.ndarray
) -> kv.KVCache:
    """Writes keys and values [B, T, K, H] of one kind of entries from slot `start` [B] on."""
    keys, values = list(cache.keys), list(cache.values)
    for store, new in ((keys, entries[-2]), (values, entries[-1])):
        store[layer] = kv.write(store[layer], new.swapaxes(1, 2), start)
    return cache.replace(keys=tuple(keys), values=tuple(values))


def _asked_nodes(template: Template) -> list[list[int]]:
    """Nodes with children, level by level from the root on."""
    inner = sorted(set(template.parent) - {templates.NO_PARENT})
    return [[i for i in inner if template.depth[i] == d] for d in range(template.max_depth)]


def _ancestry(template: Template, nodes: list[int]) -> np.ndarray:
    """Whether node j is i or an ancestor of i, among some that hold all their ancestors."""
    number = {node: j for j, node in enumerate(nodes)}
    found = np.eye(len(nodes), dtype=bool)
    for node in nodes[1:]:
        found[number[node]] |= found[number[template.parent[node]]]
    return found


@functools.cache
def chimera_drafter(config: TransformerConfig, template: Template, places: int = 0) -> Drafter:
    """Drafts a fixed tree with params['chimera_heads'], a `ChimeraHeads`.

    Args:
      config: the target's architecture.
      template: the tree; head k says the children of nodes at depth k.
      places: of a row's table of trigram states; 0 for none. What is drafted does not depend on it.

    Raises:
      InputError: a rank beyond the vocabulary; when it is run, a tree deeper than there are heads.
    """
    L, N, D = template.max_depth, template.num_nodes, config.embed_dim
    if template.width > config.vocab_size:
        raise InputError(f"tree: rank {template.width - 1} in a vocabulary of {config.vocab_size}")
    M, dtype = L + 1, config.compute_dtype
    levels = _asked_nodes(template)
    asked = [node for level in levels for node in level]
    ends = np.cumsum([len(level) for level in levels]).tolist()
    spans = [slice(end - len(level), end) for level, end in zip(levels, ends, strict=True)]
    lineage = _ancestry(template, asked)
    parent, rank = np.asarray(template.parent), np.asarray(template.rank)

    def init(batch: int, slots: int) -> ChimeraState:
        return ChimeraState(
            kv.create(config, batch, slots, num_layers=2),
            jnp.zeros((batch, M, D), dtype),
            jnp.zeros((batch,), jnp.int32),
            trigram_states.create(batch, places, D, dtype) if places else None,
        )

    def trigram(
        params: ModelParams, work: _Work, ids: jnp.ndarray, needed: jnp.ndarray
    ) -> tuple[jnp.ndarray, _Work]:
        """States [B, W, D] of trigrams int [B, W, 3], where `needed` bool [B, W]."""
        heads: ChimeraHeads = params[ROLE]
        make = functools.partial(
            chimera_heads.trigram, heads.config, config, params["target"], heads.params, ids
        )
        if work.table is None:
            return make(), work
        known, there = trigram_states.find(work.table, ids)
        made = jax.lax.cond((there | ~needed).all(), lambda: known, make)
        x = jnp.where(there[..., None], known, made)
        return x, work.replace(
            table=trigram_states.add(work.table, ids, x, needed & ~there),
            asked=work.asked + needed.sum(axis=1),
            found=work.found + (needed & there).sum(axis=1),
        )

    def entries(params: ModelParams, x: jnp.ndarray, positions: jnp.ndarray) -> Any:
        return chimera_heads.entries(config, params[ROLE].params, x, positions)

    def encode(
        params: ModelParams,
        cache: kv.KVCache,
        x: jnp.ndarray,
        queries: jnp.ndarray,
        base: jnp.ndarray,
        nodes: slice,
    ) -> jnp.ndarray:
        """Z [B, W, D] of the trigrams of some nodes, whose entries are written."""
        B, S = len(base), cache.slots
        mine = lineage[nodes]
        itself = np.eye(len(asked), dtype=bool)[nodes]
        above = mine & ~itself
        if not params[ROLE].config.draft_states:
            root = np.arange(len(asked)) == 0
            mine, above = itself | root, np.zeros_like(mine)
        of_states, of_trigrams = (
            masks.tree(jnp.broadcast_to(jnp.asarray(table), (B, *table.shape)), base, S)
            for table in (above, mine)
        )
        # The first token has no trigram of its own.
        mask = jnp.concatenate([of_states, of_trigrams & (jnp.arange(S) > 0)], axis=-1)
        keys, values = (jnp.concatenate(both, axis=-2) for both in (cache.keys, cache.values))
        return chimera_heads.encode(config, params[ROLE].params, x, queries, keys, values, mask)

    def read(
        params: ModelParams,
        inner: ChimeraState,
        tokens: jnp.ndarray,
        lengths: jnp.ndarray,
        streams: jnp.ndarray,
    ) -> ChimeraState:
        heads: ChimeraHeads = params[ROLE]
        states = transformer.final_norm(config, params["target"], streams)

        def part(first: jnp.ndarray, size: int, work: _Work) -> _Work:
            start = jnp.full_like(lengths, first)
            positions = start[:, None] + jnp.arange(size)
            ids = _trigrams_at(tokens, positions)
            x, work = trigram(params, work, ids, positions < lengths[:, None])
            some = jax.lax.dynamic_slice_in_dim(states, first, size, axis=1)
            cache = _put(work.cache, _STATES, entries(params, some, positions), start)
            return work.replace(cache=_put(cache, _TRIGRAMS, entries(params, x, positions), start))

        none = jnp.zeros_like(lengths)
        work = _Work(inner.cache, inner.table, none, none)
        if heads.config.context:
            work = prefill.in_parts(tokens.shape[1], part, work)
        last = verification.rows(states, jnp.maximum(lengths - 1, 0))
        return ChimeraState(
            kv.truncate(work.cache, lengths),
            inner.fresh.at[:, 0].set(last),
            jnp.minimum(lengths, 1),
            work.table,
        )

    def begin(
        params: ModelParams, inner: ChimeraState, state: DecodeState
    ) -> tuple[jnp.ndarray, _Work]:
        """Z [B, 1, D] at the root, the entries of accepted tokens being made first."""
        base = state.lengths - 1  # where the pending token stands
        first = jnp.maximum(base - inner.count, 0)
        positions = first[:, None] + jnp.arange(M + 1)
        needed = (positions <= base[:, None]) & state.active[:, None]
        none = jnp.zeros_like(base)
        work = _Work(kv.truncate(inner.cache, base), inner.table, none, none)
        x, work = trigram(params, work, _trigrams_at(state.tokens, positions), needed)
        root = verification.rows(x, base - first)[:, None]
        if not params[ROLE].config.context:
            return root, work
        queries, *of_trigrams = entries(params, x, positions)
        of_states = entries(params, inner.fresh, positions[:, :M])
        cache = _put(work.cache, _STATES, of_states, first)
        cache = _put(cache, _TRIGRAMS, tuple(of_trigrams), first)
        queries = verification.rows(queries, base - first)[:, None]
        return encode(params, cache, root, queries, base, slice(0, 1)), work.replace(cache=cache)

    def descend(
        params: ModelParams,
        work: _Work,
        drafted: jnp.ndarray,
        ids: jnp.ndarray,
        base: jnp.ndarray,
        d: int,
        needed: jnp.ndarray,
    ) -> tuple[jnp.ndarray, _Work]:
        """Z of the nodes at depth d with children, from their trigrams and Z of those above."""
        x, work = trigram(params, work, ids, jnp.broadcast_to(needed[:, None], ids.shape[:2]))
        if not params[ROLE].config.context:
            return x, work
        above, nodes = spans[d - 1 : d + 1]
        at = base[:, None] + d
        of_states = entries(params, drafted, jnp.broadcast_to(at - 1, drafted.shape[:2]))
        queries, *of_trigrams = entries(params, x, jnp.broadcast_to(at, x.shape[:2]))
        cache = _put(work.cache, _STATES, of_states, base + above.start)
        cache = _put(cache, _TRIGRAMS, tuple(of_trigrams), base + nodes.start)
        return encode(params, cache, x, queries, base, nodes), work.replace(cache=cache)

    def propose(params: ModelParams, inner: ChimeraState, state: DecodeState) -> Draft:
        heads: ChimeraHeads = params[ROLE]
        if heads.config.heads < L:
            raise InputError(
                f"heads: a tree of {L} levels needs as many; these are {heads.config.heads}"
            )
        B, base = len(state.lengths), state.lengths - 1
        hidden = verification.rows(inner.fresh, jnp.maximum(inner.count - 1, 0))[:, None]
        tokens = pending_tokens(state)[:, None]
        # The token before each node's.
        before = jnp.take_along_axis(state.tokens, jnp.maximum(base - 1, 0)[:, None], axis=1)
        drafted, work = begin(params, inner, state)
        for d, (first, end) in enumerate(template.levels):
            if d:
                there = np.asarray(levels[d])
                second, last, token = before[:, parent[there]], before[:, there], tokens[:, there]
                ids = chimera_heads.trigram_ids(second, last, token, base[:, None] + d)
                drafted, work = descend(params, work, drafted, ids, base, d, state.active)
            scores = chimera_heads.logits(
                heads.config, config, params["target"], heads.params, d, hidden, drafted
            )
            lists = top_k(scores, template.width)[1].astype(jnp.int32)
            within = np.searchsorted(levels[d], parent[first:end])
            tokens = jnp.concatenate([tokens, lists[:, within, rank[first:end]]], axis=1)
            before = jnp.concatenate([before, tokens[:, parent[first:end]]], axis=1)
        shape = (B, N)
        ready = jnp.broadcast_to((inner.count > 0)[:, None], shape)
        tree = DraftTree(
            tokens=tokens,
            parent=jnp.broadcast_to(jnp.asarray(parent, jnp.int32), shape),
            depth=jnp.broadcast_to(jnp.asarray(template.depth, jnp.int32), shape),
            valid=ready.at[:, 0].set(True),
            log_q=None,
            max_depth=L,
            is_chain=N == L + 1,
        )
        counters = {"trigrams": work.asked, "trigrams_known": work.found} if places else {}
        return Draft(tree, inner.replace(cache=work.cache, table=work.table), L, counters)

    def observe(
        inner: ChimeraState,
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> ChimeraState:
        del tree
        fresh = jax.vmap(lambda hidden, at: hidden[at])(output.hidden, verdict.path)
        return inner.replace(
            fresh=jnp.where(active[:, None, None], fresh, inner.fresh),
            count=jnp.where(active, verdict.count, inner.count),
        )

    return Drafter(
        roles=(ROLE,),
        num_nodes=N,
        max_depth=L,
        law=verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe,
        scratch=1,  # a round writes trigrams from before the root on, M + 1 of them
        counters=("trigrams", "trigrams_known") if places else (),
        reads=(config.num_layers,),
    )


def _trigrams_at(tokens: jnp.ndarray, positions: jnp.ndarray) -> jnp.ndarray:
    """Trigrams int [B, W, 3] that end at positions [B, W] of a text [B, M]."""
    last = tokens.shape[1] - 1

    def at(back: int) -> jnp.ndarray:
        return jnp.take_along_axis(tokens, jnp.clip(positions - back, 0, last), axis=1)

    return chimera_heads.trigram_ids(at(2), at(1), at(0), positions)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    template = templates.from_paths(paths_of(options["tree"], options["heads"]))
    drafter = chimera_drafter(configs["target"], template, options["trigram_places"])
    rule = "exact_match" if sampling.greedy else options["rule"]
    return speculative("chimera", configs["target"], drafter, rule, sampling)


SPEC = MethodSpec(
    "heads that see all tokens, verified and drafted, guess ahead in a tree (lossless)",
    ("target",),
    {
        "heads": Option(4, "heads that are used, at most as many as were trained", minimum=1),
        "tree": Option(TREE_25, "nodes as ranks from the root, a parent before its children"),
        "trigram_places": Option(
            0, "places of a row's table of trigram states; 0 for no table", minimum=0
        ),
        "rule": Option(
            "exact_match",
            "verification rule; exact_match at temperature 0; typical_acceptance is not lossless",
            choices=("exact_match", "typical_acceptance"),
        ),
    },
    _build,
    parts=(ROLE,),
)
