"""When a row ends: an end-of-sequence token, its length limit, or a full context."""

import dataclasses

import jax.numpy as jnp

from models.errors import InputError

RUNNING, EOS, LENGTH, CONTEXT = range(4)
REASONS = ("running", "eos", "length", "context")


@dataclasses.dataclass(frozen=True)
class StopConfig:
    """Stop rules.

    Attributes:
      max_new_tokens: tokens to generate at most.
      eos_ids: any of these ends a row; the token itself is kept. Empty: no such rule.
      max_position: context length in tokens, prompt included.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    max_position: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens} must be at least 1")


def is_eos(tokens: jnp.ndarray, config: StopConfig) -> jnp.ndarray:
    """Which tokens end a row: bool, of the shape of `tokens`."""
    if not config.eos_ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.isin(tokens, jnp.asarray(config.eos_ids, tokens.dtype))


def cut(
    tokens: jnp.ndarray,
    count: jnp.ndarray,
    lengths: jnp.ndarray,
    prompt_lengths: jnp.ndarray,
    config: StopConfig,
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Cuts newly emitted tokens where a rule says stop.

    Args:
      tokens: int [B, E], emitted this round; the first `count` [B] of each row count.
      count: int [B].
      lengths: int [B], tokens of each row before them.
      prompt_lengths: int [B].
      config: the rules.

    Returns:
      The tokens kept, int [B], and the reason to stop (RUNNING for none), int32 [B].
    """
    index = jnp.arange(tokens.shape[1])
    ends = is_eos(tokens, config) & (index < count[:, None])
    has_eos = ends.any(axis=1)
    kept = jnp.where(has_eos, ends.argmax(axis=1) + 1, count)
    by_length = prompt_lengths + config.max_new_tokens
    limit = jnp.minimum(by_length, config.max_position)
    room = jnp.maximum(limit - lengths, 0)
    reason = jnp.where(has_eos & (kept <= room), EOS, RUNNING)
    kept = jnp.minimum(kept, room)
    at_limit = (reason == RUNNING) & (lengths + kept >= limit)
    full = jnp.where(by_length <= config.max_position, LENGTH, CONTEXT)
    return kept, jnp.where(at_limit, full, reason).astype(jnp.int32)
