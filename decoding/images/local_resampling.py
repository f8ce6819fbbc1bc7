"""Local verification of a window: only what is rejected, and what is near it, is drawn again.

MuLo-SD (arXiv 2601.05149): a draft stays when the target gives its neighbourhood in the codebook
enough probability; around every rejected one the cells within a radius are drawn by the target,
one after the other, or all islands of such cells at once. Not lossless, unless all is rejected.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decoding.images import image_tokens, islands
from decoding.images.image_tokens import ImageSampler
from decoding.images.multi_scale import Params, Settle, State
from decoding.images.neighbourhoods import pooled
from models import cache as kv
from models.errors import InputError, check_choice

RESAMPLING = ("serial", "islands")
EXPANSIONS = ("window", "first_rejected")


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Options of local verification; how many codes are pooled is in the table of neighbours.

    The threshold is tau: 0 accepts all, above 1 nothing (which is plain decoding of the target).

    Attributes:
      radius: l, rows and columns around a rejected token that are drawn again too.
      expansion: which of these: 'window', all in the window; 'first_rejected', none before the
        first rejected token.
      resampling: 'serial', in raster order; 'islands', the 8-connected islands side by side, each
        in raster order.
      refresh: whether keys and values of a window are computed again from its final tokens. It is
        part of the next window's pass and costs positions, no call. Without, tokens that were kept
        leave keys and values behind that have not seen the changes before them.
    """

    radius: int = 1
    expansion: str = "window"
    resampling: str = "serial"
    refresh: bool = True

    def __post_init__(self) -> None:
        check_choice("expansion", self.expansion, EXPANSIONS)
        check_choice("resampling", self.resampling, RESAMPLING)
        if self.radius < 0:
            raise InputError(f"radius: {self.radius} must be 0 or more")


class _Resampling(NamedTuple):
    """Between two calls; Q groups that are drawn side by side, each in raster order."""

    tokens: jnp.ndarray  # [B, 1 + N]
    cache: kv.KVCache
    todo: jnp.ndarray  # bool [B, W]
    pending: jnp.ndarray  # [B, Q], slots of the tokens decided last
    calls: jnp.ndarray  # [B]


@functools.cache
def local_resampling(target: ImageSampler, height: int, config: LocalConfig) -> Settle:
    """Settles windows of `height` rows of the target's grid.

    Needs `params['neighbours']`, int [K, k] from `neighbourhoods.nearest_codes`.

    Args:
      target: the model.
      height: r * m.
      config: see `LocalConfig`.
    """
    n, N = target.side, target.num_tokens
    W = height * n
    Q = 1 if config.resampling == "serial" else islands.max_components(height, n)

    def settle(params: Params, state: State, first: jnp.ndarray, threshold: jnp.ndarray) -> State:
        logits, state = verify(target, params, state, first, W, config.refresh)
        drafts = jax.lax.dynamic_slice_in_dim(state.tokens, first + 1, W, axis=1)
        probs = image_tokens.probabilities(target, logits)
        rejected = pooled(probs, drafts, params["neighbours"]) < threshold
        redrawn = expand(rejected.reshape(-1, height, n), config)
        if config.resampling == "serial":
            group = jnp.where(redrawn, 0, -1)
        else:
            group = islands.components(redrawn)
        redrawn, group = redrawn.reshape(-1, W), group.reshape(-1, W)
        done = resample(target, params, state, first, logits, redrawn, group, Q)
        work = state.work.add(
            resample_calls=done.calls,
            resample_positions=done.calls * 2 * Q,
            rejected=rejected.sum(axis=1),
            resampled=redrawn.sum(axis=1),
        )
        place = (0, first)
        return state.replace(
            tokens=done.tokens,
            target_cache=done.cache,
            pending=state.pending if config.refresh else done.pending,
            rejected=jax.lax.dynamic_update_slice(state.rejected, rejected, place),
            resampled=jax.lax.dynamic_update_slice(state.resampled, redrawn, place),
            work=work,
        )

    if W > N:
        raise InputError(f"height: {height} rows exceed the target's side {n}")
    return Settle(settle, 0 if config.refresh else Q, 0, W)


def expand(rejected: jnp.ndarray, config: LocalConfig) -> jnp.ndarray:
    """The cells to draw again around rejected ones: bool [B, h, n] -> the same."""
    grown = islands.dilate(rejected, config.radius)
    if config.expansion == "window":
        return grown
    flat = rejected.reshape(len(rejected), -1)
    return grown & (jnp.cumsum(flat, axis=1) > 0).reshape(rejected.shape)


