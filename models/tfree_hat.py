"""TFree-HAT: the released variant of HAT, over one stream of bytes (arXiv 2603.15953).

Where it differs from `models.hierarchical`: encoder and decoder run over the whole stream of bytes,
causally and within a sliding window; a learned query gathers each word's bytes into its vector; the
decoder reads the encoder's states, and every layer of it adds a *guide*, a projection of what the
backbone said after the *previous* word. There are no ends of words: the splitting rule says where
words begin. So the last byte of word i predicts the first of word i + 1 with the guide of word
i - 1.

This is teacher forcing alone; decoding, which runs the splitter after every byte, is not here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import rope, transformer
from models.attention import attend
from models.config import TransformerConfig
from models.errors import InputError
from models.transformer import Params


@dataclasses.dataclass(frozen=True)
class TFreeConfig:
    """A TFree-HAT model.

    Attributes:
      encoder, decoder: causal with a window in every layer, of one width d and one vocabulary of
        bytes.
      backbone: causal, of width D; reads no tokens.
      connector_heads: heads that gather a word's bytes; each has D / heads dimensions.
      norm_eps: of the guide's norm.
    """

    encoder: TransformerConfig
    backbone: TransformerConfig
    decoder: TransformerConfig
    connector_heads: int = 4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            part = getattr(self, name)
            if not part.causal or not all(map(part.is_local, range(part.num_layers))):
                raise InputError(f"{name}: every layer must be causal with a window")
        if self.encoder.embed_dim != self.decoder.embed_dim:
            raise InputError(
                f"decoder.embed_dim: {self.decoder.embed_dim} must be the encoder's, "
                f"{self.encoder.embed_dim}: it reads the encoder's states"
            )
        if self.backbone.embed_dim % (2 * self.connector_heads):
            raise InputError(
                f"connector_heads: {self.connector_heads} must make heads of an even size of "
                f"{self.backbone.embed_dim}"
            )


@functools.partial(jax.jit, static_argnames="config")
def init(config: TFreeConfig, key: jax.Array) -> Params:
    """Random float32 parameters; `guide_i` are those of decoder layer i.

    The three parts are trees of `transformer.init` without the tables and heads that are not used.
    """
    keys = iter(jax.random.split(key, 8 + 2 * config.decoder.num_layers))
    d, D = config.encoder.embed_dim, config.backbone.embed_dim

    def matrix(rows: int, columns: int) -> jnp.ndarray:
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    def part(config: TransformerConfig, *unused: str) -> Params:
        tree = transformer.init(config, next(keys))
        return {name: value for name, value in tree.items() if name not in unused}

    return {
        "encoder": part(config.encoder, "lm_head"),
        "backbone": part(config.backbone, "embedder", "lm_head"),
        "decoder": part(config.decoder, "embedder"),
        "connector": {
            "query": jax.random.normal(next(keys), (D,)),
            "key": matrix(d, D),
            "value": matrix(d, D),
            "out": matrix(D, D),
        },
        **{
            f"guide_{i}": {"scale": jnp.ones(D), "value": matrix(D, d), "out": matrix(d, d)}
            for i in range(config.decoder.num_layers)
        },
        "first_word": jax.random.normal(next(keys), (D,)),
    }


def apply(
    config: TFreeConfig,
    params: Params,
    units: jnp.ndarray,
    word_of: jnp.ndarray,
    num_words: int,
) -> jnp.ndarray:
    """Logits of the byte after each.

    Args:
      config, params: the model.
      units: int [B, T], a text a row.
      word_of: int [B, T], the word that each byte is in: 0, 1, ... along a row; padding at the end
        of a row belongs to the last word.
      num_words: N, at least the largest of `word_of` and one.

    Returns:
      float32 [B, T, V].
    """
    states = transformer.apply(config.encoder, params["encoder"], units, with_logits=False).hidden
    vectors = connect(config, params["connector"], states, word_of, num_words)
    said = transformer.apply(config.backbone, params["backbone"], vectors, with_logits=False).hidden
    # What each byte is guided by: the backbone after the word before its own.
    first = jnp.broadcast_to(params["first_word"].astype(said.dtype), said[:, :1].shape)
    before = jnp.concatenate([first, said[:, :-1]], axis=1)
    return decode(config, params, states, before, word_of)


def connect(
    config: TFreeConfig,
    params: Params,
    states: jnp.ndarray,
    word_of: jnp.ndarray,
    num_words: int,
) -> jnp.ndarray:
    """One learned query's attention over the bytes of each word: [B, T, d] -> [B, N, D].

    The query is turned by the word's number, keys by the byte's.
    """
    B, T, _ = states.shape
    heads = config.connector_heads
    D = params["query"].shape[0]
    head = D // heads
    keys, values = (
        (states @ params[name].astype(states.dtype)).reshape(B, T, heads, head)
        for name in ("key", "value")
    )
    query = jnp.broadcast_to(params["query"].reshape(heads, head), (B, num_words, heads, head))
    query = _turn(config, query.astype(states.dtype), jnp.arange(num_words))
    keys = _turn(config, keys, jnp.arange(T))
    inside = word_of[:, None, :] == jnp.arange(num_words)[None, :, None]
    mixed = attend(
        query[:, :, :, None], keys.swapaxes(1, 2), values.swapaxes(1, 2), inside, scale=head**-0.5
    )
    return mixed.reshape(B, num_words, D) @ params["out"].astype(states.dtype)


def _turn(config: TFreeConfig, x: jnp.ndarray, positions: jnp.ndarray) -> jnp.ndarray:
    """Rotary positions [T] on x [B, T, heads, H]."""
    cos, sin = rope.angles(config.encoder.rope, x.shape[-1], positions[None])
    return rope.rotate(x, cos, sin)


def decode(
    config: TFreeConfig,
    params: Params,
    states: jnp.ndarray,
    guides: jnp.ndarray,
    word_of: jnp.ndarray,
) -> jnp.ndarray:
    """The decoder on the encoder's states, each layer after the guide of the byte's word.

    Args:
      config, params: the model.
      states: [B, T, d].
      guides: [B, N, D], of each word.
      word_of: int [B, T].

    Returns:
      float32 [B, T, V].
    """
    x, L = states, config.decoder.num_layers
    logits = None
    for layer in range(L):
        x = x + jnp.take_along_axis(
            _guide(config, params[f"guide_{layer}"], guides), word_of[..., None], axis=1
        )
        out = transformer.apply(config.decoder, params["decoder"], x, layers=(layer, layer + 1))
        x, logits = out.hidden, out.logits
    assert logits is not None
    return logits


def _guide(config: TFreeConfig, params: Params, guides: jnp.ndarray) -> jnp.ndarray:
    """Cross-attention to one key is its value, whatever queries and keys are: [B, N, D] -> d."""
    wide = guides.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    normed = (wide * params["scale"]).astype(guides.dtype)
    return normed @ params["value"].astype(normed.dtype) @ params["out"].astype(normed.dtype)


def tfree(
    *, width: int, layers: int, backbone_width: int, backbone_layers: int, window: int,
    head_dim: int = 32, max_words: int = 4096, max_bytes: int = 32_768,
) -> TFreeConfig:  # fmt: skip
    """TFree-HAT with Llama's blocks throughout: sizes in, the rest as published."""

    def part(width: int, layers: int, vocab: int, positions: int, **more: Any) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=vocab, embed_dim=width, num_layers=layers, num_heads=width // head_dim,
            num_kv_heads=width // head_dim, head_dim=head_dim, mlp_dim=-(-width * 8 // 48) * 16,
            max_position=positions, **more,
        )  # fmt: skip

    local = {"window": window, "local_layers": (True,) * layers}
    return TFreeConfig(
        encoder=part(width, layers, 256, max_bytes, **local),
        backbone=part(backbone_width, backbone_layers, 1, max_words, tie_embeddings=True),
        decoder=part(width, layers, 256, max_bytes, **local),
    )


def word_numbers(lengths: jnp.ndarray, total: int) -> jnp.ndarray:
    """The word of each byte of words of these lengths [B, N], zero-padded: int [B, `total`]."""
    ends = jnp.cumsum(lengths, axis=1)
    number = (jnp.arange(total)[None, :, None] >= ends[:, None, :]).sum(axis=-1)
    return jnp.minimum(number, jnp.maximum((lengths > 0).sum(axis=1, keepdims=True) - 1, 0))
