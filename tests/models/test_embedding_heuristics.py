"""Heuristics against definitions written out token by token."""

import functools

import numpy as np
import pytest
import scipy.optimize

from models import byte_level, embedding_heuristics
from models.errors import InputError
from training import tokenizers as tokenizer_training

TEXTS = (
    "def first(number):\n    return number + first(number - 1)\n",
    "class Second(object):\n    def method(self, number):\n        return self.number\n",
    "for index in range(number):\n    print(index, number)\n",
)
C = 6


@functools.cache
def forms() -> tuple[byte_level.ByteLevel, byte_level.ByteLevel]:
    """The target has words that the source has in pieces, and lacks some of the source's."""
    source = byte_level.normalise(tokenizer_training.train_bpe(TEXTS, 285))
    other = tokenizer_training.train_bpe([*TEXTS[1:] * 4, "größer und größer " * 4], 330)
    target = byte_level.normalise(other, specials={"<|endoftext|>": 5})
    return source, target


def table() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (forms()[0].vocab_size, C))


@pytest.mark.parametrize("name", embedding_heuristics.HEURISTICS)
def test_special_tokens_and_overlap_are_copied(name):
    """Section 6.5 for every heuristic, and the overlap for all but 'random'."""
    source, target = forms()
    found = embedding_heuristics.transfer(name, table(), source, target, texts=TEXTS, rank=8)
    assert found.shape == (target.vocab_size, C) and np.isfinite(found).all()
    np.testing.assert_array_equal(found[5], table()[0].astype(np.float32))
    match = byte_level.overlap(source, target)
    both = np.flatnonzero(match >= 0)
    assert 200 < len(both) < target.vocab_size - 20
    same = np.abs(found[both] - table()[match[both]]).max(1) < 1e-5
    assert same.all() if name != "random" else same.sum() <= 1
    again = embedding_heuristics.transfer(name, table(), source, target, texts=TEXTS, rank=8)
    np.testing.assert_array_equal(found, again)


def test_fvt_is_the_mean_of_the_pieces_rows():
    source, target = forms()
    found = embedding_heuristics.transfer("fvt", table(), source, target)
    new = np.flatnonzero(byte_level.overlap(source, target) < 0)
    for place in new:
        token = target.tokens[place]
        if token not in target.specials:
            rows = table()[source.decompose(token)]
            np.testing.assert_allclose(found[place], np.mean(rows, 0), rtol=1e-5)
    # Pieces without a row (appended bytes) do not count; a token of nothing else is drawn.
    small = np.arange(12.0).reshape(4, 3)
    got = embedding_heuristics.fvt(small, np.array([-1, -1, 2]), [[0, 9, 2], [9], [0]])
    np.testing.assert_allclose(got[0], small[[0, 2]].mean(0))
    np.testing.assert_allclose(got[2], small[2])
    assert np.isfinite(got[1]).all()


def test_random_rows_have_the_columns_statistics():
    drawn = embedding_heuristics.random_rows(table(), 4000)
    np.testing.assert_allclose(drawn.mean(0), table().mean(0), atol=0.2)
    np.testing.assert_allclose(drawn.std(0), table().std(0), rtol=0.05)


def test_sparsemax_is_the_projection_onto_the_simplex():
    scores = np.random.default_rng(1).normal(size=(5, 7))
    found = embedding_heuristics.sparsemax(scores)
    np.testing.assert_allclose(found.sum(1), 1)
    assert (found == 0).any(axis=1).all()
    for row, mine in zip(scores, found, strict=True):
        best = scipy.optimize.minimize(
            lambda p, z=row: ((p - z) ** 2).sum(),
            np.full(7, 1 / 7),
            bounds=[(0, 1)] * 7,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        )
        np.testing.assert_allclose(mine, best.x, atol=1e-3)


def test_focus_weighs_overlapping_tokens_by_auxiliary_similarity():
    rows = np.array([[1.0, 0], [0, 1], [5, 5]])
    match = np.array([0, 1, 2, -1, -1])
    auxiliary = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0.9, 0], [0, 0, 0]])
    found = embedding_heuristics.focus(rows, match, auxiliary)
    similar = np.array([[1, 0.9, 0]]) / np.hypot(1, 0.9)
    weights = embedding_heuristics.sparsemax(similar)[0]
    assert weights[2] == 0
    np.testing.assert_allclose(found[3], weights @ rows)
    np.testing.assert_array_equal(found[:3], rows)
    assert np.isfinite(found[4]).all()  # never seen: drawn


def test_ofa_gives_a_new_token_the_coordinates_of_its_like():
    rows = np.random.default_rng(2).normal(size=(4, 3))
    vectors = np.eye(4)
    new = np.array([[0, 1.0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
    found = embedding_heuristics.ofa(
        rows, np.array([-1, 3, -1]), vectors, new, neighbours=2, temperature=0.01
    )
    np.testing.assert_allclose(found[0], rows[1], atol=1e-6)
    np.testing.assert_allclose(found[1], rows[3], atol=1e-6)  # overlap wins
    np.testing.assert_allclose(found[2], rows[2:].mean(0), atol=1e-6)


def test_company_vectors_are_near_for_tokens_in_the_same_company():
    rng = np.random.default_rng(3)
    documents = []
    for _ in range(300):  # 0 and 1 stand among 4..7, 2 and 3 among 8..11
        group = rng.integers(2)
        documents.append([rng.integers(4, 8) + 4 * group, 2 * group + rng.integers(2),
                          rng.integers(4, 8) + 4 * group])  # fmt: skip
    vectors = embedding_heuristics.company_vectors(documents, 13, 4)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    near = unit @ unit.T
    assert near[0, 1] > 0.9 and near[2, 3] > 0.9 and near[0, 2] < 0.3
    assert not vectors[12].any()


def test_mistakes_are_named():
    source, target = forms()
    with pytest.raises(InputError, match="texts"):
        embedding_heuristics.transfer("focus", table(), source, target)
    with pytest.raises(InputError, match="heuristic"):
        embedding_heuristics.transfer("fvtt", table(), source, target)
    other = byte_level.normalise(tokenizer_training.train_bpe(TEXTS, 285), specials={"<s>": 0})
    with pytest.raises(InputError, match="'<s>'"):
        embedding_heuristics.transfer("fvt", table(), source, other)
