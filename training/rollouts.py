"""Completions for reinforcement learning, drawn by any decoding method that fills masks."""

import jax
import jax.numpy as jnp

from decoding import loop, stopping
from decoding.loop import Method
from models.config import TransformerConfig
from models.errors import InputError
from training.diffusion_rl import Rollout


def completer(method: Method, model: TransformerConfig) -> Rollout:
    """A rollout that fills rows of prompts and masks up with what `method` makes of them.

    Args:
      method: with a canvas; on the target model alone.
      model: the architecture, which has an end-of-text token.

    Returns:
      A function of (params, tokens int [R, T], prompt_lengths int [R], key) that returns
      completions int [R, T], end-of-text behind the first. A row's noise is that of its number.
    """
    if method.canvas is None:
        raise InputError(f"method: {method.name} writes from left to right; it fills no masks")
    if method.roles != ("target",):
        raise InputError(f"method: {method.name} needs models {method.roles}; allowed: target")
    if not model.eos_token_ids:
        raise InputError("eos_token_ids: none; completions end with one")
    multiple = method.canvas.multiple

    def rollout(
        params: object, tokens: jnp.ndarray, prompt_lengths: jnp.ndarray, key: jax.Array
    ) -> jax.Array:
        R, T = tokens.shape
        if T % multiple:
            raise InputError(f"tokens: rows of {T} must be a multiple of {multiple}")
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(R))
        models = {"target": params}
        stop = stopping.StopConfig(T, model.eos_token_ids, max_position=T)
        sizes = {"method": method, "slots": T}
        state = loop.start(
            models, tokens, prompt_lengths, keys, None, jnp.full((R,), T), buffer=T, **sizes
        )
        state = loop.advance(models, state, jnp.int32(2**31 - 1), stop=stop, **sizes)
        inside = jnp.arange(T) < state.lengths[:, None]
        return jnp.where(inside, state.tokens, model.eos_token_ids[0])

    return rollout
