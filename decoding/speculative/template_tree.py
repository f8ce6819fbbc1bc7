"""Trees of a fixed shape grown from draft distributions (EAGLE-1, arXiv 2401.15077, section 4.1).

Which ranks of which node are drafted is the same in every round; what the tokens are is asked of
the source level by level, each level in one call. The baseline of trees that follow the text.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import top_k
from decoding.speculative import sources, verification
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.sources import Source
from decoding.speculative.template import Template
from decoding.speculative.tree import DraftTree


@functools.cache
def template_tree_drafter(
    source: Source, template: Template, eos_ids: tuple[int, ...] = ()
) -> Drafter:
    """The `rank`-th likeliest token after each node's parent.

    Args:
      source: draft distributions; asked once a level, the last one aside.
      template: the shape.
      eos_ids: tokens that are not drafted beyond.
    """
    parents, ranks = np.asarray(template.parent), np.asarray(template.rank)
    most = template.width

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        tree = sources.plant(pending_tokens(state), template.num_nodes)
        log_q, inner = source.root(params, inner, state)
        log_q, above = log_q[:, None], 0
        B = len(log_q)
        for first, end in template.levels:
            values, tokens = top_k(log_q, most)
            within = parents[first:end] - above
            parent = jnp.broadcast_to(jnp.asarray(parents[first:end]), (B, end - first))
            usable = jnp.isfinite(values[:, within, ranks[first:end]])
            usable &= jnp.take_along_axis(tree.valid, parent, axis=1)
            if eos_ids and above:
                over = jnp.take_along_axis(tree.tokens, parent, axis=1)
                usable &= ~jnp.isin(over, jnp.asarray(eos_ids))
            there = jnp.full((B,), first)
            chosen = tokens[:, within, ranks[first:end]].astype(jnp.int32)
            tree = sources.add(tree, there, chosen, parent, usable)
            if end < template.num_nodes:
                log_q, inner = source.nodes(params, inner, state, tree, there, end - first)
            above = first
        drafted = DraftTree(
            tokens=tree.tokens,
            parent=tree.parent,
            depth=tree.depth,
            valid=tree.valid,
            log_q=None,
            max_depth=template.max_depth,
            is_chain=template.num_nodes == template.max_depth + 1,
        )
        return Draft(drafted, inner, template.max_depth if source.is_model else 0)

    return Drafter(
        roles=source.roles,
        num_nodes=template.num_nodes,
        max_depth=template.max_depth,
        law=verification.DETERMINISTIC,
        init=source.init,
        prefill=source.prefill,
        propose=propose,
        observe=sources.keep_accepted(source),
        reads=source.reads,
    )
