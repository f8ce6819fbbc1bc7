"""One target call on a whole draft tree, and keeping the accepted path in the cache."""

import jax.numpy as jnp

from decoding.sampling import SamplingConfig, penalise, seen_tokens
from decoding.speculative.tree import DraftTree
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig


def score(
    config: TransformerConfig,
    params: transformer.Params,
    cache: kv.KVCache,
    tree: DraftTree,
) -> transformer.Output:
    """Runs the target on all nodes; node i's keys and values go to slot lengths + i.

    Args:
      config: the target's architecture.
      params: its parameters.
      cache: committed tokens, the root not among them.
      tree: the drafts.

    Returns:
      The model's output; logits [B, N, V] at node i are for the token after it.
    """
    base = cache.lengths
    positions = base[:, None] + tree.depth
    if tree.is_chain:
        return transformer.apply(config, params, tree.tokens, positions=positions, cache=cache)
    ancestry = masks.ancestors(tree.parent, tree.max_depth)
    slot = jnp.broadcast_to(jnp.arange(cache.slots), (len(base), cache.slots))
    node = jnp.clip(slot - base[:, None], 0, tree.num_nodes - 1)
    in_tree = slot >= base[:, None]
    depth = jnp.take_along_axis(tree.depth, node, axis=1)
    return transformer.apply(
        config,
        params,
        tree.tokens,
        positions=positions,
        mask=masks.tree(ancestry, base, cache.slots),
        key_positions=jnp.where(in_tree, base[:, None] + depth, slot),
        cache=cache,
    )


def penalised_logits(
    logits: jnp.ndarray,
    tree: DraftTree,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
    sampling: SamplingConfig,
) -> jnp.ndarray:
    """Applies the repetition penalty at every node, its own path's drafts counted as seen.

    Args:
      logits: float32 [B, N, V].
      tree: the drafts.
      tokens: int32 [B, M], the text.
      lengths: int32 [B].
      sampling: with the penalty; 1 returns `logits`.
    """
    if sampling.repetition_penalty == 1:
        return logits
    V = logits.shape[-1]
    seen = jnp.broadcast_to(seen_tokens(tokens, lengths, V)[:, None], logits.shape)
    ancestry = masks.ancestors(tree.parent, tree.max_depth)
    rows = jnp.arange(len(tokens))[:, None, None]
    nodes = jnp.arange(tree.num_nodes)[None, :, None]
    seen = seen.at[rows, nodes, tree.tokens[:, None, :]].max(ancestry)
    return penalise(logits, seen, sampling)


def commit(cache: kv.KVCache, tree: DraftTree, path: jnp.ndarray, count: jnp.ndarray) -> kv.KVCache:
    """Keeps the first `count` [B] nodes of `path` [B, M] and drops all others."""
    if tree.is_chain:
        return kv.truncate(cache, cache.lengths + count)
    return kv.commit(cache, path, count)
