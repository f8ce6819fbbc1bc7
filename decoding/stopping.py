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


def limits(prompt_lengths: jnp.ndarray, config: StopConfig) -> jnp.ndarray:
    """Tokens that each row may have at most, its prompt included: int [B]."""
    return jnp.minimum(prompt_lengths + config.max_new_tokens, config.max_position)


def at_limit(prompt_lengths: jnp.ndarray, config: StopConfig) -> jnp.ndarray:
    """Why a row that is as long as its limit ends: int [B], LENGTH or CONTEXT."""
    return jnp.where(prompt_lengths + config.max_new_tokens <= config.max_position, LENGTH, CONTEXT)


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
    limit = limits(prompt_lengths, config)
    room = jnp.maximum(limit - lengths, 0)
    reason = jnp.where(has_eos & (kept <= room), EOS, RUNNING)
    kept = jnp.minimum(kept, room)
    full = (reason == RUNNING) & (lengths + kept >= limit)
    return kept, jnp.where(full, at_limit(prompt_lengths, config), reason).astype(jnp.int32)
