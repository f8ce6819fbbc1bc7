"""A window over the masks: most calls are on a few positions near the decoded text.

'Window-Diffusion', arXiv 2601.20332. Steps come in phases. The first of a phase refreshes the keys
and values of the canvas; the others run the model on the *active* positions alone, over what is
cached. Masks further to the right are the *buffer* (attended to, not computed) and, beyond that,
the *far field* (neither). Both published forms are here: `llada`, whose first step of a phase is
on the whole canvas and whose active positions may lie anywhere, and `dream`, which works on a
prefix and on a slice of the canvas.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from decoding.loop import ModelParams
from decoding.unmasking.canvas import View
from decoding.unmasking.policies import Call, Policy, no_prefill, shift
from decoding.unmasking.prediction import Prediction, Reader
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice

VARIANTS = ("llada", "dream")
# The narrowest call that is compiled has room for a multiple of so many positions.
_ROUND_TO = 16


@dataclasses.dataclass(frozen=True)
class Window:
    """The extent of a window and of its phases, and what of the published algorithm to leave out.

    Attributes:
      active: A, masks that are computed in every step.
      size: W, masks that are attended to; 0 for all of them (no far field: what lies beyond the
        active masks is stale cache).
      refresh: R, steps of a phase; 0 for one phase without an end.
      tokens_per_step: n, masks that a step fills at most.
      slide: active masks follow the text within a phase; else they are those of its start.
      buffer: attend to masks that are not active; else W is A in every step.
      recompute_decoded: tokens stay active in the phase in which they are decoded.

    Raises:
      InputError: a window that active masks would leave before the phase ends, since they could
        then not attend to themselves (the published code does not check), or, without sliding,
        more tokens in a phase than it has active masks.
    """

    active: int = 16
    size: int = 64
    refresh: int = 32
    tokens_per_step: int = 1
    slide: bool = True
    buffer: bool = True
    recompute_decoded: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (
            ("active_tokens", self.active, 1),
            ("window_tokens", self.size, 0),
            ("refresh_cycle", self.refresh, 0),
            ("tokens_per_step", self.tokens_per_step, 1),
        ):
            if value < least:
                raise InputError(f"{name}: {value} must be at least {least}")
        phase = self.refresh * self.tokens_per_step
        if self.size and self.buffer and not (self.refresh and self.size >= self.active + phase):
            needed = f"at least {self.active + phase}" if self.refresh else "0"
            raise InputError(
                f"window_tokens: {self.size} must be active_tokens + refresh_cycle * "
                f"tokens_per_step or more, or 0 for the whole canvas; allowed: {needed}"
            )
        if not self.slide and not (self.refresh and self.active >= phase):
            needed = f"at least {phase}" if self.refresh else "none without a refresh_cycle"
            raise InputError(
                f"active_tokens: {self.active} are fewer than a phase fills without slide; "
                f"allowed: {needed}"
            )

    @property
    def most(self) -> int | None:
        """Positions that a step of `llada` within a phase computes at most; None for no bound."""
        return self.active + self.refresh * self.tokens_per_step if self.refresh else None


class WindowStore(struct.PyTreeNode):
    """What is kept between steps. Sets of positions are of the size that the canvas began with.

    Attributes:
      cache: keys and values, after rotary embedding; slot s holds position s.
      offset: int32 [B], steps of the phase so far.
      keys: bool [B, S], positions attended to in this phase.
      stays: bool [B, S], positions that are computed although they may be decoded.
      edge: int32 [B], end of the masks that were active when the phase began.
    """

    cache: kv.KVCache
    offset: jnp.ndarray
    keys: jnp.ndarray
    stays: jnp.ndarray
    edge: jnp.ndarray


class Plan(struct.PyTreeNode):
    """What a step computes.

    Attributes:
      full: bool [B], it is the first of a phase.
      computed: bool [B, S], positions that the model is run on.
      keys: bool [B, S], positions that these attend to.
      known: bool [B, S], those of them that may be filled.
    """

    full: jnp.ndarray
    computed: jnp.ndarray
    keys: jnp.ndarray
    known: jnp.ndarray


def first_masks(masked: jnp.ndarray, count: int) -> jnp.ndarray:
    """The leftmost `count` of the masks [B, S]: bool [B, S]."""
    return masked & (jnp.cumsum(masked, axis=1) <= count)


def _end(among: jnp.ndarray) -> jnp.ndarray:
    """One more than the last position of each row's set, 0 for none: int32 [B]."""
    index = jnp.arange(1, among.shape[1] + 1)
    return jnp.where(among, index, 0).max(axis=1).astype(jnp.int32)


