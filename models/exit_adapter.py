"""The adapter that lets a model's first layers draft: Kangaroo (arXiv 2404.18911, section 3.2).

One block between the residual stream after some layer and the model's own head. Published are
attention alone, with a norm on either side; a feed-forward network, and neither, are what it was
compared with.
"""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import cache as kv
from models import masks, parameter_files, rope
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.layers import MLP, Attention, Norm

ROLE = "adapter"
KINDS = ("attention", "attention_mlp", "mlp", "norm")
_KIND = "exit_adapter"


@dataclasses.dataclass(frozen=True)
class ExitAdapterConfig:
    """What an adapter is, beside its target's sizes.

    Attributes:
      exit_layer: l, layers of the target whose residual stream it reads.
      kind: 'attention' (published); 'attention_mlp', 'mlp', or 'norm': the norm before the head
        alone, which reads the head off the residual stream.
    """

    exit_layer: int = 2
    kind: str = "attention"

    def __post_init__(self) -> None:
        if self.exit_layer < 1:
            raise InputError(f"exit_layer: {self.exit_layer} must be at least 1")
        check_choice("kind", self.kind, KINDS)


class _Adapter(nn.Module):
    """Rotary attention without biases, as one layer of the target is shaped."""

    config: TransformerConfig
    kind: str

    @nn.compact
    def __call__(
        self,
        x: jnp.ndarray,
        positions: jnp.ndarray,
        mask: jnp.ndarray,
        store: tuple[jnp.ndarray, jnp.ndarray] | None,
        slots: jnp.ndarray | None,
    ) -> tuple[jnp.ndarray, tuple[jnp.ndarray, jnp.ndarray] | None]:
        if self.kind.startswith("attention"):
            angles = rope.angles(self.config.rope, self.config.rotary_dim, positions)
            y = Norm(self.config, name="attention_norm")(x)
            y, store = Attention(self.config, name="attention")(y, angles, mask, store, slots)
            x = x + y
        if self.kind.endswith("mlp"):
            x = x + MLP(self.config, name="mlp")(Norm(self.config, name="mlp_norm")(x))
        return Norm(self.config, name="norm")(x), store


def block_config(target: TransformerConfig) -> TransformerConfig:
    """The target with one layer, as the adapter has it."""
    return target.replace(
        num_layers=1,
        norm="rmsnorm",
        positions="rope",
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        num_experts=0,
        experts_per_token=0,
        window=None,
        local_layers=(),
    )


def init(config: ExitAdapterConfig, target: TransformerConfig, key: jax.Array) -> Any:
    """Random parameters: for 'attention' 4 D^2 + 2 D where Q = K and Q H = D.

    Raises:
      InputError: the target has no layer after the exit.
    """
    if config.exit_layer >= target.num_layers:
        raise InputError(
            f"exit_layer: {config.exit_layer} must be below the target's {target.num_layers} layers"
        )
    module = _Adapter(block_config(target), config.kind)
    x = jnp.zeros((1, 1, target.embed_dim))
    positions, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    return module.init(key, x, positions, mask, None, None)["params"]


def kind_of(params: Any) -> str:
    """Which of `KINDS` the parameters are of."""
    parts = [part for part in ("attention", "mlp") if part in params]
    return "_".join(parts) or "norm"


def apply(
    target: TransformerConfig,
    params: Any,
    x: jnp.ndarray,
    *,
    positions: jnp.ndarray,
    mask: jnp.ndarray | None = None,
    cache: kv.KVCache | None = None,
) -> tuple[jnp.ndarray, kv.KVCache | None]:
    """What the target's head reads: the adapter on a residual stream.

    Args:
      target: the architecture it is for.
      params: of the adapter, of any kind.
      x: [B, T, D], the stream after the exit layer, not normalised.
      positions: int [B, T].
      mask: bool [B, T, S]; default causal over positions, S being the cache's slots.
      cache: of one layer. Keys and values are written at `lengths`, which stay as they were.

    Returns:
      [B, T, D], for `transformer.unembed`; and the cache.
    """
    if mask is None:
        assert cache is not None
        mask = masks.causal(positions, cache.slots)
    store = None if cache is None else (cache.keys[0], cache.values[0])
    slots = None if cache is None else cache.lengths
    module = _Adapter(block_config(target), kind_of(params))
    x = x.astype(target.compute_dtype)
    found: Any = module.apply({"params": params}, x, positions, mask, store, slots)
    y, store = found
    if cache is not None and store is not None:
        cache = cache.replace(keys=(store[0],), values=(store[1],))
    return y, cache


def save(directory: str | os.PathLike[str], config: ExitAdapterConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(
    directory: str | os.PathLike[str], target: TransformerConfig
) -> tuple[ExitAdapterConfig, Any]:
    """Reads what `save` wrote for a target; errors as `parameter_files.load` and `init`."""

    def shapes(config: ExitAdapterConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config, target), jax.random.key(0))

    return parameter_files.load(directory, _KIND, ExitAdapterConfig, shapes)
