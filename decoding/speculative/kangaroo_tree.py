"""A tree drafted by the target's first layers and an adapter: Kangaroo with several ways on.

The chain of arXiv 2404.18911 is published without its tree's rule, so the rule here is ours: every
level keeps the `width` likeliest nodes by the probability of their paths (as EAGLE-2 expands,
arXiv 2406.16858), and a path is followed while its probability is at least the threshold. All nodes
are put up; the layers above run once on the streams that drafting has computed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import SamplingConfig, top_k
from decoding.speculative import exit_state, scoring, sources, verification
from decoding.speculative.drafting import Begun, Draft, Drafter
from decoding.speculative.exit_state import ExitState
from decoding.speculative.sources import Growing
from decoding.speculative.tree import DraftTree
from models import cache as kv
from models import exit_adapter, masks, transformer
from models.config import TransformerConfig
from models.exit_adapter import ROLE


class _Growth(NamedTuple):
    """A tree while it is drafted.

    Attributes:
      tree: so far.
      target, adapter: caches; node i stands in slot base + i of both.
      streams: [B, N, D], of nodes after the exit layer.
      score: float32 [B, W], log probabilities of the paths to the last level's nodes; -inf where
        there is none.
      levels: int32 [B], levels drafted.
    """

    tree: Growing
    target: kv.KVCache
    adapter: kv.KVCache
    streams: jnp.ndarray
    score: jnp.ndarray
    levels: jnp.ndarray


@functools.cache
def kangaroo_tree_drafter(
    config: TransformerConfig,
    exit_layer: int,
    width: int,
    depth: int,
    threshold: float,
    sampling: SamplingConfig,
) -> Drafter:
    """Drafts at most `depth` levels of `width` nodes with params['target'] and params['adapter'].

    The likeliest first tokens are always put up. `layers_run` counts a layer once a call, on
    however many nodes, the adapter not at all.

    Args:
      config: the target's architecture.
      exit_layer: l, layers that draft.
      width: W, nodes of a level, and children of a node.
      depth: most levels.
      threshold: paths below this probability end.
      sampling: its penalty acts on drafts too; ranks are those of temperature 1.

    Raises:
      InputError: the exit leaves no layer above it.
    """
    exit_state.check_exit(config, exit_layer)
    W, N = width, 1 + width * depth
    ranking = SamplingConfig(temperature=1.0, repetition_penalty=sampling.repetition_penalty)
    least = jnp.log(jnp.float32(threshold))

    def propose(params: ModelParams, inner: ExitState, state: DecodeState) -> Draft:
        base = state.inner.target.lengths  # where the pending token stands
        batch = len(base)

        def shallow(
            growth: _Growth, first: jnp.ndarray, width: int
        ) -> tuple[jnp.ndarray, kv.KVCache]:
            """The first layers on nodes first [B] .. first + width - 1: their streams."""
            tree, slots = growth.tree, growth.target.slots
            out = transformer.apply(
                config,
                params["target"],
                sources.window(tree.tokens, first, width),
                positions=base[:, None] + sources.window(tree.depth, first, width),
                mask=masks.tree(sources.window(tree.ancestry, first, width), base, slots),
                key_positions=scoring.key_positions(tree.depth, base, slots),
                cache=kv.truncate(growth.target, base + first),
                layers=(0, exit_layer),
            )
            assert out.cache is not None
            return out.hidden, out.cache

        def distributions(growth: _Growth, hidden: jnp.ndarray, rows: jnp.ndarray) -> jnp.ndarray:
            """log_q [B, T, V] from the adapter's output [B, T, D] at nodes of these ancestries."""
            logits = transformer.unembed(config, params["target"], hidden)
            return sources.distribution_of(logits, state, growth.tree, rows, ranking)

        def extend(
            growth: _Growth, log_q: jnp.ndarray, parents: jnp.ndarray, level: jnp.ndarray
        ) -> _Growth:
            """The likeliest children of a level's nodes parents int [B, P], log_q [B, P, V]."""
            score = growth.score[:, : log_q.shape[1]]
            best, tokens = top_k(log_q, W)
            reached = (score[..., None] + best).reshape(batch, -1)
            reached, chosen = jax.lax.top_k(reached, W)
            tokens = jnp.take_along_axis(tokens.reshape(batch, -1), chosen, axis=1)
            parent = jnp.take_along_axis(jnp.repeat(parents, W, axis=1), chosen, axis=1)
            valid = jnp.isfinite(reached)
            first = jnp.broadcast_to(1 + level * W, (batch,))
            tree = sources.add(growth.tree, first, tokens.astype(jnp.int32), parent, valid)
            growth = growth._replace(tree=tree)
            streams, target = shallow(growth, first, W)
            ends = jnp.isin(tokens, jnp.asarray(config.eos_token_ids, tokens.dtype))
            return growth._replace(
                target=target,
                streams=jax.lax.dynamic_update_slice_in_dim(
                    growth.streams, streams, 1 + level * W, axis=1
                ),
                score=jnp.where((reached >= least) & ~ends, reached, -jnp.inf),
                levels=growth.levels + valid.any(axis=1),
            )

        def proceed(carry: tuple[_Growth, jnp.ndarray]) -> jnp.ndarray:
            growth, level = carry
            return (level < depth) & jnp.isfinite(growth.score).any()

        def grow(carry: tuple[_Growth, jnp.ndarray]) -> tuple[_Growth, jnp.ndarray]:
            growth, level = carry
            first = jnp.broadcast_to(1 + (level - 1) * W, (batch,))
            rows = sources.window(growth.tree.ancestry, first, W)
            hidden, adapter = exit_adapter.apply(
                config,
                params[ROLE],
                sources.window(growth.streams, first, W),
                positions=base[:, None] + sources.window(growth.tree.depth, first, W),
                mask=masks.tree(rows, base, growth.adapter.slots),
                cache=kv.truncate(growth.adapter, base + first),
            )
            assert adapter is not None
            growth = growth._replace(adapter=adapter)
            parents = first[:, None] + jnp.arange(W)
            return extend(growth, distributions(growth, hidden, rows), parents, level), level + 1

        zero = jnp.zeros((batch,), jnp.int32)
        growth = _Growth(
            tree=sources.plant(pending_tokens(state), N),
            target=state.inner.target,
            adapter=inner.cache,
            streams=jnp.zeros((batch, N, config.embed_dim), config.compute_dtype),
            score=jnp.where(state.active[:, None] & (jnp.arange(W) == 0), 0.0, -jnp.inf),
            levels=zero,
        )
        streams, target = shallow(growth, zero, 1)
        hidden, adapter = exit_state.at_pending(config, params, inner, streams[:, 0], base)
        growth = growth._replace(
            target=target,
            adapter=adapter,
            streams=jax.lax.dynamic_update_slice_in_dim(growth.streams, streams, 0, axis=1),
        )
        log_q = distributions(growth, hidden[:, None], growth.tree.ancestry[:, :1])
        growth = extend(growth, log_q, zero[:, None], jnp.int32(0))
        growth, _ = jax.lax.while_loop(proceed, grow, (growth, jnp.int32(1)))
        grown = growth.tree
        tree = DraftTree(
            tokens=grown.tokens,
            parent=grown.parent,
            depth=grown.depth,
            valid=grown.valid,
            log_q=None,
            max_depth=depth,
            is_chain=False,
        )
        kept = ExitState(kv.truncate(growth.adapter, inner.cache.lengths), inner.carry)
        return Draft(
            tree,
            (kept, growth.streams),
            growth.levels,
            {
                "shallow_calls": growth.levels + 1,
                "layers_run": exit_layer * growth.levels + config.num_layers,
            },
            Begun(growth.streams, kv.truncate(growth.target, base), exit_layer),
        )

    def observe(
        inner: tuple[ExitState, jnp.ndarray],
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> ExitState:
        kept, streams = inner
        assert output.cache is not None
        # The last accepted node may not have been fed to the adapter; it is fed again.
        path = verdict.path[:, : max(verdict.path.shape[1] - 1, 1)]
        committed = kv.commit(
            kv.truncate(kept.cache, output.cache.lengths), path, jnp.maximum(verdict.count - 1, 0)
        )
        last = jnp.take_along_axis(verdict.path, jnp.maximum(verdict.count - 1, 0)[:, None], axis=1)
        return ExitState(
            kv.truncate(committed, jnp.where(active, committed.lengths, kept.cache.lengths)),
            jnp.where(active[:, None], verification.rows(streams, last[:, 0]), kept.carry),
        )

    return Drafter(
        roles=(ROLE,),
        num_nodes=N,
        max_depth=depth,
        law=verification.DETERMINISTIC,
        init=functools.partial(exit_state.create, config),
        prefill=functools.partial(exit_state.read, config),
        propose=propose,
        observe=observe,
        counters=("shallow_calls", "layers_run"),
        reads=(exit_layer,),
    )
