"""Plain decoding of images, one token a call in raster order: the baseline and the drafter."""

import functools

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.images import image_tokens
from decoding.images.image_tokens import ImageSampler
from models import cache as kv
from models import transformer


@functools.partial(jax.jit, static_argnames="sampler")
def generate(
    params: transformer.Params, labels: jnp.ndarray, keys: jax.Array, *, sampler: ImageSampler
) -> jnp.ndarray:
    """Codes int32 [B, N] of images of classes int [B], by row keys [B]; N calls.

    Without guidance these are the tokens that `decoding.autoregressive` gives for the prompt of
    the class token alone, as long as it draws codes only.
    """
    tokens = image_tokens.blank(sampler, labels)
    cache = image_tokens.create_cache(sampler, len(labels))
    logits, cache = image_tokens.feed(sampler, params, cache, tokens[:, :1], jnp.int32(0))
    tokens, _ = span(
        sampler, params, cache, tokens, logits[:, 0], keys, jnp.int32(0), sampler.num_tokens
    )
    return tokens[:, 1:]


def span(
    sampler: ImageSampler,
    params: transformer.Params,
    cache: kv.KVCache,
    tokens: jnp.ndarray,
    logits: jnp.ndarray,
    keys: jax.Array,
    first: jnp.ndarray,
    count: int,
    purpose: int = randomness.SAMPLE,
) -> tuple[jnp.ndarray, kv.KVCache]:
    """Draws codes first .. first + count - 1 of the raster in count - 1 calls.

    Args:
      sampler, params: the model.
      cache: with keys and values up to position `first`.
      tokens: int32 [B, 1 + N].
      logits: float32 [B, V] for code `first`.
      keys: row keys [B].
      first: int [].
      count: at least 1.
      purpose: noise stream, see `decoding.randomness`.

    Returns:
      The tokens with those codes in place, and the cache, which lacks the last of them.
    """

    def decide(tokens: jnp.ndarray, logits: jnp.ndarray, position: jnp.ndarray) -> jnp.ndarray:
        token = image_tokens.draw(sampler, logits, keys, position, purpose)
        return jax.lax.dynamic_update_slice(tokens, token[:, None], (0, position))

    def step(
        position: jnp.ndarray, carry: tuple[jnp.ndarray, kv.KVCache]
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        tokens, cache = carry
        pending = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        logits, cache = image_tokens.feed(sampler, params, cache, pending, position)
        return decide(tokens, logits[:, 0], position + 1), cache

    tokens = decide(tokens, logits, first + 1)
    return jax.lax.fori_loop(first + 1, first + count, step, (tokens, cache))
