"""Records of which predictions were final already: what a filter for unmasking learns from.

Each prompt is answered one token a step, which gives the final text, and then again by the greedy
oracle, which knows that text and writes whatever is right (Learn2PD, arXiv 2509.25188, section
2.5). Every step of the oracle is a record: the confidences of a block, and which of its predictions
were final.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from decoding import generation, stopping
from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.unmasking import greedy_oracle, selectors
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.method import unmasking
from decoding.unmasking.policies import whole_canvas
from models import files
from models.config import TransformerConfig
from models.errors import InputError
from training import checkpoints


class Records(NamedTuple):
    """What the oracle saw in n steps.

    Attributes:
      confidence: float32 [n, L], of each position of the block, visible ones included.
      correct: bool [n, L], whether the prediction was the final token.
      masked: bool [n, L], whether the position was a mask.
      step: int32 [n], steps of the block before.
      prompt: int32 [n], number of the prompt; its records follow each other.
    """

    confidence: np.ndarray
    correct: np.ndarray
    masked: np.ndarray
    step: np.ndarray
    prompt: np.ndarray

    def of(self, chosen: np.ndarray) -> "Records":
        """Those that a mask or an index chooses."""
        return Records(*(values[chosen] for values in self))


def collect(
    config: TransformerConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    block_length: int,
    new_tokens: int,
    batch_size: int = 32,
) -> Records:
    """Answers every prompt twice, at temperature 0, and keeps what the oracle saw.

    Args:
      config: of the target, a bidirectional model.
      params: its parameters.
      prompts: token ids.
      block_length: L.
      new_tokens: of a canvas, a multiple of L.
      batch_size: prompts at a time.

    Raises:
      InputError: a canvas that blocks do not fill, prompts that do not fit.
    """
    if new_tokens % block_length:
        raise InputError(
            f"new_tokens: {new_tokens} must be a multiple of block_length, {block_length}"
        )
    stop = stopping.StopConfig(new_tokens, (), config.max_position)
    generation.check_prompts(prompts, config, stop)
    if (longest := max(map(len, prompts))) + new_tokens > config.max_position:
        raise InputError(
            f"new_tokens: {new_tokens} after a prompt of {longest} tokens exceed a context of "
            f"{config.max_position}"
        )
    one_by_one = unmasking(
        "llada", config, SamplingConfig(temperature=0.0), Schedule(block_length),
        selectors.quota(block_length), whole_canvas(config), early_stop=False,
    )  # fmt: skip
    oracle = greedy_oracle.method(config, block_length, new_tokens)
    found: list[Records] = []
    # Prompts of like lengths together, so that canvases are as small as can be.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in tqdm.trange(0, len(prompts), batch_size, desc="oracle", leave=False):
        numbers = order[first : first + batch_size]
        numbers += numbers[-1:] * (batch_size - len(numbers))  # one shape for all batches
        rows = [prompts[i] for i in numbers]
        answered, _ = _run({"target": params}, rows, one_by_one, stop)
        state, _ = _run({"target": params, greedy_oracle.ROLE: answered.tokens}, rows, oracle, stop)
        log: greedy_oracle.Log = jax.device_get(state.inner.memory)
        for row in range(len(dict.fromkeys(numbers))):
            count = log.count[row]
            fields = (log.confidence, log.correct, log.masked, log.step)
            confidence, correct, masked, step = (np.asarray(f)[row, :count] for f in fields)
            prompt = np.full(count, numbers[row], np.int32)
            found.append(Records(confidence, correct, masked, step, prompt))
    found.sort(key=lambda records: records.prompt[0])
    return Records(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _run(
    params: ModelParams,
    rows: Sequence[Sequence[int]],
    method: Method,
    stop: stopping.StopConfig,
) -> tuple[Any, int]:
    """The state of a finished run."""
    state, slots = generation.begin(params, rows, method, stop)
    return generation.advance(params, state, slots, method, stop)


def steps_per_block(records: Records) -> np.ndarray:
    """The oracle's steps in each block that it went through: int [blocks]."""
    starts = np.flatnonzero(records.step == 0)
    return np.diff([*starts, len(records.step)])


def save(path: str | os.PathLike[str], records: Records) -> None:
    """Writes a safetensors file, whole or not at all; InputError when the disk refuses."""
    content = safetensors.numpy.save(records._asdict())
    with checkpoints.disk_errors("cannot write records", pathlib.Path(path).parent):
        files.write_bytes(pathlib.Path(path), content)


def load(path: str | os.PathLike[str]) -> Records:
    """Reads what `save` wrote; raises InputError when it is missing or something else."""
    try:
        return Records(**safetensors.numpy.load_file(path))
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise InputError(f"records: {str(path)!r} cannot be read ({error})") from None
