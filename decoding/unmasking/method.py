"""Schedule x selector x policy -> a method that the loop can drive."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from decoding import stats as work
from decoding.loop import Canvas, DecodeState, Method, ModelParams, Revision
from decoding.sampling import SamplingConfig
from decoding.unmasking import canvas
from decoding.unmasking.canvas import Progress, Schedule, View
from decoding.unmasking.policies import FULL_CALLS, Policy
from decoding.unmasking.prediction import Adjust, Prediction, reader
from decoding.unmasking.selectors import Choice, Selector
from models.config import TransformerConfig
from models.errors import InputError

# (view, prediction, choice) -> where each canvas ends now, int32 [B]; never later than before.
Cut = Callable[[View, Prediction, Choice], jnp.ndarray]


@functools.cache
def unmasking(
    name: str,
    config: TransformerConfig,
    sampling: SamplingConfig,
    schedule: Schedule,
    selector: Selector,
    policy: Policy,
    *,
    cut: Cut | None = None,
    early_stop: bool = True,
    filtered: bool = False,
    revisable: int = 0,
    adjust: Adjust | None = None,
) -> Method:
    """A method that fills the masks of a canvas; the same one for the same arguments.

    Each round runs the model where `policy` says, reads a token and its probability off each
    position, writes what `selector` chooses, and moves rows whose block is full to the next one.

    Args:
      name: as users call it.
      config: of the target, a bidirectional model with a mask token.
      sampling: how a position's token is chosen; a repetition penalty is refused, since there is
        no order in which tokens were seen.
      schedule: blocks of the canvas.
      selector: what to write.
      policy: what to compute.
      cut: shortens canvases (an end of text that was foreseen); None leaves them alone.
      early_stop: a row is done when an end-of-sequence token stands in its settled text. The
        text is the same without, since what follows is dropped.
      filtered, adjust: see `prediction.reader`.
      revisable: blocks before the current one that may still be rewritten.

    Raises:
      InputError: a model without mask token, or a repetition penalty.
    """
    mask_id = config.mask_token_id
    if mask_id is None:
        raise InputError(f"mask_token_id: the target model ({config.family}) has none")
    if sampling.repetition_penalty != 1:
        raise InputError(
            f"repetition_penalty: {sampling.repetition_penalty} is not for methods that fill "
            "masks; allowed: 1"
        )

    def init(batch: int, slots: int) -> Progress:
        zero = jnp.zeros((batch,), jnp.int32)
        return Progress(zero, zero, zero, policy.init(batch, slots), selector.init(batch))

    def prefill(
        params: ModelParams, inner: Progress, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> Progress:
        store = policy.prefill(params, inner.store, tokens, lengths)
        return inner.replace(block=schedule.block_at(lengths, lengths), store=store)

    def step(params: ModelParams, state: DecodeState) -> tuple[Progress, Revision]:
        inner: Progress = state.inner
        view = canvas.look(state, schedule, mask_id)
        read = reader(
            view, sampling, mask_id, features=selector.features, filtered=filtered, adjust=adjust
        )
        with jax.named_scope("target"):
            call = policy.compute(params, view, inner.store, read)
        if call.tokens is not None:
            view = canvas.rewritten(view, call.tokens, mask_id)
        # A call that predicts nothing only writes a cache: no step, and it takes no noise.
        steps = call.served & call.prediction.known.any(axis=1)
        with jax.named_scope("verify"):
            choice = selector.select(params, view, call.prediction, inner.memory)
        write = choice.write & call.served[:, None]
        tokens = jnp.where(write, choice.tokens, view.tokens)
        ends = view.ends
        if cut is not None:
            ends = jnp.where(call.served, cut(view, call.prediction, choice), ends)
            tokens = jnp.where(view.index < ends[:, None], tokens, 0)
        left = canvas.undecided(tokens, view.prompt_lengths, ends, mask_id)
        first = jnp.where(left.any(axis=1), left.argmax(axis=1), ends)
        stay = choice.stay | ~call.served
        block = jnp.where(stay, inner.block, schedule.block_at(first, view.prompt_lengths))
        if selector.edits:  # one block after the other, each with its own edits
            block = jnp.minimum(block, inner.block + 1)
        moved = block > inner.block
        refresh = moved if choice.refresh is None else moved | choice.refresh
        store = policy.update(call.store, view, write, refresh)
        pending = jnp.zeros_like(stay) if policy.pending is None else policy.pending(store)
        settled, complete = first, None
        if selector.edits:
            complete = schedule.start_of(block - pending, view.prompt_lengths)
            settled = schedule.start_of(block - pending - revisable, view.prompt_lengths)
        progress = Progress(
            block=block,
            step=jnp.where(moved, 0, inner.step + steps),
            calls=inner.calls + steps,
            store=store,
            memory=choice.memory,
        )
        done = ~stay & ~pending & (schedule.start_of(block, view.prompt_lengths) >= ends)
        done |= ~stay & ~left.any(axis=1) & (not selector.edits)
        revision = Revision(tokens, settled, ends, done, _work(call, choice), complete)
        return progress, revision

    def _work(call: Any, choice: Choice) -> work.Stats:
        spent = lambda amount: jnp.where(call.served, amount, 0)  # noqa: E731
        amounts = (choice.extra | call.extra).items()
        extra = {name: spent(amount) for name, amount in amounts}
        return work.round_work(
            len(call.served), 0, extra=extra | {FULL_CALLS: spent(call.full)}
        ).replace(target_calls=spent(call.calls), target_positions=spent(call.positions))

    return Method(
        name,
        ("target", *selector.roles),
        0,
        0,
        init,
        prefill,
        step,
        counters=(*selector.counters, *policy.counters, FULL_CALLS),
        lossless=False,
        canvas=Canvas(mask_id, schedule.length if schedule.absolute else 1, early_stop),
        amounts=(*selector.amounts, *policy.amounts),
    )
