"""Tokenisers drawn at random from text, one for every batch (ZeTT, arXiv 2405.07883, algorithm 1).

A Unigram tokeniser is made of the substrings that recent batches' words hold, scored by how often
they occur and how long they are, with noise whose size is itself drawn: some tokenisers are nearly
what the text asks for, some nearly random. The batch that will be tokenised is among those counted,
so that rare tokens are both in the vocabulary and in the text.

Batch number i is a function of the seed and i, so a run that was killed goes on with the same.
"""

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import models

from models import byte_level
from models.byte_characters import BYTE_CHARACTERS, whitespace_runs
from models.byte_level import ByteLevel
from models.byte_level_conversion import Vocabulary
from models.errors import InputError

_IMPOSSIBLE = -100_000.0  # log-probability of a piece whose noisy score is not positive
_MAX_SURFACES_KEPT = 2**20
_TEXTS, _NOISE, _HELD_OUT = 0, 1, 2  # what a batch's draws are for


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Sizes of the sampler; defaults are the published ones.

    Attributes:
      batch_size: texts a batch, over all processes.
      queue_batches: batches whose substrings are counted, the current one among them.
      characters: of a text.
      stride: every so many characters of a word, substrings begin.
      longest: characters of a substring.
      vocab_mean, vocab_deviation, vocab_min, vocab_max: of the normal law of vocabulary sizes,
        which is clipped.
      noise_median: of the noise's standard deviation sigma, beside probabilities that sum to one.
      noise_deviation: of ln sigma; `noise` False for none at all.
      longest_run: repeats in a token of white space.
      prefix_space: whether a text is read with a space before it.
    """

    batch_size: int = 128
    queue_batches: int = 16
    characters: int = 2048
    stride: int = 4
    longest: int = 15
    vocab_mean: float = 32768
    vocab_deviation: float = 0.0
    vocab_min: int = 16384
    vocab_max: int = 32768
    noise: bool = True
    noise_median: float = 1e-5
    noise_deviation: float = 4.0
    longest_run: int = 15
    prefix_space: bool = True

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "queue_batches", "characters", "stride", "longest", "longest_run",
        ):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise InputError(f"sampler.{name}: {value} must be at least 1")
        least = len(BYTE_CHARACTERS) + len(whitespace_runs(self.longest_run))
        if not least < self.vocab_min <= self.vocab_max:
            raise InputError(
                f"sampler.vocab_min: {self.vocab_min} must be above {least} (bytes and white "
                f"space) and at most vocab_max {self.vocab_max}"
            )
        if self.noise_median <= 0 or self.noise_deviation < 0 or self.vocab_deviation < 0:
            raise InputError("sampler: deviations must be at least 0 and noise_median positive")


def count_substrings(words: Mapping[str, int], stride: int = 4, longest: int = 15) -> Counter[str]:
    """Scores of substrings: how often each begins at a multiple of `stride`, times its length.

    Args:
      words: in byte characters, with their frequency.
      stride: see `SamplerConfig`.
      longest: characters.

    Returns:
      frequency * length in UTF-8 bytes, as in the official code: 'Ġ' has two, which favours
      substrings that begin a word.
    """
    scores: Counter[str] = Counter()
    for word, frequency in words.items():
        for start in range(0, len(word), stride):
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                part = word[start:end]
                scores[part] += frequency * len(part.encode())
    return scores


class Drawn(NamedTuple):
    """A tokeniser that was drawn.

    Attributes:
      form: it.
      deviation: sigma of its noise.
      size: its vocabulary's, what was asked for unless there were fewer substrings.
    """

    form: ByteLevel
    deviation: float
    size: int


def draw(
    config: SamplerConfig,
    scores: Mapping[str, int],
    specials: Mapping[str, int],
    rng: np.random.Generator,
) -> Drawn:
    """A Unigram tokeniser (section 2.4).

    Args:
      config: see `SamplerConfig`.
      scores: of substrings, from `count_substrings`.
      specials: string -> id, which they get.
      rng: draws the size, sigma and the noise.
    """
    size = rng.normal(config.vocab_mean, config.vocab_deviation)
    size = int(np.clip(round(size), config.vocab_min, config.vocab_max))
    deviation = math.exp(rng.normal(math.log(config.noise_median), config.noise_deviation))
    words = sorted(part for part, score in scores.items() if score > 0)
    score = np.array([scores[word] for word in words], float)
    noisy = score / score.sum()
    if config.noise:
        noisy = noisy + rng.normal(0.0, deviation, len(words))
    certainty = np.where(noisy > 0, np.log(np.where(noisy > 0, noisy, 1.0)), _IMPOSSIBLE)
    always = dict.fromkeys((*BYTE_CHARACTERS, *whitespace_runs(config.longest_run)))
    room = size - len(always) - len(specials)
    best = np.argsort(-certainty, kind="stable")
    chosen = [i for i in best if words[i] not in always][:room]
    least = min((float(certainty[i]) for i in chosen), default=0.0)
    pieces = [(byte, least) for byte in BYTE_CHARACTERS]
    pieces += [(run, 0.0) for run in whitespace_runs(config.longest_run)]
    pieces += [(words[i], float(certainty[i])) for i in chosen]
    ordinary = Vocabulary(tuple(p for p, _ in pieces), tuple(s for _, s in pieces))
    laid_out = ordinary.with_specials(specials, removed=set())
    model = models.Unigram(list(zip(laid_out.tokens, laid_out.scores, strict=True)))
    splitter = byte_level.pre_tokenizer(prefix_space=config.prefix_space)
    tokens = laid_out.tokens
    form = byte_level.assemble(model, tokens, specials, len(tokens), splitter)
    return Drawn(form, deviation if config.noise else 0.0, len(tokens))


class Queue:
    """Scores of the substrings of the last few batches, and their sum."""

    def __init__(self, config: SamplerConfig):
        self._config = config
        self._split = byte_level.pre_tokenizer(prefix_space=config.prefix_space)
        self._counters: deque[Counter[str]] = deque()
        self.total: Counter[str] = Counter()

    def push(self, texts: Iterable[str]) -> None:
        """Takes a batch in, and drops the oldest beyond `queue_batches`."""
        words = Counter(word for text in texts for word, _ in self._split.pre_tokenize_str(text))
        found = count_substrings(words, self._config.stride, self._config.longest)
        self._counters.append(found)
        self.total.update(found)
        if len(self._counters) > self._config.queue_batches:
            for part, score in self._counters.popleft().items():
                self.total[part] -= score
                if not self.total[part]:
                    del self.total[part]


def spans(
    documents: Sequence[Mapping[str, Any]],
    config: SamplerConfig,
    rng: np.random.Generator,
    separator: str,
) -> list[str]:
    """A batch of texts: from a random place of a random document on, others following.

    Args:
      documents: with the field `text`.
      config: gives how many, and how long.
      rng: draws.
      separator: between documents.
    """
    found = []
    for _ in range(config.batch_size):
        text = documents[int(rng.integers(len(documents)))]["text"]
        text = text[int(rng.integers(max(1, len(text) - config.characters + 1))) :]
        while len(text) < config.characters:
            text += separator + documents[int(rng.integers(len(documents)))]["text"]
        found.append(text[: config.characters])
    return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is laid out for a language model.

    Attributes:
      source: its own tokeniser.
      sequence_length: tokens of a row [T].
      pad_id: of surface forms.
      max_surface: ids of a surface form [L].
      next_token: whether targets are next tokens, or the tokens themselves (masked models).
      separator: the special token between documents.
    """

    source: ByteLevel
    sequence_length: int
    pad_id: int
    max_surface: int
    next_token: bool
    separator: str

    def __post_init__(self) -> None:
        if self.separator not in self.source.specials:
            raise InputError(f"separator: {self.separator!r} is not a special token of the source")


