"""The decoder-only Transformer as functions of its parameters.

`apply` is the whole interface: tokens or embeddings in; logits, hidden states and a new cache
out. Layers are unrolled, so that any range of them can be run alone: early exit, self-drafting
and pruning at a layer are calls with other arguments.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models import masks, placement, rope
from models.cache import KVCache
from models.config import RelativeBiasConfig, TransformerConfig
from models.layers import Block, Dense, Norm
from models.relative_bias import RelativeBias

Params = Any


class Output(struct.PyTreeNode):
    """What one call returns.

    Attributes:
      logits: float32 [B, T, V]; None when not asked for or when the last layer was not run.
      hidden: [B, T, D]; after the final norm when the last layer was run, else the residual
        stream after the last layer that was run.
      cache: the cache with the call's keys and values written and `lengths` unchanged; None
        without a cache.
      collected: residual streams [B, T, D], one for each entry of `collect`.
    """

    logits: jnp.ndarray | None
    hidden: jnp.ndarray
    cache: KVCache | None
    collected: tuple[jnp.ndarray, ...] = ()


class Embedder(nn.Module):
    """Token embeddings, learned positions where the architecture has them, tied logits."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        # Tied, embeddings are also the kernel of the logits, which are then of order one.
        tied = config.embed_dim**-0.5
        normal = nn.initializers.normal(tied if config.tie_embeddings else 1.0)
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = self.param("embedding", normal, shape)
        if config.positions == "learned":
            rows = config.max_position + config.position_offset
            self.positions = self.param(
                "positions", nn.initializers.normal(0.02), (rows, config.embed_dim)
            )

    def encode(self, inputs: jnp.ndarray, positions: jnp.ndarray) -> jnp.ndarray:
        config, dtype = self.config, self.config.compute_dtype
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            table = placement.gathered(self.embedding, *self.path, "embedding")
            x = table[inputs].astype(dtype)
            if config.embedding_scale is not None:
                x = x * jnp.asarray(config.embedding_scale, dtype)
        else:
            x = inputs.astype(dtype)
        if config.positions == "learned":
            x = x + self.positions[positions + config.position_offset].astype(dtype)
        return x

    def logits(self, x: jnp.ndarray) -> jnp.ndarray:
        return jax.lax.dot_general(
            x,
            placement.gathered(self.embedding.astype(x.dtype), *self.path, "embedding"),
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )


