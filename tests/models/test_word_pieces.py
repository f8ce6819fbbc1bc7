"""Pieces: joined they are the word, merges are BPE's, files, errors."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from models import spaced_words, word_pieces
from models.errors import InputError

TEXTS = ("the cat  sat on the mat, the naïve cat", "東京 the\n\tsat")


def words(text: str) -> list[bytes]:
    return spaced_words.split(text, 16)


def test_pieces_joined_are_the_word(tmp_path: Path) -> None:
    made = word_pieces.train(map(words, TEXTS), 300)
    made.save(tmp_path)
    pieces = word_pieces.load(tmp_path)
    table, lengths = pieces.table
    assert pieces.vocab_size == len(table) == len(lengths) <= 300
    every = "".join(map(chr, range(1, 256))) + " never seen: Ωмега 한 👩"
    for text in (*TEXTS, every):
        for word in words(text):
            ids = pieces.encode(word)
            assert ids == made.encode(word) == pieces.encode(word)
            assert pieces.decode(ids) == word
            assert word_pieces.EOS_ID not in ids
            assert b"".join(bytes(table[i, : lengths[i]].tolist()) for i in ids) == word
    the = words("x the")[1]
    assert len(pieces.encode(the)) == 1  # with its flag, as the most frequent
    assert len(pieces.encode(words("never")[0])) > 1
    assert lengths[word_pieces.EOS_ID] == 0


def test_the_first_merge_is_the_most_frequent_pair() -> None:
    corpus = [words("ab ab ab ac b b")]
    made = word_pieces.train(corpus, 258)
    new = [made.decode([i]) for i in range(made.vocab_size) if len(made.decode([i])) == 2]
    counted: dict[bytes, int] = {}
    for word in corpus[0]:
        for pair in itertools.pairwise(word):
            counted[bytes(pair)] = counted.get(bytes(pair), 0) + 1
    assert len(new) == 1 and max(counted.values()) == counted[new[0]]


def test_table_is_padded_with_zeros() -> None:
    table, lengths = word_pieces.train(map(words, TEXTS), 280).table
    assert table.shape[1] == lengths.max()
    assert not table[np.arange(table.shape[1]) >= lengths[:, None]].any()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab_size: 256 must be at least 257"):
        word_pieces.train([], 256)
    with pytest.raises(InputError, match=r"has no word_pieces\.json"):
        word_pieces.load(tmp_path)
    with pytest.raises(InputError, match=r"word pieces: corrupt"):
        word_pieces.from_json("{")
