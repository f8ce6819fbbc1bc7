"""Batches for masked diffusion: prompt, answer, and end-of-text up to the end of a canvas.

The canvas is what a masked diffusion model decodes on: all of it behind the prompt is masked at
first. End-of-text behind an answer is part of what is learned, so that a model says where its
answer ends by filling the rest with it (LLaDA, arXiv 2502.09992, section 2.3).
"""

import functools
from collections.abc import Iterable
from typing import Any

import grain
import numpy as np

from models.errors import InputError
from training.batches import Batch, TokenizedDocuments


def train_batches(
    documents: TokenizedDocuments,
    *,
    batch_size: int,
    canvas: int,
    pad_id: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless iterator over shuffled batches, whose position can be saved and restored.

    Each batch is a dict of int32 arrays with B = `batch_size` and T = `canvas`:
      tokens: [B, T]; the document, then `pad_id`.
      prompt_lengths: [B], tokens of the prompt.
      answer_lengths: [B], tokens of the answer with its first end-of-text.

    `get_state` and `set_state` as `training.batches.train_batches`.

    Args:
      documents: with `loss_on='response'` for prompts and answers; otherwise all is answer.
      batch_size: rows of this process's batches.
      canvas: tokens of a row.
      pad_id: the end-of-text id.
      seed: of the order, a new one each epoch.
      process_index, process_count: this process reads every `process_count`-th document.

    Raises:
      InputError: a number out of range; fewer documents than processes; or (on reading) a
        document longer than the canvas.
    """
    _check(documents, batch_size, canvas, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} must be between 0 and 2**32 - 1")
    # Hashed as in training.batches: grain shuffles epoch e with seed + e.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    source = grain.MapDataset.source(documents)[process_index::process_count]
    rows = source.shuffle(seed=seed).repeat(None)
    return iter(_batches(rows, batch_size, canvas, pad_id))


def eval_batches(
    documents: TokenizedDocuments,
    *,
    batch_size: int,
    canvas: int,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterable[Batch]:
    """One pass over `documents` in order; each iteration starts afresh. Fields as in training.

    What does not fill a batch of `process_count * batch_size` rows is left out; each process has
    its rows of every batch.

    Raises:
      InputError: as `train_batches`; fewer documents than one batch has rows.
    """
    _check(documents, batch_size, canvas, process_index, process_count)
    together = batch_size * process_count
    if len(documents) < together:
        raise InputError(f"documents: {len(documents)} do not fill one batch of {together} rows")
    own = slice(process_index * batch_size, (process_index + 1) * batch_size)
    return _batches(grain.MapDataset.source(documents), together, canvas, pad_id).map(
        lambda batch: {name: value[own] for name, value in batch.items()}
    )


def _batches(
    documents: grain.MapDataset, batch_size: int, canvas: int, pad_id: int
) -> grain.IterDataset:
    # Documents are in memory after the first epoch, so reader threads would only add overhead.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = documents.map(functools.partial(_row, canvas=canvas, pad_id=pad_id))
    return rows.batch(batch_size, drop_remainder=True).to_iter_dataset(read)


def _row(document: dict[str, Any], *, canvas: int, pad_id: int) -> Batch:
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
    if len(documents) < process_count:
        raise InputError(
            f"process_count: {process_count} processes cannot share {len(documents)} documents"
        )
