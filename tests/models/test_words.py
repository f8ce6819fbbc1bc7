import unicodedata

import numpy as np
import pytest

from models import words
from models.errors import InputError

# What hat-splitter does, (text, longest word in bytes, words).
GOLDEN = [
    ("Hello, world!", 64, ["Hello,", " world!"]),
    ("howAreYou", 64, ["how", "Are", "You"]),
    ("how_are_you", 64, ["how_", "are_", "you"]),
    ("hello   world", 64, ["hello", "   ", "world"]),
    ("hello \n\nworld", 64, ["hello", " ", "\n", "\n", "world"]),
    ("isn't 3.14 x", 64, ["isn'", "t", " 3.", "14", " x"]),
    ("verylongword", 10, ["verylongwo", "rd"]),
    ("für", 2, ["f", "ü", "r"]),
    ("a\r\nb\t\tc", 64, ["a", "\r\n", "b", "\t", "\t", "c"]),
    ("", 64, []),
]

# Characters of every class that a rule tells apart, and some of 2, 3 and 4 bytes.
ALPHABET = "aBcéΩ9 \n\t\r\v\u2003.,'_-()\u2044\u0301\u200dж日テのสวั א٣\u00ad\U0001f468\U0001f1e9"


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    any_character = [chr(c) for c in rng.integers(1, 0x2FFFF, 4 * count)]
    any_character = [c for c in any_character if unicodedata.category(c) not in ("Cs", "Cn")]
    pool = list(ALPHABET) * 40 + any_character
    return ["".join(rng.choice(pool, rng.integers(1, 24))) for _ in range(count)]


@pytest.mark.parametrize(("text", "cap", "expected"), GOLDEN)
def test_rule_b_splits_as_the_published_splitter(text, cap, expected):
    assert [word.decode() for word in words.split_unicode(text, cap)] == expected


def test_rule_a_leaves_whitespace_at_the_end_of_its_word():
    found = words.split_whitespace(" the cat\u2003 sat\n\n", 64)
    assert [word.decode() for word in found] == [" ", "the ", "cat\u2003 ", "sat\n\n"]


def test_fixed_chunks_have_the_given_length():
    assert words.split_fixed("abcdefgh", 3) == [b"abc", b"def", b"gh"]
    assert words.split_fixed("", 3) == []


@pytest.mark.parametrize("rule", words.SPLITTERS)
def test_joined_words_are_the_text_and_prefixes_have_its_words(rule):
    for number, text in enumerate(random_texts(300)):
        cap = (1, 2, 5, 64)[number % 4]
        whole = words.split(text, rule, cap)
        assert b"".join(whole) == text.encode()
        assert all(0 < len(word) <= cap for word in whole)
        for end in range(len(text)):
            part = words.split(text[:end], rule, cap)
            assert part[:-1] == whole[: len(part[:-1])], (text, end)
            if part:
                assert whole[len(part) - 1].startswith(part[-1]), (text, end)


def test_words_longer_than_the_cap_are_cut_between_characters():
    assert words.split_whitespace("日本語", 7) == ["日本".encode(), "語".encode()]
    assert words.split_whitespace("日", 2) == [b"\xe6\x97", b"\xa5"]  # no boundary to back off to


def test_packed_words_are_rows_with_lengths():
    rows, lengths = words.pack([b"the ", b"cat", b"\xff"], 5)
    assert rows.dtype == lengths.dtype == np.int32
    assert rows.tolist() == [[116, 104, 101, 32, 0], [99, 97, 116, 0, 0], [255, 0, 0, 0, 0]]
    assert lengths.tolist() == [4, 3, 1]
    assert words.pack([], 5)[0].shape == (0, 5)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="rule: 'word' is not known"):
        words.split("a", "word", 8)
    with pytest.raises(InputError, match="max_bytes: 0"):
        words.split_unicode("a", 0)
    with pytest.raises(InputError, match="width is 3"):
        words.pack([b"four"], 3)
    with pytest.raises(InputError, match="no UTF-8"):
        words.split_unicode("\ud800", 8)