def verify(
    target: ImageSampler,
    params: Params,
    state: State,
    first: jnp.ndarray,
    window: int,
    refresh: bool,
) -> tuple[jnp.ndarray, State]:
    """One pass of the target over a window's drafts: logits float32 [B, W, V] for its codes.

    With `refresh` the pass begins a window earlier, whose tokens are final by now; else the tokens
    of `state.pending` are run along, whose own keys and values were never written.
    """
    cache, tokens = state.target_cache, state.tokens
    if refresh:
        length = min(2 * window, target.num_tokens)
        start = jnp.maximum(first - window, 0)
        # In the first window, what lies behind it is run too: no matter, it is written again.
        fed = jax.lax.dynamic_slice_in_dim(tokens, start, length, axis=1)
        logits, cache = image_tokens.feed(target, params["target"], cache, fed, start)
        logits = jax.lax.dynamic_slice_in_dim(logits, first - start, window, axis=1)
    else:
        late = state.pending
        inside = jnp.broadcast_to(first + jnp.arange(window), (len(tokens), window))
        at = jnp.concatenate([late, inside], axis=1)
        # The window's first input is the token before it, which may be pending itself.
        valid = jnp.concatenate([(late >= 0) & (late < first), inside >= 0], axis=1)
        fed = jnp.take_along_axis(tokens, jnp.maximum(at, 0), axis=1)
        logits, cache = image_tokens.feed_scattered(target, params["target"], cache, fed, at, valid)
        length = at.shape[1]
        logits = logits[:, late.shape[1] :]
    work = state.work.add(window_passes=1, window_positions=length)
    return logits, state.replace(target_cache=cache, work=work)


def resample(
    target: ImageSampler,
    params: Params,
    state: State,
    first: jnp.ndarray,
    logits: jnp.ndarray,
    redrawn: jnp.ndarray,
    group: jnp.ndarray,
    num_groups: int,
) -> _Resampling:
    """Draws the marked codes of a window given all that stands before each at that moment.

    The first of each group needs no call: nothing that it depends on has changed since the window
    was verified. A later one takes a call on the token before it, together with the tokens that the
    last call decided, so that what is read is always the keys and values of current tokens.

    Args:
      target, params, state: as in `verify`, after it.
      first: int [], the window's first code.
      logits: float32 [B, W, V] from `verify`.
      redrawn: bool [B, W].
      group: int [B, W], group of each of these.
      num_groups: Q.
    """
    B, W = redrawn.shape
    rows = jnp.arange(B)[:, None]
    of_group = group[:, None, :] == jnp.arange(num_groups)[:, None]

    def next_codes(todo: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
        """Each group's next code in the window [B, Q], and whether there is one."""
        hits = of_group & todo[:, None, :]
        return hits.argmax(axis=2), hits.any(axis=2)

    def decide(
        carry: _Resampling, codes: jnp.ndarray, some: jnp.ndarray, logits: jnp.ndarray
    ) -> _Resampling:
        """Draws codes [B, Q] from logits [B, Q, V] where there are `some`."""
        at = first + 1 + codes
        drawn = image_tokens.draw(target, logits, state.keys, at)
        place = jnp.where(some, at, carry.tokens.shape[1])
        tokens = carry.tokens.at[rows, place].set(drawn, mode="drop")
        todo = carry.todo.at[rows, jnp.where(some, codes, W)].set(False, mode="drop")
        # A row that is done keeps its last tokens pending: nothing runs for it any more.
        active = some.any(axis=1, keepdims=True)
        pending = jnp.where(active, jnp.where(some, at, -1), carry.pending)
        return carry._replace(tokens=tokens, todo=todo, pending=pending)

    def step(carry: _Resampling) -> _Resampling:
        codes, some = next_codes(carry.todo)
        before = first + codes
        active = some.any(axis=1)
        same = (carry.pending[:, :, None] == before[:, None, :]) & some[:, None, :]
        late = (carry.pending >= 0) & active[:, None] & ~same.any(axis=2)
        at = jnp.concatenate([carry.pending, before], axis=1)
        fed = jnp.take_along_axis(carry.tokens, jnp.maximum(at, 0), axis=1)
        valid = jnp.concatenate([late, some], axis=1)
        found, cache = image_tokens.feed_scattered(
            target, params["target"], carry.cache, fed, at, valid
        )
        carry = carry._replace(cache=cache, calls=carry.calls + active)
        return decide(carry, codes, some, found[:, num_groups:])

    none = jnp.full((B, num_groups), -1, jnp.int32)
    calls = jnp.zeros((B,), jnp.int32)
    carry = _Resampling(state.tokens, state.target_cache, redrawn, none, calls)
    codes, some = next_codes(redrawn)
    at_codes = jnp.take_along_axis(logits, codes[:, :, None], axis=1)
    carry = decide(carry, codes, some, at_codes)
    return jax.lax.while_loop(lambda carry: carry.todo.any(), step, carry)
