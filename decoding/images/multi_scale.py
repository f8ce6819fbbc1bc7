"""MuLo-SD: images drafted by the same kind of model at a lower resolution.

'Multi-Scale Local Speculative Decoding', arXiv 2601.05149. A cycle drafts m rows of the small grid,
up-samples them to a window of r m rows of the large one, lets the target settle the window
(`Settle`: `local_resampling`, or `raster_rejection` for what the paper compares with), and takes
what was settled down to the small grid again, where it replaces the draft. All rows of the batch
settle the same window in a cycle, whatever was rejected. One compiled loop, no host in between.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding.images import image_tokens, raster, wavefront
from decoding.images.image_tokens import ImageSampler
from models import cache as kv
from models.errors import InputError

Params = dict[str, Any]


class Work(struct.PyTreeNode):
    """What was done for each image, int32 [B]; calls of both guidance streams count once.

    Attributes:
      drafter_calls, drafter_positions: calls of the small model, and tokens they were run on.
      window_passes, window_positions: calls of the target on whole windows.
      resample_calls, resample_positions: calls of the target that serve single tokens.
      rejected: tokens that failed the test.
      resampled: tokens that the target drew itself.
    """

    drafter_calls: jnp.ndarray
    drafter_positions: jnp.ndarray
    window_passes: jnp.ndarray
    window_positions: jnp.ndarray
    resample_calls: jnp.ndarray
    resample_positions: jnp.ndarray
    rejected: jnp.ndarray
    resampled: jnp.ndarray

    def add(self, **amounts: jnp.ndarray | int) -> "Work":
        """The counters with amounts int [B] or [] added."""
        new = {name: getattr(self, name) + amount for name, amount in amounts.items()}
        return self.replace(**{name: value.astype(jnp.int32) for name, value in new.items()})


def no_work(batch: int) -> Work:
    """Counters at zero."""
    zero = jnp.zeros((batch,), jnp.int32)
    return Work(zero, zero, zero, zero, zero, zero, zero, zero)


class State(struct.PyTreeNode):
    """Everything a run is, between two cycles.

    Attributes:
      tokens: int32 [B, 1 + N], class token and codes of the target's grid.
      low: int32 [B, 1 + M], the same of the drafter's grid: D_r of what is settled.
      target_cache, draft_cache: keys and values; slots beyond the settled rows are scratch.
      pending: int32 [B, Q], slots whose keys and values are not those of their token; -1: none.
        Used by settlers that leave these behind.
      rejected, resampled: bool [B, N], what happened to each token.
      keys: row keys [B].
      work: counters.
    """

    tokens: jnp.ndarray
    low: jnp.ndarray
    target_cache: kv.KVCache
    draft_cache: kv.KVCache
    pending: jnp.ndarray
    rejected: jnp.ndarray
    resampled: jnp.ndarray
    keys: jax.Array
    work: Work


class Settle(NamedTuple):
    """How the target decides a window.

    Attributes:
      run: (params, state, first, threshold) -> state. `first` int [] is the window's first code;
        its drafts are in `state.tokens`. `threshold` float [] is what its test compares with.
        Returns the window's final tokens, maps and work.
      pending: Q, see `State.pending`.
      extra_slots: cache slots it needs beyond N.
      window: codes of a window that it was made for.
    """

    run: Callable[[Params, State, jnp.ndarray, jnp.ndarray], State]
    pending: int
    extra_slots: int
    window: int


class Pair(NamedTuple):
    """Target and drafter of one codebook, and the way between their grids.

    Attributes:
      target: the model of the large grid, side n_p.
      draft: the model of the small one, side n_q; n_q divides n_p.
      up: U_r: (params, codes int32 [B, n_q, n_q], rows int []) -> int32 [B, n_p, n_p]. The first
        `rows` rows are known; only what they say about their own place is used.
      down: D_r: (params, codes [B, n_p, n_p], rows) -> [B, n_q, n_q], likewise.
    """

    target: ImageSampler
    draft: ImageSampler
    up: Callable[[Params, jnp.ndarray, jnp.ndarray], jnp.ndarray]
    down: Callable[[Params, jnp.ndarray, jnp.ndarray], jnp.ndarray]

    @property
    def factor(self) -> int:
        """r."""
        return self.target.side // self.draft.side


class Result(NamedTuple):
    """Codes int32 [B, N], the small grid [B, M] they went through, maps bool [B, N], and work."""

    codes: jnp.ndarray
    low: jnp.ndarray
    rejected: jnp.ndarray
    resampled: jnp.ndarray
    work: Work


def window_size(pair: Pair, rows: int) -> int:
    """W, codes of a window: r * m rows of the target's grid.

    Raises:
      InputError: grids that do not fit, or rows that do not divide the small grid.
    """
    n_p, n_q = pair.target.side, pair.draft.side
    if n_p % n_q or n_p == n_q:
        raise InputError(f"draft.side: {n_q} must be a proper divisor of the target's side {n_p}")
    if pair.target.num_codes != pair.draft.num_codes:
        raise InputError(
            f"draft.num_codes: {pair.draft.num_codes} must be the target's "
            f"{pair.target.num_codes}: both share a codebook"
        )
    if rows < 1 or n_q % rows:
        raise InputError(f"rows: {rows} must divide the drafter's side {n_q}")
    return pair.factor * rows * n_p


@functools.partial(jax.jit, static_argnames=("pair", "settle", "rows", "draft_width"))
def generate(
    params: Params,
    labels: jnp.ndarray,
    keys: jax.Array,
    threshold: jnp.ndarray | float = 0.0,
    *,
    pair: Pair,
    settle: Settle,
    rows: int = 1,
    draft_width: int | None = None,
) -> Result:
    """Images of classes int [B] by row keys [B].

    Args:
      params: 'target' and 'draft', and what `pair` and `settle` need.
      labels: classes.
      keys: row keys; the target's own draws use the noise of plain decoding with the same keys.
      threshold: of the settler's test: tau or delta.
      pair: models and samplers.
      settle: how windows are decided.
      rows: m, rows of the small grid drafted in a cycle.
      draft_width: the rows of a cycle are drafted as a wavefront of this width; None: serially.

    Raises:
      InputError: see `window_size`; a settler made for other windows.
    """
    if settle.window != (W := window_size(pair, rows)):
        raise InputError(f"settle: made for windows of {settle.window} codes, these have {W}")
    B, N = len(labels), pair.target.num_tokens
    state = State(
        tokens=image_tokens.blank(pair.target, labels),
        low=image_tokens.blank(pair.draft, labels),
        target_cache=image_tokens.create_cache(pair.target, B, N + settle.extra_slots),
        # The first call of a cycle may reach one slot beyond the last code's predecessor.
        draft_cache=image_tokens.create_cache(pair.draft, B, pair.draft.num_tokens + 1),
        pending=jnp.full((B, settle.pending), -1, jnp.int32),
        rejected=jnp.zeros((B, N), bool),
        resampled=jnp.zeros((B, N), bool),
        keys=keys,
        work=no_work(B),
    )

    def cycle(number: jnp.ndarray, state: State) -> State:
        state = _draft(pair, params, state, number, rows, draft_width)
        state = _up_sample(pair, params, state, number, rows)
        state = settle.run(params, state, number * W, jnp.asarray(threshold))
        return _down_sample(pair, params, state, number, rows)

    state = jax.lax.fori_loop(0, pair.draft.side // rows, cycle, state)
    return Result(
        state.tokens[:, 1:], state.low[:, 1:], state.rejected, state.resampled, state.work
    )


def _draft(
    pair: Pair, params: Params, state: State, number: jnp.ndarray, rows: int, width: int | None
) -> State:
    """Samples the next rows of the small grid.

    Its first call feeds the rows that the target settled in the last cycle: they have replaced
    the drafts that the cache was written with.
    """
    draft, n = pair.draft, pair.draft.side
    count = rows * n
    first = number * count
    start = jnp.maximum(first - count, 0)
    fed = jax.lax.dynamic_slice_in_dim(state.low, start, count + 1, axis=1)
    logits, cache = image_tokens.feed(draft, params["draft"], state.draft_cache, fed, start)
    logits = jax.lax.dynamic_index_in_dim(logits, first - start, axis=1, keepdims=False)
    given = (draft, params["draft"], cache, state.low, logits, state.keys, first)
    if width is None:
        low, cache = raster.span(*given, count, randomness.DRAFT)
        calls, positions = count, 2 * count
    else:
        order = wavefront.schedule(rows, n, width, first_row_serial=False)
        low, cache = wavefront.span(*given, order, randomness.DRAFT)
        calls = order.steps
        positions = count + 1 + (calls - 1) * order.decides.shape[1]
    work = state.work.add(drafter_calls=calls, drafter_positions=positions)
    return state.replace(low=low, draft_cache=cache, work=work)


def _up_sample(pair: Pair, params: Params, state: State, number: jnp.ndarray, rows: int) -> State:
    """Writes the window's drafts into the tokens."""
    n_p, n_q, height = pair.target.side, pair.draft.side, pair.factor * rows
    grid = state.low[:, 1:].reshape(-1, n_q, n_q)
    high = pair.up(params, grid, (number + 1) * rows)
    window = jax.lax.dynamic_slice_in_dim(high, number * height, height, axis=1)
    window = window.reshape(-1, height * n_p).astype(jnp.int32)
    place = (0, 1 + number * height * n_p)
    return state.replace(tokens=jax.lax.dynamic_update_slice(state.tokens, window, place))


def _down_sample(pair: Pair, params: Params, state: State, number: jnp.ndarray, rows: int) -> State:
    """Replaces the drafted rows of the small grid by what was settled; rows before stay."""
    n_p, n_q, height = pair.target.side, pair.draft.side, pair.factor * rows
    grid = state.tokens[:, 1:].reshape(-1, n_p, n_p)
    low = pair.down(params, grid, (number + 1) * height)
    settled = jax.lax.dynamic_slice_in_dim(low, number * rows, rows, axis=1)
    settled = settled.reshape(-1, rows * n_q).astype(jnp.int32)
    place = (0, 1 + number * rows * n_q)
    return state.replace(low=jax.lax.dynamic_update_slice(state.low, settled, place))
