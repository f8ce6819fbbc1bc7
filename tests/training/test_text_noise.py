"""Noise: what each kind keeps, how much it changes on average, and that clusters stay whole."""

import collections

import numpy as np
import pytest
import regex

from models.errors import InputError
from training import text_noise

TEXT = "The quick brown  fox\njumped over naïve café lions, 東京 e\u0301te\u0301 и ёлка! " * 40


def noisy(kind: str, rate: float, seed: int = 0, text: str = TEXT) -> str:
    return text_noise.perturb(text, kind, rate, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", text_noise.KINDS)
def test_white_space_and_the_number_of_words_stay(kind: str) -> None:
    found = noisy(kind, 0.5)
    assert regex.sub(r"\S+", "w", found) == regex.sub(r"\S+", "w", TEXT)
    assert found.encode().decode() == found
    assert found != TEXT
    assert noisy(kind, 0.5) == found  # of the generator alone
    assert noisy(kind, 0.5, seed=1) != found


@pytest.mark.parametrize("kind", text_noise.KINDS)
def test_rate_zero_changes_nothing(kind: str) -> None:
    assert noisy(kind, 0.0) == TEXT


def test_permuting_and_swapping_keep_the_letters_of_each_word() -> None:
    for kind in ("permute", "swap"):
        for before, after in zip(TEXT.split(), noisy(kind, 0.7).split(), strict=True):
            clusters = regex.compile(r"\X")
            assert collections.Counter(clusters.findall(before)) == collections.Counter(
                clusters.findall(after)
            )


def test_a_swap_moves_letters_by_one_place_only() -> None:
    text = " ".join(["abcdefgh"] * 200)
    for word in noisy("swap", 1.0, text=text).split():
        assert all(abs(word.index(letter) - i) == 1 for i, letter in enumerate("abcdefgh"))


@pytest.mark.parametrize("length", [1, 3, 8])
def test_the_share_of_changed_characters_is_the_rate(length: int) -> None:
    words = 4000
    text = " ".join(["#" * length] * words)
    total = words * length
    replaced = sum(letter not in "# " for letter in noisy("replace", 0.15, text=text))
    assert replaced / total == pytest.approx(0.15, abs=0.02)
    inserted = len(noisy("insert", 0.15, text=text)) - len(text)
    assert inserted / total == pytest.approx(0.15, abs=0.02)
    deleted = len(text) - len(noisy("delete", 0.15, text=text))
    expected = 0.0 if length == 1 else 0.15  # a word keeps one character
    assert deleted / total == pytest.approx(expected, abs=0.02)


def test_capitals() -> None:
    assert noisy("upper", 1.0) == TEXT.upper()
    some = sum(word == word.upper() for word in noisy("upper", 0.5, text="word " * 2000).split())
    assert some / 2000 == pytest.approx(0.5, abs=0.05)


def test_combining_marks_stay_with_their_letters() -> None:
    word = "e\u0301o\u0308"
    for kind in ("permute", "swap"):
        assert noisy(kind, 1.0, text=word) == "o\u0308e\u0301"


def test_bad_input() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"kind: 'replce' is not known \(did you mean 'replace'"):
        text_noise.perturb("a", "replce", 0.1, rng)
    with pytest.raises(InputError, match=r"rate: 1\.5 must be between 0 and 1"):
        text_noise.perturb("a", "replace", 1.5, rng)
    with pytest.raises(InputError, match="alphabet: 'a' must hold at least two"):
        text_noise.perturb("a", "replace", 0.1, rng, alphabet="a")
