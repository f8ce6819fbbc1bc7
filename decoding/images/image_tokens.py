"""Autoregressive models of images: class token first, then the codes of a grid in raster order.

The vocabulary is K codes, then the classes, then one null class for classifier-free guidance (Ho
and Salimans, arXiv 2207.12598). The token at position 0 is the class; code i of the raster stands
at position i + 1, which is also its cache slot, so `tokens` [B, 1 + N] is read by position. With
guidance every row has two streams, one under its class and one under the null class, side by side
in the batch of one cache so that a mesh keeps them on one device.
"""

import dataclasses

import jax
import jax.numpy as jnp

from decoding import randomness, sampling
from decoding.sampling import SamplingConfig
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ImageSampler:
    """An image model and how its tokens are drawn.

    Attributes:
      config: the architecture; its vocabulary is codes, classes and the null class.
      num_codes: K.
      side: n, tokens along a side of the grid; an image has N = n * n.
      sampling: temperature and filters.
      guidance: s in null + s * (conditional - null), on logits; 1 for one stream, no guidance.
    """

    config: TransformerConfig
    num_codes: int
    side: int
    sampling: SamplingConfig = dataclasses.field(default_factory=lambda: SamplingConfig(1.0))
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.num_codes <= self.config.vocab_size - 2:
            raise InputError(
                f"num_codes: {self.num_codes} must leave room for a class and the null class in "
                f"vocab_size {self.config.vocab_size}"
            )
        if self.side < 1 or self.num_tokens > self.config.max_position:
            raise InputError(
                f"side: {self.side} needs {self.num_tokens} positions, max_position is "
                f"{self.config.max_position}"
            )
        if self.guidance < 0:
            raise InputError(f"guidance: {self.guidance} must be 0 or more; 1 is none")
        if self.sampling.repetition_penalty != 1:
            raise InputError("sampling.repetition_penalty: must be 1 for images")

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.side * self.side

    @property
    def num_classes(self) -> int:
        return self.config.vocab_size - self.num_codes - 1

    @property
    def streams(self) -> int:
        """Cache rows that an image takes: 2 with guidance."""
        return 1 if self.guidance == 1 else 2


def blank(sampler: ImageSampler, labels: jnp.ndarray) -> jnp.ndarray:
    """Tokens int32 [B, 1 + N] of images of classes int [B] before anything is drawn."""
    first = (sampler.num_codes + labels).astype(jnp.int32)
    return jnp.pad(first[:, None], ((0, 0), (0, sampler.num_tokens)))


def create_cache(sampler: ImageSampler, batch: int, slots: int | None = None) -> kv.KVCache:
    """An empty cache for `batch` images with `slots` slots (default N: the last code needs none).

    Folded where it has a single row, see `models.cache`.
    """
    rows = batch * sampler.streams
    return kv.fold(kv.create(sampler.config, rows, slots or sampler.num_tokens))


def feed(
    sampler: ImageSampler,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    start: jnp.ndarray,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """Runs tokens at consecutive positions and writes their keys and values.

    Everything in the slots below is attended to.

    Args:
      sampler: the model.
      params: its parameters.
      cache: from `create_cache`.
      tokens: int32 [B, T].
      start: int [B] or [], position of each row's first token.

    Returns:
      Logits float32 [B, T, V] for the tokens after, guided, -inf where V is not a code; and the
      cache.
    """
    first = _per_stream(sampler, jnp.broadcast_to(start, tokens.shape[:1]))
    cache = kv.truncate(cache, first)
    out = transformer.apply(sampler.config, params, _inputs(sampler, tokens), cache=cache)
    assert out.logits is not None and out.cache is not None
    return _guided(sampler, out.logits), out.cache


def feed_scattered(
    sampler: ImageSampler,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    positions: jnp.ndarray,
    valid: jnp.ndarray,
    visible: jnp.ndarray | None = None,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """Runs tokens at any positions, each one attending to every visible slot up to its own.

    All keys and values of the call are written before any is read. A row's valid positions must
    differ; what is not valid writes nothing, and its logits mean nothing.

    Args:
      sampler, params, cache: as in `feed`.
      tokens: int32 [B, T].
      positions: int [B, T].
      valid: bool [B, T].
      visible: bool [S], slots that hold something after the call's own are written; None: all.

    Returns:
      As `feed`.
    """
    positions = _per_stream(sampler, jnp.where(valid, positions, 0))
    nowhere = cache.slots
    mask = masks.causal(positions, cache.slots)
    if visible is not None:
        mask = mask & visible
    out = transformer.apply(
        sampler.config,
        params,
        _inputs(sampler, tokens),
        positions=positions,
        mask=mask,
        cache=cache,
        slots=jnp.where(_per_stream(sampler, valid), positions, nowhere),
    )
    assert out.logits is not None and out.cache is not None
    return _guided(sampler, out.logits), out.cache


def draw(
    sampler: ImageSampler,
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    purpose: int = randomness.SAMPLE,
) -> jnp.ndarray:
    """Tokens int32 [B, ...] from logits [B, ..., V] for `positions` [B, ...], by row keys [B]."""
    shape, V = logits.shape[:-1], logits.shape[-1]
    each = jnp.broadcast_to(keys.reshape(-1, *(1,) * (len(shape) - 1)), shape)
    flat = jnp.broadcast_to(positions, shape).reshape(-1)
    tokens = sampling.draw(logits.reshape(-1, V), each.reshape(-1), flat, sampler.sampling, purpose)
    return tokens.reshape(shape)


def probabilities(sampler: ImageSampler, logits: jnp.ndarray) -> jnp.ndarray:
    """What acceptance tests look at: softmax at the sampling temperature (1 if that is 0).

    Filters such as top-k are left out: they would make a code's neighbourhood count for nothing.
    """
    return jax.nn.softmax(logits / (sampler.sampling.temperature or 1.0), axis=-1)


def _per_stream(sampler: ImageSampler, values: jnp.ndarray) -> jnp.ndarray:
    return values if sampler.streams == 1 else jnp.repeat(values, sampler.streams, axis=0)


def _inputs(sampler: ImageSampler, tokens: jnp.ndarray) -> jnp.ndarray:
    """Tokens of every stream: under the null class the class token is replaced."""
    if sampler.streams == 1:
        return tokens
    null = jnp.where(tokens >= sampler.num_codes, sampler.config.vocab_size - 1, tokens)
    return jnp.stack([tokens, null], axis=1).reshape(-1, tokens.shape[1])


def _guided(sampler: ImageSampler, logits: jnp.ndarray) -> jnp.ndarray:
    if sampler.streams == 2:
        conditional, null = (part[:, 0] for part in _split(logits))
        logits = null + sampler.guidance * (conditional - null)
    is_code = jnp.arange(logits.shape[-1]) < sampler.num_codes
    return jnp.where(is_code, logits, -jnp.inf)


def _split(logits: jnp.ndarray) -> list[jnp.ndarray]:
    """[2 B, T, V] -> two of [B, 1, T, V]."""
    return jnp.split(logits.reshape(-1, 2, *logits.shape[1:]), 2, axis=1)
