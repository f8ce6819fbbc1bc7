"""What a method writes on a canvas, round by round: for an animation that needs no script."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from decoding import generation
from decoding.loop import Method, ModelParams
from decoding.stopping import StopConfig
from models.tokenizer import Tokenizer


def record(
    params: ModelParams,
    prompt: Sequence[int],
    method: Method,
    stop: StopConfig,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The history of one row's canvas.

    Args:
      params: parameters by role.
      prompt: token ids.
      method: with a canvas.
      stop: stop rules.
      tokenizer: of the target.
      seed: base of all randomness.

    Returns:
      `rounds`, how many there were, and `cells`, a list for each position of the finished text:
      pairs of a round and the text that it wrote there. A position that was edited has several.
    """
    assert method.canvas is not None
    state, slots = generation.begin(params, [prompt], method, stop, seed=seed)
    start = len(prompt)
    before = np.asarray(state.tokens[0])
    changes: list[list[tuple[int, int]]] = [[] for _ in before]
    rounds = 0
    while bool(state.active[0]):
        state, slots = generation.advance(params, state, slots, method, stop, rounds=1)
        rounds += 1
        now = np.asarray(state.tokens[0])
        for position in np.flatnonzero(now != before):
            changes[position].append((rounds, int(now[position])))
        before = now
    end = int(state.lengths[0])
    return {
        "rounds": rounds,
        "cells": [
            [[number, tokenizer.decode([token])] for number, token in changes[position]]
            for position in range(start, end)
        ],
    }
