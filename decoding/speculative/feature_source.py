"""Draft distributions from a head on the target's own features (EAGLE, FSPAD).

The head's cache holds one entry for every token of the text but the last: of the feature of the
token at its position and the embedding of the token after it. Entries of accepted tokens are always
made of the target's features, once these are known; those that drafting made of the head's own are
thrown away (EAGLE-2's code; section 2A of the method's description).
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from decoding import prefill
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import SamplingConfig
from decoding.speculative import verification
from decoding.speculative.sources import Growing, Source, distribution_of, plant, window
from models import cache as kv
from models import feature_head, masks, transformer
from models.config import TransformerConfig
from models.feature_head import ROLE, Drafted


class FeatureState(struct.PyTreeNode):
    """What the source keeps.

    Attributes:
      cache: of the head, one layer.
      fresh: [B, M, D], the target's features of the tokens that were accepted last, which the head
        has not read yet; the last of them stands before the pending token.
      count: int32 [B], how many they are.
      said: [B, N, D], features that the head said at the nodes of the growing tree.
    """

    cache: kv.KVCache
    fresh: jnp.ndarray
    count: jnp.ndarray
    said: jnp.ndarray


@functools.cache
def feature_source(
    config: TransformerConfig, sampling: SamplingConfig, max_depth: int, num_nodes: int
) -> Source:
    """The head of params['feature_head'], under a tree mask over its own cache.

    Args:
      config: the target's architecture.
      sampling: what draft distributions are made with.
      max_depth: deepest node of a tree: one token more may be accepted at once.
      num_nodes: nodes of the tree while it grows, root included.
    """
    M, D, dtype = max_depth + 1, config.embed_dim, config.compute_dtype

    def init(batch: int, slots: int) -> FeatureState:
        return FeatureState(
            kv.create(config, batch, slots, num_layers=1),
            jnp.zeros((batch, M, D), dtype),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, num_nodes, D), dtype),
        )

    def run(
        params: ModelParams,
        cache: kv.KVCache,
        tokens: jnp.ndarray,
        features: jnp.ndarray,
        positions: jnp.ndarray,
        mask: jnp.ndarray | None = None,
    ) -> Drafted:
        """The head on features at positions, each with the token after it: [B, T] each."""
        embeddings = transformer.embed(config, params["target"], tokens, positions + 1)
        return feature_head.apply(
            config,
            params[ROLE],
            embeddings,
            features,
            positions=positions,
            mask=mask,
            cache=cache,
        )

    def read(
        params: ModelParams,
        inner: FeatureState,
        tokens: jnp.ndarray,
        lengths: jnp.ndarray,
        streams: jnp.ndarray,
    ) -> FeatureState:
        features = transformer.final_norm(config, params["target"], streams)
        following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

        def part(first: jnp.ndarray, size: int, cache: kv.KVCache) -> kv.KVCache:
            ids, some = (
                jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (following, features)
            )
            at = jnp.full_like(lengths, first)
            positions = at[:, None] + jnp.arange(size)
            found = run(params, kv.truncate(cache, at), ids, some, positions)
            assert found.cache is not None
            return found.cache

        cache = prefill.in_parts(tokens.shape[1], part, inner.cache)
        last = verification.rows(features, jnp.maximum(lengths - 1, 0))
        return inner.replace(
            cache=kv.truncate(cache, jnp.maximum(lengths - 1, 0)),
            fresh=inner.fresh.at[:, 0].set(last),
            count=jnp.minimum(lengths, 1),
        )

    def distribution(
        params: ModelParams,
        readable: jnp.ndarray,
        state: DecodeState,
        tree: Growing,
        rows: jnp.ndarray,
    ) -> jnp.ndarray:
        logits = transformer.unembed(config, params["target"], readable)
        return distribution_of(logits, state, tree, rows, sampling)

    def root(
        params: ModelParams, inner: FeatureState, state: DecodeState
    ) -> tuple[jnp.ndarray, FeatureState]:
        base = state.lengths - 1  # where the pending token stands
        first = jnp.maximum(base - inner.count, 0)
        positions = first[:, None] + jnp.arange(M)
        # A row of one token has no feature before its last; nothing that it drafts is any good.
        index = jnp.minimum(positions + (inner.count > 0)[:, None], state.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(state.tokens, index, axis=1)
        found = run(params, kv.truncate(inner.cache, first), tokens, inner.fresh, positions)
        assert found.cache is not None
        last = jnp.maximum(inner.count - 1, 0)
        readable = verification.rows(found.readable, last)[:, None]
        pending = plant(tokens[:, 0], 1)
        log_q = distribution(params, readable, state, pending, pending.ancestry)
        return log_q[:, 0], inner.replace(
            cache=kv.truncate(found.cache, base),
            said=inner.said.at[:, 0].set(verification.rows(found.features, last)),
        )

    def nodes(
        params: ModelParams,
        inner: FeatureState,
        state: DecodeState,
        tree: Growing,
        first: jnp.ndarray,
        width: int,
    ) -> tuple[jnp.ndarray, FeatureState]:
        # Node i's entry goes to slot base + i; the root's is that of the token before it.
        base = state.lengths - 1
        rows = window(tree.ancestry, first, width)
        parent = jnp.maximum(window(tree.parent, first, width), 0)
        features = jax.vmap(lambda table, at: table[at])(inner.said, parent)
        below_root = rows & (jnp.arange(rows.shape[-1]) > 0)
        found = run(
            params,
            kv.truncate(inner.cache, base + first),
            window(tree.tokens, first, width),
            features,
            base[:, None] + window(tree.depth, first, width) - 1,
            masks.tree(below_root, base, inner.cache.slots),
        )
        assert found.cache is not None
        log_q = distribution(params, found.readable, state, tree, rows)
        said = jax.vmap(
            lambda table, new, at: jax.lax.dynamic_update_slice_in_dim(table, new, at, axis=0)
        )(inner.said, found.features, first)
        return log_q, inner.replace(cache=kv.truncate(found.cache, base), said=said)

    def commit(
        inner: FeatureState, path: jnp.ndarray, count: jnp.ndarray, output: transformer.Output
    ) -> FeatureState:
        fresh = jax.vmap(lambda hidden, at: hidden[at])(output.hidden, path)
        moved = (count > 0)[:, None, None]
        return inner.replace(
            fresh=jnp.where(moved, fresh, inner.fresh),
            count=jnp.where(count > 0, count, inner.count),
        )

    return Source(
        roles=(ROLE,),
        init=init,
        prefill=read,
        root=root,
        nodes=nodes,
        commit=commit,
        is_model=True,
        reads=(config.num_layers,),
    )
