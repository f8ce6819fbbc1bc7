"""Hierarchical models: words are encoded from their units, and written unit by unit.

A small bidirectional *encoder* turns the units of a word (bytes, characters, subwords) into p
vectors; a causal *backbone* runs over these vectors alone; a small causal *decoder* writes the next
word's units from the p vectors that the backbone gives, until it writes the end of the word. The
encoder sees one word, and so does the decoder. HAT (arXiv 2501.10322, section 2) is p = 1 over
bytes; Learn Your Tokens (arXiv 2310.11628) has p > 1 over any units.

Each of the three is a `TransformerConfig` run by `transformer.apply`, so that caches, masks,
sharding and layer ranges are those of every model. Letters beside the usual ones: N words, C units
of the longest word, p vectors of a word, d width of encoder and decoder.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from models import cache as kv
from models import masks, parameter_files, transformer
from models.config import RopeConfig, TransformerConfig
from models.errors import InputError, check_choice
from models.transformer import Params
from models.words import SPLITTERS

KIND = "hat"
# Values that no byte of UTF-8 text has. Two of them stand for the ends of words and documents.
UNUSED_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))
WORD_END, DOCUMENT_END = 0xC1, 0xC0
# Logits of what cannot come next: finite, so that a target of weight 0 is not NaN.
IMPOSSIBLE = -1e9


@dataclasses.dataclass(frozen=True)
class HierarchicalConfig:
    """A hierarchical model.

    Attributes:
      encoder: bidirectional, of width d; its vocabulary holds the units and the markers.
      backbone: causal, of width D. It reads no tokens: one row of vocabulary is enough.
      decoder: causal, of width d; its vocabulary [V] is what may be written.
      max_word: C, units of a word at most. A word of C units ends without being told.
      markers: p ids that stand before a word's units in the encoder, whose outputs there are the
        word's p vectors. HAT has [W] alone.
      word_end: the unit that is written at the end of a word.
      document_end: the unit that is written in place of a word at the end of a document.
      banned: further units that are never written.
      rule: how text is split into words, a key of `models.words.SPLITTERS`.
      units: 'bytes' of UTF-8, or 'ids' of some other vocabulary.
    """

    encoder: TransformerConfig
    backbone: TransformerConfig
    decoder: TransformerConfig
    max_word: int
    markers: tuple[int, ...] = (WORD_END,)
    word_end: int = WORD_END
    document_end: int = DOCUMENT_END
    banned: tuple[int, ...] = tuple(sorted(set(UNUSED_BYTES) - {WORD_END, DOCUMENT_END}))
    rule: str = "unicode"
    units: str = "bytes"

    def __post_init__(self) -> None:
        if self.encoder.causal or not self.backbone.causal or not self.decoder.causal:
            raise InputError(
                "causal: the encoder must be bidirectional, backbone and decoder causal; given: "
                f"{self.encoder.causal}, {self.backbone.causal}, {self.decoder.causal}"
            )
        if self.max_word < 1:
            raise InputError(f"max_word: {self.max_word} must be at least 1")
        if not self.markers:
            raise InputError("markers: () is empty; a word needs at least one vector")
        for field, ids, size in (
            ("markers", self.markers, self.encoder.vocab_size),
            ("word_end", (self.word_end,), self.decoder.vocab_size),
            ("document_end", (self.document_end,), self.decoder.vocab_size),
            ("banned", self.banned, self.decoder.vocab_size),
        ):
            if bad := [i for i in ids if not 0 <= i < size]:
                raise InputError(f"{field}: {bad[0]} is out of range; allowed: 0 to {size - 1}")
        if self.encoder.vocab_size < self.decoder.vocab_size:
            raise InputError(
                f"encoder.vocab_size: {self.encoder.vocab_size} must be at least the decoder's, "
                f"{self.decoder.vocab_size}: it reads what that one writes"
            )
        check_choice("rule", self.rule, SPLITTERS)
        check_choice("units", self.units, ("bytes", "ids"))
        if self.units == "bytes" and self.vocab_size != 256:
            raise InputError(f"decoder.vocab_size: {self.vocab_size} must be 256, a byte's values")

    @property
    def family(self) -> str:
        return KIND

    @property
    def num_prefix(self) -> int:
        """Vectors of a word [p]; each is a position of the backbone."""
        return len(self.markers)

    @property
    def vocab_size(self) -> int:
        """Units, the ends of words and documents among them [V]."""
        return self.decoder.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self.document_end,)

    @property
    def causal(self) -> bool:
        return True

    @property
    def max_position(self) -> int:
        """Ids, ends of words included, that surely fit: a word is at least a unit and its end."""
        return 2 * (self.backbone.max_position // self.num_prefix)

    def replace(self, **changes: Any) -> "HierarchicalConfig":
        """A copy with `changes`; `dtype` is that of all three parts."""
        if "dtype" in changes:
            dtype = changes.pop("dtype")
            parts = ("encoder", "backbone", "decoder")
            changes |= {part: getattr(self, part).replace(dtype=dtype) for part in parts}
        return dataclasses.replace(self, **changes)

    def num_params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(self)))


def _part(
    layers: int, width: int, head_dim: int, vocab_size: int, max_position: int, causal: bool
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        mlp_dim=-(-width * 8 // 3 // 16) * 16,  # as Llama
        max_position=max_position,
        tie_embeddings=vocab_size == 1,
        causal=causal,
    )


def hat(
    *,
    width: int,
    layers: int,
    backbone_width: int,
    backbone_layers: int,
    head_dim: int = 32,
    decoder_width: int | None = None,
    decoder_layers: int | None = None,
    max_word: int = 100,
    max_words: int = 4096,
    rule: str = "unicode",
) -> HierarchicalConfig:
    """HAT with Llama's blocks throughout (section 2.3): sizes in, the rest as published.

    Args:
      width, layers: d and the layers of the encoder, and of the decoder unless it has its own.
      backbone_width, backbone_layers: D and layers.
      head_dim: of every head; divides all widths.
      decoder_width, decoder_layers: where they are not the encoder's.
      max_word: C, bytes.
      max_words: of a context.
      rule: how text is split.
    """
    decoder = (decoder_layers or layers, decoder_width or width, head_dim, 256, max_word + 1, True)
    return HierarchicalConfig(
        encoder=_part(layers, width, head_dim, 256, max_word + 1, False),
        backbone=_part(backbone_layers, backbone_width, head_dim, 1, max_words, True),
        decoder=_part(*decoder),
        max_word=max_word,
        rule=rule,
    )


@functools.partial(jax.jit, static_argnames="config")
def init(config: HierarchicalConfig, key: jax.Array) -> Params:
    """Random float32 parameters.

    `encoder`, `backbone` and `decoder` are trees of `transformer.init`, without tables of tokens or
    heads that would not be used; `into_backbone` [d, D] and `into_decoder` [D, d] stand between
    them; `first` [p, d] is what the decoder writes the first word from, before there is anything
    that the backbone could say.
    """
    encoder, backbone, decoder, up, down, first = jax.random.split(key, 6)
    d, D, width = config.encoder.embed_dim, config.backbone.embed_dim, config.decoder.embed_dim
    normal = jax.random.normal
    no_tokens = ("lm_head",) if config.backbone.positions == "learned" else ("lm_head", "embedder")
    return {
        "encoder": _without(transformer.init(config.encoder, encoder), "lm_head"),
        "backbone": _without(transformer.init(config.backbone, backbone), *no_tokens),
        "decoder": transformer.init(config.decoder, decoder),
        "into_backbone": {"kernel": normal(up, (d, D)) * d**-0.5},
        "into_decoder": {"kernel": normal(down, (D, width)) * D**-0.5},
        "first": normal(first, (config.num_prefix, width)),
    }


def param_shapes(config: HierarchicalConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without allocating anything."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def save(directory: str | os.PathLike[str], config: HierarchicalConfig, params: Params) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: str | os.PathLike[str]) -> tuple[HierarchicalConfig, Params]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, _from_json, param_shapes)


def load_config(directory: str | os.PathLike[str]) -> HierarchicalConfig:
    """The config alone; errors as `load`."""
    return parameter_files.load_config(directory, KIND, _from_json)


def _from_json(**fields: Any) -> HierarchicalConfig:
    """The config of JSON's dicts and lists."""

    def part(values: dict[str, Any]) -> TransformerConfig:
        values = dict(values)
        for name in ("rope", "local_rope"):
            if values.get(name) is not None:
                values[name] = RopeConfig(**values[name])
        return TransformerConfig(**{k: _tuples(v) for k, v in values.items()})

    parts = {name: part(fields.pop(name)) for name in ("encoder", "backbone", "decoder")}
    return HierarchicalConfig(**(parts | {k: _tuples(v) for k, v in fields.items()}))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def encode(
    config: HierarchicalConfig, params: Params, units: jnp.ndarray, lengths: jnp.ndarray
) -> jnp.ndarray:
    """The vectors of words, each from its own units alone (section 2.3, steps 1 and 2).

    Args:
      config, params: the model.
      units: int [..., C]; what stands beyond a word's length has no influence.
      lengths: int [...].

    Returns:
      [..., p, D], as the backbone reads them.
    """
    p, C = config.num_prefix, units.shape[-1]
    rows = units.reshape(-1, C)
    markers = jnp.broadcast_to(jnp.asarray(config.markers, rows.dtype), (len(rows), p))
    valid = jnp.arange(p + C) < p + lengths.reshape(-1, 1)
    hidden = transformer.apply(
        config.encoder,
        params["encoder"],
        jnp.concatenate([markers, rows], axis=1),
        mask=masks.full(valid, p + C),
        with_logits=False,
    ).hidden[:, :p]
    vectors = _project(params["into_backbone"], hidden)
    return vectors.reshape(*units.shape[:-1], p, -1)


