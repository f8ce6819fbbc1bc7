"""Token Recycling: drafts from the target's own runners-up (Luo et al., arXiv 2408.08696).

Every target call says what k tokens are likely after each token it was run on. A table keeps the
last such list of every token of the vocabulary; a tree of fixed shape is read off it, level by
level. No draft model, no training: the table begins with zeros (token 0 after everything) and
learns from accepted and rejected drafts alike. `generation.HotStart` keeps it from run to run,
as in the paper's evaluation.

A table that all rows share learns from all of them, so a row's neighbours change how many of its
drafts are accepted (`stats`), but under `exact_match` never its tokens.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Memory, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.prefill import CHUNK
from decoding.sampling import SamplingConfig, top_k
from decoding.speculative import template as templates
from decoding.speculative import verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.method import speculative
from decoding.speculative.template import Template
from decoding.speculative.tree import DraftTree
from models import cache as kv
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError

COUNTERS = ("tree_nodes", "duplicate_updates")


class Recycled(struct.PyTreeNode):
    """The drafter's state.

    Attributes:
      table: int32 [V, k], shared by all rows, or [B, V, k]: the successors last seen of every
        token, the likeliest first.
      duplicates: int32 [B], updates of the last round that lost to a different one.
      reached: int32 [B, N], rounds that accepted each node of the template; see
        `template.measured_acceptance`.
    """

    table: jnp.ndarray
    duplicates: jnp.ndarray
    reached: jnp.ndarray


def _places(table: jnp.ndarray, tokens: jnp.ndarray) -> jnp.ndarray:
    """Where the rows of tokens [B, W] stand in the table once it is flattened to [.., k]."""
    if table.ndim == 2:
        return tokens
    return tokens + table.shape[1] * jnp.arange(tokens.shape[0])[:, None]


def expand(table: jnp.ndarray, root: jnp.ndarray, template: Template) -> jnp.ndarray:
    """Fills a template with the table's successors of its root: int32 [B, N].

    Args:
      table: int32 [V, k] or [B, V, k].
      root: int32 [B], pending tokens.
      template: of width k at most.
    """
    flat = table.reshape(-1, table.shape[-1])
    tokens = root[:, None]
    for first, end in template.levels:
        above = tokens[:, jnp.asarray(template.parent[first:end])]
        drafts = flat[_places(table, above), jnp.asarray(template.rank[first:end])]
        tokens = jnp.concatenate([tokens, drafts], axis=1)
    return tokens


def update_table(
    table: jnp.ndarray,
    tokens: jnp.ndarray,
    successors: jnp.ndarray,
    order: jnp.ndarray,
    usable: jnp.ndarray,
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Writes what follows some tokens; of those with one place in the table, only the first.

    Args:
      table: int32 [V, k] or [B, V, k].
      tokens: int32 [B, W].
      successors: int32 [B, W, k].
      order: int32 [B, W], different within a row: the smallest of a token is written; a tie
        between rows of a shared table goes to the smaller row.
      usable: bool [B, W]; the others are not there.

    Returns:
      The table, and by row how many updates lost to one with other successors: int32 [B].
    """
    B = tokens.shape[0]
    flat = table.reshape(-1, table.shape[-1])
    nowhere = len(flat)  # out of range: dropped
    place = jnp.where(usable, _places(table, tokens), nowhere)
    order = order * B + jnp.arange(B)[:, None]
    last = jnp.iinfo(jnp.int32).max
    first = jnp.full(nowhere, last, jnp.int32).at[place].min(order, mode="drop")
    wins = usable & (first.at[place].get(mode="fill", fill_value=last) == order)
    flat = flat.at[jnp.where(wins, place, nowhere)].set(successors, mode="drop")
    written = flat.at[place].get(mode="fill", fill_value=0)
    lost = usable & (written != successors).any(axis=-1)
    return flat.reshape(table.shape), lost.sum(axis=1).astype(jnp.int32)


def _successors(logits: jnp.ndarray, k: int) -> jnp.ndarray:
    """The k likeliest tokens, descending, ties to the smaller id: [..., V] -> int32 [..., k]."""
    return top_k(logits, k)[1].astype(jnp.int32)


