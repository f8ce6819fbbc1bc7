"""The next word after a context: chosen examples, predictions, and what is measured of them.

One rule for models of all units: a prediction is right when the word and its end are (Learn Your
Tokens, arXiv 2310.11628; `WordUnits.first_word`). A context is a number of words for a pooled
model, and of units for a flat one, which may begin within a word.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding import methods
from decoding.generation import Row
from decoding.sampling import SamplingConfig
from decoding.stopping import StopConfig
from experiments import timing
from models import hierarchical, transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from models.word_units import WordUnits
from training import losses, text_noise


@dataclasses.dataclass(frozen=True)
class Example:
    """A word of a held-out document, the words before it, and how often training text has it."""

    context: tuple[str, ...]
    word: str
    count: int


class Buckets(NamedTuple):
    """Examples by how often training text has their word.

    Attributes:
      names: of buckets.
      examples: of each.
      shares: of each among all words that could have been chosen; overall figures are means with
        these weights, so that rare words can be measured on more examples than they have a share.
    """

    names: tuple[str, ...]
    examples: tuple[tuple[Example, ...], ...]
    shares: tuple[float, ...]

    @property
    def flat(self) -> list[Example]:
        return [example for part in self.examples for example in part]

    def means(self, values: Sequence[float] | np.ndarray) -> list[float]:
        """Mean of a value an example, by bucket; NaN for a bucket without any."""
        found, start = [], 0
        for part in self.examples:
            mine = np.asarray(values[start : start + len(part)], float)
            found.append(float(mine.mean()) if len(mine) else float("nan"))
            start += len(part)
        return found

    def mean(self, values: Sequence[float] | np.ndarray) -> float:
        """Mean over all words."""
        pairs = zip(self.means(values), self.shares, strict=True)
        return float(sum(mean * share for mean, share in pairs if share))


def choose(
    documents: Sequence[Mapping[str, str]],
    counts: Mapping[str, int],
    *,
    bounds: Sequence[int],
    sizes: Sequence[int],
    context_words: int,
    seed: int,
) -> Buckets:
    """Examples from documents in normal form.

    Args:
      documents: dicts with `text`.
      counts: of words in training text.
      bounds: a word belongs to the first bucket whose bound its count does not exceed, else to the
        last; 0 is the bucket of words that training text has not.
      sizes: examples of each bucket at most, one more than bounds.
      context_words: words before each example, all of its document.
      seed: of the choice.

    Raises:
      InputError: bounds that do not rise, another number of sizes, or no example at all.
    """
    if list(bounds) != sorted(set(bounds)) or len(sizes) != len(bounds) + 1:
        raise InputError(f"buckets: bounds {tuple(bounds)} must rise, with one more size: {sizes}")
    places: list[list[tuple[int, int]]] = [[] for _ in sizes]
    split = [document["text"].split() for document in documents]
    for number, words in enumerate(split):
        for place in range(context_words, len(words)):
            bucket = int(np.searchsorted(bounds, counts.get(words[place], 0)))
            places[bucket].append((number, place))
    total = sum(map(len, places))
    if not total:
        raise InputError(f"documents: none has more than {context_words} words")
    rng = np.random.default_rng(seed)
    chosen = []
    for part, size in zip(places, sizes, strict=True):
        some = sorted(rng.permutation(len(part))[:size].tolist())
        chosen.append(tuple(_example(split, counts, context_words, *part[i]) for i in some))
    shares = tuple(len(part) / total for part in places)
    return Buckets(_names(bounds), tuple(chosen), shares)


def _example(
    split: Sequence[Sequence[str]],
    counts: Mapping[str, int],
    context_words: int,
    number: int,
    place: int,
) -> Example:
    words = split[number]
    context = tuple(words[place - context_words : place])
    return Example(context, words[place], counts.get(words[place], 0))


def _names(bounds: Sequence[int]) -> tuple[str, ...]:
    low, names = 0, []
    for bound in bounds:
        names.append("never" if bound == 0 else f"{low}-{bound}")
        low = bound + 1
    return (*names, f"{low} and more")


def word_counts(documents: Sequence[Mapping[str, str]]) -> Mapping[str, int]:
    """How often each word occurs."""
    return collections.Counter(word for document in documents for word in document["text"].split())


def noisy(examples: Sequence[Example], kind: str, rate: float, seed: int) -> list[Example]:
    """The examples with noise in the words of their contexts, each its own.

    Raises:
      InputError: as `text_noise.perturb`; insertions, which may make a word too long.
    """
    if kind == "insert":
        raise InputError("noise: 'insert' makes words longer than models may read; choose another")
    changed = []
    for number, example in enumerate(examples):
        rng = np.random.default_rng((seed, number))
        text = text_noise.perturb(" ".join(example.context), kind, rate, rng)
        changed.append(dataclasses.replace(example, context=tuple(text.split())))
    return changed


class Model(NamedTuple):
    """A trained model and its units."""

    config: HierarchicalConfig | TransformerConfig
    params: Any
    units: WordUnits

    @property
    def is_pooled(self) -> bool:
        return isinstance(self.config, HierarchicalConfig)


def prompt(model: Model, words: Sequence[str], context: int) -> list[int]:
    """The ids of the last `context` words of a pooled model, or units of a flat one."""
    if model.is_pooled:
        words = words[-context:]
    ids = [unit for word in words for unit in model.units.closed(word)]
    return ids if model.is_pooled else ids[-context:]


def generated(
    model: Model,
    examples: Sequence[Example],
    *,
    context: int,
    max_word: int,
    temperature: float = 0.0,
    batch_size: int,
    seed: int = 0,
) -> list[Row]:
    """Lets the model write until it closes a word, by the loop of every method.

    Args:
      model: of either kind.
      examples: what comes next in them is not read.
      context: see `prompt`.
      max_word: units of a word at most, its end aside.
      temperature: 0 for the likeliest unit each time.
      batch_size: examples decoded together.
      seed: of draws.
    """
    name = "hat" if model.is_pooled else "autoregressive"
    method = methods.build(name, {"target": model.config}, SamplingConfig(temperature))
    stop = StopConfig(max_word + 1, (*sorted(model.units.ends), *model.units.eos_ids))
    prompts = [prompt(model, example.context, context) for example in examples]
    return timing.decode_all(
        {"target": model.params}, prompts, method, stop, batch_size=batch_size, seed=seed
    )


def right_words(model: Model, examples: Sequence[Example], rows: Sequence[Row]) -> np.ndarray:
    """Which examples' words, with their ends, were written: bool [n]."""
    pairs = zip(examples, rows, strict=True)
    return np.array([model.units.first_word(row.token_ids) == e.word for e, row in pairs])


