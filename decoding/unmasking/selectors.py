"""Which masks a round fills: the rules of LLaDA and Fast-dLLM, and what all rules are made of.

A selector looks at the canvas and at the model's predictions and says what to write. It always
writes at least one token in a row that has an open mask, so that every row comes to an end.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding.loop import ModelParams
from decoding.unmasking.canvas import View
from decoding.unmasking.prediction import Prediction
from models.errors import InputError, check_choice

RANKINGS = ("confidence", "random", "entropy", "margin")


class Choice(struct.PyTreeNode):
    """What a selector decided.

    Attributes:
      write: bool [B, S], positions to write.
      tokens: int32 [B, S], what to write there.
      stay: bool [B], rows that have more to do in their block even if nothing in it is masked.
      memory: for the selector's next call.
      extra: amounts for the selector's own work counters, [B] each.
      sure: bool [B, S], those of `write` that the rule would write at any time, and not only
        because something must be; None where a rule makes no difference.
      refresh: bool [B], rows whose caches are to be computed anew as if they had moved to another
        block; None for none.
    """

    write: jnp.ndarray
    tokens: jnp.ndarray
    stay: jnp.ndarray
    memory: Any
    extra: dict[str, jnp.ndarray]
    sure: jnp.ndarray | None = None
    refresh: jnp.ndarray | None = None


class Selector(NamedTuple):
    """A rule for what a round writes.

    Attributes:
      select: (params, view, prediction, memory) -> Choice.
      init: batch -> memory before the first round.
      features: what it needs of a prediction beside token and confidence.
      edits: whether it may rewrite what is decided in the current block.
      counters: names of its own work counters.
      roles: parameters that it needs beside the target's.
      amounts: names of those of its work counters that are not whole numbers.
    """

    select: Callable[[ModelParams, View, Prediction, Any], Choice]
    init: Callable[[int], Any] = lambda batch: ()
    features: tuple[str, ...] = ()
    edits: bool = False
    counters: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    amounts: tuple[str, ...] = ()


def rank(among: jnp.ndarray, score: jnp.ndarray) -> jnp.ndarray:
    """Place of each position by descending score, those of `among` first: int32 [B, S].

    Equal scores go from left to right.
    """
    order = jnp.argsort(jnp.where(among, -score, jnp.inf), axis=-1, stable=True)
    rows = jnp.arange(score.shape[0])[:, None]
    places = jnp.broadcast_to(jnp.arange(score.shape[1], dtype=jnp.int32), score.shape)
    return jnp.zeros(score.shape, jnp.int32).at[rows, order].set(places)


def best(among: jnp.ndarray, score: jnp.ndarray, count: jnp.ndarray | int) -> jnp.ndarray:
    """The `count` [B] positions of `among` [B, S] with the largest scores: bool [B, S]."""
    return among & (rank(among, score) < jnp.asarray(count)[..., None])


def first_best(among: jnp.ndarray, score: jnp.ndarray) -> jnp.ndarray:
    """The one position of `among` with the largest score, the leftmost of several: bool [B, S]."""
    chosen = jnp.argmax(jnp.where(among, score, -jnp.inf), axis=-1)
    return among & (jnp.arange(score.shape[1]) == chosen[:, None])


def fill(prediction: Prediction, write: jnp.ndarray, memory: Any = (), **extra: Any) -> Choice:
    """The choice to write the predicted tokens at `write` and to leave a block when it is full."""
    stay = jnp.zeros(write.shape[:1], bool)
    return Choice(write, prediction.tokens, stay, memory, dict(extra))


def confidence_of(prediction: Prediction, view: View, ranking: str) -> jnp.ndarray:
    """What positions are ranked by: float32 [B, S].

    'confidence' is the probability of the token; 'entropy' and 'margin' are Dream's measures
    (negative entropy; distance of the two most likely tokens); 'random' is uniform noise.
    """
    if ranking == "random":
        keys = randomness.at(view.keys, view.calls, randomness.ORDER)
        return randomness.uniform(randomness.several(keys, view.tokens.shape[1]))
    if ranking == "confidence":
        return prediction.confidence
    feature = prediction.features[ranking]
    return -feature if ranking == "entropy" else feature


def _features(ranking: str) -> tuple[str, ...]:
    check_choice("ranking", ranking, RANKINGS)
    return () if ranking in ("confidence", "random") else (ranking,)


@functools.cache
def quota(steps: int, ranking: str = "confidence") -> Selector:
    """A fixed number of tokens a step: the n masks of a block over its steps (LLaDA, 2502.09992).

    The first n mod steps steps write one token more than the others.

    Args:
      steps: calls a block; a block with fewer masks takes as many as it has masks.
      ranking: which tokens come first, see `confidence_of`.
    """
    if steps < 1:
        raise InputError(f"steps: {steps} must be at least 1")

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del params
        inside = view.candidates & (view.index < view.stop[:, None])
        total = jnp.where(view.step == 0, inside.sum(axis=1), memory)
        count = total // steps + (view.step < total % steps)
        score = confidence_of(prediction, view, ranking)
        write = best(view.candidates & prediction.known, score, jnp.maximum(count, 1))
        return fill(prediction, write, total)

    return Selector(select, lambda batch: jnp.zeros((batch,), jnp.int32), _features(ranking))


@functools.cache
def threshold(least: float) -> Selector:
    """Every token of probability `least` or more, else the most likely one (Fast-dLLM)."""
    if not 0 <= least <= 1:
        raise InputError(f"threshold: {least} must be between 0 and 1")

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del params, memory
        among = view.candidates & prediction.known
        sure = among & (prediction.confidence >= least)
        return fill(prediction, sure | first_best(among, prediction.confidence))

    return Selector(select)


@functools.cache
def factor(budget: float) -> Selector:
    """The most likely n tokens, n the largest with (n + 1)(1 - p_n) < `budget` (Fast-dLLM).

    p_n is the n-th largest probability; at least one token is written.
    """
    if not budget > 0:
        raise InputError(f"factor: {budget} must be positive")

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del params, memory
        among = view.candidates & prediction.known
        place = rank(among, prediction.confidence)
        # (n + 1)(1 - p_n) grows with n, so what passes is a prefix of the ranking.
        passes = (place + 2) * (1 - prediction.confidence) < budget
        return fill(prediction, among & (passes | (place == 0)))

    return Selector(select)
