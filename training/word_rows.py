"""Documents as rows of words, in the forms that two kinds of model read: bytes, and sub-words.

A row is [CLS], words of one document, [SEP]. It holds the bytes of every word, for a model of words
(`models.cross_attention_words`), and the same words as sub-word tokens, for a model of those, with
the places of each word's tokens; so both are trained and measured on the same words.
"""

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from models import cross_attention_words as caw
from models import spaced_words, words
from models.errors import InputError
from models.word_pieces import EOS_ID, WordPieces

Batch = dict[str, np.ndarray]
_MAX_CACHED_WORDS = 2**24


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The sizes of a row.

    Attributes:
      num_words: N, special words included.
      width: C, bytes of a word at most, flag included.
      num_slots: J, pieces of a word that are predicted at most.
      num_tokens: T, sub-word tokens of a row; it ends early where its words have more.
      end_of_text: whether [EOS] follows a document's last word: a target of causal models.
    """

    num_words: int = 48
    width: int = 17
    num_slots: int = 6
    num_tokens: int = 128
    end_of_text: bool = False

    def __post_init__(self) -> None:
        for field, least in (("num_words", 3), ("width", 5), ("num_slots", 1)):
            if (value := getattr(self, field)) < least:
                raise InputError(f"rows.{field}: {value} must be at least {least}")
        if self.num_tokens < self.width + 2:
            raise InputError(
                f"rows.num_tokens: {self.num_tokens} must be at least {self.width + 2}, a longest "
                "word and two special ones"
            )


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a text and their pieces.

    Attributes:
      symbols: int32 [n, C].
      lengths: int32 [n].
      pieces: ids of each word's pieces.
    """

    symbols: np.ndarray
    lengths: np.ndarray
    pieces: tuple[tuple[int, ...], ...]


def words_of(text: str, pieces: WordPieces, shape: RowShape) -> Words:
    """Splits a text; words longer than the width are cut (`spaced_words.split`)."""
    found = spaced_words.split(text, shape.width - 1)
    symbols, lengths = words.pack(found, shape.width)
    return Words(symbols, lengths, tuple(map(pieces.encode, found)))


def rows_of(text: Words, pieces: WordPieces, shape: RowShape) -> list[Batch]:
    """The rows of a text, in order; no word is lost.

    Returns:
      Dicts of int32 arrays:
        symbols [N, C], lengths [N]: bytes of words; 0 for special words.
        special [N]: of `caw.SPECIALS`, or `caw.WORD`.
        pieces [N, J], counts [N]: the first pieces of each word and how many it has; [EOS] has
          the end of the text for its piece, other special words none.
        tokens [T]: sub-word ids; special words are V + their number.
        words [T]: the word of each token; N on padding.
        first [N]: the place of each word's first token.
    """
    rows: list[Batch] = []
    start, total = 0, len(text.lengths)
    while start < total or not rows:
        stop, tokens = start, 2 + shape.end_of_text
        room = shape.num_words - tokens
        while stop < total and stop - start < room:
            tokens += len(text.pieces[stop])
            if tokens > shape.num_tokens:
                break
            stop += 1
        ends = shape.end_of_text and stop == total
        rows.append(_row(text, start, stop, ends, pieces.vocab_size, shape))
        start = stop
    return rows


def _row(text: Words, start: int, stop: int, ends: bool, vocab_size: int, shape: RowShape) -> Batch:
    N, J, T = shape.num_words, shape.num_slots, shape.num_tokens
    count = stop - start
    inside = slice(1, 1 + count)
    row = {
        "symbols": np.zeros((N, shape.width), np.int32),
        "lengths": np.zeros(N, np.int32),
        "special": np.full(N, caw.PAD, np.int32),
        "pieces": np.zeros((N, J), np.int32),
        "counts": np.zeros(N, np.int32),
        "tokens": np.full(T, vocab_size + caw.PAD, np.int32),
        "words": np.full(T, N, np.int32),
        "first": np.zeros(N, np.int32),
    }
    row["symbols"][inside] = text.symbols[start:stop]
    row["lengths"][inside] = text.lengths[start:stop]
    tail = [caw.EOS] * ends + [caw.SEP]
    row["special"][: 1 + count + len(tail)] = [caw.CLS, *[caw.WORD] * count, *tail]
    spelled = [(vocab_size + caw.CLS,), *text.pieces[start:stop]]
    spelled += [(vocab_size + special,) for special in tail]
    place = 0
    for number, ids in enumerate(spelled):
        row["first"][number] = place
        row["tokens"][place : place + len(ids)] = ids
        row["words"][place : place + len(ids)] = number
        place += len(ids)
        if row["special"][number] == caw.WORD:
            row["counts"][number] = len(ids)
            row["pieces"][number, : len(ids)] = ids[:J]
        elif row["special"][number] == caw.EOS:
            row["counts"][number], row["pieces"][number, 0] = 1, EOS_ID
    return row


