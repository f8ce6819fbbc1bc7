"""Learn Your Tokens (arXiv 2310.11628): sizes of its models and of the ones it is compared with.

A word-pooled model is a hierarchical one (`models.hierarchical`) with p vectors a word, each a
position of the backbone, over any units. A flat model reads the same units as a stream.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from models.config import RopeConfig, TransformerConfig
from models.errors import InputError, check_choice
from models.hierarchical import HierarchicalConfig
from models.word_units import WordUnits

# GPT-2's blocks, as published, or Llama's.
_BLOCKS: dict[str, dict[str, Any]] = {
    "gpt": {
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": "gelu",
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
    },
    "llama": {},
}
# Rotary positions so far apart that all are one: attention knows order by its mask alone.
_NO_POSITIONS = RopeConfig(kind="linear", factor=1e9)
_MLP_MULTIPLE = 8

Config = TypeVar("Config", HierarchicalConfig, TransformerConfig)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model; the defaults are the published ones.

    Attributes:
      num_prefix: p, vectors of a word; 0 for a flat model.
      width, layers, heads: d of encoder and decoder, layers of each, heads (the published encoder
        has 4). Flat models do not read them.
      backbone_width, backbone_layers, backbone_heads: D and so on.
      blocks: 'gpt' or 'llama'.
      positions: False for a flat model without any, as the published baselines are.
      num_params: how many the model is to have; the feed-forward width of the backbone is chosen
        for it. None for 4 D.
    """

    num_prefix: int = 4
    width: int = 512
    layers: int = 2
    heads: int = 8
    backbone_width: int = 512
    backbone_layers: int = 8
    backbone_heads: int = 8
    blocks: str = "gpt"
    positions: bool = True
    num_params: int | None = None

    def __post_init__(self) -> None:
        check_choice("sizes.blocks", self.blocks, _BLOCKS)
        if self.num_prefix < 0:
            raise InputError(f"sizes.num_prefix: {self.num_prefix} must be at least 0")
        if self.num_prefix and not self.positions:
            raise InputError("sizes.positions: False is for flat models (num_prefix=0)")


def pooled(sizes: Sizes, units: WordUnits, *, max_word: int, max_words: int) -> HierarchicalConfig:
    """A word-pooled model.

    The published model differs in what follows: its encoder normalises after each sum, encoder
    and decoder share their table, and there is dropout. Padding is masked here.

    Args:
      sizes: see `Sizes`.
      units: what words are written in, with an end of their own.
      max_word: C, units of a word at most.
      max_words: of a context.

    Raises:
      InputError: units whose words are closed by their last unit; sizes that do not fit.
    """
    if units.word_end not in units.ends:
        raise InputError(
            f"units: {units.kind!r} have no end of words; allowed: byte, char, subword"
        )
    V, p = units.vocab_size, sizes.num_prefix
    inside = (sizes.layers, sizes.width, sizes.heads)
    backbone = (sizes.backbone_layers, sizes.backbone_width, sizes.backbone_heads)
    config = HierarchicalConfig(
        encoder=_part(sizes, *inside, V + p, p + max_word).replace(causal=False),
        backbone=_part(sizes, *backbone, 1, p * max_words),
        decoder=_part(sizes, *inside, V, p + max_word),
        max_word=max_word,
        markers=tuple(range(V, V + p)),
        word_end=units.word_end,
        document_end=units.document_end,
        banned=(),
        units="ids",
    )

    def with_mlp(mlp_dim: int) -> HierarchicalConfig:
        return dataclasses.replace(config, backbone=config.backbone.replace(mlp_dim=mlp_dim))

    return _sized(config, sizes, with_mlp)


def flat(sizes: Sizes, units: WordUnits, *, max_units: int) -> TransformerConfig:
    """The baseline: a Transformer of as many layers as its backbone has, over the stream of units.

    Args:
      sizes: see `Sizes`.
      units: of any kind.
      max_units: of a context.
    """
    backbone = (sizes.backbone_layers, sizes.backbone_width, sizes.backbone_heads)
    config = _part(sizes, *backbone, units.vocab_size, max_units)
    config = config.replace(eos_token_ids=units.eos_ids)
    if not sizes.positions:
        config = config.replace(positions="rope", rope=_NO_POSITIONS)
    return _sized(config, sizes, lambda mlp_dim: config.replace(mlp_dim=mlp_dim))


def _part(
    sizes: Sizes, layers: int, width: int, heads: int, vocab_size: int, max_position: int
) -> TransformerConfig:
    if width % heads:
        raise InputError(f"sizes: {heads} heads must divide a width of {width}")
    blocks = _BLOCKS[sizes.blocks]
    gated = blocks.get("gated_mlp", True)
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=-(-width * 8 // 3 // 16) * 16 if gated else 4 * width,
        max_position=max_position,
        tie_embeddings=vocab_size == 1,
        **blocks,
    )


def _sized(config: Config, sizes: Sizes, with_mlp: Callable[[int], Config]) -> Config:
    """The config whose number of parameters is nearest to the wanted one."""
    if sizes.num_params is None:
        return config
    one, two = (_count(with_mlp(n * _MLP_MULTIPLE)) for n in (1, 2))
    steps = 1 + round((sizes.num_params - one) / (two - one))
    if steps < 1:
        raise InputError(
            f"sizes.num_params: {sizes.num_params} is less than {one}, what the rest of it has"
        )
    return with_mlp(steps * _MLP_MULTIPLE)


def _count(config: HierarchicalConfig | TransformerConfig) -> int:
    return config.num_params()
