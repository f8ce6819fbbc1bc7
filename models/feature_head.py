"""Heads that draft from a model's own features: EAGLE, and FSPAD's two additions.

A feature is what the target's head reads at a position, after the final norm. The head is one
decoder layer that reads the feature of a token beside the embedding of the token after it, and says
the feature that this next token will have; the target's own head makes a distribution of it (EAGLE,
arXiv 2401.15077, section 4.1; EAGLE-2, arXiv 2406.16858, drafts with the same).

FSPAD (arXiv 2408.15562) adds *feature sampling*, a multiplicative path in which the token selects
from the feature, and *partial alignment distillation*, which frees what the target's head reads
from what is fed back. Neither code nor details of the paper are public: the forms here are this
project's, and start out equal to EAGLE.
"""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models import cache as kv
from models import masks, parameter_files, rope
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.exit_adapter import block_config
from models.layers import MLP, Attention, Dense, Norm

ROLE = "feature_head"
FUSIONS = ("concatenation", "product", "mlp")
ALIGNMENTS = ("full", "heads", "mask")
_KIND = "feature_head"
_ZERO = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class FeatureHeadConfig:
    """What a head is, beside its target's sizes.

    Attributes:
      fusion: how feature and embedding meet: 'concatenation' and one matrix (EAGLE); 'product',
        that and a path W((A f) * silu(B e)) through `width` channels (feature sampling); 'mlp',
        that and a plain network W silu(A [e; f]) of as many parameters, the control.
      width: channels of the further path; 0 for twice the target's width.
      alignment: 'full', one vector is fed back and read by the target's head (EAGLE); 'heads', what
        is read is that and a matrix of it (partial alignment distillation); 'mask', only a share of
        the vector's channels is trained to be the feature.
      aligned: that share, for 'mask'.
    """

    fusion: str = "concatenation"
    width: int = 0
    alignment: str = "full"
    aligned: float = 0.5

    def __post_init__(self) -> None:
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("alignment", self.alignment, ALIGNMENTS)
        if self.width < 0:
            raise InputError(f"width: {self.width} must be at least 0")
        if not 0 < self.aligned <= 1:
            raise InputError(f"aligned: {self.aligned} must be above 0 and at most 1")


class Drafted(struct.PyTreeNode):
    """What a head says.

    Attributes:
      features: [B, T, D], of the next token; fed back when drafting goes on.
      readable: [B, T, D], for `transformer.unembed` of the target.
      cache: with the call's keys and values written, `lengths` as they were; None without one.
    """

    features: jnp.ndarray
    readable: jnp.ndarray
    cache: kv.KVCache | None


class _Head(nn.Module):
    """One layer as the target's, without a norm before attention."""

    config: TransformerConfig
    head: FeatureHeadConfig

    @nn.compact
    def __call__(
        self,
        embeddings: jnp.ndarray,
        features: jnp.ndarray,
        positions: jnp.ndarray,
        mask: jnp.ndarray,
        store: tuple[jnp.ndarray, jnp.ndarray] | None,
        slots: jnp.ndarray | None,
    ) -> tuple[jnp.ndarray, jnp.ndarray, tuple[jnp.ndarray, jnp.ndarray]]:
        D = self.config.embed_dim
        width = self.head.width or 2 * D
        both = jnp.concatenate([embeddings, features], axis=-1)
        x = Dense((D,), use_bias=True, name="fuse")(both)
        if self.head.fusion == "product":
            chosen = Dense((width,), name="of_feature")(features)
            chosen = chosen * jax.nn.silu(Dense((width,), name="of_token")(embeddings))
            x = x + Dense((D,), kernel_init=_ZERO, name="chosen")(chosen)
        elif self.head.fusion == "mlp":
            inner = jax.nn.silu(Dense((width,), name="of_both")(both))
            x = x + Dense((D,), kernel_init=_ZERO, name="chosen")(inner)
        angles = rope.angles(self.config.rope, self.config.rotary_dim, positions)
        y, store = Attention(self.config, name="attention")(x, angles, mask, store, slots)
        x = x + y
        x = x + MLP(self.config, name="mlp")(Norm(self.config, name="mlp_norm")(x))
        readable = x
        if self.head.alignment == "heads":
            readable = x + Dense((D,), kernel_init=_ZERO, name="read")(x)
        return x, readable, store


def init(config: FeatureHeadConfig, target: TransformerConfig, key: jax.Array) -> Any:
    """Random parameters; FSPAD's paths end in zeros, so that at first it is EAGLE."""
    x = jnp.zeros((1, 1, target.embed_dim))
    positions, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
    module = _Head(block_config(target), config)
    return module.init(key, x, x, positions, mask, None, None)["params"]


def _shape(params: Any) -> FeatureHeadConfig:
    """The config that parameters were made with, as far as `apply` must know."""
    fusion, width = "concatenation", 0
    if "of_feature" in params:
        fusion, width = "product", params["of_feature"]["kernel"].shape[-1]
    elif "of_both" in params:
        fusion, width = "mlp", params["of_both"]["kernel"].shape[-1]
    return FeatureHeadConfig(fusion, width, "heads" if "read" in params else "full")


def apply(
    target: TransformerConfig,
    params: Any,
    embeddings: jnp.ndarray,
    features: jnp.ndarray,
    *,
    positions: jnp.ndarray,
    mask: jnp.ndarray | None = None,
    cache: kv.KVCache | None = None,
) -> Drafted:
    """The features that follow.

    Args:
      target: the architecture it is for.
      params: of the head, of any kind.
      embeddings: [B, T, D], of the tokens at positions + 1.
      features: [B, T, D], the target's or the head's own, at positions.
      positions: int [B, T].
      mask: bool [B, T, S]; default causal over positions, S being the cache's slots.
      cache: of one layer. Keys and values are written at `lengths`, which stay as they were.
    """
    if mask is None:
        assert cache is not None
        mask = masks.causal(positions, cache.slots)
    store = None if cache is None else (cache.keys[0], cache.values[0])
    slots = None if cache is None else cache.lengths
    module = _Head(block_config(target), _shape(params))
    dtype = target.compute_dtype
    result: Any = module.apply(
        {"params": params},
        embeddings.astype(dtype),
        features.astype(dtype),
        positions,
        mask,
        store,
        slots,
    )
    found, readable, store = result
    if cache is not None:
        cache = cache.replace(keys=(store[0],), values=(store[1],))
    return Drafted(found, readable, cache)


def save(directory: str | os.PathLike[str], config: FeatureHeadConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(
    directory: str | os.PathLike[str], target: TransformerConfig
) -> tuple[FeatureHeadConfig, Any]:
    """Reads what `save` wrote for a target; errors as `parameter_files.load`."""

    def shapes(config: FeatureHeadConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config, target), jax.random.key(0))

    return parameter_files.load(directory, _KIND, FeatureHeadConfig, shapes)
