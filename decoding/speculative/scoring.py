"""One target call on a whole draft tree, and keeping the accepted path in the cache."""

import jax.numpy as jnp

from decoding.sampling import SamplingConfig, penalise, seen_tokens
from decoding.speculative.drafting import Begun
from decoding.speculative.tree import DraftTree
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig


def score(
    config: TransformerConfig,
    params: transformer.Params,
    cache: kv.KVCache,
    tree: DraftTree,
    begun: Begun | None = None,
) -> transformer.Output:
    """Runs the target on all nodes; node i's keys and values go to slot lengths + i.

    Args:
      config: the target's architecture.
      params: its parameters.
      cache: committed tokens, the root not among them.
      tree: the drafts.
      begun: what is done already: the layers that are left run from there, on its cache.

    Returns:
      The model's output; logits [B, N, V] at node i are for the token after it.
    """
    inputs, layers = tree.tokens, None
    if begun is not None:
        inputs, cache, layers = begun.hidden, begun.cache, (begun.layer, config.num_layers)
    base = cache.lengths
    positions = base[:, None] + tree.depth
    if tree.is_chain:
        return transformer.apply(
            config, params, inputs, positions=positions, cache=cache, layers=layers
        )
    return transformer.apply(
        config,
        params,
        inputs,
        positions=positions,
        layers=layers,
        mask=masks.tree(tree.ancestry, base, cache.slots),
        key_positions=key_positions(tree.depth, base, cache.slots),
        cache=cache,
    )


def key_positions(depth: jnp.ndarray, base: jnp.ndarray, slots: int) -> jnp.ndarray:
    """Positions int [B, S] of the keys in a cache: the text's, then the tree's by node depth.

    Args:
      depth: int [B, N]; node i stands in slot base + i.
      base: int [B], committed length.
      slots: S.
    """
    slot = jnp.broadcast_to(jnp.arange(slots), (len(base), slots))
    node = jnp.clip(slot - base[:, None], 0, depth.shape[1] - 1)
    in_tree = base[:, None] + jnp.take_along_axis(depth, node, axis=1)
    return jnp.where(slot >= base[:, None], in_tree, slot)


def penalised_logits(
    logits: jnp.ndarray,
    ancestry: jnp.ndarray,
    drafts: jnp.ndarray,
    tokens: jnp.ndarray,
    lengths: jnp.ndarray,
    sampling: SamplingConfig,
) -> jnp.ndarray:
    """Applies the repetition penalty at nodes of a tree, a path's own drafts counted as seen.

    Args:
      logits: float32 [B, T, V], of T nodes.
      ancestry: bool [B, T, N], which of the tree's nodes are on each one's path.
      drafts: int32 [B, N], tokens of the tree.
      tokens: int32 [B, M], the text.
      lengths: int32 [B].
      sampling: with the penalty, which must not be 1.
    """
    B, T, V = logits.shape
    seen = jnp.broadcast_to(seen_tokens(tokens, lengths, V)[:, None], logits.shape)
    rows, nodes = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
    seen = seen.at[rows, nodes, drafts[:, None, :]].max(ancestry)
    return penalise(logits, seen, sampling)


def commit(cache: kv.KVCache, tree: DraftTree, path: jnp.ndarray, count: jnp.ndarray) -> kv.KVCache:
    """Keeps the first `count` [B] nodes of `path` [B, M] and drops all others."""
    if tree.is_chain:
        return kv.truncate(cache, cache.lengths + count)
    return kv.commit(cache, path, count)
