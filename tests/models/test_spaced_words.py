"""Words with flags: exact round trips, BERT's basic tokenisation as the reference, caps."""

import random

import pytest
from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer

from models import spaced_words
from models.errors import InputError

TEXTS = (
    "",
    " ",
    "The quick  brown fox, isn't it?\n\n    def f(x): return x**2\t# naïve café   ",
    "東京 is Tokyo; Москва, Moscow. ประเทศไทย 한국어 e\u0301\u200d👩\u200d🚀 \u00a0\u3000x",
    "x" + " " * 25 + "y" + " " * 31,
    "a" * 100 + "é" * 40,
)  # fmt: skip


def random_text(rng: random.Random) -> str:
    alphabet = "ab Z.,-_\n\t\r\u00a0é東ไ👩\u0301 \u2003     "
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))


def test_text_to_words_to_text_is_lossless() -> None:
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng) for _ in range(500))]:
        for cap in (4, 16):
            words = spaced_words.split(text, cap)
            assert spaced_words.join(words) == text
            stream = b"".join(words)
            assert spaced_words.words_of(stream) == words
            assert spaced_words.decode([*stream, spaced_words.END_OF_TEXT, 65]) == text
            assert all(word[0] >= spaced_words.FIRST_FLAG for word in words)
            assert all(len(word) <= cap + 1 for word in words)
            for word in words:
                word[1:].decode()  # no cut within a character


def test_words_are_those_of_basic_tokenisation() -> None:
    basic = BasicTokenizer(do_lower_case=False, strip_accents=False)
    rng = random.Random(1)
    alphabet = "abZé .,-_$^~`\n\t«東京 ไ"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(40))
        found = [word[1:].decode() for word in spaced_words.split(text, 1000)]
        assert [word for word in found if word.strip()] == basic.tokenize(text)


def test_flags_count_spaces() -> None:
    flag = spaced_words.FIRST_FLAG
    words = spaced_words.split("a b  c" + " " * 23 + "d(e)", 16)
    assert [(w[0] - flag, w[1:]) for w in words] == [
        (0, b"a"), (1, b"b"), (2, b"c"), (10, b""), (10, b""), (3, b"d"), (0, b"("), (0, b"e"),
        (0, b")"),
    ]  # fmt: skip


def test_overlong_words_are_cut_or_truncated_and_counted() -> None:
    text = "internationalisation internationalism Schifffahrt " + "é" * 9
    cut = spaced_words.split(text, 16)
    assert [w[1:].decode() for w in cut] == [
        "internationalisa", "tion", "internationalism", "Schifffahrt", "é" * 8, "é",
    ]  # fmt: skip
    truncated = spaced_words.split(text, 16, overlong="truncate")
    assert [w[1:].decode() for w in truncated] == [
        "internationalisa", "internationalism", "Schifffahrt", "é" * 8,
    ]  # fmt: skip
    found = spaced_words.count_overlong([text, "internationalisations"], 16)
    assert found == spaced_words.Overlong(words=5, overlong=3, distinct=5, collisions=2)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="max_bytes: 3 must be at least 4"):
        spaced_words.split("a", 3)
    with pytest.raises(InputError, match="overlong: 'drop' is not known"):
        spaced_words.split("a", 8, overlong="drop")
    with pytest.raises(InputError, match="has no UTF-8"):
        spaced_words.split("\ud800", 8)
    with pytest.raises(InputError, match="stream: begins with 0x61"):
        spaced_words.words_of(b"a")
    with pytest.raises(InputError, match="stream: 256 at 1 is not a byte"):
        spaced_words.words_of([0xF5, 256])