class SampledBatches:
    """Endless batches, each in a tokeniser of its own; a position that can be saved and restored.

    A batch is a dict of
      tokens, targets: int32 [B, T], 0 on padding.
      loss_mask: float32 [B, T], 1 where the target counts.
      target_bytes: int32 [B, T], bytes of text that the target stands for.
      surfaces: int32 [k, L] of every token, k = `vocab_max`; all padding beyond the vocabulary.
      vocab_size: int32 [], tokens that there are.
      truncated: int32 [], tokens whose surface form lost its tail.
      deviation: float32 [], sigma of the noise.

    Args:
      documents: with the field `text`, random access.
      config: see `SamplerConfig`.
      layout: see `Layout`.
      seed: of every draw.
      process_index, process_count: all processes draw the same texts and tokeniser, and each
        keeps its share of the rows.
    """

    def __init__(
        self,
        documents: Sequence[Mapping[str, Any]],
        config: SamplerConfig,
        layout: Layout,
        *,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if config.batch_size % process_count:
            raise InputError(
                f"sampler.batch_size: {config.batch_size} must be a multiple of {process_count}"
            )
        self._documents, self._config, self._layout = documents, config, layout
        self._seed, self._surfaces = seed, _SurfaceForms(layout)
        rows = config.batch_size // process_count
        self._rows = slice(process_index * rows, (process_index + 1) * rows)
        self.set_state({"count": 0})

    def __next__(self) -> dict[str, np.ndarray]:
        batch, _, _ = self.draw()
        return batch

    def draw(self) -> tuple[dict[str, np.ndarray], Drawn, list[str]]:
        """The next batch, its tokeniser, and the texts of all processes."""
        texts = self._texts(self._count)
        self._queue.push(texts)
        rng = np.random.default_rng((self._seed, _NOISE, self._count))
        drawn = draw(self._config, self._queue.total, self._layout.source.specials, rng)
        self._count += 1
        batch = encode(drawn, texts[self._rows], self._layout, self._config, self._surfaces)
        return batch, drawn, texts

    def held_out(
        self, documents: Sequence[Mapping[str, Any]], count: int
    ) -> list[dict[str, np.ndarray]]:
        """Batches of other documents in tokenisers of the queue, which they do not enter.

        The queue is that of the first `queue_batches` batches.
        """
        queue = Queue(self._config)
        for number in range(self._config.queue_batches):
            queue.push(self._texts(number))
        found = []
        for number in range(count):
            rng = np.random.default_rng((self._seed, _HELD_OUT, number))
            texts = spans(documents, self._config, rng, self._layout.separator)
            drawn = draw(self._config, queue.total, self._layout.source.specials, rng)
            rows = texts[self._rows]
            found.append(encode(drawn, rows, self._layout, self._config, self._surfaces))
        return found

    def get_state(self) -> dict[str, int]:
        return {"count": self._count}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._count = int(state["count"])
        self._queue = Queue(self._config)
        first = max(0, self._count - self._config.queue_batches)
        for number in range(first, self._count):
            self._queue.push(self._texts(number))

    def _texts(self, number: int) -> list[str]:
        rng = np.random.default_rng((self._seed, _TEXTS, number))
        return spans(self._documents, self._config, rng, self._layout.separator)


class _SurfaceForms:
    """Surface forms of tokens, most of which come again in the next tokeniser."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._known: dict[str, list[int]] = {}

    def __call__(self, tokens: Sequence[str], rows: int) -> tuple[np.ndarray, int]:
        """int32 [rows, L], and how many lost their tail."""
        layout = self._layout
        ids = np.full((rows, layout.max_surface), layout.pad_id, np.int32)
        if len(self._known) > _MAX_SURFACES_KEPT:
            self._known.clear()
        truncated = 0
        for row, token in enumerate(tokens):
            found = self._known.get(token)
            if found is None:
                found = self._known[token] = layout.source.decompose(token)
            truncated += len(found) > layout.max_surface
            ids[row, : min(len(found), layout.max_surface)] = found[: layout.max_surface]
        return ids, truncated


def encode(
    drawn: Drawn,
    texts: Sequence[str],
    layout: Layout,
    config: SamplerConfig,
    surface_forms: _SurfaceForms | None = None,
) -> dict[str, np.ndarray]:
    """A batch of `SampledBatches` from a tokeniser and texts, padded or cut to T tokens."""
    form, length = drawn.form, layout.sequence_length
    surfaces, truncated = (surface_forms or _SurfaceForms(layout))(form.tokens, config.vocab_max)
    sizes = form.token_bytes
    shift = int(layout.next_token)
    shape = (len(texts), length + shift)
    ids, real = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    found = form.backend.encode_batch(list(texts), add_special_tokens=False)
    for row, encoding in enumerate(found):
        mine = encoding.ids[: shape[1]]
        ids[row, : len(mine)], real[row, : len(mine)] = mine, 1
    targets = ids[:, shift:]
    return {
        "tokens": ids[:, :length],
        "targets": targets,
        "loss_mask": real[:, shift:],
        "target_bytes": sizes[targets] * (real[:, shift:] > 0),
        "surfaces": surfaces,
        "vocab_size": np.array(drawn.size, np.int32),
        "truncated": np.array(truncated, np.int32),
        "deviation": np.array(drawn.deviation, np.float32),
    }
