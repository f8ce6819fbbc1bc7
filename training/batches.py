"""From documents to packed batches: tokenise, pack, batch, shuffle, shard, resume.

A row holds whole documents, each a segment of its own; a document longer than a row is cut into
windows, each a segment. Attention stays inside a segment, so a document's tokens do not depend
on what it is packed with. Packing is grain's first fit over a group of rows, which are emitted
in random order when shuffling.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
from grain import experimental as grain_experimental

from models import distributed
from models.errors import InputError, check_choice

Batch = dict[str, np.ndarray]

# First fit chooses among this many tokens' worth of rows: enough to leave little padding and to
# mix a long document's windows with many others (a short run must not see a few files only).
_PACKING_TOKENS = 2**21
_MIN_PACKING_ROWS, _MAX_PACKING_ROWS = 16, 8192
# Tokenised documents kept in memory, in tokens of 8 bytes; further ones are tokenised again in
# each epoch, so that a corpus larger than memory can be read.
_MAX_CACHED_TOKENS = 2**27
_PACKED = ("tokens", "targets", "loss_mask", "target_bytes")
LOSS_ON = ("all", "response")


class Tokenizer(Protocol):
    """What this module needs of a tokeniser."""

    vocab_size: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class TokenizedDocuments:
    """A random-access data source of tokenised documents, each a dict of

      tokens: int32 [n]; ends with the tokeniser's first EOS id, if it has one.
      token_bytes: int32 [n], the UTF-8 bytes of text that each token stands for. A token that is
        part of a character gets its even share of the bytes that whole tokens leave, so that a
        document's sum is exactly its length in bytes. 0 for EOS.
      prompt_length: the tokens that no loss is taken on.

    A document is tokenised at most once in a process (up to `_MAX_CACHED_TOKENS`): give the
    same object to several iterators to share that.

    Args:
      examples: random-access data source of dicts with the text field 'text', or with
        'question' and 'solution', whose concatenation is the text, for `loss_on='response'`.
      tokenizer: see `Tokenizer`.
      loss_on: 'all' tokens, or only those of the 'response'. Its two parts are tokenised
        separately, as they are when a prompt is continued.

    Raises:
      InputError: unknown `loss_on`, no examples, a field that is missing, or (on reading) a
        token id outside the vocabulary.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        loss_on: str = "all",
    ):
        check_choice("loss_on", loss_on, LOSS_ON)
        if not len(examples):
            raise InputError("examples: the data source has no examples")
        self._fields = ("text",) if loss_on == "all" else ("question", "solution")
        for field in self._fields:
            if field not in examples[0]:
                raise InputError(
                    f"loss_on: {loss_on!r} needs the field {field!r}, which is not among "
                    f"{', '.join(sorted(examples[0]))} (text_field names another text field)"
                )
        self._examples = examples
        self._tokenizer = tokenizer
        self._count_bytes = _ByteCounter(tokenizer)
        self._cache: dict[int, dict[str, Any]] = {}
        self._cached_tokens = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # One thread tokenises at a time, or two could do the same document.
        with self._lock:
            document = self._cache.get(index)
            if document is None:
                document = self._tokenize(self._examples[index])
                if self._cached_tokens + document["tokens"].size <= _MAX_CACHED_TOKENS:
                    self._cache[index] = document
                    self._cached_tokens += document["tokens"].size
            return document

    def _tokenize(self, example: Mapping[str, Any]) -> dict[str, Any]:
        texts = [example[field] for field in self._fields]
        parts = [self._tokenizer.encode(text) for text in texts]
        tokens = np.array([token for part in parts for token in part], np.int32)
        vocab_size = self._tokenizer.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise InputError(
                f"tokenizer: it made the token id {wrong}; its vocab_size is {vocab_size}"
            )
        sizes = self._count_bytes(tokens, sum(len(text.encode()) for text in texts))
        if tokens.size and self._tokenizer.eos_ids:
            tokens = np.append(tokens, np.int32(self._tokenizer.eos_ids[0]))
            sizes = np.append(sizes, np.int32(0))
        return {
            "tokens": tokens,
            "token_bytes": sizes,
            "prompt_length": sum(len(part) for part in parts[:-1]),
        }


