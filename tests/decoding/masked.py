"""A tiny bidirectional model and a naive, one-row reference of block-wise unmasking."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import generation, loop, stopping
from models import cache as kv
from models import transformer
from models.config import TransformerConfig
from tests.decoding import tiny
from tests.models import random_models

CONFIG = tiny.MASKED
MASK, EOS = CONFIG.mask_token_id, CONFIG.eos_token_ids[0]
NEW = 24
STOP = stopping.StopConfig(NEW, (EOS,))
ENDLESS = stopping.StopConfig(NEW)
SLOTS = 64  # of the references: what the longest of tiny.PROMPTS and its canvas need


@functools.cache
def params() -> dict[str, Any]:
    """Random parameters, with logits that are sharp enough for thresholds to matter."""
    target = dict(random_models.params(CONFIG))
    target["lm_head"] = jax.tree.map(lambda x: 2 * x, target["lm_head"])
    return {"target": target}


def decode(method: loop.Method, rows: Sequence[Sequence[int]] = tiny.PROMPTS, **kwargs: Any):
    return generation.generate(params(), rows, method, kwargs.pop("stop", STOP), **kwargs)


@functools.cache
def _forward(config: TransformerConfig, width: int) -> Callable[..., Any]:
    """Call on `width` tokens from `first` over a cache; keys beyond `end` are hidden."""

    @jax.jit
    def run(model: Any, tokens: jnp.ndarray, first: int, end: int, cache: kv.KVCache) -> Any:
        mask = jnp.broadcast_to(jnp.arange(2 * SLOTS) < end, (1, width, 2 * SLOTS))
        cache = kv.truncate(cache, jnp.full((1,), first))
        out = transformer.apply(config, model, tokens[None], mask=mask, cache=cache)
        return out.logits[0], out.cache

    return run


class Reference:
    """Logits of one row, with the keys and values that the last calls left in each slot."""

    def __init__(self) -> None:
        self.cache = kv.create(CONFIG, 1, 2 * SLOTS)

    def __call__(self, canvas: np.ndarray, first: int, last: int) -> np.ndarray:
        """Logits [last - first, V] from a call on canvas[first:last], its mask token ruled out."""
        # Padding beyond the canvas is hidden; within it there must be none.
        width = SLOTS if last == len(canvas) else last - first
        tokens = np.zeros(width, np.int32)
        tokens[: last - first] = canvas[first:last]
        logits, self.cache = _forward(CONFIG, width)(
            params()["target"], jnp.asarray(tokens), first, len(canvas), self.cache
        )
        found = np.array(logits[: last - first], np.float64)
        found[:, MASK] = -np.inf
        return found


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# (masked positions that may be written, their probabilities, step of the block, masks that the
# block had) -> positions to write.
Pick = Callable[[list[int], dict[int, float], int, int], list[int]]


def unmask(
    prompt: Sequence[int],
    pick: Pick,
    *,
    new: int = NEW,
    block: int = 8,
    cache: str = "none",
    shifted: bool = False,
) -> tuple[list[int], int]:
    """The canvas of one row after greedy unmasking without early stop, and the calls it took."""
    canvas = np.array([*prompt, *[MASK] * new])
    end, model, calls = len(canvas), Reference(), 0
    for start in range(len(prompt), end, block or end):
        stop = min(start + (block or end), end)
        step, size = 0, stop - start
        while (canvas[start:stop] == MASK).any():
            first, last = 0, end
            if step and cache != "none":
                first, last = start - shifted, {"prefix": end, "dual": stop}[cache]
            logits = model(canvas, first, last)
            if shifted:
                logits = np.concatenate([logits[:1], logits[:-1]])
            law = softmax(logits)
            among = [i for i in range(start, stop) if canvas[i] == MASK]
            sure = {i: law[i - first].max() for i in among}
            for i in pick(among, sure, step, size):
                canvas[i] = logits[i - first].argmax()
            step, calls = step + 1, calls + 1
    return canvas.tolist(), calls