class Scores(NamedTuple):
    """Of each example's word and its end, the units before each given: arrays [n].

    Attributes:
      nats: surprise.
      hits, units: units that are the likeliest ones, and how many there are.
      right: whether all are: what greedy writing gets right.
      bytes: of the word and a space.
    """

    nats: np.ndarray
    hits: np.ndarray
    units: np.ndarray
    right: np.ndarray
    bytes: np.ndarray


def scores(
    model: Model, examples: Sequence[Example], *, context: int, max_word: int, batch_size: int
) -> Scores:
    """Teacher-forced scores; arguments as `generated`.

    An unknown word of a closed vocabulary is never right, and its surprise is that of the unknown.
    """
    parts = []
    for first in range(0, len(examples), batch_size):
        group = list(examples[first : first + batch_size])
        group += group[:1] * (batch_size - len(group))  # one shape, one compilation
        batch = _batch(model, group, context, max_word)
        score = _pooled_scores if model.is_pooled else _flat_scores
        found = score(model.config, model.params, *batch)
        parts.append([np.asarray(x)[: len(examples) - first] for x in found])
    nats, hits, units = map(np.concatenate, zip(*parts, strict=True))
    known = [model.units.word(model.units.closed(e.word)) == e.word for e in examples]
    size = np.array([len(e.word.encode()) + 1 for e in examples])
    return Scores(nats, hits, units, (hits == units) & np.array(known), size)


def _batch(
    model: Model, examples: Sequence[Example], context: int, max_word: int
) -> tuple[np.ndarray, ...]:
    """What is read, the words to score int [B, C] or [B, C + 1], and their lengths [B].

    Read are words [B, N, C] and their lengths [B, N], or units [B, S].
    """
    B = len(examples)
    words = [model.units.closed(example.word) for example in examples]
    # A word of C units ends a pooled model's slots without being told.
    target = np.zeros((B, max_word + (not model.is_pooled)), np.int32)
    sizes = np.minimum(list(map(len, words)), target.shape[1]).astype(np.int32)
    for row, ids in enumerate(words):
        target[row, : sizes[row]] = ids[: sizes[row]]
    if not model.is_pooled:
        before = [prompt(model, example.context, context) for example in examples]
        if (least := min(map(len, before))) < context:
            raise InputError(f"context: {context} units, but an example has {least} before it")
        return np.array(before, np.int32), target, sizes
    source = np.zeros((B, context, max_word), np.int32)
    lengths = np.zeros((B, context), np.int32)
    for row, example in enumerate(examples):
        for place, word in enumerate(example.context[-context:]):
            ids = model.units.units(word)
            source[row, place, : len(ids)], lengths[row, place] = ids, len(ids)
    return source, lengths, target, sizes


@functools.partial(jax.jit, static_argnums=0)
def _pooled_scores(
    config: HierarchicalConfig,
    params: Any,
    source: jax.Array,
    lengths: jax.Array,
    target: jax.Array,
    sizes: jax.Array,
) -> tuple[jax.Array, ...]:
    vectors = hierarchical.encode(config, params, source, lengths)
    prefix, _ = hierarchical.think(config, params, vectors)
    logits = hierarchical.write(config, params, prefix[:, -1], target)
    return _totals(logits, target, sizes)


@functools.partial(jax.jit, static_argnums=0)
def _flat_scores(
    config: TransformerConfig,
    params: Any,
    before: jax.Array,
    target: jax.Array,
    sizes: jax.Array,
) -> tuple[jax.Array, ...]:
    tokens = jnp.concatenate([before, target[:, :-1]], axis=1)
    hidden = transformer.apply(config, params, tokens, with_logits=False).hidden
    logits = transformer.unembed(config, params, hidden[:, before.shape[1] - 1 :])
    return _totals(logits, target, sizes)


def _totals(logits: jax.Array, target: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    counted = jnp.arange(target.shape[1]) < sizes[:, None]
    nats = jnp.where(counted, losses.cross_entropy(logits, target), 0.0)
    hits = counted & (logits.argmax(axis=-1) == target)
    return nats.sum(axis=1), hits.sum(axis=1), sizes
