"""What is computed in a round: the whole canvas, or a part of it over cached keys and values.

A policy runs the model and hands the logits to a reader. Which tokens are written is none of its
business, nor does a selector know what was computed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from decoding.loop import ModelParams
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.prediction import Prediction, Reader
from models import cache as kv
from models import masks, transformer
from models.config import TransformerConfig

FULL_CALLS = "full_calls"


class Call(struct.PyTreeNode):
    """What a round computed.

    Attributes:
      store: the policy's state afterwards.
      prediction: for the rows that were served.
      served: bool [B], rows that the call was for. The others wait: they write nothing.
      calls: int32 [B], model calls.
      positions: int32 [B], tokens that the model was run on.
      full: int32 [B], those of the calls that were on the whole canvas.
      extra: amounts for the policy's own work counters, [B] each.
      tokens: int32 [B, S], the rows as they are when the policy itself has written something;
        None otherwise.
    """

    store: Any
    prediction: Prediction
    served: jnp.ndarray
    calls: jnp.ndarray
    positions: jnp.ndarray
    full: jnp.ndarray
    extra: dict[str, jnp.ndarray] = struct.field(default_factory=dict)
    tokens: jnp.ndarray | None = None


class Policy(NamedTuple):
    """How the model is run.

    Attributes:
      init: (batch, slots) -> store.
      prefill: (params, store, tokens [B, P], lengths [B]) -> store.
      compute: (params, view, store, read) -> Call.
      update: (store, view, write bool [B, S], moved bool [B]) -> store after the round; `moved`
        are the rows that go on to another block, or that the selector wants refreshed.
      counters: names of its own work counters.
      pending: store -> bool [B], rows whose blocks before the current one have a call to come;
        they are not done until then. None if there are no such calls.
      amounts: names of those of its work counters that are not whole numbers.
    """

    init: Callable[[int, int], Any]
    prefill: Callable[[ModelParams, Any, jnp.ndarray, jnp.ndarray], Any]
    compute: Callable[[ModelParams, View, Any, Reader], Call]
    update: Callable[[Any, View, jnp.ndarray, jnp.ndarray], Any]
    counters: tuple[str, ...] = ()
    pending: Callable[[Any], jnp.ndarray] | None = None
    amounts: tuple[str, ...] = ()


def no_prefill(params: ModelParams, store: Any, tokens: jnp.ndarray, lengths: jnp.ndarray) -> Any:
    """For policies that read the prompt with the canvas."""
    del params, tokens, lengths
    return store


def keep(store: Any, view: View, write: jnp.ndarray, moved: jnp.ndarray) -> Any:
    """For policies whose state a round's choice does not change."""
    del view, write, moved
    return store


def visible(view: View, num_queries: int) -> jnp.ndarray:
    """Everything on a row's canvas, for each query: bool [B, T, S]."""
    return masks.full(view.index < view.ends[:, None], num_queries)


def shift(hidden: jnp.ndarray, shifted: bool) -> jnp.ndarray:
    """Hidden states [B, S, D] such that the i-th predicts token i.

    In models that were adapted from autoregressive ones (Dream) state i predicts token i + 1; the
    first token then has its own state, which does no harm since it is part of a prompt.
    """
    return jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1) if shifted else hidden


@functools.cache
def whole_canvas(
    config: TransformerConfig,
    *,
    shifted: bool = False,
    guidance: float = 0.0,
    block_causal: int = 0,
) -> Policy:
    """The model on every position in every round.

    Args:
      config: the architecture.
      shifted: whether logits at i predict token i + 1 (Dream).
      guidance: s of classifier-free guidance without a classifier or labels: logits
        u + (s + 1)(c - u), u from the same canvas with its prompt masked (LLaDA, appendix); 0
        for none.
      block_causal: block length of a model whose blocks see themselves and what is before them;
        0 for a model that sees everything.
    """

    def logits_of(params: ModelParams, view: View, tokens: jnp.ndarray) -> jnp.ndarray:
        S = tokens.shape[1]
        mask = visible(view, S)
        if block_causal:
            mask &= masks.block_diffusion(view.index[None], view.index, block_causal)
        out = transformer.apply(config, params["target"], tokens, mask=mask, with_logits=False)
        return transformer.unembed(config, params["target"], shift(out.hidden, shifted))

    def compute(params: ModelParams, view: View, store: Any, read: Reader) -> Call:
        logits, calls = logits_of(params, view, view.tokens), 1
        if guidance:
            prompt = view.index < view.prompt_lengths[:, None]
            blank = jnp.where(prompt, jnp.int32(config.mask_token_id), view.tokens)
            without = logits_of(params, view, blank)
            logits, calls = without + (guidance + 1) * (logits - without), 2
        count = jnp.full_like(view.ends, calls)
        return Call(store, read(logits, None), view.active, count, calls * view.ends, count)

    return Policy(lambda batch, slots: (), no_prefill, compute, keep)


