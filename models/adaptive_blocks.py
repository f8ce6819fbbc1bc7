"""Transformer blocks whose norms are set by a condition (adaLN-Zero), perhaps with context.

DiT's block (Peebles and Xie, arXiv 2212.09748, section 3.2) and ENAT's extension of it (arXiv
2411.06959): keys and values come from context tokens and from the block's own tokens, through
weights of their own, in one softmax.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import attend

EPSILON = 1e-6
Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
# Without scale and bias of its own: the condition gives them.
_plain_norm = functools.partial(nn.LayerNorm, EPSILON, use_bias=False, use_scale=False)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift for x [B, n, d] and one vector [B, d] a row."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear; `ratio` times as wide inside."""

    ratio: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Dense(self.ratio * x.shape[-1], dtype=self.dtype, name="up")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="down")(nn.gelu(hidden))


class AdaptiveBlock(nn.Module):
    """One block.

    Attributes:
      num_heads: attention heads.
      mlp_ratio: width of the feed-forward part over d.
      two_way: whether it can attend to context; 22 d^2 weights rather than 18 d^2.
      dtype: of the computation.
    """

    num_heads: int
    mlp_ratio: int = 4
    two_way: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array,
        *,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the block.

        Args:
          x: [B, n, d].
          condition: [B, d].
          context: [B, m, d] for a two-way block; None for none.
          mask: bool [B, n, m + n], context first; None where every key is seen.

        Returns:
          [B, n, d].
        """
        width = x.shape[-1]
        chunks = 8 if self.two_way else 6
        linear = nn.Dense(
            chunks * width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="modulation"
        )
        shift, scale, *across, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(
            linear(nn.silu(condition)), chunks, axis=-1
        )
        norm = _plain_norm(dtype=self.dtype)
        own = modulate(norm(x), shift, scale)
        keys_values = Dense(2 * width, dtype=self.dtype, name="kv_self")(own)
        if self.two_way and (context is not None or self.is_initializing()):
            given = own if context is None else modulate(norm(context), *across)
            others = Dense(2 * width, dtype=self.dtype, name="kv_context")(given)
            if context is not None:
                keys_values = jnp.concatenate([others, keys_values], axis=1)
        queries = Dense(width, dtype=self.dtype, name="query")(own)
        mixed = _attention(queries, keys_values, mask, self.num_heads)
        mixed = Dense(width, dtype=self.dtype, name="out")(mixed)
        x = x + gate[:, None] * mixed
        hidden = modulate(norm(x), mlp_shift, mlp_scale)
        hidden = Mlp(self.mlp_ratio, self.dtype, name="mlp")(hidden)
        return x + mlp_gate[:, None] * hidden


def _attention(
    queries: jax.Array, keys_values: jax.Array, mask: jax.Array | None, heads: int
) -> jax.Array:
    """[B, n, d] for queries [B, n, d] and keys and values [B, s, 2 d]."""
    B, n, width = queries.shape
    s, size = keys_values.shape[1], width // heads
    keys, values = keys_values.reshape(B, s, 2, heads, size).transpose(2, 0, 3, 1, 4)
    if mask is None:
        mask = jnp.ones((1, n, s), bool)
    split = queries.reshape(B, n, heads, 1, size)
    return attend(split, keys, values, mask, scale=size**-0.5).reshape(B, n, width)