class Transformer(nn.Module):
    """The parameters' home; use the functions of this module rather than the methods."""

    config: TransformerConfig
    remat: bool = False

    def setup(self) -> None:
        block = nn.remat(Block) if self.remat else Block
        self.embedder = Embedder(self.config)
        self.layers = [
            block(self.config, self.config.is_routed(layer))
            for layer in range(self.config.num_layers)
        ]
        self.final_norm = Norm(self.config)
        if isinstance(self.config, RelativeBiasConfig):
            self.relative_bias = RelativeBias(self.config)
        if not self.config.tie_embeddings:
            self.lm_head = Dense((self.config.vocab_size,), result_dtype=jnp.float32)

    def run(
        self,
        x: jnp.ndarray,
        positions: jnp.ndarray,
        mask: jnp.ndarray,
        key_positions: jnp.ndarray,
        cache: KVCache | None,
        slots: jnp.ndarray | None,
        start: int,
        stop: int,
        collect: Sequence[int],
    ) -> tuple[jnp.ndarray, KVCache | None, tuple[jnp.ndarray, ...]]:
        """Layers start..stop-1 on the residual stream x [B, T, D]."""
        config = self.config
        local = [layer for layer in range(start, stop) if config.is_local(layer)]
        angles = local_angles = None
        local_mask = mask
        if config.positions == "rope":
            angles = rope.angles(config.rope, config.rotary_dim, positions)
            local_angles = angles
            if local and config.local_rope is not None:
                local_angles = rope.angles(config.local_rope, config.rotary_dim, positions)
        bias = None
        if config.positions == "t5":
            bias = self.relative_bias(positions, key_positions)
        if local:
            assert config.window is not None
            local_mask = masks.within(mask, positions, key_positions, config.window)
        keys = list(cache.keys) if cache is not None else []
        values = list(cache.values) if cache is not None else []
        streams = {start: x}
        for layer in range(start, stop):
            is_local = layer in local
            x, store = self.layers[layer](
                placement.split_rows(x),
                local_angles if is_local else angles,
                local_mask if is_local else mask,
                (keys[layer], values[layer]) if cache is not None else None,
                slots,
                bias,
            )
            if cache is not None:
                keys[layer], values[layer] = store
            streams[layer + 1] = x
        if cache is not None:
            cache = cache.replace(keys=tuple(keys), values=tuple(values))
        return placement.split_rows(x), cache, tuple(streams[layer] for layer in collect)

    def encode(self, inputs: jnp.ndarray, positions: jnp.ndarray) -> jnp.ndarray:
        return self.embedder.encode(inputs, positions)

    def normalise(self, x: jnp.ndarray) -> jnp.ndarray:
        return self.final_norm(x)

    def unembed(self, x: jnp.ndarray) -> jnp.ndarray:
        logits = self.embedder.logits(x) if self.config.tie_embeddings else self.lm_head(x)
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def __call__(self, tokens: jnp.ndarray) -> jnp.ndarray:
        """Touches every parameter, so that `init` makes them all."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = masks.causal(positions, tokens.shape[1])
        x = self.encode(tokens, positions)
        x, _, _ = self.run(x, positions, mask, positions, None, None, 0, self.config.num_layers, ())
        return self.unembed(self.normalise(x))


@functools.partial(jax.jit, static_argnames="config")
def init(config: TransformerConfig, key: jax.Array) -> Params:
    """Random float32 parameters: nested dicts named as in `models.sharding`'s table."""
    return Transformer(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def param_shapes(config: TransformerConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without allocating anything."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def apply(
    config: TransformerConfig,
    params: Params,
    inputs: jnp.ndarray,
    *,
    positions: jnp.ndarray | None = None,
    mask: jnp.ndarray | None = None,
    key_positions: jnp.ndarray | None = None,
    cache: KVCache | None = None,
    slots: jnp.ndarray | None = None,
    layers: tuple[int, int] | None = None,
    collect: Sequence[int] = (),
    with_logits: bool = True,
    remat: bool = False,
) -> Output:
    """Runs a range of layers on tokens, embeddings or a residual stream.

    With a cache, the call's keys and values are written to slots lengths .. lengths + T - 1 of
    each row and attention is over all S slots under `mask`; `lengths` stay as they were, so the
    caller decides what is committed.

    Args:
      config: the architecture.
      params: from `init` or a checkpoint.
      inputs: tokens int [B, T], or float [B, T, D]: embeddings when the range starts at layer
        0 (learned positions are added, `embedding_scale` is not applied), else the residual
        stream before the range's first layer.
      positions: int [B, T], or [1, T] for those of all rows; default 0..T-1, or lengths ..
        lengths + T - 1 with a cache.
      mask: bool [B, T, S], S being the cache's slots or T; default causal over positions (over
        the order in the call without a cache), or everything written for a bidirectional model.
      key_positions: int [B, S] positions of the keys, for sliding windows and relative biases;
        default the slot index, or `positions` without a cache.
      cache: keys and values so far.
      slots: int [B, T], cache slot of each token; those from S on are not written. Needs
        `positions` and `mask`. Default lengths .. lengths + T - 1.
      layers: (start, stop); default all. Logits and the final norm belong to stop = L.
      collect: layer counts c whose residual stream (after c layers; start <= c <= stop) is
        returned in `Output.collected`.
      with_logits: False saves the product with the vocabulary; see `unembed`.
      remat: recompute each block's activations in the backward pass.
    """
    L, T = config.num_layers, inputs.shape[1]
    start, stop = layers or (0, L)
    if not 0 <= start <= stop <= L:
        raise ValueError(f"layers: {layers} is not a range within 0..{L}")
    if any(not start <= c <= stop for c in collect):
        raise ValueError(f"collect: {tuple(collect)} must lie within {start}..{stop}")
    if positions is None:
        first = cache.lengths[:, None] if cache is not None else jnp.zeros((1, 1), jnp.int32)
        positions = jnp.broadcast_to(first + jnp.arange(T), inputs.shape[:2])
    S = cache.slots if cache is not None else T
    if mask is None:
        if not config.causal:
            ends = jnp.zeros(inputs.shape[:1], int) if cache is None else cache.lengths
            mask = masks.full(jnp.arange(S) < ends[:, None] + T, T)
        elif cache is not None:
            mask = masks.causal(positions, S)
        else:
            mask = jnp.broadcast_to(jnp.tri(T, dtype=bool), (inputs.shape[0], T, T))
    if key_positions is None:
        key_positions = jnp.arange(S) if cache is not None else positions

    x = inputs
    if start == 0:
        x = embed(config, params, inputs, positions)
    if cache is not None and slots is None:
        slots = cache.lengths
    run = (positions, mask, key_positions, cache, slots, start, stop, tuple(collect))
    x, cache, collected = _call("run", config, params, x, *run, remat=remat)
    logits = None
    if stop == L:
        x = final_norm(config, params, x)
        if with_logits:
            logits = unembed(config, params, x)
    return Output(logits=logits, hidden=x, cache=cache, collected=collected)


def embed(
    config: TransformerConfig, params: Params, inputs: jnp.ndarray, positions: jnp.ndarray
) -> jnp.ndarray:
    """Embeddings [B, T, D] as the first layer receives them; `inputs` as in `apply`."""
    if jnp.issubdtype(inputs.dtype, jnp.floating) and config.positions != "learned":
        return inputs.astype(config.compute_dtype)  # `params` need not hold a table
    return _call("encode", config, params, inputs, positions)


def token_embeddings(config: TransformerConfig, params: Params, tokens: jnp.ndarray) -> jnp.ndarray:
    """Embeddings [..., D] of tokens int [...] alone, without positions: what `apply` takes."""
    x = params["embedder"]["embedding"][tokens].astype(config.compute_dtype)
    return x if config.embedding_scale is None else x * jnp.asarray(config.embedding_scale, x.dtype)


def unembed(config: TransformerConfig, params: Params, hidden: jnp.ndarray) -> jnp.ndarray:
    """Logits float32 [..., V] of hidden states [..., D] that went through the final norm."""
    return _call("unembed", config, params, hidden)


def final_norm(config: TransformerConfig, params: Params, x: jnp.ndarray) -> jnp.ndarray:
    """The final norm alone, for reading logits off an intermediate layer."""
    return _call("normalise", config, params, x)


def _call(
    method: str, config: TransformerConfig, params: Params, *args: Any, remat: bool = False
) -> Any:
    return Transformer(config, remat=remat).apply({"params": params}, *args, method=method)
