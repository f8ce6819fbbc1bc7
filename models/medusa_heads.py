"""Heads that guess several tokens ahead from one hidden state (Medusa, arXiv 2401.10774).

Head k reads what the target's head reads and guesses the token k + 2 places on: one residual block
each, and a head of its own (published) or the target's.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from models import parameter_files, transformer
from models.config import TransformerConfig
from models.errors import InputError

ROLE = "medusa_heads"
_KIND = "medusa_heads"


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """What the heads are, beside their target's sizes.

    Attributes:
      heads: K, tokens guessed ahead.
      own_head: whether each has a kernel [D, V] of its own; else all share the target's.
    """

    heads: int = 4
    own_head: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"heads: {self.heads} must be at least 1")


def init(config: MedusaConfig, target: TransformerConfig, key: jax.Array) -> Any:
    """Residual blocks of zeros, so that every head begins as the target's (section 2.1)."""
    K, D, V = config.heads, target.embed_dim, target.vocab_size
    params = {"block": {"kernel": jnp.zeros((K, D, D)), "bias": jnp.zeros((K, D))}}
    if config.own_head:
        params["head"] = {"kernel": jax.random.normal(key, (K, D, V)) * D**-0.5}
    return params


def head_kernel(target: TransformerConfig, target_params: Any) -> jnp.ndarray:
    """The target's own head, float32 [D, V]."""
    if target.tie_embeddings:
        return target_params["embedder"]["embedding"].T.astype(jnp.float32)
    return target_params["lm_head"]["kernel"].astype(jnp.float32)


def with_head(target: TransformerConfig, target_params: Any, params: Any) -> Any:
    """Own heads that begin as copies of the target's; others are returned as they are."""
    if "head" not in params:
        return params
    kernel = head_kernel(target, target_params)
    return {**params, "head": {"kernel": jnp.broadcast_to(kernel, params["head"]["kernel"].shape)}}


def apply(
    target: TransformerConfig, target_params: Any, params: Any, hidden: jnp.ndarray
) -> jnp.ndarray:
    """Logits float32 [..., K, V] of hidden states [..., D] that went through the final norm."""
    kernel = params["block"]["kernel"].astype(hidden.dtype)
    inner = jnp.einsum("...d,kde->...ke", hidden, kernel)
    x = hidden[..., None, :] + jax.nn.silu(inner + params["block"]["bias"].astype(hidden.dtype))
    if "head" in params:
        own = params["head"]["kernel"].astype(hidden.dtype)
        return jnp.einsum("...kd,kdv->...kv", x, own, preferred_element_type=jnp.float32)
    return transformer.unembed(target, target_params, x)


def save(directory: str | os.PathLike[str], config: MedusaConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(directory: str | os.PathLike[str], target: TransformerConfig) -> tuple[MedusaConfig, Any]:
    """Reads what `save` wrote for a target; errors as `parameter_files.load`."""

    def shapes(config: MedusaConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config, target), jax.random.key(0))

    return parameter_files.load(directory, _KIND, MedusaConfig, shapes)
