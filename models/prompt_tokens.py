"""Trained embeddings that stand for tokens to come (PPD, arXiv 2405.18628, section 3.1)."""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from models import parameter_files
from models.config import TransformerConfig
from models.errors import InputError, check_choice

ROLE = "prompt_tokens"
MASKS = ("ensemble", "decoder", "independent")
_KIND = "prompt_tokens"


@dataclasses.dataclass(frozen=True)
class PromptTokensConfig:
    """How many there are.

    Attributes:
      distances: n, tokens ahead that are guessed.
      ensemble: m, embeddings for each distance, whose logits are averaged.
      mask: what an embedding sees beside the text and itself: 'ensemble', those of nearer distances
        with its own number (published); 'decoder', all before it, its siblings too; 'independent',
        none.
    """

    distances: int = 3
    ensemble: int = 1
    mask: str = "ensemble"

    def __post_init__(self) -> None:
        for field in ("distances", "ensemble"):
            if (value := getattr(self, field)) < 1:
                raise InputError(f"{field}: {value} must be at least 1")
        check_choice("mask", self.mask, MASKS)

    def num_params(self, target: TransformerConfig) -> int:
        """All that is trained, and all that a decoder keeps beside its target's parameters."""
        return self.distances * self.ensemble * target.embed_dim


def init(config: PromptTokensConfig, target: TransformerConfig, key: jax.Array) -> Any:
    """`embedding` [n m, D], those of one distance together, of the size of token embeddings."""
    shape = (config.distances * config.ensemble, target.embed_dim)
    size = target.embed_dim**-0.5 if target.tie_embeddings else 1.0
    return {"embedding": size * jax.random.normal(key, shape, jnp.float32)}


def from_tokens(
    config: PromptTokensConfig, target: TransformerConfig, params: Any, tokens: Any
) -> Any:
    """The published start: embeddings of ordinary tokens, int [k], one after another, tiled."""
    rows = params["embedder"]["embedding"][jnp.asarray(tokens)].astype(jnp.float32)
    if target.embedding_scale is not None:
        rows = rows * target.embedding_scale
    number = config.distances * config.ensemble
    return {"embedding": jnp.tile(rows, (-(-number // len(rows)), 1))[:number]}


def save(directory: str | os.PathLike[str], config: PromptTokensConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(
    directory: str | os.PathLike[str], target: TransformerConfig
) -> tuple[PromptTokensConfig, Any]:
    """Reads what `save` wrote for a target; errors as `parameter_files.load`."""

    def shapes(config: PromptTokensConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config, target), jax.random.key(0))

    return parameter_files.load(directory, _KIND, PromptTokensConfig, shapes)
