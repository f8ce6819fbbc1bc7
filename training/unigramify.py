"""A BPE tokeniser as a Unigram one: the same vocabulary, scores that give the same segmentations.

ZeTT (arXiv 2405.07883, section 2.7) shows by this that tokenisers drawn as Unigram stand for BPE
ones too. Scores come from a linear programme: the segmentation of each frequent word must beat its
best rivals by a margin, or pay for it by the word's frequency; scores stay near their priors.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from tokenizers import models

from models import byte_level
from models.byte_level import ByteLevel
from models.errors import InputError
from training import tokenizer_sampling


class Unigramified(NamedTuple):
    """What came out.

    Attributes:
      form: the Unigram tokeniser.
      identical: share of words, by frequency, that it segments as the original does.
      words: how many different ones the programme looked at.
    """

    form: ByteLevel
    identical: float
    words: int


def best_segmentations(
    word: str, scores: Mapping[str, float], count: int, longest: int
) -> list[tuple[str, ...]]:
    """The `count` likeliest ways to write a word in pieces, by falling sum of scores.

    Args:
      word: to be written.
      scores: of pieces.
      count: at most so many.
      longest: characters of the longest piece.
    """
    best: list[list[tuple[float, tuple[str, ...]]]] = [[(0.0, ())]]
    for end in range(1, len(word) + 1):
        found = []
        for start in range(max(0, end - longest), end):
            piece = word[start:end]
            if piece in scores:
                found += [(total + scores[piece], (*way, piece)) for total, way in best[start]]
        best.append(heapq.nlargest(count, found, key=lambda entry: entry[0]))
    return [way for _, way in best[-1]]


def unigramify(
    form: ByteLevel,
    texts: Iterable[str],
    *,
    max_words: int = 100_000,
    rivals: int = 16,
    margin: float = 1e-3,
    prior_weight: float = 0.01,
) -> Unigramified:
    """The Unigram tokeniser that segments words as a BPE (or any other) one does, where it can.

    Args:
      form: the tokeniser.
      texts: what words are counted on.
      max_words: the most frequent ones that are looked at.
      rivals: other segmentations of a word that its own must beat: the best by prior scores.
      margin: by so much.
      prior_weight: of the absolute distance of scores from their priors, which come of substring
        counts.

    Raises:
      InputError: no words, or the solver fails.
    """
    words = _count(form, texts)
    chosen = dict(words.most_common(max_words))
    if not chosen:
        raise InputError("texts: they hold no words")
    ordinary = [token for token in form.tokens if token not in form.specials]
    prior = _priors(ordinary, chosen)
    longest = max(map(len, ordinary))
    wanted = {word: tuple(form.tokens[i] for i in form.decompose(word)) for word in chosen}
    contests = []
    for word, own in wanted.items():
        ways = best_segmentations(word, prior, rivals + 1, longest)
        contests.append((own, [way for way in ways if way != own][:rivals], chosen[word]))
    scores = _solve(ordinary, prior, contests, margin, prior_weight)
    pieces = [(token, scores.get(token, 0.0)) for token in form.tokens]
    new = byte_level.assemble(
        models.Unigram(pieces),
        form.tokens,
        form.specials,
        form.num_original,
        form.backend.pre_tokenizer,
    )
    same = sum(
        count for word, count in words.items() if form.decompose(word) == new.decompose(word)
    )
    return Unigramified(new, same / words.total(), len(chosen))


def _count(form: ByteLevel, texts: Iterable[str]) -> Counter[str]:
    split = form.backend.pre_tokenizer
    assert split is not None
    return Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))


def _priors(tokens: Sequence[str], words: Mapping[str, int]) -> dict[str, float]:
    """Log-probabilities of substring counts times length; unseen tokens below all others."""
    longest = max(map(len, tokens))
    counted = tokenizer_sampling.count_substrings(words, 1, longest)
    known = {token: counted[token] for token in tokens if counted[token] > 0}
    total = sum(known.values())
    least = math.log(1 / total) - 1
    return {token: math.log(known[token] / total) if token in known else least for token in tokens}


def _solve(
    tokens: Sequence[str],
    prior: Mapping[str, float],
    contests: Sequence[tuple[tuple[str, ...], list[tuple[str, ...]], int]],
    margin: float,
    prior_weight: float,
) -> dict[str, float]:
    """Scores that minimise slack by frequency plus the distance to the priors.

    Variables: how far each score lies above and below its prior, and a slack a word.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    n, m = len(tokens), len(contests)
    rows, columns, values, bounds = [], [], [], []
    number = 0
    for word, (own, others, _) in enumerate(contests):
        for other in others:
            difference = Counter(own)
            difference.subtract(other)
            gap = 0.0
            for piece, times in difference.items():
                if times:
                    gap += times * prior[piece]
                    for column, sign in ((ids[piece], -1), (n + ids[piece], 1)):
                        rows.append(number)
                        columns.append(column)
                        values.append(sign * times)
            rows.append(number)
            columns.append(2 * n + word)
            values.append(-1)
            bounds.append(gap - margin)  # -(change) - slack <= gap - margin
            number += 1
    if not number:
        return dict(prior)
    matrix = scipy.sparse.csr_matrix((values, (rows, columns)), (number, 2 * n + m))
    frequency = np.array([count for *_, count in contests], float)
    cost = np.concatenate([np.full(2 * n, prior_weight), frequency / frequency.mean()])
    found = scipy.optimize.linprog(cost, A_ub=matrix, b_ub=bounds, method="highs")
    if found.x is None:
        raise InputError(f"unigramify: no scores found ({found.message})")
    change = found.x[:n] - found.x[n : 2 * n]
    return {token: prior[token] + float(change[i]) for token, i in ids.items()}
