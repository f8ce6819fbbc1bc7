"""Byte-pair merging of a batch, without a merge table: the most frequent neighbours first.

Feher et al., arXiv 2411.18553, algorithm 1. Counts are over the whole batch, so how a text is cut
depends on what it is batched with, and, through ties, on its place in the batch. This happens on
the host, on strings; what the model gets is embeddings (`embedding_cache`).
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from decoding.dynamic_vocabulary.boundaries import Valid
from models.errors import InputError

Pair = tuple[int, int]


class Merged(NamedTuple):
    """A batch after merging.

    Attributes:
      tokens: the strings of each sequence; joined, they are what came in.
      starts: for each of them, which token of its sequence it begins with; labels of the left part
        (word ids) are a gather.
      merges: what was merged, in order.
      lengths: tokens of the whole batch after 0, 1, ... merges.
    """

    tokens: list[list[str]]
    starts: list[list[int]]
    merges: list[tuple[str, str]]
    lengths: list[int]


class Reduction(NamedTuple):
    """How much shorter a batch is: both of the measures in use, which differ widely.

    Attributes:
      absolute: (L0 - L) / L0.
      relative: (L0 - L) / (L0 - Lword), Lword being what is left when nothing can be merged any
        more; 1 where nothing could be.
    """

    absolute: float
    relative: float


def merge(sequences: Sequence[Sequence[str]], budget: int | None, valid: Valid) -> Merged:
    """Merges the most frequent valid pair of the batch, up to `budget` times.

    Occurrences are counted as they come: 'a a a' holds the pair (a, a) twice, though only one can
    be merged; merging is left to right. Of pairs that are equally frequent, the one that is met
    first in the batch as it is now is merged, sequence by sequence. Pairs that occur once are
    merged too. It ends early when no valid pair is left.

    Counts and places are kept up to date from merge to merge: the work of a merge is that of its
    occurrences, not of the batch.

    Args:
      sequences: strings of byte characters, of any lengths.
      budget: merges at most; None for as many as there are.
      valid: see `boundaries.rule`.

    Raises:
      InputError: a negative budget.
    """
    if budget is not None and budget < 0:
        raise InputError(f"budget: {budget} must be at least 0, or None for no limit")
    batch = _Batch(sequences, valid)
    merges: list[tuple[str, str]] = []
    lengths = [batch.total]
    while budget is None or len(merges) < budget:
        pair = batch.best()
        if pair is None:
            break
        merges.append((batch.strings[pair[0]], batch.strings[pair[1]]))
        batch.replace(pair)
        lengths.append(batch.total)
    tokens, starts = batch.read()
    return Merged(tokens, starts, merges, lengths)


class _Batch:
    """The tokens of a batch as linked lists in one numbering, and where each pair occurs.

    A token keeps the place of its left end, so places are in batch order for ever. `counts` are
    exact. `places` has a heap of places for each pair and `queue` one of pairs; both may hold
    entries that are out of date, which are recognised when they come up.
    """

    def __init__(self, sequences: Sequence[Sequence[str]], valid: Valid):
        self.strings: list[str] = []
        self._ids: dict[str, int] = {}
        self._valid, self._known = valid, dict[Pair, bool]()
        self._bounds = [0]
        self._at: list[int] = []
        for sequence in sequences:
            self._at.extend(self._id(token) for token in sequence)
            self._bounds.append(len(self._at))
        N = self.total = len(self._at)
        self._next = list(range(1, N + 1))
        self._before = list(range(-1, N - 1))
        for begin, end in itertools.pairwise(self._bounds):
            if begin < end:
                self._before[begin], self._next[end - 1] = -1, -1
        self._counts: dict[Pair, int] = defaultdict(int)
        self._places: dict[Pair, list[int]] = defaultdict(list)
        self._queue: list[tuple[int, int, Pair]] = []
        self._put(set(filter(None, [self._count(place, 1) for place in range(N)])))

    def _id(self, token: str) -> int:
        if token not in self._ids:
            self._ids[token] = len(self.strings)
            self.strings.append(token)
        return self._ids[token]

    def _pair(self, place: int) -> Pair | None:
        """The pair that begins at a place; None where none does."""
        if place < 0 or self._at[place] < 0 or self._next[place] < 0:
            return None
        return self._at[place], self._at[self._next[place]]

    def _count(self, place: int, change: int) -> Pair | None:
        """Counts the pair at a place in (1) or out (-1); None where there is no valid one."""
        pair = self._pair(place)
        if pair is None:
            return None
        if pair not in self._known:
            self._known[pair] = self._valid(self.strings[pair[0]], self.strings[pair[1]])
        if not self._known[pair]:
            return None
        self._counts[pair] += change
        if change > 0:
            heapq.heappush(self._places[pair], place)
        return pair

    def _first(self, pair: Pair) -> int:
        places = self._places[pair]
        while self._pair(places[0]) != pair:
            heapq.heappop(places)
        return places[0]

    def _put(self, pairs: Iterable[Pair]) -> None:
        """Queues pairs; needed whenever one has become more frequent or is met earlier."""
        for pair in pairs:
            if self._counts[pair]:
                heapq.heappush(self._queue, (-self._counts[pair], self._first(pair), pair))

    def best(self) -> Pair | None:
        """The valid pair of the highest count, the first met of equals; None without any."""
        while self._queue:
            count, first, pair = heapq.heappop(self._queue)
            if not self._counts[pair]:
                continue
            if (count, first) == (-self._counts[pair], self._first(pair)):
                return pair
            self._put((pair,))  # it has become rarer, or is met later
        return None

    def replace(self, pair: Pair) -> None:
        """Merges every occurrence of a pair, left to right."""
        merged = self._id(self.strings[pair[0]] + self.strings[pair[1]])
        grown: set[Pair | None] = set()
        for place in sorted(set(self._places[pair])):
            if self._pair(place) != pair:
                continue
            before, right = self._before[place], self._next[place]
            for gone in (before, place, right):
                self._count(gone, -1)
            after = self._next[right]
            self._at[place], self._at[right] = merged, -1
            self._next[place] = after
            if after >= 0:
                self._before[after] = place
            self.total -= 1
            grown |= {self._count(before, 1), self._count(place, 1)}
        self._put(filter(None, grown))

    def read(self) -> tuple[list[list[str]], list[list[int]]]:
        """Strings and left ends of each sequence."""
        alive = [
            [place for place in range(begin, end) if self._at[place] >= 0]
            for begin, end in itertools.pairwise(self._bounds)
        ]
        tokens = [[self.strings[self._at[place]] for place in row] for row in alive]
        starts = [[place - begin for place in row] for begin, row in zip(self._bounds, alive)]
        return tokens, starts


def reductions(lengths: Sequence[float], word_level: float) -> list[Reduction]:
    """Both measures of each length, the first being that of no merges.

    Args:
      lengths: total (or mean) tokens after 0, 1, ... merges.
      word_level: tokens after every possible merge.
    """
    first = lengths[0]
    room = first - word_level
    return [
        Reduction((first - n) / first if first else 0.0, (first - n) / room if room else 1.0)
        for n in lengths
    ]


def merges_for(lengths: Sequence[float], word_level: float, relative: float) -> int:
    """The smallest number of merges whose relative reduction is at least `relative`."""
    found = reductions(lengths, word_level)
    enough = (m for m, at in enumerate(found) if at.relative >= relative - 1e-9)
    return next(enough, len(found) - 1)
