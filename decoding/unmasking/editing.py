"""Token editing: a call fills masks and overwrites tokens that are already placed.

LLaDA2.1, arXiv 2602.08676. Mask-to-token (M2T) and token-to-token (T2T) writes come from one call.
"""

import functools
from typing import Any

import jax.numpy as jnp

from decoding.loop import ModelParams
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.prediction import Adjust, Prediction
from decoding.unmasking.selectors import Choice, Selector, best
from models.errors import InputError

COUNTERS = ("edits", "post_passes", "budget_exits")


@functools.cache
def joint_threshold(
    mask_threshold: float,
    edit_threshold: float,
    *,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    earlier: bool = False,
) -> Selector:
    """Fills what is sure, and replaces what is surely wrong.

    M2T: masks of the block whose token has a probability above `mask_threshold`; if they are
    fewer than `num_to_transfer`, that many of the most likely. T2T: placed tokens that differ from
    the prediction, whose probability is above `edit_threshold`; not those of the prompt, nor those
    placed in this very call. Section 2 of the paper, in the form of its published sampler.

    A row leaves its block after a call on a block without masks that edits nothing, or when
    `max_post_steps` calls without masks have been made. While there are masks each call fills one,
    so that 'nothing was filled and nothing edited' (SGLang's JointThreshold) is the same condition.

    Counters: `edits`; `post_passes`, calls on a block without masks; `budget_exits`, blocks that
    were left while the last call had still changed them.

    Args:
      mask_threshold: exceeded strictly, so that 1 fills `num_to_transfer` masks a call.
      edit_threshold: exceeded strictly; 1 never edits, which is LLaDA2.0's sampler.
      max_post_steps: 0 leaves a block as soon as it is full.
      num_to_transfer: masks that a call fills at least.
      earlier: also edit blocks before the current one, where a policy predicts them.
    """
    for name, value in (("mask_threshold", mask_threshold), ("edit_threshold", edit_threshold)):
        if not 0 <= value <= 1:
            raise InputError(f"{name}: {value} must be between 0 and 1")
    if max_post_steps < 0:
        raise InputError(f"max_post_steps: {max_post_steps} must be 0 or more")
    if num_to_transfer < 1:
        raise InputError(f"num_to_transfer: {num_to_transfer} must be at least 1")

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del params
        return joint(
            view,
            prediction,
            memory,
            mask_threshold,
            edit_threshold,
            max_post_steps=max_post_steps,
            num_to_transfer=num_to_transfer,
            earlier=earlier,
        )

    return Selector(select, no_calls, edits=True, counters=COUNTERS)


def no_calls(batch: int) -> jnp.ndarray:
    """The memory of `joint` before the first round."""
    return jnp.zeros((batch,), jnp.int32)


def joint(
    view: View,
    prediction: Prediction,
    memory: jnp.ndarray,
    mask_threshold: float | jnp.ndarray,
    edit_threshold: float | jnp.ndarray,
    *,
    max_post_steps: int,
    num_to_transfer: int = 1,
    earlier: bool = False,
) -> Choice:
    """The choice of `joint_threshold`, with thresholds that may be traced.

    Args:
      view, prediction: of the round.
      memory: int32 [B], calls on the current block since it was full.
      mask_threshold, edit_threshold, max_post_steps, num_to_transfer, earlier: see
        `joint_threshold`.
    """
    here = prediction.known & view.open
    active = here & view.masked
    sure = active & (prediction.confidence > mask_threshold)
    enough = sure.sum(axis=1) >= num_to_transfer
    likely = best(active, prediction.confidence, num_to_transfer)
    place = jnp.where(enough[:, None], sure, likely)

    scope = prediction.known & (view.index < view.start[:, None]) | here if earlier else here
    editable = scope & ~view.masked & (view.index >= view.prompt_lengths[:, None])
    differs = prediction.tokens != view.tokens
    edit = editable & differs & (prediction.confidence > edit_threshold)

    # Calls that predict nothing of the block (a commit, a look at earlier ones) do not count.
    seen, was_full = here.any(axis=1), ~view.candidates.any(axis=1)
    post = memory + (seen & was_full)
    full = ~(view.candidates & ~place).any(axis=1)
    unchanged = was_full & ~edit.any(axis=1)
    spent = full & ~unchanged & (post >= max_post_steps)
    leave = seen & (unchanged | spent)
    return Choice(
        write=place | edit,
        tokens=prediction.tokens,
        stay=seen & ~leave,
        memory=jnp.where(leave, 0, post),
        extra={
            "edits": edit.sum(axis=1),
            "post_passes": (seen & was_full).astype(jnp.int32),
            "budget_exits": (seen & spent).astype(jnp.int32),
        },
    )


@functools.cache
def anti_stutter(schedule: Schedule, penalty: float) -> Adjust:
    """Takes `penalty` off the logit of the token that stands one position to the left.

    It makes immediate repetition less likely, which low thresholds tend to. The first position of
    a block is left alone. SGLang's JointThreshold, `penalty_lambda`.
    """

    def adjust(view: View, logits: jnp.ndarray, positions: jnp.ndarray) -> jnp.ndarray:
        B, S = view.tokens.shape
        positions = jnp.broadcast_to(positions, logits.shape[:2])
        before = jnp.take_along_axis(view.tokens, jnp.clip(positions - 1, 0, S - 1), axis=1)
        inside = schedule.block_at(positions - 1, view.prompt_lengths[:, None]) == (
            schedule.block_at(positions, view.prompt_lengths[:, None])
        )
        rows, columns = jnp.arange(B)[:, None], jnp.arange(positions.shape[1])
        return logits.at[rows, columns, before].add(jnp.where(inside, -penalty, 0.0))

    return adjust
