"""The canvas that masks are filled in on: its blocks, and what a round sees of it.

A row is its prompt and then the canvas proper, masks at first, up to `ends`. It is filled block by
block. Positions are absolute throughout; arrays over positions are [B, S], S being the canvas size
that the loop runs at.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.loop import DecodeState
from models.errors import InputError

_ENDLESS = 1 << 20  # a block that no canvas fills


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which parts of the canvas are opened for writing.

    Attributes:
      block_length: tokens of a block; 0 for one block over the whole canvas.
      absolute: blocks begin at multiples of their length (LLaDA 2, arXiv 2512.15745) and not at
        the end of the prompt (LLaDA, arXiv 2502.09992): the first one may then begin with
        tokens of the prompt.
      horizon: blocks beyond the current one that may be open too.
      open_ratio: a further block opens when this share of the one before it is filled.
    """

    block_length: int = 32
    absolute: bool = False
    horizon: int = 0
    open_ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.block_length < 0:
            raise InputError(f"block_length: {self.block_length} must be 0 (one block) or more")
        if self.absolute and not self.block_length:
            raise InputError("block_length: 0 is not for blocks at absolute positions")
        if self.horizon < 0:
            raise InputError(f"horizon: {self.horizon} must be 0 or more")
        if not 0 < self.open_ratio <= 1:
            raise InputError(f"open_ratio: {self.open_ratio} must be above 0 and at most 1")

    @property
    def length(self) -> int:
        return self.block_length or _ENDLESS

    @property
    def reach(self) -> int:
        """Positions from the start of the current block that can be open."""
        return self.length * (1 + self.horizon)

    def block_at(self, positions: jnp.ndarray, prompt_lengths: jnp.ndarray) -> jnp.ndarray:
        """Number of the block that holds each position; int, shapes as broadcast."""
        return (positions - (0 if self.absolute else prompt_lengths)) // self.length

    def start_of(self, block: jnp.ndarray, prompt_lengths: jnp.ndarray) -> jnp.ndarray:
        """First position of each block; int, shapes as broadcast."""
        return block * self.length + (0 if self.absolute else prompt_lengths)


class Progress(struct.PyTreeNode):
    """The inner state of every method that fills masks.

    Attributes:
      block: int32 [B], the block that each row is at.
      step: int32 [B], the row's calls since it came to this block.
      calls: int32 [B], the row's calls in all; they name its noise.
      store: what the cache policy keeps.
      memory: what the selector keeps.
    """

    block: jnp.ndarray
    step: jnp.ndarray
    calls: jnp.ndarray
    store: Any
    memory: Any


class View(struct.PyTreeNode):
    """What the parts of a method see of the rows in a round.

    Attributes:
      tokens: int32 [B, S].
      masked: bool [B, S], positions of the canvas that are not decided.
      open: bool [B, S], positions of the blocks that may be written now, masked or not.
      start, stop: int32 [B], the current block; `stop` is at most the end of the canvas.
      prompt_lengths, ends: int32 [B].
      step, calls: int32 [B], as in `Progress`.
      active: bool [B].
      keys: row keys [B].
      memory: what the selector keeps, for policies that try what it proposes.
    """

    tokens: jnp.ndarray
    masked: jnp.ndarray
    open: jnp.ndarray
    start: jnp.ndarray
    stop: jnp.ndarray
    prompt_lengths: jnp.ndarray
    ends: jnp.ndarray
    step: jnp.ndarray
    calls: jnp.ndarray
    active: jnp.ndarray
    keys: jax.Array
    memory: Any = ()

    @property
    def index(self) -> jnp.ndarray:
        """Every position: int [S]."""
        return jnp.arange(self.tokens.shape[1])

    @property
    def candidates(self) -> jnp.ndarray:
        """Masks that may be filled now: bool [B, S]."""
        return self.masked & self.open


def undecided(
    tokens: jnp.ndarray, prompt_lengths: jnp.ndarray, ends: jnp.ndarray, mask_id: int
) -> jnp.ndarray:
    """Masks of the canvas; those in a prompt stay as they are: bool [B, S]."""
    index = jnp.arange(tokens.shape[1])
    inside = (index >= prompt_lengths[:, None]) & (index < ends[:, None])
    return inside & (tokens == mask_id)


def look(state: DecodeState, schedule: Schedule, mask_id: int) -> View:
    """What a round sees of `state`, whose tokens are [B, S] and whose inner is a `Progress`."""
    assert state.ends is not None
    inner = state.inner
    masked = undecided(state.tokens, state.prompt_lengths, state.ends, mask_id)
    start = schedule.start_of(inner.block, state.prompt_lengths)
    stop = jnp.minimum(start + schedule.length, state.ends)
    index = jnp.arange(state.tokens.shape[1])
    reach = stop
    for ahead in range(schedule.horizon):
        before = schedule.start_of(inner.block + ahead, state.prompt_lengths)[:, None]
        block = (index >= before) & (index < before + schedule.length)
        size = (block & (index < state.ends[:, None])).sum(axis=1)
        filled = size - (block & masked).sum(axis=1)
        opens = (reach == before[:, 0] + schedule.length) & (filled >= schedule.open_ratio * size)
        reach = jnp.where(opens, jnp.minimum(reach + schedule.length, state.ends), reach)
    return View(
        tokens=state.tokens,
        masked=masked,
        open=(index >= start[:, None]) & (index < reach[:, None]),
        start=start,
        stop=stop,
        prompt_lengths=state.prompt_lengths,
        ends=state.ends,
        step=inner.step,
        calls=inner.calls,
        active=state.active,
        keys=state.keys,
        memory=inner.memory,
    )


def rewritten(view: View, tokens: jnp.ndarray, mask_id: int) -> View:
    """The view of rows in which a policy has written something: tokens [B, S]."""
    return view.replace(tokens=tokens, masked=view.masked & (tokens == mask_id))
