"""A hypernetwork that gives tokens of any tokeniser their embeddings (ZeTT, arXiv 2405.07883).

A token is read as the ids that the language model's own tokeniser makes of it (its surface form,
`models.byte_level.surfaces`); a small bidirectional encoder turns their embeddings into the row
that the token is read with, the row that scores it, and a bias. Each token is on its own: neither
the others nor their order change its rows, so a table can be computed in parts.

Letters: n tokens, L ids of a surface form, V tokens of the language model, d its width, h the
hypernetwork's; the source table has c columns, 2 d or (tied embeddings) d.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import parameter_files
from models.byte_level import MAX_SURFACE
from models.config import DTYPES, TransformerConfig
from models.errors import InputError, check_choice
from models.layers import Dense
from models.token_tables import Tables

KIND = "embedding_hypernetwork"
_MASKED = -1e9  # finite: a row of padding alone stays a number
_EPSILON = 1e-5
# The scalers' parameters that training leaves alone; that of the output table learns, as in the
# official code.
_FROZEN = ("in_scaler", "input_scaler")


@dataclasses.dataclass(frozen=True)
class HypernetworkConfig:
    """The architecture (section 2.3). See `for_model` for the published sizes.

    Attributes:
      embed_dim: d.
      vocab_size: V, rows of the source table; larger ids are appended tokens.
      num_fallback: rows for appended tokens, at least 1.
      pad_id: what surface forms are padded with. Where it is a token's id too, that token cannot
        be seen; it is a special one, whose row is the model's own.
      tied: whether the language model has one table.
      hidden_dim, mlp_dim, num_heads, num_layers: h, the inner width, and of the encoder.
      max_surface: the largest L.
      bias: whether tokens have a bias of their logit (masked language models).
      num_languages: rows of the language embedding, read as a further position; 0 for none.
      initializer_range: of parameters, and what source columns are scaled to.
      dtype: of the computation; tables are float32.
    """

    embed_dim: int
    vocab_size: int
    num_fallback: int = 1
    pad_id: int = 0
    tied: bool = False
    hidden_dim: int = 128
    mlp_dim: int = 256
    num_heads: int = 2
    num_layers: int = 3
    max_surface: int = MAX_SURFACE
    bias: bool = False
    num_languages: int = 0
    initializer_range: float = 0.02
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive = (
            "embed_dim", "vocab_size", "num_fallback", "hidden_dim", "mlp_dim", "num_heads",
            "num_layers", "max_surface",
        )  # fmt: skip
        for name in positive:
            if (value := getattr(self, name)) < 1:
                raise InputError(f"hypernetwork.{name}: {value} must be at least 1")
        if self.hidden_dim % self.num_heads:
            raise InputError(
                f"hypernetwork.num_heads: {self.num_heads} must divide hidden_dim {self.hidden_dim}"
            )
        if self.num_languages < 0:
            raise InputError(f"hypernetwork.num_languages: {self.num_languages} must be at least 0")
        check_choice("hypernetwork.dtype", self.dtype, DTYPES)

    @property
    def columns(self) -> int:
        """c."""
        return self.embed_dim * (1 if self.tied else 2)


def for_model(
    model: TransformerConfig, *, num_extra: int = 0, pad_id: int | None = None, **changes: Any
) -> HypernetworkConfig:
    """The published sizes for a language model: h = d, twice that inside, heads of 64.

    Args:
      model: the language model.
      num_extra: tokens that its tokeniser's normal form appended.
      pad_id: default its padding, else its first end-of-text id, else 0.
      changes: other fields.
    """
    if pad_id is None:
        pad_id = model.pad_token_id
    if pad_id is None:
        pad_id = next(iter(model.eos_token_ids), 0)
    sizes: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "vocab_size": model.vocab_size,
        "num_fallback": max(1, num_extra),
        "pad_id": pad_id,
        "tied": model.tie_embeddings,
        "hidden_dim": model.embed_dim,
        "mlp_dim": 2 * model.embed_dim,
        "num_heads": max(1, model.embed_dim // 64),
    }
    return HypernetworkConfig(**sizes | changes)


class _Scaler(nn.Module):
    """A scale and an offset for each column."""

    columns: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.columns,))
        return x * scale + self.param("bias", nn.initializers.zeros, (self.columns,))


class _Mlp(nn.Module):
    """W2 gelu(W1 x); its parameters are called as those of `models.layers.MLP` are."""

    inner: int
    outer: int
    init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(Dense((self.inner,), 1, True, self.init, name="up")(x), approximate=False)
        return Dense((self.outer,), 1, True, self.init, name="down")(x)


class _Projector(nn.Module):
    """LayerNorm(x + gelu(W2 gelu(W1 x)))."""

    config: HypernetworkConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, init = self.config, nn.initializers.normal(self.config.initializer_range)
        y = nn.gelu(_Mlp(config.mlp_dim, config.hidden_dim, init, name="mlp")(x), approximate=False)
        return nn.LayerNorm(_EPSILON, name="norm")(x + y)


class _Attention(nn.Module):
    """Bidirectional attention; laid out as `models.layers.Attention` is, for meshes."""

    config: HypernetworkConfig

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array, queries: int) -> jax.Array:
        config, init = self.config, nn.initializers.normal(self.config.initializer_range)
        heads, width = config.num_heads, config.hidden_dim // config.num_heads
        qkv = Dense((heads, 3, width), 1, True, init, name="qkv")(x)
        q, k, v = (part[..., 0, :] for part in jnp.split(qkv, 3, axis=-2))
        scores = jnp.einsum("nqhw,nkhw->nhqk", q[:, :queries], k).astype(jnp.float32)
        scores = jnp.where(seen[:, None, None], scores * width**-0.5, _MASKED)
        weights = jax.nn.softmax(scores).astype(x.dtype)
        mixed = jnp.einsum("nhqk,nkhw->nqhw", weights, v)[..., None, :]
        return Dense((config.hidden_dim,), 3, True, init, name="out")(mixed)


class _Block(nn.Module):
    """A layer of a post-norm encoder (BERT, RoBERTa).

    Only the first `queries` positions come out: the last layer computes the one that is read.
    """

    config: HypernetworkConfig

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array, queries: int) -> jax.Array:
        """x [n, P, h], seen bool [n, P] -> [n, queries, h]."""
        config, init = self.config, nn.initializers.normal(self.config.initializer_range)
        y = _Attention(config, name="attention")(x, seen, queries)
        x = nn.LayerNorm(_EPSILON, name="attention_norm")(x[:, :queries] + y)
        y = _Mlp(config.mlp_dim, config.hidden_dim, init, name="mlp")(x)
        return nn.LayerNorm(_EPSILON, name="mlp_norm")(x + y)


class _Hypernetwork(nn.Module):
    config: HypernetworkConfig

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(config.initializer_range)
        self.in_scaler = _Scaler(config.columns)
        self.fallback = self.param("fallback", normal, (config.num_fallback, config.columns))
        self.projection = Dense((config.hidden_dim,), 1, True, normal)
        self.projector = _Projector(config)
        self.positions = self.param("positions", normal, (config.max_surface, config.hidden_dim))
        self.token_type = self.param("token_type_embedding", normal, (config.hidden_dim,))
        if config.num_languages:
            shape = (config.num_languages, config.hidden_dim)
            self.languages = self.param("language_embedding", normal, shape)
        self.embedding_norm = nn.LayerNorm(_EPSILON)
        self.layers = [_Block(config) for _ in range(config.num_layers)]
        self.input_projector = _Projector(config)
        self.input_head = Dense((config.embed_dim,), 1, True, normal)
        self.input_scaler = _Scaler(config.embed_dim)
        if not config.tied:
            self.output_projector = _Projector(config)
            self.output_head = Dense((config.embed_dim,), 1, True, normal)
            self.output_scaler = _Scaler(config.embed_dim)
        if config.bias:
            self.bias_head = Dense((1,), 1, True, normal)

    def __call__(
        self, table: jax.Array, surfaces: jax.Array, languages: jax.Array | None
    ) -> Tables:
        config, dtype = self.config, DTYPES[self.config.dtype]
        known = surfaces < config.vocab_size
        rows = self.in_scaler(table[jnp.where(known, surfaces, 0)].astype(jnp.float32))
        appended = jnp.clip(surfaces - config.vocab_size, 0, config.num_fallback - 1)
        x = jnp.where(known[..., None], rows, self.fallback[appended]).astype(dtype)
        x = self.projector(self.projection(x))
        x = x + (self.positions[: x.shape[1]] + self.token_type).astype(dtype)
        seen = surfaces != config.pad_id
        if config.num_languages:
            assert languages is not None
            x = jnp.concatenate([x, self.languages[languages][:, None].astype(dtype)], axis=1)
            seen = jnp.concatenate([seen, jnp.ones((seen.shape[0], 1), bool)], axis=1)
        x = self.embedding_norm(x)
        for layer in self.layers:
            last = layer is self.layers[-1]
            x = layer(x, seen, 1 if last else x.shape[1])
        x = x[:, 0].astype(jnp.float32)
        read = self.input_scaler(self.input_head(self.input_projector(x)))
        output = bias = None
        if not config.tied:
            output = self.output_scaler(self.output_head(self.output_projector(x)))
        if config.bias:
            bias = self.bias_head(x)[:, 0]
        return Tables(read, output, bias)


def init(config: HypernetworkConfig, key: jax.Array) -> Any:
    """Parameters, float32, scalers at the identity; see `calibrate`."""
    table = jnp.zeros((1, config.columns))
    surfaces = jnp.zeros((1, config.max_surface), jnp.int32)
    languages = jnp.zeros((1,), jnp.int32) if config.num_languages else None
    return _Hypernetwork(config).init({"params": key}, table, surfaces, languages)["params"]


def param_shapes(config: HypernetworkConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of `init`'s parameters."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def apply(
    config: HypernetworkConfig,
    params: Any,
    table: jax.Array,
    surfaces: jax.Array,
    languages: jax.Array | None = None,
) -> Tables:
    """Rows of tokens.

    Args:
      config, params: the hypernetwork. No gradient reaches its frozen scalers.
      table: [V, c], the source: `token_tables.joined` of the language model's tables.
      surfaces: int [n, L], L at most `max_surface`.
      languages: int [n], where the hypernetwork has language embeddings.

    Returns:
      float32 input and output [n, d], bias [n]; those that the model does not have are None.

    Raises:
      InputError: a table or surfaces of another shape; languages missing or not wanted.
    """
    if table.shape[1] != config.columns:
        raise InputError(
            f"table: {table.shape[1]} columns; the hypernetwork reads {config.columns}"
        )
    if surfaces.shape[1] > config.max_surface:
        raise InputError(
            f"surfaces: {surfaces.shape[1]} ids a token; max_surface is {config.max_surface}"
        )
    if (languages is None) != (config.num_languages == 0):
        raise InputError(f"languages: the hypernetwork knows {config.num_languages}")
    frozen = {name: jax.lax.stop_gradient(params[name]) for name in _FROZEN}
    found: Any = _Hypernetwork(config).apply(
        {"params": {**params, **frozen}}, table, surfaces, languages
    )
    return Tables(*found)


def calibrate(
    config: HypernetworkConfig,
    params: Any,
    table: jax.Array,
    anchors: jax.Array,
    languages: jax.Array | None = None,
) -> Any:
    """Parameters with scalers set so that columns begin where the language model's are.

    Source columns are brought to mean 0 and the initialiser's range; predicted ones to the mean
    and standard deviation of the source's, measured on one prediction.

    Args:
      config, params: the hypernetwork.
      table: [V, c].
      anchors: int [n, L], surfaces to measure on; published: the first 2048 tokens.
      languages: as in `apply`.
    """
    mean, deviation = jnp.mean(table, 0), jnp.maximum(jnp.std(table, 0), 1e-12)
    inward = config.initializer_range / deviation
    params = {**params, "in_scaler": {"scale": inward, "bias": -mean * inward}}
    wanted = [("input_scaler", slice(0, config.embed_dim))]
    if not config.tied:
        wanted.append(("output_scaler", slice(config.embed_dim, None)))
    for name, _ in wanted:
        ones = jnp.ones(config.embed_dim)
        params[name] = {"scale": ones, "bias": jnp.zeros_like(ones)}
    raw = apply(config, params, table, anchors, languages)
    for (name, columns), values in zip(wanted, raw[:2], strict=False):
        assert values is not None
        scale = deviation[columns] / jnp.maximum(jnp.std(values, 0), 1e-12)
        params[name] = {"scale": scale, "bias": mean[columns] - jnp.mean(values, 0) * scale}
    return params


@functools.partial(jax.jit, static_argnums=(0, 4))
def _in_parts(
    config: HypernetworkConfig,
    params: Any,
    table: jax.Array,
    inputs: tuple[jax.Array, jax.Array | None],
    chunk: int,
) -> Tables:
    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs)
    found = jax.lax.map(lambda part: apply(config, params, table, *part), parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def predict(
    config: HypernetworkConfig,
    params: Any,
    table: jax.Array,
    surfaces: Any,
    languages: Any = None,
    *,
    chunk: int = 4096,
) -> Tables:
    """Rows of many tokens, `chunk` at a time: memory does not grow with the vocabulary.

    Arguments and errors as `apply`, on the host or not; one compilation for each number of chunks.
    """
    n = len(surfaces)
    chunk = min(chunk, -(-n // 128) * 128)
    padding = -n % chunk

    def padded(values: Any) -> jax.Array:
        values = jnp.asarray(values, jnp.int32)
        return jnp.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))

    inputs = (padded(surfaces), None if languages is None else padded(languages))
    found = _in_parts(config, params, jnp.asarray(table), inputs, chunk)
    return jax.tree.map(lambda x: x[:n], found)


def save(directory: Any, config: HypernetworkConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: Any) -> tuple[HypernetworkConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, HypernetworkConfig, param_shapes)
