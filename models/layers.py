"""Flax Linen modules of one Transformer block. Every choice between families is read from config.

Matrices that share their input are one parameter (query, key and value; gate and up), because
fewer and larger products are faster on every backend; see docs/performance.md.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import cache as kv
from models import placement, rope
from models.attention import attend
from models.config import GroupedExpertsConfig, TransformerConfig

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def _into_residual(config: TransformerConfig) -> Any:
    """Initialiser of projections that write to the residual stream (GPT-2's 0.02 / sqrt(2 L)).

    Small, so that token embeddings are not drowned by the blocks before these learn anything.
    """
    return nn.initializers.normal(0.02 * (2 * config.num_layers) ** -0.5)


def _initializer(*fan_in_axes: int) -> Any:
    """Truncated normal of variance 1 / fan-in, the fan-in being the product of the given axes."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jnp.ndarray:
        fan_in = 1
        for axis in fan_in_axes:
            fan_in *= shape[axis]
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) * fan_in**-0.5

    return init


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        config = self.config
        shape = (x.shape[-1],)
        init = nn.initializers.constant(1.0 - config.norm_offset)
        scale = self.param("scale", init, shape).astype(jnp.float32) + config.norm_offset
        wide = x.astype(jnp.float32)
        if config.norm == "layernorm":
            wide = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(variance + config.norm_eps) * scale
        if config.norm == "layernorm":
            wide = wide + self.param("bias", nn.initializers.zeros, shape).astype(jnp.float32)
        return wide.astype(x.dtype)


class Dense(nn.Module):
    """A product over the last `contract` axes of x with a kernel [*contracted, *features]."""

    features: tuple[int, ...]
    contract: int = 1
    use_bias: bool = False
    kernel_init: Any = None
    result_dtype: Any = None  # of the sums, where it is not that of x

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        inputs = x.shape[x.ndim - self.contract :]
        init = self.kernel_init or _initializer(*range(self.contract))
        kernel = self.param("kernel", init, (*inputs, *self.features)).astype(x.dtype)
        kernel = placement.gathered(kernel, *self.path, "kernel")
        axes = (tuple(range(x.ndim - self.contract, x.ndim)), tuple(range(self.contract)))
        y = jax.lax.dot_general(
            x, kernel, (axes, ((), ())), preferred_element_type=self.result_dtype
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features).astype(x.dtype)
        return y


