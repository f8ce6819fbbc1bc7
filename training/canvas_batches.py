"""Batches for masked diffusion: prompt, answer, and end-of-text up to the end of a canvas.

The canvas is what a masked diffusion model decodes on: all of it behind the prompt is masked at
first. End-of-text behind an answer is part of what is learned, so that a model says where its
answer ends by filling the rest with it (LLaDA, arXiv 2502.09992, section 2.3).
"""

from collections.abc import Iterable
from typing import Any

import grain
import numpy as np

from models.errors import InputError
from training.batches import Batch, TokenizedDocuments, own_process, own_rows


def train_batches(
    documents: TokenizedDocuments,
    *,
    batch_size: int,
    canvas: int,
    pad_id: int,
    seed: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Endless iterator over shuffled batches, whose position can be saved and restored.

    Each batch is a dict of int32 arrays with B = `batch_size` and T = `canvas`; of several
    processes each reads its own B / `process_count` rows of it, and all together have the rows that
    a single one would have:
      tokens: [B, T]; the document, then `pad_id`.
      prompt_lengths: [B], tokens of the prompt.
      answer_lengths: [B], tokens of the answer with its first end-of-text.

    `get_state` and `set_state` as `training.batches.train_batches`.

    Args:
      documents: with `loss_on='response'` for prompts and answers; otherwise all is answer.
      batch_size: rows of a batch, over all processes.
      canvas: tokens of a row.
      pad_id: the end-of-text id.
      seed: of the order, a new one each epoch.
      process_index, process_count: this process; None for JAX's own.

    Raises:
      InputError: a number out of range; a batch that processes cannot share; or (on reading) a
        document longer than the canvas.
    """
    process_index, process_count = own_process(process_index, process_count)
    _check(documents, batch_size, canvas, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} must be between 0 and 2**32 - 1")
    # Hashed as in training.batches: grain shuffles epoch e with seed + e.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(documents)).shuffle(seed=seed).repeat(None)
    own = own_rows(batch_size, process_index, process_count)
    return iter(_batches(documents, order, batch_size, own, canvas, pad_id))


def eval_batches(
    documents: TokenizedDocuments,
    *,
    batch_size: int,
    canvas: int,
    pad_id: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterable[Batch]:
    """One pass over `documents` in order; each iteration starts afresh. Fields as in training.

    What does not fill a batch of `batch_size` rows is left out; each process has its rows of every
    batch.

    Raises:
      InputError: as `train_batches`; fewer documents than one batch has rows.
    """
    process_index, process_count = own_process(process_index, process_count)
    _check(documents, batch_size, canvas, process_index, process_count)
    if len(documents) < batch_size:
        raise InputError(f"documents: {len(documents)} do not fill one batch of {batch_size} rows")
    own = own_rows(batch_size, process_index, process_count)
    order = grain.MapDataset.range(len(documents))
    return _batches(documents, order, batch_size, own, canvas, pad_id)


def _batches(
    documents: TokenizedDocuments,
    order: grain.MapDataset,
    batch_size: int,
    own: slice,
    canvas: int,
    pad_id: int,
) -> grain.IterDataset:
    """Batches of the documents that `order` names; only those of the rows `own` are read."""
    # Documents are in memory after the first epoch, so reader threads would only add overhead.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

    def rows(numbers: np.ndarray) -> Batch:
        found = [_row(documents[int(number)], canvas, pad_id) for number in numbers[own]]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    return order.batch(batch_size, drop_remainder=True).map(rows).to_iter_dataset(read)


def _row(document: dict[str, Any], canvas: int, pad_id: int) -> Batch:
    tokens, prompt = document["tokens"], document["prompt_length"]
    if tokens.size > canvas:
        raise InputError(f"canvas: {canvas} tokens do not hold a document of {tokens.size}")
    row = np.full(canvas, pad_id, np.int32)
    row[: tokens.size] = tokens
    return {
        "tokens": row,
        "prompt_lengths": np.array(prompt, np.int32),
        "answer_lengths": np.array(tokens.size - prompt, np.int32),
    }


def _check(
    documents: TokenizedDocuments,
    batch_size: int,
    canvas: int,
    process_index: int,
    process_count: int,
) -> None:
    sizes = (("batch_size", batch_size), ("canvas", canvas), ("process_count", process_count))
    for name, value in sizes:
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index: {process_index} must be at least 0 and below process_count "
            f"{process_count}"
        )
    if batch_size % process_count:
        raise InputError(
            f"batch_size: {batch_size} must be a multiple of the {process_count} processes"
        )
