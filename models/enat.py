"""Masked models of image tokens: ENAT (arXiv 2411.06959) and the uniform network it departs from.

The uniform network (MaskGIT, arXiv 2202.04200, with DiT's blocks) runs every layer on all N tokens.
ENAT runs a deep encoder on visible tokens only and a shallow decoder on masked ones, which see
the encoded visible tokens and each other; from step to step it encodes only what became visible
and reuses, through a projector, features of what was visible before.

What an image is of, the condition, is a class or, for a `TextENATConfig`, a vector of a text. The
method's text variant is not public: how a vector conditions is this project's choice.

Letters: B batch, N tokens of an image, K codes, d width, E width of text vectors; n, o and m tokens
that are newly visible, visible before ('old'), and masked. Rows of a batch have equal counts, or
lists are padded.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import parameter_files
from models.adaptive_blocks import EPSILON, AdaptiveBlock, Dense, Mlp
from models.errors import InputError, check_choice

KIND = "enat"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ENATConfig:
    """The architecture. The defaults are the offline preset's.

    Attributes:
      num_codes: K; the mask id is K.
      num_tokens: N.
      num_classes: classes; the null class of guidance is that number.
      embed_dim: d.
      num_heads: attention heads.
      encoder_layers, decoder_layers: E and D. The uniform network has E + D layers.
      disentangled: False for the uniform network.
      mlp_ratio: of the feed-forward parts.
      dropout: after the input embedding, in training.
      dtype: of the computation; parameters and logits are float32.
    """

    num_codes: int = 64
    num_tokens: int = 64
    num_classes: int = 10
    embed_dim: int = 96
    num_heads: int = 4
    encoder_layers: int = 5
    decoder_layers: int = 1
    disentangled: bool = True
    mlp_ratio: int = 4
    dropout: float = 0.1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (
            "num_codes", "num_tokens", "num_classes", "embed_dim", "num_heads", "mlp_ratio",
        ):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise InputError(f"enat.{name}: {value} must be at least 1")
        least = 1 if self.disentangled else 0
        for name in ("encoder_layers", "decoder_layers"):
            if (value := getattr(self, name)) < least:
                raise InputError(f"enat.{name}: {value} must be at least {least}")
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"enat.num_heads: {self.num_heads} must divide embed_dim {self.embed_dim}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"enat.dropout: {self.dropout} must be at least 0 and below 1")
        check_choice("enat.dtype", self.dtype, DTYPES)

    @property
    def mask_id(self) -> int:
        return self.num_codes

    @property
    def null_class(self) -> int:
        return self.num_classes


@dataclasses.dataclass(frozen=True)
class TextENATConfig(ENATConfig):
    """A network conditioned on text vectors instead of classes; `num_classes` is not read.

    A vector is standardised by the mean and deviation of the training texts, which lie among the
    parameters but are not trained, and projected to width d, in the place of the class
    embedding. The vector of zeros is the null condition, and has an embedding of its own.

    Attributes:
      text_dim: E.
    """

    text_dim: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_dim < 1:
            raise InputError(f"enat.text_dim: {self.text_dim} must be at least 1")


# ENAT-L for 256 x 256 pixels: 16 x 16 tokens of VQGAN_F16.
ENAT_L = ENATConfig(
    num_codes=1024,
    num_tokens=256,
    num_classes=1000,
    embed_dim=1024,
    num_heads=16,
    encoder_layers=22,
    decoder_layers=2,
)
# A split of ours, of the 219 million parameters that are reported for ENAT-B.
ENAT_B = dataclasses.replace(ENAT_L, embed_dim=768, num_heads=12, encoder_layers=14)


class Indices(NamedTuple):
    """Positions by what is done with them, int32 [B, o], [B, n] and [B, m]; N pads a list.

    Attributes:
      old: visible now and in the previous call, whose features are reused.
      new: visible now, encoded in this call.
      masked: masked now.
    """

    old: jax.Array
    new: jax.Array
    masked: jax.Array


class Output(NamedTuple):
    """What a call gives.

    Attributes:
      logits: float32 [B, m, K] at `Indices.masked`; the mask is no choice.
      features: [B, N, d] in grid order, before the head's norm: what a later call reuses.
    """

    logits: jax.Array
    features: jax.Array


class _Projector(nn.Module):
    """f of section 2.3: r + MLP(LN(r))."""

    config: ENATConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = DTYPES[self.config.dtype]
        hidden = nn.LayerNorm(EPSILON, dtype=dtype, name="norm")(x)
        return x + Mlp(self.config.mlp_ratio, dtype, name="mlp")(hidden)


class _FixedAffine(nn.Module):
    """scale x + bias, neither of which is trained."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.stop_gradient(scale) + jax.lax.stop_gradient(bias)