def _read_prompts(
    config: TransformerConfig,
    params: transformer.Params,
    table: jnp.ndarray,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
) -> jnp.ndarray:
    """The table after the first `lengths` [B] of tokens [B, P]; a token's last place counts.

    Reads the prompts once more, with a cache of its own: a drafter does not see the target's.
    """
    B, P = tokens.shape
    chunk = next(size for size in range(min(P, CHUNK), 0, -1) if P % size == 0)

    def read(i: jnp.ndarray, carry: tuple) -> tuple:
        cache, table = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        cache = kv.truncate(cache, jnp.full_like(lengths, i * chunk))
        out = transformer.apply(config, params, part, cache=cache)
        assert out.logits is not None and out.cache is not None
        found = _successors(out.logits, table.shape[-1])
        index = jnp.broadcast_to(jnp.arange(chunk), part.shape)
        usable = i * chunk + index < lengths[:, None]
        table, _ = update_table(table, part, found, chunk - 1 - index, usable)
        return out.cache, table

    start = (kv.create(config, B, P), table)
    return jax.lax.fori_loop(0, P // chunk, read, start)[1]


@functools.cache
def recycling_drafter(
    config: TransformerConfig,
    k: int,
    template: Template,
    *,
    per_row: bool = False,
    accepted_only: bool = False,
    from_prompt: bool = False,
) -> Drafter:
    """Drafts a tree of one shape from a table of successors that every target call updates.

    Args:
      config: the target's architecture.
      k: successors kept of each token.
      template: the tree's shape.
      per_row: a table a row; else all rows share one.
      accepted_only: update from the accepted path only; published: from every node.
      from_prompt: update from the prompts too, at the cost of reading them twice; published: no.

    Raises:
      InputError: k below `template.width` or above the vocabulary's size; when it is run, a hot
        start from a table of another shape.
    """
    V, N = config.vocab_size, template.num_nodes
    if k > V:
        raise InputError(f"k: {k} must be at most {V}, the tokens of the vocabulary")
    if k < template.width:
        raise InputError(f"k: {k} must be at least {template.width}, which the template needs")

    def init(batch: int, slots: int) -> Recycled:
        return Recycled(
            table=jnp.zeros((batch, V, k) if per_row else (V, k), jnp.int32),
            duplicates=jnp.zeros(batch, jnp.int32),
            reached=jnp.zeros((batch, N), jnp.int32),
        )

    def read(
        params: ModelParams, inner: Recycled, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> Recycled:
        if not from_prompt:
            return inner
        table = _read_prompts(config, params["target"], inner.table, tokens, lengths)
        return inner.replace(table=table)

    def propose(params: ModelParams, inner: Recycled, state: DecodeState) -> Draft:
        tokens = expand(inner.table, pending_tokens(state), template)
        full = lambda values: jnp.broadcast_to(jnp.asarray(values, jnp.int32), tokens.shape)  # noqa: E731
        tree = DraftTree(
            tokens=tokens,
            parent=full(template.parent),
            depth=full(template.depth),
            valid=jnp.ones(tokens.shape, bool),
            log_q=None,
            max_depth=template.max_depth,
            is_chain=False,
        )
        counters = {
            "tree_nodes": jnp.full(len(tokens), N - 1, jnp.int32),
            "duplicate_updates": inner.duplicates,
        }
        return Draft(tree, inner, counters=counters)

    def observe(
        inner: Recycled,
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> Recycled:
        assert output.logits is not None
        row = jnp.arange(len(active))[:, None]
        taken = (jnp.arange(verdict.path.shape[1]) < verdict.count[:, None]) & active[:, None]
        at = jnp.where(taken, verdict.path, N)
        accepted = jnp.zeros(tree.tokens.shape, bool).at[row, at].set(True, mode="drop")
        if accepted_only:
            tokens, logits = tree.tokens[row, verdict.path], output.logits[row, verdict.path]
            order, usable = verdict.path, taken
        else:
            tokens, logits = tree.tokens, output.logits
            # Nodes are numbered by depth. Accepted ones first: theirs is the text's own context.
            order = jnp.arange(N) + jnp.where(accepted, 0, N)
            usable = jnp.broadcast_to(active[:, None], tokens.shape)
        table, duplicates = update_table(inner.table, tokens, _successors(logits, k), order, usable)
        return Recycled(table, duplicates, inner.reached + accepted)

    def put(inner: Recycled, table: jnp.ndarray) -> Recycled:
        if table.shape != inner.table.shape:
            raise InputError(
                f"hot start: a table of shape {table.shape} was kept, this run needs "
                f"{inner.table.shape}; allowed: the same k, vocabulary and, for tables per row, "
                "number of rows"
            )
        return inner.replace(table=table)

    return Drafter(
        roles=(),
        num_nodes=N,
        max_depth=template.max_depth,
        law=verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe,
        counters=COUNTERS,
        memory=Memory(take=lambda inner: inner.table, put=put),
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    per_row = options["table"] == "per_row"
    rule = "exact_match" if sampling.greedy else options["rule"]
    if rule != "exact_match" and not per_row:
        raise InputError(
            f"table: 'shared' with rule {rule} would let a row's neighbours change its text; "
            "allowed: per_row"
        )
    drafter = recycling_drafter(
        configs["target"],
        options["k"],
        templates.named(options["template"], options["k"]),
        per_row=per_row,
        accepted_only=options["update"] == "accepted",
        from_prompt=options["update_from_prompt"],
    )
    return speculative("token_recycling", configs["target"], drafter, rule, sampling)


SPEC = MethodSpec(
    "drafts a fixed tree from a table of every token's last likely successors (lossless)",
    ("target",),
    {
        "k": Option(8, "successors kept of each token", minimum=1),
        "template": Option("default80", "shape of the tree, by its nodes", choices=templates.NAMES),
        "table": Option(
            "shared", "one table for all rows, or one a row", choices=("shared", "per_row")
        ),
        "update": Option(
            "all", "learn from every node or from accepted ones", choices=("all", "accepted")
        ),
        "update_from_prompt": Option(False, "learn from the prompt too, which is read twice"),
        "rule": Option(
            "exact_match",
            "verification rule; exact_match at temperature 0; typical_acceptance is not lossless",
            choices=("exact_match", "typical_acceptance"),
        ),
    },
    _build,
)
