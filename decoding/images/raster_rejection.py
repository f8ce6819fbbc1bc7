"""Verification of a window in raster order: a rejection drops the judgement of all that follows.

What speculative decoding of text does, on the same drafts: after each rejection the rest of the
window is verified again behind the corrected token. With `verification.exact_match` as the rule
this is lossless, and its images are those of plain decoding, token for token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from decoding.images import image_tokens, relaxed
from decoding.images.image_tokens import ImageSampler
from decoding.images.multi_scale import Params, Settle, State
from decoding.speculative import verification
from decoding.speculative.tree import chain
from models import cache as kv
from models.errors import InputError, check_choice

RULES = ("exact_match", "pooled_threshold", "lantern")


@dataclasses.dataclass(frozen=True)
class RasterConfig:
    """Options of verification in raster order.

    Attributes:
      rule: 'exact_match' (lossless); 'pooled_threshold', whose threshold is tau; 'lantern', whose
        threshold is delta (see `relaxed`).
      clear: of 'lantern'.
    """

    rule: str = "exact_match"
    clear: str = "used"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_choice("clear", self.clear, ("used", "all"))


class _Round(NamedTuple):
    """Between two passes over what is left of a window."""

    tokens: jnp.ndarray  # [B, 1 + N]
    cache: kv.KVCache
    settled: jnp.ndarray  # [B], codes of the window that are decided
    passes: jnp.ndarray  # [B]
    replaced: jnp.ndarray  # bool [B, W], codes that the target drew itself


@functools.cache
def raster_rejection(target: ImageSampler, height: int, config: RasterConfig) -> Settle:
    """Settles windows of `height` rows of the target's grid, left to right.

    Rules other than 'exact_match' need `params['neighbours']`.

    Args:
      target: the model.
      height: r * m.
      config: see `RasterConfig`.
    """
    n, N = target.side, target.num_tokens
    W = height * n
    if W > N:
        raise InputError(f"height: {height} rows exceed the target's side {n}")
    judge = _judge(config)

    def settle(params: Params, state: State, first: jnp.ndarray, threshold: jnp.ndarray) -> State:
        B = len(state.tokens)
        rows, index = jnp.arange(B)[:, None], jnp.arange(W + 1)
        drafts = jax.lax.dynamic_slice_in_dim(state.tokens, first + 1, W, axis=1)

        def one_round(carry: _Round) -> _Round:
            start = first + carry.settled
            # The pending token and what is left of the drafts; beyond the window anything.
            at = jnp.minimum(start[:, None] + index, carry.tokens.shape[1] - 1)
            fed = jnp.take_along_axis(carry.tokens, at, axis=1)
            logits, cache = image_tokens.feed(target, params["target"], carry.cache, fed, start)
            left = W - carry.settled
            tree = chain(fed[:, 0], fed[:, 1:], jnp.arange(W) < left[:, None])
            verdict = judge(params, threshold, tree, logits, state.keys, start + 1, target.sampling)
            # Behind the last draft comes the next window, which has drafts of its own.
            count = jnp.minimum(verdict.count, left)
            inside = index < count[:, None]
            place = jnp.where(inside, start[:, None] + 1 + index, carry.tokens.shape[1])
            tokens = carry.tokens.at[rows, place].set(verdict.tokens, mode="drop")
            own = carry.settled + verdict.count - 1
            own = jnp.where(left > 0, own, W)[:, None]
            return _Round(
                tokens,
                cache,
                carry.settled + count,
                carry.passes + (left > 0),
                carry.replaced.at[rows, own].set(True, mode="drop"),
            )

        zero = jnp.zeros((B,), jnp.int32)
        none = jnp.zeros((B, W), bool)
        carry = _Round(state.tokens, state.target_cache, zero, zero, none)
        done = jax.lax.while_loop(lambda c: (c.settled < W).any(), one_round, carry)
        final = jax.lax.dynamic_slice_in_dim(done.tokens, first + 1, W, axis=1)
        rejected = done.replaced & (final != drafts)
        work = state.work.add(
            window_passes=done.passes,
            window_positions=done.passes * (W + 1),
            rejected=rejected.sum(axis=1),
            resampled=done.replaced.sum(axis=1),
        )
        place = (0, first)
        return state.replace(
            tokens=done.tokens,
            target_cache=done.cache,
            rejected=jax.lax.dynamic_update_slice(state.rejected, rejected, place),
            resampled=jax.lax.dynamic_update_slice(state.resampled, done.replaced, place),
            work=work,
        )

    return Settle(settle, 0, W + 1, W)


def _judge(config: RasterConfig) -> Callable[..., verification.Verdict]:
    """(params, threshold, tree, logits, keys, positions, sampling) -> Verdict."""
    if config.rule == "exact_match":
        return lambda params, threshold, *given: verification.exact_match(*given)
    if config.rule == "pooled_threshold":
        return lambda params, threshold, *given: relaxed.pooled_threshold(
            params["neighbours"], threshold, *given
        )
    return lambda params, threshold, *given: relaxed.lantern(
        params["neighbours"], threshold, config.clear, 1, *given
    )