class BlockStore(struct.PyTreeNode):
    """What the block caches keep.

    Attributes:
      cache: keys and values of the whole canvas; slot s holds position s.
      stale: bool [B], rows that came to a new block and need a call on the whole canvas.
    """

    cache: kv.KVCache
    stale: jnp.ndarray


@functools.cache
def block_cache(
    config: TransformerConfig,
    schedule: Schedule,
    kind: str,
    *,
    shifted: bool = False,
    everywhere: bool = False,
) -> Policy:
    """Approximate caches that are refreshed at every block (Wu et al., Fast-dLLM, 2505.22618).

    The first call of a block is on the whole canvas. Further calls are on the block and what
    follows it ('prefix'), or on the block alone ('dual'), over the cached rest. With a schedule
    that opens further blocks, these count as part of the block.

    Rows come to new blocks at different times. A call on the whole canvas is made when every row
    needs one, so that it serves all of them; until then the rows that need it wait. What a row
    writes does not depend on that.

    Args:
      config: the architecture.
      schedule: of the blocks.
      kind: 'prefix' or 'dual'.
      shifted: as in `whole_canvas`; the token before the block is then computed as well.
      everywhere: predict every position that is computed, and not only those that can be open;
        rules that look for the end of the text need it.
    """
    extra = int(shifted)

    def run(
        params: ModelParams, view: View, cache: kv.KVCache, read: Reader, width: int | None
    ) -> tuple[kv.KVCache, Prediction]:
        """A call on `width` tokens of each row from `start`; on the whole canvas for None."""
        S = view.tokens.shape[1]
        whole = width is None
        block = min(schedule.reach, S)
        reach = (width or S) if everywhere else block
        first = jnp.zeros_like(view.start) if whole else view.start - extra
        length = S if width is None else width + extra
        positions = first[:, None] + jnp.arange(length)
        held = jnp.clip(positions, 0, S - 1)
        out = transformer.apply(
            config,
            params["target"],
            jnp.take_along_axis(view.tokens, held, axis=1),
            positions=held,
            mask=visible(view, length),
            cache=cache,
            # Every position has its own slot; those outside the canvas are not written.
            slots=None if whole else jnp.where(positions < 0, S, positions),
            with_logits=False,
        )
        assert out.cache is not None
        if whole and everywhere:
            hidden = shift(out.hidden, shifted)
            return out.cache, read(transformer.unembed(config, params["target"], hidden), None)
        wanted = view.start[:, None] + jnp.arange(reach)
        if whole:
            source = jnp.clip(wanted - extra, 0, S - 1)
            hidden = jnp.take_along_axis(out.hidden, source[..., None], axis=1)
        else:
            hidden = out.hidden[:, :reach]
        return out.cache, read(transformer.unembed(config, params["target"], hidden), wanted)

    def compute(params: ModelParams, view: View, store: BlockStore, read: Reader) -> Call:
        S = view.tokens.shape[1]
        block = min(schedule.reach, S)
        refresh = (store.stale | ~view.active).all()
        served = view.active & (store.stale == refresh)
        stop = view.ends if kind == "prefix" else jnp.minimum(view.start + block, view.ends)
        size = jnp.where(served, stop - view.start, 0)
        widths = _widths(block, S) if kind == "prefix" else [block]
        # The narrowest call that holds what every served row needs.
        narrow = jnp.searchsorted(jnp.asarray(widths), size.max())
        which = jnp.where(refresh, 0, 1 + jnp.minimum(narrow, len(widths) - 1))

        def branch(width: int | None) -> Callable[[kv.KVCache], tuple[kv.KVCache, Prediction]]:
            return lambda cache: run(params, view, cache, read, width)

        cache = kv.truncate(store.cache, jnp.zeros_like(view.start))
        branches = [branch(width) for width in (None, *widths)]
        cache, prediction = kv.switch(which, branches, cache)
        one = jnp.ones_like(view.start)
        return Call(
            store=BlockStore(cache, store.stale & ~served),
            prediction=prediction,
            served=served,
            calls=one,
            positions=jnp.where(refresh, view.ends, size + extra),
            full=one * refresh,
        )

    def update(store: BlockStore, view: View, write: jnp.ndarray, moved: jnp.ndarray) -> BlockStore:
        del view, write
        return store.replace(stale=store.stale | moved)

    def init(batch: int, slots: int) -> BlockStore:
        return BlockStore(kv.create(config, batch, slots), jnp.ones((batch,), bool))

    return Policy(init, no_prefill, compute, update)


def _widths(block: int, slots: int) -> list[int]:
    """Widths that a call on a block and what follows is compiled for, ascending."""
    widths = [slots]
    while widths[-1] // 2 >= block:
        widths.append(widths[-1] // 2)
    if widths[-1] > block:
        widths.append(block)
    return widths[::-1]
