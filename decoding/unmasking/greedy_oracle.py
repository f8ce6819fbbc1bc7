"""Extremely greedy decoding (EGP): with the final text at hand, write whatever is already right.

The bound that Learn2PD's filter is trained to come close to, and the source of its labels
(arXiv 2509.25188, section 2.5). The selector keeps what it saw of every block in its memory.
"""

import functools

import jax.numpy as jnp
from flax import struct

from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.learned_filter import block_confidence
from decoding.unmasking.method import unmasking
from decoding.unmasking.policies import whole_canvas
from decoding.unmasking.prediction import Prediction
from decoding.unmasking.selectors import Choice, Selector
from models.config import TransformerConfig

ROLE = "reference"
STUCK = "stuck_blocks"


class Log(struct.PyTreeNode):
    """What the oracle saw, a record for each row and round.

    Attributes:
      count: int32 [B], records of a row.
      step: int32 [B, R], steps of the block before this one.
      confidence: float32 [B, R, L], of every position of the block.
      correct: bool [B, R, L], whether the prediction was the final token.
      masked: bool [B, R, L], whether the position was a mask.
      last: int32 [B, L], the block's predictions in the round before.
    """

    count: jnp.ndarray
    step: jnp.ndarray
    confidence: jnp.ndarray
    correct: jnp.ndarray
    masked: jnp.ndarray
    last: jnp.ndarray


def _empty(batch: int, rounds: int, length: int) -> Log:
    each = (batch, rounds, length)
    return Log(
        count=jnp.zeros((batch,), jnp.int32),
        step=jnp.zeros((batch, rounds), jnp.int32),
        confidence=jnp.zeros(each, jnp.float32),
        correct=jnp.zeros(each, bool),
        masked=jnp.zeros(each, bool),
        last=jnp.zeros((batch, length), jnp.int32),
    )


@functools.cache
def greedy_oracle(block_length: int, rounds: int) -> Selector:
    """Every mask of the current block whose prediction is the token of params['reference'].

    When the predictions of a block are those of the round before, it is stuck: the reference is
    written over the rest of it. So a round may write nothing, but never two in a row.

    Args:
      block_length: L.
      rounds: R, records kept of a row; twice the masks of a row are always enough.
    """

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Log) -> Choice:
        S = view.tokens.shape[1]
        reference = params[ROLE][:, :S]
        right = prediction.tokens == reference
        among = view.candidates & prediction.known
        positions = view.start[:, None] + jnp.arange(block_length)
        held = jnp.clip(positions, 0, S - 1)
        inside = positions < view.stop[:, None]

        def block(values: jnp.ndarray) -> jnp.ndarray:
            return jnp.where(inside, jnp.take_along_axis(values, held, axis=1), 0)

        seen = block(prediction.tokens)
        stuck = (view.step > 0) & (seen == memory.last).all(axis=1)
        rows = jnp.arange(view.tokens.shape[0])
        at = jnp.where(view.active, memory.count, rounds)
        log = Log(
            count=memory.count + view.active,
            step=memory.step.at[rows, at].set(view.step, mode="drop"),
            confidence=memory.confidence.at[rows, at].set(
                block_confidence(view, prediction.confidence, block_length), mode="drop"
            ),
            correct=memory.correct.at[rows, at].set(block(right).astype(bool), mode="drop"),
            masked=memory.masked.at[rows, at].set(block(view.masked).astype(bool), mode="drop"),
            last=seen,
        )
        return Choice(
            write=among & (right | stuck[:, None]),
            tokens=jnp.where(stuck[:, None], reference, prediction.tokens),
            stay=jnp.zeros_like(stuck),
            memory=log,
            extra={STUCK: stuck.astype(jnp.int32)},
        )

    return Selector(
        select,
        lambda batch: _empty(batch, rounds, block_length),
        counters=(STUCK,),
        roles=(ROLE,),
    )


def method(config: TransformerConfig, block_length: int, new_tokens: int) -> Method:
    """The oracle as a method; params['reference'] is int32 [B, S] or longer, prompts included.

    Its state's `inner.memory` is a `Log`.
    """
    return unmasking(
        "greedy_oracle",
        config,
        SamplingConfig(temperature=0.0),
        Schedule(block_length),
        greedy_oracle(block_length, 2 * new_tokens),
        whole_canvas(config),
        early_stop=False,
    )
