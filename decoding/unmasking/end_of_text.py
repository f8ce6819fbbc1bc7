"""End-of-text prediction: a canvas is cut where the model foresees that the text ends.

Learn2PD, arXiv 2509.25188, section 2.3 (EoTP). It is the prediction of an end-of-text token that
cuts, not a token that was written: this may happen in the first step, and a later step may cut
further to the left. What is cut is seen by no later call.
"""

import functools

import jax.numpy as jnp

from decoding.unmasking.canvas import View
from decoding.unmasking.method import Cut
from decoding.unmasking.prediction import Prediction
from decoding.unmasking.selectors import Choice, first_best
from models.errors import InputError


@functools.cache
def cut_at_end_of_text(eos_ids: tuple[int, ...]) -> Cut:
    """Where each canvas ends after a step.

    Rule A: where the selector was sure of an end of text (`Choice.sure`), after the leftmost one.
    Rule B, where it was not, or for selectors that are sure of nothing: among all masks that the
    call predicted, later blocks included, after the most confident prediction of an end of text;
    that position may still be a mask then.

    Args:
      eos_ids: tokens that end a text.

    Raises:
      InputError: there are none.
    """
    if not eos_ids:
        raise InputError("eotp: the target model has no end-of-text token; allowed: false")

    def cut(view: View, prediction: Prediction, choice: Choice) -> jnp.ndarray:
        foreseen = jnp.isin(prediction.tokens, jnp.asarray(eos_ids))
        foreseen &= view.masked & prediction.known
        most = first_best(foreseen, prediction.confidence)
        ends = jnp.where(most.any(axis=1), most.argmax(axis=1) + 1, view.ends)
        if choice.sure is not None:
            sure = foreseen & choice.sure
            ends = jnp.where(sure.any(axis=1), sure.argmax(axis=1) + 1, ends)
        return ends

    return cut