class _ByteCounter:
    """Bytes of text per token, from what each token decodes to after a visible character.

    After one, since some decoders strip a leading space.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._before = list(tokenizer.encode("a"))
        self._sizes: dict[int, int] = {}

    def __call__(self, tokens: np.ndarray, total: int) -> np.ndarray:
        """Bytes of each of `tokens` int32 [n], whose text has `total` bytes: int32 [n]."""
        ids, index = np.unique(tokens, return_inverse=True)
        sizes = np.array([self._size(int(token)) for token in ids], np.int32)[index]
        partial = np.flatnonzero(sizes < 0)
        if partial.size:
            left = max(0, total - int(sizes[sizes > 0].sum()))
            shares = np.arange(1, partial.size + 1) * left // partial.size
            sizes[partial] = np.diff(shares, prepend=0)
        return sizes

    def _size(self, token: int) -> int:
        """UTF-8 bytes that `token` decodes to; -1 when it is part of a character."""
        size = self._sizes.get(token)
        if size is None:
            start = len(self._decode(self._before))
            text = self._decode([*self._before, token])[start:]
            size = self._sizes[token] = -1 if "\ufffd" in text else len(text.encode())
        return size


def train_batches(
    documents: TokenizedDocuments,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    shards: int = 1,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterator over packed training batches, whose position can be saved and restored.

    Each batch is a dict of arrays with B = `batch_size` and T = `seq_len`; of several processes,
    each has its own B / `process_count` rows of it, and all together have the rows that a single
    one would have:
      tokens: int32 [B, T]; 0 on padding.
      targets: int32 [B, T], the document's next token; 0 where there is none. At the end of
        a window this is the first token of the next window, so that cutting a document loses
        no target.
      segment_ids: int32 [B, T]; 1, 2, ... for the documents of a row, 0 for padding.
      positions: int32 [B, T], from 0 in each segment.
      loss_mask: float32 [B, T]; 1 where the target counts: not on padding, not at a document's
        last token, and with `loss_on='response'` only where the *target* is in the response.
      target_bytes: int32 [B, T], UTF-8 bytes of text that the target stands for. Summed nats
        over summed bytes (both times `loss_mask`), divided by ln 2, are the bits per byte.

    `iterator.get_state()` after a batch is a JSON-serialisable dict, and `set_state` of it on an
    iterator made with the same arguments, in any process and with any number of them, continues
    with exactly the next batch.

    Args:
      documents: what to pack, in a new random order each epoch when shuffling. Documents of two
        epochs can share a row.
      batch_size: rows of a batch, over all processes.
      seq_len: tokens of a row.
      seed: of the order.
      shuffle: False to keep the order of `documents`, apart from first fit.
      num_epochs: None for no end. With an end, the last batch is filled up with rows of padding;
        shards can end one or a few batches apart, so train by steps when there are several.
      shards: parts of the documents, each packed on its own into B / `shards` rows of a batch.
        With 1 every process reads all documents and keeps its rows; with a multiple of the number
        of processes each reads its own shards alone. The batches depend on it, but not on who
        reads them.
      process_index, process_count: this process; None for JAX's own.

    Raises:
      InputError: a number out of range, one that does not divide another, or fewer documents than
        shards.
    """
    process_index, process_count = own_process(process_index, process_count)
    _check_sizes(batch_size, seq_len, process_index, process_count)
    _check_shards(shards, batch_size, process_count, len(documents))
    if num_epochs is not None and num_epochs < 1:
        raise InputError(f"num_epochs: {num_epochs} must be at least 1, or None for no end")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} must be between 0 and 2**32 - 1")
    # grain shuffles epoch e with seed + e: hashed, or the next seed's run would repeat this one
    # an epoch later.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])

    def shard(number: int) -> grain.IterDataset:
        source = grain.MapDataset.source(documents)[number::shards]
        if shuffle:
            source = source.shuffle(seed=seed)
        rows = _pack(source.repeat(num_epochs), seq_len, shuffle, seed)
        return _batch(rows, batch_size // shards)

    sharers = max(1, process_count // shards)  # processes that read the same shard
    own = _take(own_rows(batch_size // shards, process_index % sharers, sharers))
    if shards == 1:
        return iter(shard(0).map(own))
    start = process_index * shards // process_count
    mine = range(start, start + max(1, shards // process_count))
    return _Shards({number: iter(shard(number).map(own)) for number in mine})


def eval_batches(
    documents: TokenizedDocuments,
    *,
    batch_size: int,
    seq_len: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterable[Batch]:
    """One pass over `documents` in order; each iteration starts afresh. Fields as in training.

    Every process packs all documents and takes its rows of each batch of `batch_size` rows, so
    that all have as many batches and a loss summed over processes does not depend on how many
    there are. The last batch is filled up with padding.

    Raises:
      InputError: a number out of range, or a batch that processes cannot share.
    """
    process_index, process_count = own_process(process_index, process_count)
    _check_sizes(batch_size, seq_len, process_index, process_count)
    _check_shards(1, batch_size, process_count, len(documents))
    rows = _pack(grain.MapDataset.source(documents), seq_len, shuffle=False, seed=0)
    return _batch(rows, batch_size).map(_take(own_rows(batch_size, process_index, process_count)))


def own_process(index: int | None, count: int | None) -> tuple[int, int]:
    """This process and the number of processes; JAX's own for None."""
    return (
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )


def own_rows(batch_size: int, index: int, count: int) -> slice:
    """The rows of process `index` of `count` in a batch, as `fitting.place` wants them."""
    rows = batch_size // count
    return slice(index * rows, (index + 1) * rows)


def _take(rows: slice) -> Callable[[Batch], Batch]:
    return lambda batch: {name: value[rows] for name, value in batch.items()}


class _Shards(grain.DatasetIterator[Batch]):
    """This process' shards of the documents, whose rows follow each other in a batch.

    The position is that of all shards, gathered from all processes: every process has to ask for
    it at the same batch, and a run may go on with another number of processes.
    """

    def __init__(self, shards: Mapping[int, grain.DatasetIterator[Batch]]):
        super().__init__()
        self._own = shards

    def __next__(self) -> Batch:
        parts = [next(shard) for shard in self._own.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        own = {str(number): shard.get_state() for number, shard in self._own.items()}
        states: dict[str, Any] = {}
        for text in distributed.gather(json.dumps(own)):
            states |= json.loads(text)
        return {"shards": states}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, shard in self._own.items():
            shard.set_state(state["shards"][str(number)])


def _pack(documents: grain.MapDataset, seq_len: int, shuffle: bool, seed: int) -> grain.IterDataset:
    # Documents are in memory after the first epoch, so reader threads would only add overhead.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    windows = grain_experimental.FlatMapIterDataset(
        documents.to_iter_dataset(read), _CutIntoWindows(seq_len)
    )
    packed = grain_experimental.FirstFitPackIterDataset(
        windows,
        length_struct=dict.fromkeys(_PACKED, seq_len),
        num_packing_bins=int(
            np.clip(_PACKING_TOKENS // seq_len, _MIN_PACKING_ROWS, _MAX_PACKING_ROWS)
        ),
        shuffle_bins=shuffle,
        seed=seed,
    )
    return packed.map(_rename)


class _CutIntoWindows(grain_experimental.FlatMapTransform):
    """A document as windows of at most `seq_len` tokens, with what belongs to their targets."""

    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element: dict[str, Any]) -> list[Batch]:
        tokens = element["tokens"]
        is_response = np.arange(tokens.size) >= element["prompt_length"]
        fields = {
            "tokens": tokens,
            "targets": _next(tokens),
            "loss_mask": _next(is_response.astype(np.float32)),
            "target_bytes": _next(element["token_bytes"]),
        }
        return [
            {name: values[start : start + self._seq_len] for name, values in fields.items()}
            for start in range(0, tokens.size, self._seq_len)
        ]


def _next(values: np.ndarray) -> np.ndarray:
    """values[1:] and a 0."""
    return np.append(values[1:], values.dtype.type(0)) if values.size else values


def _rename(row: Batch) -> Batch:
    batch = {name: row[name] for name in _PACKED}
    return batch | {"segment_ids": row["tokens_segment_ids"], "positions": row["tokens_positions"]}


def _batch(rows: grain.IterDataset, batch_size: int) -> grain.IterDataset:
    pad = functools.partial(grain_experimental.batch_and_pad, batch_size=batch_size)
    return rows.batch(batch_size, drop_remainder=False, batch_fn=pad)


def _check_sizes(batch_size: int, seq_len: int, process_index: int, process_count: int) -> None:
    for name, value in (
        ("batch_size", batch_size),
        ("seq_len", seq_len),
        ("process_count", process_count),
    ):
        if value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index: {process_index} must be at least 0 and below process_count "
            f"{process_count}"
        )


def _check_shards(shards: int, batch_size: int, process_count: int, documents: int) -> None:
    if shards < 1:
        raise InputError(f"shards: {shards} must be at least 1")
    if shards % process_count and process_count % shards:
        raise InputError(
            f"shards: {shards} must be a multiple or a divisor of the {process_count} processes"
        )
    for name, parts in (("shards", shards), ("processes", process_count)):
        if batch_size % parts:
            raise InputError(f"batch_size: {batch_size} must be a multiple of the {parts} {name}")
    if documents < shards:
        raise InputError(f"shards: {shards} cannot share {documents} documents")