class Attention(nn.Module):
    """Grouped-query attention with optional biases, query/key norms and rotary positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jnp.ndarray,
        angles: tuple[jnp.ndarray, jnp.ndarray] | None,
        mask: jnp.ndarray,
        store: tuple[jnp.ndarray, jnp.ndarray] | None,
        start: jnp.ndarray | None,
        bias: jnp.ndarray | None = None,
    ) -> tuple[jnp.ndarray, tuple[jnp.ndarray, jnp.ndarray]]:
        """Attends from x [B, T, D] to the cache (or to x itself when `store` is None).

        `bias` is added to the scores, see `attend`.

        Returns:
          The output [B, T, D] and this layer's keys and values [B, K, S, H].
        """
        config = self.config
        G, K, H = config.queries_per_kv, config.num_kv_heads, config.head_dim
        qkv = Dense((K, G + 2, H), use_bias=config.qkv_bias, name="qkv")(x)
        # Splits, not slices: the gradient of a slice is a padding of the whole.
        queries, keys, values = jnp.split(qkv, [G, G + 1], axis=-2)
        keys, values = keys[..., 0, :], values[..., 0, :]
        if config.qk_norm:
            queries = Norm(config, name="query_norm")(queries)
            keys = Norm(config, name="key_norm")(keys)
        if angles is not None:
            cos, sin = angles
            queries = rope.rotate(queries, cos[..., None, :], sin[..., None, :])
            keys = rope.rotate(keys, cos, sin)
        new = (keys.swapaxes(1, 2), values.swapaxes(1, 2))
        if store is not None:
            assert start is not None
            new = (kv.write(store[0], new[0], start), kv.write(store[1], new[1], start))
        mixed = attend(
            queries, *new, mask, scale=config.scale, softcap=config.attention_softcap, bias=bias
        )
        out = Dense((config.embed_dim,), 3, config.out_bias, _into_residual(config), name="out")
        return out(mixed), new


class MLP(nn.Module):
    """Feed-forward network, gated (SwiGLU, GeGLU) or plain."""

    config: TransformerConfig
    width: int = 0  # where it is not the config's

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        config = self.config
        activation = _ACTIVATIONS[config.activation]
        F, bias = self.width or config.mlp_dim, config.mlp_bias
        if config.gated_mlp:
            both = Dense((2, F), use_bias=bias, name="gate_up")(x)
            gate, up = (part[..., 0, :] for part in jnp.split(both, 2, axis=-2))
            inner = activation(gate) * up
        else:
            inner = activation(Dense((F,), use_bias=bias, name="up")(x))
        down = Dense((config.embed_dim,), 1, bias, _into_residual(config), name="down")
        return down(inner)


class ExpertDense(nn.Module):
    """One kernel an expert [E, D, *features], applied to rows grouped by expert."""

    num_experts: int
    features: tuple[int, ...]
    kernel_init: Any = None

    @nn.compact
    def __call__(self, rows: jnp.ndarray, groups: jnp.ndarray) -> jnp.ndarray:
        """rows [R, D] in expert order, groups int32 [E] rows an expert -> [R, *features]."""
        shape = (self.num_experts, rows.shape[-1], *self.features)
        kernel = self.param("kernel", self.kernel_init or _initializer(1), shape).astype(rows.dtype)
        kernel = placement.gathered(kernel, *self.path, "kernel")
        flat = kernel.reshape(*shape[:2], -1)
        return jax.lax.ragged_dot(rows, flat, groups).reshape(-1, *self.features)


def grouped_top_k(
    config: GroupedExpertsConfig, logits: jnp.ndarray, bias: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Weights and experts of group-limited sigmoid routing (DeepSeek-V3, arXiv 2412.19437).

    Args:
      config: groups and scale.
      logits: float32 [R, E].
      bias: float32 [E], added to the scores for the choice alone; it balances the experts' load.

    Returns:
      float32 [R, k] and int32 [R, k].
    """
    E, groups = config.num_experts, config.expert_groups
    scores = jax.nn.sigmoid(logits)
    ranked = (scores + bias).reshape(-1, groups, E // groups)
    two_best = jax.lax.top_k(ranked, min(2, E // groups))[0].sum(axis=-1)
    kept = jax.lax.top_k(two_best, config.groups_per_token)[1]
    inside = (kept[:, :, None] == jnp.arange(groups)).any(axis=1)
    ranked = jnp.where(inside[:, :, None], ranked, -jnp.inf).reshape(-1, E)
    experts = jax.lax.top_k(ranked, config.experts_per_token)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.experts_per_token > 1:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * config.routed_scale, experts


class GroupedRouter(nn.Module):
    """Logits of `grouped_top_k`, in float32 as published, and its bias, which has no gradient."""

    num_experts: int

    @nn.compact
    def __call__(self, rows: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
        kernel = self.param("kernel", _initializer(0), (rows.shape[-1], self.num_experts))
        bias = self.param("bias", nn.initializers.zeros, (self.num_experts,))
        logits = rows.astype(jnp.float32) @ kernel.astype(jnp.float32)
        return logits, jax.lax.stop_gradient(bias.astype(jnp.float32))


class MoE(nn.Module):
    """Token-choice mixture of gated experts.

    Mixtral: softmax over the chosen top-k logits. `GroupedExpertsConfig`: `grouped_top_k`, and an
    expert that every token goes through.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        config = self.config
        E, k, F = config.num_experts, config.experts_per_token, config.expert_dim
        grouped = config if isinstance(config, GroupedExpertsConfig) else None
        tokens = x.reshape(-1, config.embed_dim)
        if grouped is None:
            logits = Dense((E,), name="router")(tokens).astype(jnp.float32)
            chosen, experts = jax.lax.top_k(logits, k)
            weights = jax.nn.softmax(chosen, axis=-1)
        else:
            logits, bias = GroupedRouter(E, name="router")(tokens)
            weights, experts = grouped_top_k(grouped, logits, bias)
        # Tokens sorted by expert, so that each expert's product is one contiguous group.
        order = jnp.argsort(experts.reshape(-1), stable=True)
        groups = jnp.bincount(experts.reshape(-1), length=E).astype(jnp.int32)
        both = ExpertDense(E, (2, F), name="gate_up")(tokens[order // k], groups)
        inner = _ACTIVATIONS[config.activation](both[:, 0]) * both[:, 1]
        down = ExpertDense(E, (config.embed_dim,), _into_residual(config), name="down")
        outputs = down(inner, groups)
        outputs = outputs * weights.reshape(-1)[order, None].astype(x.dtype)
        mixed = jnp.zeros_like(tokens).at[order // k].add(outputs).reshape(x.shape)
        if grouped is not None and grouped.shared_dim:
            mixed = mixed + MLP(config, grouped.shared_dim, name="shared_mlp")(x)
        return mixed


class Block(nn.Module):
    """Attention and feed-forward network, each with residual and norms."""

    config: TransformerConfig
    routed: bool

    @nn.compact
    def __call__(
        self,
        x: jnp.ndarray,
        angles: tuple[jnp.ndarray, jnp.ndarray] | None,
        mask: jnp.ndarray,
        store: tuple[jnp.ndarray, jnp.ndarray] | None,
        start: jnp.ndarray | None,
        bias: jnp.ndarray | None = None,
    ) -> tuple[jnp.ndarray, tuple[jnp.ndarray, jnp.ndarray]]:
        config = self.config
        y = Norm(config, name="attention_norm")(x)
        y, store = Attention(config, name="attention")(y, angles, mask, store, start, bias)
        if config.post_norms:
            y = Norm(config, name="post_attention_norm")(y)
        x = x + y
        y = Norm(config, name="mlp_norm")(x)
        y = MoE(config, name="moe")(y) if self.routed else MLP(config, name="mlp")(y)
        if config.post_norms:
            y = Norm(config, name="post_mlp_norm")(y)
        return x + y, store