def think(
    config: HierarchicalConfig,
    params: Params,
    vectors: jnp.ndarray,
    cache: kv.KVCache | None = None,
    **places: Any,
) -> tuple[jnp.ndarray, kv.KVCache | None]:
    """The backbone on words (step 3): what the decoder writes the word after each of them from.

    Args:
      config, params: the model.
      vectors: [B, N, p, D] from `encode`.
      cache: of the backbone: p slots a word.
      **places: `positions`, `slots` [B, N p] and `mask` [B, N p, S] of `transformer.apply`.

    Returns:
      [B, N, p, d], and the cache with the words written and `lengths` as they were.
    """
    B, N, p, D = vectors.shape
    out = transformer.apply(
        config.backbone,
        params["backbone"],
        vectors.reshape(B, N * p, D),
        cache=cache,
        with_logits=False,
        **places,
    )
    return _project(params["into_decoder"], out.hidden).reshape(B, N, p, -1), out.cache


def write(
    config: HierarchicalConfig, params: Params, prefix: jnp.ndarray, units: jnp.ndarray
) -> jnp.ndarray:
    """Logits of the units of words, teacher-forced (steps 4 and 5).

    Args:
      config, params: the model.
      prefix: [..., p, d] from `think`, of the word before each.
      units: int [..., C], the words.

    Returns:
      float32 [..., C, V]; entry k is for unit k, or for the end of a word of k units. Of a word of
      C units the end needs no telling.
    """
    p, C = config.num_prefix, units.shape[-1]
    rows = units.reshape(-1, C)
    prefix = prefix.reshape(-1, p, prefix.shape[-1])
    inputs = jnp.concatenate([prefix, embed(params, rows[:, :-1]).astype(prefix.dtype)], axis=1)
    out = transformer.apply(config.decoder, params["decoder"], inputs, with_logits=False)
    logits = transformer.unembed(config.decoder, params["decoder"], out.hidden[:, p - 1 :])
    logits = possible(config, logits, jnp.arange(C))
    return logits.reshape(*units.shape, -1)