class _Network(nn.Module):
    config: ENATConfig

    def setup(self) -> None:
        config, dtype = self.config, DTYPES[self.config.dtype]
        small = nn.initializers.normal(0.02)
        self.words = nn.Embed(config.num_codes + 1, config.embed_dim, embedding_init=small)
        self.positions = self.param("positions", small, (config.num_tokens, config.embed_dim))
        if isinstance(config, TextENATConfig):
            self.text_norm = _FixedAffine()
            self.text = Dense(config.embed_dim, dtype=dtype)
            self.null_text = nn.Embed(1, config.embed_dim, embedding_init=small)
        else:
            self.classes = nn.Embed(config.num_classes + 1, config.embed_dim, embedding_init=small)
        self.input_norm = nn.LayerNorm(EPSILON, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)

        def blocks(count: int) -> list[AdaptiveBlock]:
            block = (config.num_heads, config.mlp_ratio, config.disentangled, dtype)
            return [AdaptiveBlock(*block) for _ in range(count)]

        self.encoder = blocks(config.encoder_layers)
        self.decoder = blocks(config.decoder_layers)
        if config.disentangled:
            self.reuse = _Projector(config)
        self.head_norm = nn.LayerNorm(EPSILON, dtype=dtype)
        self.head = Dense(config.embed_dim, dtype=dtype)
        self.output_norm = nn.LayerNorm(EPSILON, dtype=dtype)
        self.output_bias = self.param("output_bias", nn.initializers.zeros, (config.num_codes + 1,))

    def embed(self, ids: jax.Array, train: bool) -> jax.Array:
        x = self.input_norm(self.words(ids) + self.positions)
        return self.dropout(x, deterministic=not train)

    def embed_condition(self, condition: jax.Array) -> jax.Array:
        """[B, d] of classes int [B], or of text vectors [B, E]."""
        if not isinstance(self.config, TextENATConfig):
            embedded: jax.Array = self.classes(condition)
            return embedded
        projected = self.text(self.text_norm(condition))
        given = jnp.any(condition != 0, axis=-1, keepdims=True)
        null = self.null_text(jnp.zeros(condition.shape[:1], jnp.int32))
        return jnp.where(given, projected, null.astype(projected.dtype))

    def logits(self, x: jax.Array) -> jax.Array:
        """Tied to the input embeddings, which get no gradient from here."""
        x = self.output_norm(nn.gelu(self.head(self.head_norm(x))))
        words = jax.lax.stop_gradient(self.words.embedding)
        logits = x.astype(jnp.float32) @ words.T + self.output_bias
        return logits[..., : self.config.num_codes]

    def __call__(
        self,
        ids: jax.Array,
        condition: jax.Array,
        indices: Indices,
        reused: jax.Array | None,
        padded: bool,
        train: bool,
    ) -> Output:
        old, new, masked = indices
        embedded, condition = self.embed(ids, train), self.embed_condition(condition)
        # One shape of computation for all kinds of call; empty parts vanish when traced.
        seen = jnp.zeros((ids.shape[0], 0, embedded.shape[-1]), embedded.dtype)
        if old.shape[1] or self.is_initializing():
            seen = self.reuse(seen if reused is None else gather(reused, old))
        x = gather(embedded, new)
        if new.shape[1] or self.is_initializing():
            mask = _key_mask(self.config, (old, new), new) if padded else None
            for block in self.encoder:
                x = block(x, condition, context=seen if old.shape[1] else None, mask=mask)
        visible = jnp.concatenate([seen, x], axis=1)
        hidden = gather(embedded, masked)
        mask = _key_mask(self.config, (old, new, masked), masked) if padded else None
        context = visible if visible.shape[1] else None
        for block in self.decoder:
            hidden = block(hidden, condition, context=context, mask=mask)
        features = jnp.zeros_like(embedded)
        for at, values in ((old, seen), (new, x), (masked, hidden)):
            features = scatter(features, at, values)
        return Output(self.logits(hidden), features)

    def uniform(
        self,
        ids: jax.Array,
        condition: jax.Array,
        masked: jax.Array,
        mask: jax.Array | None,
        train: bool,
    ) -> Output:
        x, condition = self.embed(ids, train), self.embed_condition(condition)
        for block in [*self.encoder, *self.decoder]:
            x = block(x, condition, mask=mask)
        return Output(self.logits(gather(x, masked)), x)

    def encode_only(self, ids: jax.Array, condition: jax.Array, new: jax.Array) -> jax.Array:
        x, condition = gather(self.embed(ids, False), new), self.embed_condition(condition)
        mask = _key_mask(self.config, (new,), new)
        for block in self.encoder:
            x = block(x, condition, mask=mask)
        return x