class WordDocuments(Sequence):
    """A random-access source of `Words`, each text split at most once (up to a limit).

    Args:
      examples: random-access source of dicts with 'text'.
      pieces: the sub-words.
      shape: of rows.
    """

    def __init__(self, examples: Sequence[Any], pieces: WordPieces, shape: RowShape):
        if not len(examples):
            raise InputError("examples: the data source has no examples")
        self._examples, self.pieces, self.shape = examples, pieces, shape
        self._cache: dict[int, Words] = {}
        self._cached = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        with self._lock:
            found = self._cache.get(index)
            if found is None:
                found = words_of(self._examples[index]["text"], self.pieces, self.shape)
                if self._cached + len(found.lengths) <= _MAX_CACHED_WORDS:
                    self._cache[index] = found
                    self._cached += len(found.lengths)
            return found

    def counts(self) -> dict[str, int]:
        """Words, words cut at the width, and words of more pieces than are predicted."""
        found = {"words": 0, "cut": 0, "beyond_slots": 0}
        for i in range(len(self)):
            document = self[i]
            found["words"] += len(document.lengths)
            found["cut"] += spaced_words.count_overlong(
                [self._examples[i]["text"]], self.shape.width - 1
            ).overlong
            found["beyond_slots"] += sum(len(ids) > self.shape.num_slots for ids in document.pieces)
        return found


class _Rows(grain_experimental.FlatMapTransform):
    def __init__(self, documents: WordDocuments):
        self._documents = documents

    def flat_map(self, element: Words) -> list[Batch]:
        return rows_of(element, self._documents.pieces, self._documents.shape)


def train_batches(
    documents: WordDocuments,
    *,
    batch_size: int,
    seed: int = 0,
    window: int = 4096,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches of `rows_of`, stacked; the position can be saved and restored.

    Documents come in a new order each epoch, and rows are shuffled within windows of `window`, so
    that one document does not fill a batch.

    Raises:
      InputError: fewer documents than processes.
    """
    if len(documents) < process_count:
        raise InputError(
            f"process_count: {process_count} processes cannot share {len(documents)} documents"
        )
    # Hashed: grain shuffles epoch e with seed + e.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    source = grain.MapDataset.source(documents)[process_index::process_count]
    texts = source.shuffle(seed=seed).repeat(None).to_iter_dataset(read)
    rows = grain_experimental.FlatMapIterDataset(texts, _Rows(documents))
    shuffled = grain_experimental.WindowShuffleIterDataset(rows, window_size=window, seed=seed)
    return iter(shuffled.batch(batch_size, drop_remainder=True))


def eval_batches(documents: WordDocuments, *, batch_size: int, num_rows: int) -> list[Batch]:
    """Whole batches of about `num_rows` rows from all over the documents, at least one."""
    rows = [
        row
        for i in range(len(documents))
        for row in rows_of(documents[i], documents.pieces, documents.shape)
    ]
    rows = rows[:: max(1, len(rows) // num_rows)]
    return in_batches(rows, batch_size) or in_batches(rows * batch_size, batch_size)[:1]


def in_batches(rows: Sequence[Batch], batch_size: int) -> list[Batch]:
    """Rows stacked into whole batches; what is left over is dropped."""
    return [
        stack(rows[first : first + batch_size])
        for first in range(0, len(rows) - batch_size + 1, batch_size)
    ]


def stack(rows: Iterable[Batch]) -> Batch:
    """Rows as one batch."""
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