def apply(
    config: HierarchicalConfig,
    params: Params,
    source: jnp.ndarray,
    source_lengths: jnp.ndarray,
    target: jnp.ndarray,
    *,
    segment_ids: jnp.ndarray,
    positions: jnp.ndarray,
) -> jnp.ndarray:
    """Logits of every target word given the source words up to the one before it.

    All words of a batch go through the encoder in one call, and through the decoder in another.

    Args:
      config, params: the model.
      source: int [B, N, C], words to read; an empty one is the start of a document, which is
        in nobody's past and whose target is written from `first`.
      source_lengths: int [B, N].
      target: int [B, N, C], the word after each.
      segment_ids: int [B, N], documents of a packed row; 0 is padding.
      positions: int [B, N], of the words in their documents.

    Returns:
      float32 [B, N, C, V], see `write`.
    """
    p = config.num_prefix
    is_start = source_lengths == 0
    mask = masks.packed_causal(jnp.repeat(segment_ids, p, axis=1))
    mask &= ~jnp.repeat(is_start, p, axis=1)[:, None, :]
    places = positions[..., None] * p + jnp.arange(p)
    prefix, _ = think(
        config,
        params,
        encode(config, params, source, source_lengths),
        positions=places.reshape(len(source), -1),
        mask=mask,
    )
    first = params["first"].astype(prefix.dtype)
    prefix = jnp.where(is_start[..., None, None], first, prefix)
    return write(config, params, prefix, target)


def embed(params: Params, units: jnp.ndarray) -> jnp.ndarray:
    """Units as the decoder reads them: int [...] -> [..., d]."""
    return params["decoder"]["embedder"]["embedding"][units]


def possible(config: HierarchicalConfig, logits: jnp.ndarray, written: jnp.ndarray) -> jnp.ndarray:
    """Rules out units that cannot come next (section 2.4), so that words have probabilities.

    A word is not empty, a document's end stands in place of a whole word, a word of C units ends.

    Args:
      config: the model.
      logits: float32 [..., V].
      written: int [...], units of the word so far.
    """
    unit = jnp.arange(logits.shape[-1])
    written = written[..., None]
    allowed = ~jnp.isin(unit, jnp.asarray(config.banned, unit.dtype))
    allowed &= (unit != config.word_end) | (written > 0)
    allowed &= (unit != config.document_end) | (written == 0)
    allowed &= (unit == config.word_end) | (written < config.max_word)
    return jnp.where(allowed, logits, IMPOSSIBLE)


def _without(tree: Params, *names: str) -> Params:
    return {name: value for name, value in tree.items() if name not in names}


def _project(layer: Params, x: jnp.ndarray) -> jnp.ndarray:
    return x @ layer["kernel"].astype(x.dtype)
