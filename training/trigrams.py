"""Tri-gram stores of a corpus, which ADED's drafts can begin with; saved as safetensors.

    examples = registry.load("stdlib_code", "train")
    documents = batches.TokenizedDocuments(examples, tokenizer)
    store = trigrams.build((d["tokens"] for d in documents), slots=2**18)
    trigrams.save("code.trigrams.safetensors", store)

    hot = generation.HotStart(trigrams.load("code.trigrams.safetensors"))

The tokens must be those of the target's tokeniser (`training.corpus_stores` sees to that, and
keeps what it counted). Published stores are counted from UltraChat,
ShareGPT or The Stack (arXiv 2407.12021).
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from decoding.speculative import aded, trigram
from models.errors import InputError
from training import checkpoints

# A tri-gram is counted as one integer, so many bits an id.
_ID_BITS = 21
# Tri-grams held before equal ones are merged: bounds the memory of a large corpus.
_CHUNK = 2**24
# A store's file in a directory of its own.
STORE_FILE = "trigrams.safetensors"
_FIELDS = ("keys", "successors", "weights")


class Counts(NamedTuple):
    """How often each tri-gram occurs.

    Attributes:
      trigrams: int64 [n, 3], distinct, in lexicographic order.
      counts: int64 [n].
    """

    trigrams: np.ndarray
    counts: np.ndarray


def count(documents: Iterable[Sequence[int]]) -> Counts:
    """Counts every tri-gram inside every document; those of fewer than 3 tokens have none.

    Raises:
      InputError: a token id that is negative or has more than 21 bits.
    """
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    pending: list[np.ndarray] = []
    waiting = 0
    for number, document in enumerate(documents):
        ids = np.asarray(document, np.int64)
        if len(ids) < 3:
            continue
        if ids.min() < 0 or ids.max() >= 1 << _ID_BITS:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(
                f"document {number}: token id {bad}; allowed: 0 to {(1 << _ID_BITS) - 1}"
            )
        pending.append((ids[:-2] << 2 * _ID_BITS) | (ids[1:-1] << _ID_BITS) | ids[2:])
        waiting += len(ids) - 2
        if waiting >= _CHUNK:
            keys, counts = _merge(keys, counts, pending)
            pending, waiting = [], 0
    keys, counts = _merge(keys, counts, pending)
    mask = (1 << _ID_BITS) - 1
    parts = (keys >> 2 * _ID_BITS, (keys >> _ID_BITS) & mask, keys & mask)
    return Counts(np.stack(parts, axis=1), counts)


def _merge(
    keys: np.ndarray, counts: np.ndarray, new: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Counts with one more for each of the `new` keys."""
    added = np.concatenate([keys, *new])
    weights = np.ones(len(added), np.int64)
    weights[: len(keys)] = counts
    merged, index = np.unique(added, return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, index, weights)
    return merged, total


def build(
    documents: Iterable[Sequence[int]],
    *,
    slots: int = 2**18,
    top: int = trigram.CORPUS_WIDTH,
    width: int = trigram.WIDTH,
) -> trigram.Store:
    """The store of a corpus; see `trigram.from_counts`.

    Args:
      documents: token ids of each.
      slots: S; about twice the pairs of the corpus loses none of them.
      top: successors kept of a pair; published: 12.
      width: R, room for successors, those that are learned later included.

    Raises:
      InputError: sizes that do not fit each other, or as `count`.
    """
    if slots < trigram.PROBES:
        raise InputError(f"slots: {slots} must be at least {trigram.PROBES}")
    if not 1 <= top <= width:
        raise InputError(f"top: {top} must be between 1 and width, {width}")
    found = count(documents)
    store = trigram.from_counts(*found, slots, top=top, width=width)
    logging.info(
        "tri-gram store: %d of %d pairs in %d slots, %d bytes",
        (store.keys[:, 0] != trigram.EMPTY).sum(),
        len(np.unique(found.trigrams[:, :2], axis=0)),
        slots,
        store.num_bytes,
    )
    return store


def save(path: str | os.PathLike[str], store: trigram.Store) -> None:
    """Writes a store, from a corpus or out of a `HotStart`, to a safetensors file.

    Raises:
      InputError: the file cannot be written; what was at `path` is still there.
    """
    path = Path(path)
    content = safetensors.numpy.save({name: np.asarray(getattr(store, name)) for name in _FIELDS})
    with checkpoints.disk_errors("cannot write the store", path.parent):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> trigram.Store:
    """The store in a file, on the device: what `generation.HotStart` holds for ADED.

    Raises:
      InputError: the file is missing, corrupt, or holds no store.
    """
    try:
        tensors: dict[str, Any] = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"store: {str(path)!r} cannot be read ({error})") from None
    if sorted(tensors) != sorted(_FIELDS):
        raise InputError(
            f"store: {str(path)!r} holds {', '.join(sorted(tensors)) or 'nothing'}; allowed: "
            f"{', '.join(_FIELDS)}"
        )
    return aded.initial_memory(trigram.Store(**tensors))
