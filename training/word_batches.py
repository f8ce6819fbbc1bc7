"""From documents to packed batches of words, for hierarchical models: split, pack, batch, resume.

As `training.batches`, with a word in the place of a token: a row holds whole documents, each a
segment of its own; longer ones are cut into windows, and no target is lost where they are cut. A
document is its words and the end of the document.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from models import words
from models.errors import InputError
from models.hierarchical import HierarchicalConfig

Batch = dict[str, np.ndarray]
# Text -> the units of its words, none of them empty or longer than the model allows.
Split = Callable[[str], Sequence[Sequence[int]]]

# First fit chooses among this many words' worth of rows; see `training.batches`.
_PACKING_WORDS = 2**17
_MIN_PACKING_ROWS, _MAX_PACKING_ROWS = 16, 1024
_MAX_CACHED_UNITS = 2**27
FIELDS = ("source", "source_lengths", "target", "target_lengths", "target_bytes", "positions")


class WordDocuments:
    """A random-access data source of documents as words, each a dict of

      source: int32 [n, C], the words to read: nothing first, then every word.
      source_lengths: int32 [n]; 0 for the nothing that the first word is written after.
      target: int32 [n, C], the words to write: every word, then the end of the document.
      target_lengths: int32 [n]; 1 for the end of the document.
      target_bytes: int32 [n], bytes of text that the target stands for; 0 for the end.

    A document is split at most once in a process, as long as memory allows.

    Args:
      examples: random-access data source of dicts with the text field 'text'.
      config: gives C, the rule for text as bytes, and the end of documents.
      split: for units other than bytes; None for the config's rule.
      count_bytes: bytes of text that the units of a word stand for.

    Raises:
      InputError: no examples, or none with 'text'; (on reading) a word that is empty or too long.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        config: HierarchicalConfig,
        *,
        split: Split | None = None,
        count_bytes: Callable[[Sequence[int]], int] = len,
    ):
        if not len(examples):
            raise InputError("examples: the data source has no examples")
        if "text" not in examples[0]:
            raise InputError(f"examples: no field 'text' among {', '.join(sorted(examples[0]))}")
        if split is None and config.units != "bytes":
            raise InputError(f"split: needed for a model whose units are {config.units!r}")
        self._examples = examples
        self._config = config
        self._split = split or (lambda text: words.split(text, config.rule, config.max_word))
        self._count_bytes = count_bytes
        self._cache: dict[int, Batch] = {}
        self._cached_units = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Batch:
        with self._lock:
            document = self._cache.get(index)
            if document is None:
                document = self._read(self._examples[index]["text"])
                if self._cached_units + document["source"].size <= _MAX_CACHED_UNITS:
                    self._cache[index] = document
                    self._cached_units += document["source"].size
            return document

    def _read(self, text: str) -> Batch:
        config = self._config
        found = self._split(text)
        if bad := [word for word in found if not 0 < len(word) <= config.max_word]:
            raise InputError(
                f"split: a word has {len(bad[0])} units; allowed: 1 to {config.max_word}"
            )
        lengths = np.array([len(word) for word in found], np.int32)
        units = np.zeros((len(found), config.max_word), np.int32)
        units[np.arange(config.max_word) < lengths[:, None]] = [u for word in found for u in word]
        end = np.zeros((1, config.max_word), np.int32)
        end[0, 0] = config.document_end
        one, none = np.ones(1, np.int32), np.zeros(1, np.int32)
        return {
            "source": np.concatenate([0 * end, units]),
            "source_lengths": np.concatenate([none, lengths]),
            "target": np.concatenate([units, end]),
            "target_lengths": np.concatenate([lengths, one]),
            "target_bytes": np.array([*map(self._count_bytes, found), 0], np.int32),
        }


def train_batches(
    documents: WordDocuments,
    *,
    batch_size: int,
    num_words: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of packed batches in random order, whose position can be saved.

    Each batch is a dict of arrays, with B = `batch_size` and N = `num_words`: the fields of
    `WordDocuments` as [B, N, C] and [B, N], and
      segment_ids: int32 [B, N]; 1, 2, ... for the documents of a row, 0 for padding.
      positions: int32 [B, N] of the words to read, from 0 in each segment.

    Args:
      documents: what to pack.
      batch_size: rows of this process's batches.
      num_words: words of a row.
      seed: of the order.
      process_index, process_count: this process reads every `process_count`-th document.

    Raises:
      InputError: a number out of range, or fewer documents than processes.
    """
    _check(batch_size, num_words)
    if len(documents) < process_count:
        raise InputError(
            f"process_count: {process_count} processes cannot share {len(documents)} documents"
        )
    order = int(np.random.SeedSequence(seed).generate_state(1)[0])
    source = grain.MapDataset.source(documents)[process_index::process_count]
    rows = _pack(source.shuffle(seed=order).repeat(), num_words, order)
    return iter(rows.batch(batch_size))


def eval_batches(documents: WordDocuments, *, batch_size: int, num_words: int) -> Iterable[Batch]:
    """One pass in order; each iteration starts afresh. The last batch is filled up with padding."""
    _check(batch_size, num_words)

    def fill(rows: Sequence[Batch]) -> Batch:
        return grain_experimental.batch_and_pad(rows, batch_size=batch_size)

    rows = _pack(grain.MapDataset.source(documents), num_words, None)
    return rows.batch(batch_size, drop_remainder=False, batch_fn=fill)


def _pack(documents: grain.MapDataset, num_words: int, order: int | None) -> grain.IterDataset:
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    windows = grain_experimental.FlatMapIterDataset(
        documents.to_iter_dataset(read), _CutIntoWindows(num_words)
    )
    packed = grain_experimental.FirstFitPackIterDataset(
        windows,
        length_struct=dict.fromkeys(FIELDS, num_words),
        num_packing_bins=int(
            np.clip(_PACKING_WORDS // num_words, _MIN_PACKING_ROWS, _MAX_PACKING_ROWS)
        ),
        shuffle_bins=order is not None,
        seed=order or 0,
    )
    return packed.map(_rename)


class _CutIntoWindows(grain_experimental.FlatMapTransform):
    """A document as windows of at most `num_words` words, each with positions of its own."""

    def __init__(self, num_words: int):
        self._num_words = num_words

    def flat_map(self, element: Batch) -> list[Batch]:
        windows = []
        for start in range(0, len(element["source"]), self._num_words):
            window = {name: x[start : start + self._num_words] for name, x in element.items()}
            # What stands before the first word has no position: nothing looks at it.
            place = np.arange(len(window["source"]), dtype=np.int32) - (start == 0)
            windows.append(window | {"positions": np.maximum(place, 0)})
        return windows


def _rename(row: Batch) -> Batch:
    return {name: row[name] for name in FIELDS} | {"segment_ids": row["source_segment_ids"]}


def _check(batch_size: int, num_words: int) -> None:
    for name, value in (("batch_size", batch_size), ("num_words", num_words)):
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
