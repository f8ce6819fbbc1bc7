"""The exact lexinvariant model of a small language, against its definition."""

import itertools
import math

import numpy as np
import pytest

from models.errors import InputError
from models.permutation_mixture import MarkovLanguage, log_probs, predictions

LANGUAGE = MarkovLanguage(num_symbols=4, next_probs=(0.7, 0.2), seed=3)


def _by_definition(tokens):
    """p'(x_1..n) of each prefix of one sequence: the mean over V! ciphers."""
    transition, V = LANGUAGE.transition(), LANGUAGE.num_symbols
    totals = np.zeros(len(tokens))
    for cipher in itertools.permutations(range(V)):
        probability = 1 / V
        for t, token in enumerate(tokens):
            if t:
                probability *= transition[cipher[tokens[t - 1]], cipher[token]]
            totals[t] += probability / math.factorial(V)
    return np.log(totals)


def test_the_conditionals_multiply_to_the_average_over_permutations():
    tokens = LANGUAGE.sample(3, 10, seed=0)
    found = np.asarray(log_probs(LANGUAGE.transition(), tokens))
    for row, sequence in enumerate(tokens):
        np.testing.assert_allclose(np.cumsum(found[row]), _by_definition(sequence), atol=1e-4)


def test_it_is_lexinvariant_normalised_and_nears_the_language():
    tokens = LANGUAGE.sample(400, 40, seed=1)
    said = np.asarray(predictions(LANGUAGE.transition(), tokens))
    np.testing.assert_allclose(np.exp(said).sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(said[:, 0], -np.log(4), atol=1e-6)
    found = np.asarray(log_probs(LANGUAGE.transition(), tokens))
    renamed = np.array([2, 3, 1, 0])[tokens]
    np.testing.assert_allclose(log_probs(LANGUAGE.transition(), renamed), found, atol=1e-3)
    true = LANGUAGE.log_probs(tokens)
    gap = (true - found).mean(0)
    assert gap[1] > 0.3 and abs(gap[-10:].mean()) < 0.02
    # No cipher is ever worth more than all of them: the sum is at most ln(4!) behind.
    assert ((true - found).sum(1) < math.log(24) + 1e-3).all()


def test_samples_follow_the_transitions():
    tokens = LANGUAGE.sample(4000, 12, seed=2)
    counts = np.zeros((4, 4))
    np.add.at(counts, (tokens[:, :-1], tokens[:, 1:]), 1)
    np.testing.assert_allclose(
        counts / counts.sum(1, keepdims=True), LANGUAGE.transition(), atol=0.02
    )
    np.testing.assert_allclose(LANGUAGE.transition().sum(0), 1)  # every symbol is as frequent


def test_languages_that_cannot_be_enumerated_are_refused():
    with pytest.raises(InputError, match="num_symbols"):
        MarkovLanguage(num_symbols=8)
    with pytest.raises(InputError, match="next_probs"):
        MarkovLanguage(next_probs=(0.7, 0.3))
    with pytest.raises(InputError, match="num_symbols"):
        predictions(np.full((8, 8), 1 / 8), np.zeros((1, 2), int))
