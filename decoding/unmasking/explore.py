"""Explore, then exploit: commit what is sure, and now and then a token that is anything but.

After 'From Bits to Rounds' (arXiv 2511.21103). A token of probability p carries -log p nats, so
rounds that only write sure tokens carry little, and their number is at least the information of the
text over what a round may carry. One uncertain token a round adds nothing to the bound on what
is lost by writing tokens independently, sum of H - max of H, and may make many others sure. The
paper's own rule is not public: this is one that fits its abstract, with every choice an option.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct

from decoding.loop import ModelParams
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.prediction import Prediction
from decoding.unmasking.selectors import (
    Choice,
    Selector,
    confidence_of,
    fill,
    first_best,
    rank,
)
from models.errors import InputError, check_choice

EXPLOIT_RULES = ("threshold", "factor")
WHEN = ("starved", "every", "alternate", "never")
# Counters: tokens of either kind, rounds without a sure token, tokens beyond the current block.
EXPLOITED, EXPLORED, STARVED, AHEAD = "exploited", "explored", "starved_rounds", "tokens_ahead"
# In nats: information of the tokens of either kind, and the bound on their total correlation.
EXPLOITED_NATS, EXPLORED_NATS, ERROR_BOUND = "exploited_nats", "explored_nats", "error_bound_nats"

# (view, prediction, masks of a block [B, S]) -> what to explore first, float32 [B, S].
Score = Callable[[View, Prediction, jnp.ndarray], jnp.ndarray]


@dataclasses.dataclass(frozen=True)
class Exploration:
    """The rule's settings; none of the defaults is from the paper.

    Attributes:
      rule: what is sure: 'threshold', or 'factor' (Fast-dLLM's, over all open blocks).
      threshold: tau, least probability of a sure token.
      factor: f of (n + 1)(1 - p_n) < f. Below 1, a round's sure tokens carry less than f nats.
      when: 'starved' explores when there are fewer than `trigger` sure tokens for each open block
        with masks; 'every' round, 'alternate' rounds of a row, or 'never'.
      score: a key of `SCORES`.
      per_block: k, tokens explored in each open block.
      error_budget: eps in nats: beyond the current block a token is explored only while
        sum of H - max of H over all tokens of the round stays within it.
      least: p_min, probability that a token must have to be explored.
      trigger: m_min, see `when`.
      frontier: w, masks of a block that 'frontier' prefers.
      guard: never write an end of text beyond the current block.
      look_ahead: C; above 1, what to explore in the current block is left to
        `look_ahead.look_ahead`, which tries C tokens and writes one of them.
      refresh: compute all keys and values again after exploring (for caches that freeze what
        follows the open blocks).
    """

    rule: str = "threshold"
    threshold: float = 0.9
    factor: float = 0.9
    when: str = "starved"
    score: str = "frontier"
    per_block: int = 1
    error_budget: float = 0.5
    least: float = 0.1
    trigger: int = 2
    frontier: int = 8
    guard: bool = True
    look_ahead: int = 1
    refresh: bool = False

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, EXPLOIT_RULES)
        check_choice("explore", self.when, WHEN)
        check_choice("score", self.score, SCORES)
        for field in ("threshold", "least"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise InputError(f"{field}: {value} must be between 0 and 1")
        if not 0 < self.factor < 1:
            raise InputError(f"factor: {self.factor} must be above 0 and below 1")
        for field in ("per_block", "frontier", "look_ahead"):
            if (value := getattr(self, field)) < 1:
                raise InputError(f"{field}: {value} must be at least 1")
        for field in ("trigger", "error_budget"):
            if (value := getattr(self, field)) < 0:
                raise InputError(f"{field}: {value} must be at least 0")


def _entropy(view: View, prediction: Prediction, masks: jnp.ndarray) -> jnp.ndarray:
    del view, masks
    return prediction.features["entropy"]


def _frontier(width: int) -> Score:
    """Entropy among the first masks of a block, where there is context; then that of others."""

    def score(view: View, prediction: Prediction, masks: jnp.ndarray) -> jnp.ndarray:
        entropy = _entropy(view, prediction, masks)
        near = jnp.cumsum(masks, axis=1) <= width
        return jnp.where(near, entropy, entropy - 1e6)

    return score


SCORES: dict[str, Score | None] = {
    "frontier": None,  # needs a width: `_frontier`
    "entropy": _entropy,
    "margin": lambda view, prediction, masks: -prediction.features["margin"],
    # Controls.
    "random": lambda view, prediction, masks: confidence_of(prediction, view, "random"),
    "leftmost": lambda view, prediction, masks: -view.index.astype(jnp.float32)[None],
    "confident": lambda view, prediction, masks: prediction.features["peak"],
}


class Proposals(struct.PyTreeNode):
    """Tokens of the current block of which the next call is to choose one; [B, C] each.

    Attributes:
      positions: int32.
      tokens: int32.
      log_q: float32, log-probability of each token when it was proposed.
      entropy: float32, of each position then.
      waiting: bool [B], rows that have any.
    """

    positions: jnp.ndarray
    tokens: jnp.ndarray
    log_q: jnp.ndarray
    entropy: jnp.ndarray
    waiting: jnp.ndarray


def no_proposals(batch: int, count: int) -> Proposals:
    whole = jnp.zeros((batch, count), jnp.int32)
    real = jnp.zeros((batch, count), jnp.float32)
    return Proposals(whole, whole, real, real, jnp.zeros((batch,), bool))


def sure_tokens(how: Exploration, among: jnp.ndarray, peak: jnp.ndarray) -> jnp.ndarray:
    """What is written for being sure, none perhaps: bool [B, S]."""
    if how.rule == "threshold":
        return among & (peak >= how.threshold)
    return among & ((rank(among, peak) + 2) * (1 - peak) < how.factor)


@functools.cache
def explore(how: Exploration, schedule: Schedule, eos_ids: tuple[int, ...]) -> Selector:
    """The selector of 'ETE-1'.

    Which positions are written depends on the model's distributions and never on the tokens that
    were drawn, so at temperature 1 each token follows its distribution exactly.

    Args:
      how: see `Exploration`.
      schedule: of the blocks; those of its horizon that are open are exploited and explored too.
      eos_ids: tokens that end a text.
    """
    score = SCORES[how.score] or _frontier(how.frontier)
    features = ("peak", "best", "entropy", *(("margin",) if how.score == "margin" else ()))
    C = how.look_ahead

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del params, memory
        peak, entropy = prediction.features["peak"], prediction.features["entropy"]
        among = view.candidates & prediction.known
        own = view.index < view.stop[:, None]
        free = among
        if how.guard and eos_ids:
            ends = jnp.isin(prediction.features["best"], jnp.asarray(eos_ids))
            free = among & (own | ~ends)
        sure = sure_tokens(how, free, peak)
        block_of = (view.index - view.start[:, None]) // schedule.length
        blocks = [among & (block_of == ahead) for ahead in range(schedule.horizon + 1)]
        explored, go = jnp.zeros_like(sure), _wanted(how, view, sure, blocks)
        total = jnp.where(sure, entropy, 0).sum(axis=1)
        largest = jnp.where(sure, entropy, 0).max(axis=1)
        proposals, held = no_proposals(len(go), C), jnp.zeros_like(go)
        for ahead, block in enumerate(blocks):
            for turn in range(how.per_block):
                rest = block & ~sure & ~explored
                likely = rest & free & (peak >= how.least)
                always = ahead == turn == 0  # progress
                if always:
                    likely = jnp.where(likely.any(axis=1)[:, None], likely, rest)
                scores = score(view, prediction, view.masked & block)
                one = first_best(likely, scores)
                added = jnp.where(one, entropy, 0).sum(axis=1)
                if always and C > 1:  # the next call writes one of these instead
                    proposals = _propose(prediction, entropy, likely, scores, go, C)
                    held = proposals.waiting
                    one &= ~held[:, None]
                    added = jnp.where(held, proposals.entropy.max(axis=1), added)
                new_largest = jnp.maximum(largest, added)
                fits = total + added - new_largest <= how.error_budget
                take = go & (one.any(axis=1) | (held & always)) & (fits | always)
                explored |= one & take[:, None]
                total = jnp.where(take, total + added, total)
                largest = jnp.where(take, new_largest, largest)
        nothing = ~(sure | explored).any(axis=1) & ~held
        explored |= first_best(among & own, peak) & nothing[:, None]
        nats = -jnp.log(prediction.confidence)
        choice = fill(
            prediction,
            sure | explored,
            proposals if C > 1 else (),
            **_ledger(sure, explored, own, nats),
            **{ERROR_BOUND: total - largest},
        )
        return choice.replace(
            sure=sure, refresh=(explored.any(axis=1) | held) if how.refresh else None
        )

    return Selector(
        select,
        lambda batch: no_proposals(batch, C) if C > 1 else (),
        features,
        counters=(EXPLOITED, EXPLORED, STARVED, AHEAD),
        amounts=(EXPLOITED_NATS, EXPLORED_NATS, ERROR_BOUND),
    )


def _ledger(
    sure: jnp.ndarray, explored: jnp.ndarray, own: jnp.ndarray, nats: jnp.ndarray
) -> dict[str, jnp.ndarray]:
    """What a round wrote, and the information of it."""
    return {
        EXPLOITED: sure.sum(axis=1),
        EXPLORED: explored.sum(axis=1),
        STARVED: (~sure.any(axis=1)).astype(jnp.int32),
        AHEAD: ((sure | explored) & ~own).sum(axis=1),
        EXPLOITED_NATS: jnp.where(sure, nats, 0).sum(axis=1),
        EXPLORED_NATS: jnp.where(explored, nats, 0).sum(axis=1),
    }


def _wanted(
    how: Exploration, view: View, sure: jnp.ndarray, blocks: list[jnp.ndarray]
) -> jnp.ndarray:
    """Rows that explore in this round: bool [B]."""
    if how.when == "starved":
        open_blocks = sum(block.any(axis=1).astype(jnp.int32) for block in blocks)
        return sure.sum(axis=1) < how.trigger * open_blocks
    if how.when == "alternate":
        return view.calls % 2 == 0
    return jnp.full(view.calls.shape, how.when == "every")


def _propose(
    prediction: Prediction,
    entropy: jnp.ndarray,
    likely: jnp.ndarray,
    scores: jnp.ndarray,
    go: jnp.ndarray,
    count: int,
) -> Proposals:
    """The `count` positions of `likely` with the largest scores, if there are two to choose from.

    Places beyond those that there are repeat the first.
    """
    number = likely.sum(axis=1)
    order = jnp.argsort(rank(likely, scores), axis=1)[:, :count].astype(jnp.int32)
    positions = jnp.where(jnp.arange(count) < number[:, None], order, order[:, :1])

    def at(values: jnp.ndarray) -> jnp.ndarray:
        return jnp.take_along_axis(values, positions, axis=1)

    log_q = jnp.log(at(prediction.confidence))
    return Proposals(positions, at(prediction.tokens), log_q, at(entropy), go & (number > 1))