def _llada_plan(window: Window, view: View, store: WindowStore) -> Plan:
    S = view.tokens.shape[1]
    full = store.offset == 0
    inside = view.index < view.ends[:, None]
    edge = _end(first_masks(view.masked, window.active)) if window.slide else store.edge
    active = view.masked & (view.index < edge[:, None])
    computed = jnp.where(full[:, None], inside, active | store.stays[:, :S])
    keys = store.keys[:, :S] if window.buffer else ~view.masked | active
    keys = jnp.where(full[:, None], inside, keys & inside)
    return Plan(full, computed & view.active[:, None], keys, view.masked & computed)


def _llada_update(
    window: Window, view: View, store: WindowStore, write: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Keys and computed tokens of the steps that follow."""
    S = view.tokens.shape[1]
    full = (store.offset == 0)[:, None]
    masked = view.masked & ~write
    keys = ~masked | (first_masks(masked, window.size) if window.size else masked)
    # What the first step of a phase decodes is computed once more; what others do, to its end.
    stays = write | (store.stays[:, :S] & (store.offset >= 2)[:, None])
    if not window.recompute_decoded:
        stays = jnp.zeros_like(stays)
    return jnp.where(full, keys, store.keys[:, :S]), stays


def _dream_plan(window: Window, view: View, store: WindowStore, ended: jnp.ndarray) -> Plan:
    S = view.tokens.shape[1]
    full = (store.offset == 0) | ended
    edge = _end(first_masks(view.masked, window.active)) if window.slide else store.edge
    prefix = _prefix(window, view)
    slice_ = store.stays[:, :S] & (view.index < edge[:, None])
    computed = jnp.where(full[:, None], prefix, slice_)
    # The slice may reach beyond the prefix that the phase began with.
    keys = jnp.where(full[:, None], prefix, store.keys[:, :S] | (view.index < edge[:, None]))
    first = view.masked & (jnp.cumsum(view.masked, axis=1) == 1)
    known = jnp.where(full[:, None], first, view.masked & slice_)
    inside = view.index < view.ends[:, None]
    return Plan(full, computed & view.active[:, None], keys & inside, known)


def _prefix(window: Window, view: View) -> jnp.ndarray:
    """The canvas up to the window's end, counted in tokens (ranks begin at 1): bool [B, S]."""
    count = view.ends
    if window.size:
        count = jnp.minimum(count, count - view.masked.sum(axis=1) + window.size - 1)
    return view.index < count[:, None]


def _dream_update(
    window: Window, view: View, store: WindowStore, full: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Keys of the steps that follow, and where their slice begins: at the first mask."""
    S = view.tokens.shape[1]
    keys = jnp.where(full[:, None], _prefix(window, view), store.keys[:, :S])
    from_first = jnp.cumsum(view.masked, axis=1) > 0
    return keys, jnp.where(full[:, None], from_first, store.stays[:, :S])


def _widths(least: int, most: int) -> list[int]:
    """Widths that calls on some positions are compiled for, ascending; the last is `most`."""
    width, widths = -(-least // _ROUND_TO) * _ROUND_TO, []
    while width < most:
        widths.append(width)
        width *= 2
    return [*widths, most]


def gathered(
    config: TransformerConfig,
    params: ModelParams,
    tokens: jnp.ndarray,
    computed: jnp.ndarray,
    keys: jnp.ndarray,
    cache: kv.KVCache,
    width: int,
) -> tuple[jnp.ndarray, jnp.ndarray, kv.KVCache]:
    """The model on some positions of each row, over cached keys and values.

    Args:
      config: the architecture.
      params: by role.
      tokens: int32 [B, S].
      computed: bool [B, S], at most `width` positions of a row.
      keys: bool [B, S], what they attend to: themselves too where they are in it.
      cache: slot s holds position s; those of computed positions are overwritten.
      width: T, room for positions.

    Returns:
      Positions int [B, T] in ascending order and then S; hidden states [B, T, D]; the cache.
    """
    S = tokens.shape[1]
    place = jnp.cumsum(computed, axis=1)
    # The k-th position has k - 1 before it; beyond a row's last one all S are.
    at = (place[:, None, :] <= jnp.arange(width)[:, None]).sum(axis=2)
    held = jnp.minimum(at, S - 1)
    out = transformer.apply(
        config,
        params["target"],
        jnp.take_along_axis(tokens, held, axis=1),
        positions=held,
        mask=masks.full(keys, width),
        cache=cache,
        slots=at,
        with_logits=False,
    )
    assert out.cache is not None
    return at, out.hidden, out.cache


@functools.cache
def windowed(
    config: TransformerConfig,
    window: Window,
    *,
    variant: str = "llada",
    shifted: bool = False,
    eos_ids: tuple[int, ...] = (),
) -> Policy:
    """Phases of one refreshing step and steps on the active positions alone (2601.20332).

    A step of `llada` refreshes all positions of the canvas and may fill any mask, and the others
    compute the first A masks and what was decoded in the phase: n more rows at each step. A step of
    `dream` refreshes the decoded text and W - 1 masks and fills the first mask, and the others
    compute the slice from that mask to the A-th that is left.

    Rows are in step with each other, except where ends of text differ (`eos_ids`); a call is as
    wide as its widest row needs.

    Args:
      config: the architecture.
      window: its extent.
      variant: one of VARIANTS.
      shifted: whether logits at i predict token i + 1; for `dream`, whose slices are contiguous.
        Their first position then has its own logits, which does no harm: it is decoded.
      eos_ids: with `dream`, once a row's canvas ends with one of these all its steps refresh.

    Raises:
      InputError: an unknown variant, or something that it has not.
    """
    check_choice("variant", variant, VARIANTS)
    if variant == "llada" and shifted:
        raise InputError("shifted: True needs variant=dream; given: llada")
    if variant == "dream" and not (window.buffer and window.recompute_decoded):
        raise InputError("buffer, recompute_decoded: False needs variant=llada; given: dream")
    dream = variant == "dream"

    def ended(view: View) -> jnp.ndarray:
        if not eos_ids:
            return jnp.zeros_like(view.active)
        last = jnp.take_along_axis(view.tokens, view.ends[:, None] - 1, axis=1)
        return jnp.isin(last, jnp.asarray(eos_ids)).any(axis=1)

    def plan_of(view: View, store: WindowStore) -> Plan:
        if dream:
            return _dream_plan(window, view, store, ended(view))
        return _llada_plan(window, view, store)

    def whole(
        params: ModelParams, view: View, plan: Plan, cache: kv.KVCache, read: Reader
    ) -> tuple[kv.KVCache, Prediction]:
        mask = masks.full(plan.keys, view.tokens.shape[1])
        out = transformer.apply(
            config, params["target"], view.tokens, mask=mask, cache=cache, with_logits=False
        )
        assert out.cache is not None
        return out.cache, read(transformer.unembed(config, params["target"], out.hidden), None)

    def part(
        params: ModelParams, view: View, plan: Plan, cache: kv.KVCache, read: Reader, width: int
    ) -> tuple[kv.KVCache, Prediction]:
        at, hidden, cache = gathered(
            config, params, view.tokens, plan.computed, plan.keys, cache, width
        )
        logits = transformer.unembed(config, params["target"], shift(hidden, shifted))
        return cache, read(logits, at)

    def compute(params: ModelParams, view: View, store: WindowStore, read: Reader) -> Call:
        S = view.tokens.shape[1]
        plan = plan_of(view, store)
        count = plan.computed.sum(axis=1)
        most = S if dream or window.most is None else min(window.most, S)
        widths = _widths(window.active + window.tokens_per_step, most)

        def branch(width: int) -> Callable[[kv.KVCache], tuple[kv.KVCache, Prediction]]:
            return lambda cache: part(params, view, plan, cache, read, width)

        branches = [branch(width) for width in widths]
        # The narrowest call that holds what every row needs.
        which = jnp.searchsorted(jnp.asarray(widths), count.max())
        if not dream:
            branches.append(lambda cache: whole(params, view, plan, cache, read))
            # All rows that are not done are at the same step of a phase.
            which = jnp.where((plan.full & view.active).any(), len(widths), which)
        cache = kv.truncate(store.cache, jnp.zeros_like(view.ends))
        cache, prediction = kv.switch(which, branches, cache)
        return Call(
            store=store.replace(cache=cache),
            prediction=prediction.replace(known=prediction.known & plan.known),
            served=view.active,
            calls=jnp.ones_like(view.ends),
            positions=count,
            full=plan.full.astype(jnp.int32),
        )

    def update(
        store: WindowStore, view: View, write: jnp.ndarray, moved: jnp.ndarray
    ) -> WindowStore:
        del moved
        full = store.offset == 0
        if dream:
            full |= ended(view)
            keys, stays = _dream_update(window, view, store, full)
        else:
            keys, stays = _llada_update(window, view, store, write)
        edge = _end(first_masks(view.masked & ~write, window.active))
        offset = store.offset + 1
        if window.refresh:
            offset = jnp.where(offset == window.refresh, 0, offset)
        return store.replace(
            offset=offset,
            keys=jax.lax.dynamic_update_slice(store.keys, keys, (0, 0)),
            stays=jax.lax.dynamic_update_slice(store.stays, stays, (0, 0)),
            edge=jnp.where(full, edge, store.edge),
        )

    def init(batch: int, slots: int) -> WindowStore:
        none = jnp.zeros((batch, slots), bool)
        zero = jnp.zeros((batch,), jnp.int32)
        return WindowStore(kv.create(config, batch, slots), zero, none, none, zero)

    return Policy(init, no_prefill, compute, update)