def gather(grid: jax.Array, indices: jax.Array) -> jax.Array:
    """[B, k, d] of [B, N, d] at int [B, k]; padding gives some row of the grid."""
    return jnp.take_along_axis(grid, indices[..., None], axis=1, mode="clip")


def scatter(grid: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """The grid [B, N, ...] with `values` [B, k, ...] at int [B, k]; padding is dropped."""
    rows = jnp.arange(grid.shape[0])[:, None]
    return grid.at[rows, indices].set(values.astype(grid.dtype), mode="drop")


def _key_mask(config: ENATConfig, keys: tuple[jax.Array, ...], queries: jax.Array) -> jax.Array:
    """bool [B, queries, keys]: all keys that are no padding."""
    real = jnp.concatenate(keys, axis=1) < config.num_tokens
    return jnp.broadcast_to(real[:, None], (*queries.shape, real.shape[1]))


def init(config: ENATConfig, key: jax.Array) -> Any:
    """Parameters: a nested dict, float32."""
    ids = jnp.zeros((1, config.num_tokens), jnp.int32)
    null, one = null_condition(config, 1), jnp.zeros((1, 1), jnp.int32)
    network, rngs = _Network(config), {"params": key}
    if not config.disentangled:
        variables = network.init(rngs, ids, null, one, None, False, method=_Network.uniform)
    else:
        indices = Indices(one[:, :0], one, one)
        variables = network.init(rngs, ids, null, indices, None, False, False)
    return variables["params"]


def with_text_statistics(params: Any, mean: Any, deviation: Any) -> Any:
    """Parameters of a `TextENATConfig` that standardise by a mean and a deviation [E]."""
    scale = 1 / jnp.asarray(deviation)
    return {**params, "text_norm": {"scale": scale, "bias": -scale * mean}}


def null_condition(config: ENATConfig, rows: int) -> jax.Array:
    """The condition of images of nothing in particular, for guidance: int [B], or [B, E]."""
    if isinstance(config, TextENATConfig):
        return jnp.zeros((rows, config.text_dim))
    return jnp.full((rows,), config.null_class, jnp.int32)


def param_shapes(config: ENATConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of `init`'s parameters."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def apply(
    config: ENATConfig,
    params: Any,
    ids: jax.Array,
    condition: jax.Array,
    indices: Indices,
    *,
    reused: jax.Array | None = None,
    padded: bool = False,
    attention_mask: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> Output:
    """One call of either network.

    Args:
      config: which network.
      params: of it.
      ids: int [B, N]; the mask id where masked.
      condition: classes int [B], the null class among them; text vectors [B, E] for a
        `TextENATConfig`, the null vector of zeros among them.
      indices: see `Indices`; the uniform network reads `masked` only.
      reused: [B, N, d], an earlier call's features; needed where `indices.old` is not empty. No
        gradient flows into them.
      padded: whether lists may hold padding.
      attention_mask: bool [B, N, N] for the uniform network, to ablate directions of attention.
      dropout_key: for training; None for evaluation.

    Raises:
      InputError: old tokens without features, an attention mask for the disentangled network, or
        a condition of another shape.
    """
    expected = null_condition(config, ids.shape[0]).shape
    if jnp.shape(condition) != expected:
        raise InputError(f"condition: shape {jnp.shape(condition)} must be {expected}")
    train = dropout_key is not None
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    network = _Network(config)
    if not config.disentangled:
        uniform: Any = network.apply(
            {"params": params}, ids, condition, indices.masked, attention_mask, train,
            rngs=rngs, method=_Network.uniform,
        )  # fmt: skip
        return uniform
    if attention_mask is not None:
        raise InputError("attention_mask: is for the uniform network only")
    if indices.old.shape[1] and reused is None:
        raise InputError(f"reused: None, but {indices.old.shape[1]} tokens are to be reused")
    reused = None if reused is None else jax.lax.stop_gradient(reused)
    output: Any = network.apply(
        {"params": params}, ids, condition, indices, reused, padded, train, rngs=rngs
    )
    return Output(*output)


def encode_visible(
    config: ENATConfig, params: Any, ids: jax.Array, condition: jax.Array, visible: jax.Array
) -> jax.Array:
    """Features [B, N, d] of the tokens at int [B, v] (padded with N) alone, zero elsewhere.

    What a call without reuse leaves for the next; masked tokens' features are not reused, so the
    decoder need not run.
    """
    found: Any = _Network(config).apply(
        {"params": params}, ids, condition, visible, method=_Network.encode_only
    )
    grid = jnp.zeros((*ids.shape, config.embed_dim), found.dtype)
    return scatter(grid, visible, found)


def indices_of(masked: np.ndarray, before: np.ndarray | None = None) -> Indices:
    """The lists for masks bool [B, N], on the host.

    Args:
      masked: of this call's input.
      before: of the previous call's input; None for a call without reuse.

    Raises:
      InputError: rows with different counts, or a token that is masked now and was not before.
    """
    before = np.ones_like(masked) if before is None else before
    if (masked & ~before).any():
        raise InputError("masked: a token is masked that was visible before; masks only shrink")
    lists = []
    for name, chosen in (("old", ~before), ("new", before & ~masked), ("masked", masked)):
        counts = chosen.sum(1)
        if (counts != counts[0]).any():
            raise InputError(f"masked: rows have {counts.tolist()} {name} tokens; allowed: equal")
        lists.append(jnp.asarray(np.nonzero(chosen)[1].reshape(len(masked), -1), jnp.int32))
    return Indices(*lists)


def macs(config: ENATConfig, old: int, new: int, masked: int) -> int:
    """Multiply-accumulates of one call on one image, embeddings and norms aside."""
    d, r = config.embed_dim, config.mlp_ratio
    layers = config.encoder_layers + config.decoder_layers
    head = masked * (d * d + d * config.num_codes)

    def block(tokens: int, context: int) -> int:
        """Query, output, own keys and values, context's, two attention products, MLP."""
        if not tokens:
            return 0
        linear = tokens * (4 + 2 * r) * d * d + context * 2 * d * d
        return linear + 2 * tokens * (tokens + context) * d

    if not config.disentangled:
        return layers * (block(old + new + masked, 0) + 6 * d * d) + head
    total = old * 2 * r * d * d + layers * 8 * d * d + head
    total += config.encoder_layers * block(new, old)
    return total + config.decoder_layers * block(masked, old + new)


def save(directory: Any, config: ENATConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: Any) -> tuple[ENATConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""

    def config_of(**fields: Any) -> ENATConfig:
        return (TextENATConfig if "text_dim" in fields else ENATConfig)(**fields)

    return parameter_files.load(directory, KIND, config_of, param_shapes)
