"""Words from their bytes by one cross-attention: a model's input without a vocabulary (Byte2Word).

Chu-Tak Lee et al., 'Word-Level Representation From Bytes For Language Modeling' (arXiv 2211.12677).
Only its abstract could be read; it says that a cross-attention network builds a word's vector from
the word's bytes, for about a tenth of the parameters of BERT's embedding table. One plain attention
layer at model width, with a learned query, has that size (4 D^2 against 30,522 D at D = 768) and is
the default here; what else there is are options, and choices of this project.

The backbone is a `models.transformer`, whose own table holds the few words that are no text
(`SPECIALS`). Parameters: {'encoder', 'backbone'}, and what others add, such as 'head'.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import transformer, words
from models.cache import KVCache
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.layers import Dense, Norm

# Words without bytes; `WORD` stands for those that have some.
SPECIALS = ("PAD", "CLS", "SEP", "MASK", "EOS")
PAD, CLS, SEP, MASK, EOS = range(len(SPECIALS))
WORD = -1
POOLINGS = ("query", "mean_query", "mean")

_NUM_BYTES = 256
# Finite, so that a word of nothing but padding has uniform weights rather than NaN.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class WordEncoderConfig:
    """How the bytes of a word become its vector.

    Attributes:
      width: bytes of a word at most, flag included [C].
      num_heads: of the attention [M]; divides the model's width.
      pooling: 'query' (learned queries), 'mean_query' (the query is the mean of the word's bytes),
        or 'mean' (no attention: every byte has the same weight).
      num_queries: learned queries; several are concatenated and projected.
      positions: whether bytes have positions; without them the bytes of a word are a set.
      mlp_dim: inner width of a two-layer network with a residual after the attention; 0 for none.
    """

    width: int = 17
    num_heads: int = 12
    pooling: str = "query"
    num_queries: int = 1
    positions: bool = True
    mlp_dim: int = 0

    def __post_init__(self) -> None:
        check_choice("encoder.pooling", self.pooling, POOLINGS)
        for field, least in (("width", 5), ("num_heads", 1), ("num_queries", 1), ("mlp_dim", 0)):
            if (value := getattr(self, field)) < least:
                raise InputError(f"encoder.{field}: {value} must be at least {least}")
        if self.pooling != "query" and self.num_queries > 1:
            raise InputError(
                f"encoder.num_queries: {self.num_queries} are learned ones, pooling 'query'"
            )


@dataclasses.dataclass(frozen=True)
class WordModelConfig:
    """Word encoder and backbone.

    Attributes:
      backbone: over word vectors; its vocabulary is `SPECIALS` and it is tied, so that it has no
        table of logits.
      encoder: see `WordEncoderConfig`.
    """

    backbone: TransformerConfig
    encoder: WordEncoderConfig = dataclasses.field(default_factory=WordEncoderConfig)

    def __post_init__(self) -> None:
        if (size := self.backbone.vocab_size) != len(SPECIALS):
            raise InputError(f"backbone.vocab_size: {size} must be {len(SPECIALS)}")
        if not self.backbone.tie_embeddings:
            raise InputError("backbone.tie_embeddings: False would make logits of special words")
        if (width := self.backbone.embed_dim) % self.encoder.num_heads:
            raise InputError(
                f"encoder.num_heads: {self.encoder.num_heads} must divide embed_dim {width}"
            )


def bert_backbone(
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    max_words: int = 512,
    vocab_size: int = len(SPECIALS),
    positions: Literal["rope", "learned"] = "learned",
    causal: bool = False,
) -> TransformerConfig:
    """The sizes of BERT-base by default, in blocks that normalise before rather than after."""
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=4 * width,
        max_position=max_words,
        norm="layernorm",
        norm_eps=1e-12,
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions=positions,
        tie_embeddings=True,
        causal=causal,
    )


class WordEncoder(nn.Module):
    """The parameters' home; use `encode`."""

    config: WordModelConfig

    @nn.compact
    def __call__(self, symbols: jnp.ndarray, lengths: jnp.ndarray) -> jnp.ndarray:
        encoder, backbone = self.config.encoder, self.config.backbone
        D, M = backbone.embed_dim, encoder.num_heads
        normal = nn.initializers.normal(1.0)
        table = self.param("embedding", normal, (_NUM_BYTES, D))
        u = table[symbols].astype(backbone.compute_dtype)
        if encoder.positions:
            at = self.param("positions", normal, (encoder.width, D))
            u = u + at[: symbols.shape[1]].astype(u.dtype)
        mask = jnp.arange(symbols.shape[1]) < lengths[:, None]
        weights = self._weights(u, mask)
        # The sum over a word's bytes is taken before the product with the value matrix: the same
        # by linearity, and a product a word instead of one a byte.
        mixed = jnp.einsum("wnmc,wcd->wnmd", weights, u)
        kernel = self.param("value_kernel", nn.initializers.lecun_normal(), (D, D))
        values = jnp.einsum(
            "wnmd,dmh->wnmh", mixed, kernel.reshape(D, M, D // M).astype(u.dtype)
        ).reshape(-1, encoder.num_queries, D)
        x = Dense((D,), name="out")(values)
        x = Dense((D,), 2, name="merge")(x) if encoder.num_queries > 1 else x[:, 0]
        x = Norm(backbone, name="norm")(x)
        if encoder.mlp_dim:
            inner = jax.nn.gelu(Dense((encoder.mlp_dim,), 1, True, name="up")(x))
            x = x + Dense((D,), 1, True, name="down")(inner)
            x = Norm(backbone, name="mlp_norm")(x)
        # As large as rows of a tied table, beside which positions are learned.
        return x * D**-0.5

    def _weights(self, u: jnp.ndarray, mask: jnp.ndarray) -> jnp.ndarray:
        """Attention of each query and head over the bytes u [W, C, D]: [W, n, M, C].

        (q W_q)_m . (u W_k)_m = u . (W_k)_m (q W_q)_m: the key matrix is applied to the queries,
        of which there are few, and not to the bytes.
        """
        encoder, D = self.config.encoder, u.shape[-1]
        M, H = encoder.num_heads, D // encoder.num_heads
        if encoder.pooling == "mean":
            count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
            even = (mask / count).astype(u.dtype)
            return jnp.broadcast_to(even[:, None, None], (len(u), 1, M, u.shape[1]))
        if encoder.pooling == "query":
            normal = nn.initializers.normal(1.0)
            query = self.param("query_embedding", normal, (encoder.num_queries, D))[None]
        else:
            total = jnp.where(mask[..., None], u, 0).sum(axis=1, keepdims=True)
            query = total / jnp.maximum(mask.sum(axis=1), 1)[:, None, None]
        lecun = nn.initializers.lecun_normal()
        to_query = self.param("query_kernel", lecun, (D, D)).reshape(D, M, H)
        to_key = self.param("key_kernel", lecun, (D, D)).reshape(D, M, H)
        folded = jnp.einsum("wnd,dmh,emh->wnme", query, to_query, to_key).astype(u.dtype)
        if len(folded) == 1:  # the same queries for every word
            scores = jnp.einsum("wcd,nmd->wnmc", u, folded[0])
        else:
            scores = jnp.einsum("wcd,wnmd->wnmc", u, folded)
        scores = jnp.where(mask[:, None, None], scores.astype(jnp.float32) * H**-0.5, _HIDDEN)
        return jax.nn.softmax(scores, axis=-1).astype(u.dtype)


@functools.partial(jax.jit, static_argnames="config")
def init(config: WordModelConfig, key: jax.Array) -> Any:
    """Random float32 parameters: {'encoder', 'backbone'}."""
    first, second = jax.random.split(key)
    symbols = jnp.zeros((1, config.encoder.width), jnp.int32)
    encoder = WordEncoder(config).init(first, symbols, jnp.ones((1,), jnp.int32))["params"]
    return {"encoder": encoder, "backbone": transformer.init(config.backbone, second)}


def encode(
    config: WordModelConfig, params: Any, symbols: jnp.ndarray, lengths: jnp.ndarray
) -> jnp.ndarray:
    """Vectors of words, each from its own bytes alone.

    Args:
      config: the architecture.
      params: of the whole model.
      symbols: int [..., C], flag and bytes; C at most `config.encoder.width`.
      lengths: int [...], symbols that count; 0 gives a vector without meaning.

    Returns:
      [..., D].

    Raises:
      InputError: words wider than the encoder's.
    """
    if (width := symbols.shape[-1]) > config.encoder.width:
        raise InputError(f"symbols: {width} bytes a word; encoder.width is {config.encoder.width}")
    flat = symbols.reshape(-1, width), lengths.reshape(-1)
    found: Any = WordEncoder(config).apply({"params": params["encoder"]}, *flat)
    return found.reshape(*lengths.shape, -1)


def embed(
    config: WordModelConfig,
    params: Any,
    symbols: jnp.ndarray,
    lengths: jnp.ndarray,
    special: jnp.ndarray,
) -> jnp.ndarray:
    """Inputs of the backbone [B, N, D]: all words of the batch in one call of the encoder.

    Args:
      config, params: the model.
      symbols, lengths: int [B, N, C] and [B, N].
      special: int [B, N], of `SPECIALS`, whose vectors are learned; `WORD` for words with bytes.
    """
    vectors = encode(config, params, symbols, lengths)
    table = params["backbone"]["embedder"]["embedding"].astype(vectors.dtype)
    return jnp.where((special == WORD)[..., None], vectors, table[jnp.maximum(special, 0)])


def apply(
    config: WordModelConfig,
    params: Any,
    symbols: jnp.ndarray,
    lengths: jnp.ndarray,
    special: jnp.ndarray,
    *,
    cache: KVCache | None = None,
    remat: bool = False,
) -> tuple[jnp.ndarray, KVCache | None]:
    """Hidden states [B, N, D] after the final norm, and the cache, one slot a word.

    Arguments as `embed`; `cache` as `transformer.apply`, which commits nothing. Without a cache a
    bidirectional backbone sees every word that is not PAD, a causal one those before.
    """
    x = embed(config, params, symbols, lengths, special)
    mask = None
    if cache is None and not config.backbone.causal:
        seen = special != PAD
        mask = jnp.broadcast_to(seen[:, None, :], (*seen.shape, seen.shape[1]))
    output = transformer.apply(
        config.backbone,
        params["backbone"],
        x,
        mask=mask,
        cache=cache,
        with_logits=False,
        remat=remat,
    )
    return output.hidden, output.cache


def num_input_params(params: Any) -> int:
    """Parameters that turn text into the backbone's inputs: word encoder and special words."""
    inputs = (params["encoder"], params["backbone"]["embedder"]["embedding"])
    return sum(leaf.size for leaf in jax.tree.leaves(inputs))


class WordCache:
    """Vectors of words that were seen before, least recently used first out.

    A word's vector depends on its bytes alone, so that text of frequent words costs nothing to
    encode. For inference: it keeps the parameters that it was made with.

    Attributes:
      hits, misses: words looked up so far.
    """

    def __init__(self, config: WordModelConfig, params: Any, capacity: int):
        if capacity < 1:
            raise InputError(f"capacity: {capacity} must be at least 1")
        self._capacity, self._width = capacity, config.encoder.width
        held = {"encoder": jax.device_put(params["encoder"])}
        self._encode = jax.jit(functools.partial(encode, config, held))
        self._kept: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self.hits = self.misses = 0

    def __call__(self, text: Sequence[bytes]) -> np.ndarray:
        """Vectors [n, D] of n >= 1 words of `spaced_words.split`; new ones in one call."""
        new = [word for word in dict.fromkeys(text) if word not in self._kept]
        self.misses += len(new)
        self.hits += len(text) - len(new)
        fresh = dict(zip(new, self._encoded(new), strict=True)) if new else {}
        found = [fresh[word] if word in fresh else self._kept[word] for word in text]
        for word, vector in zip(text, found, strict=True):
            self._kept[word] = vector
            self._kept.move_to_end(word)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return np.stack(found)

    def _encoded(self, new: Sequence[bytes]) -> np.ndarray:
        """Padded to a power of two, so that few sizes are compiled."""
        symbols, lengths = words.pack(new, self._width)
        rows = 1 << max(len(new) - 1, 0).bit_length()
        padding = rows - len(new)
        symbols = np.pad(symbols, ((0, padding), (0, 0)))
        return np.asarray(self._encode(symbols, np.pad(lengths, (0, padding))))[: len(new)]
