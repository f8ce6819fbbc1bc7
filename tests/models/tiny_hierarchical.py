"""Tiny hierarchical models that tests of models, decoding and training share."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from models import hierarchical
from models.config import TransformerConfig
from models.hierarchical import HierarchicalConfig

HAT = hierarchical.hat(
    width=16,
    layers=1,
    backbone_width=32,
    backbone_layers=2,
    head_dim=8,
    max_word=6,
    max_words=64,
    rule="whitespace",
)

_PART = TransformerConfig(
    vocab_size=7,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    max_position=32,
)
# Three vectors a word over five units and two ends, as Learn Your Tokens has them.
POOLED = HierarchicalConfig(
    encoder=_PART.replace(vocab_size=10, causal=False, positions="learned"),
    backbone=_PART.replace(vocab_size=1, tie_embeddings=True, embed_dim=24),
    decoder=_PART,
    max_word=3,
    markers=(7, 8, 9),
    word_end=5,
    document_end=6,
    banned=(),
    units="ids",
)
CONFIGS = {"hat": HAT, "pooled": POOLED}


@functools.cache
def params(config: HierarchicalConfig = HAT, seed: int = 0) -> Any:
    """Random parameters, large enough that everything has an influence."""
    tree = hierarchical.init(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32), tree)


def without_ends(config: HierarchicalConfig) -> list[int]:
    """Units that a word may hold."""
    never = {config.word_end, config.document_end, *config.banned}
    return [unit for unit in range(config.vocab_size) if unit not in never]


def random_words(config: HierarchicalConfig, shape: tuple[int, ...], seed: int = 0) -> tuple:
    """Units int32 [*shape, C], zeros beyond the words, and lengths int32 [*shape], at least 1."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, config.max_word + 1, shape).astype(np.int32)
    units = rng.choice(without_ends(config), (*shape, config.max_word)).astype(np.int32)
    return np.where(np.arange(config.max_word) < lengths[..., None], units, 0), lengths


def wider(config: HierarchicalConfig, more: int = 2) -> HierarchicalConfig:
    """The same with room for longer words."""
    return dataclasses.replace(config, max_word=config.max_word + more)
