"""Rows: no word is lost, both forms hold the same words, pieces reconstruct them, resuming."""

import numpy as np
import pytest

from models import cross_attention_words as caw
from models import spaced_words, word_pieces
from models.errors import InputError
from tests.training import tiny_words
from training import word_rows
from training.word_rows import RowShape

SHAPE = tiny_words.SHAPE


def words_of_row(row: word_rows.Batch) -> list[bytes]:
    real = np.flatnonzero(row["special"] == caw.WORD)
    return [bytes(row["symbols"][i, : row["lengths"][i]].astype(np.uint8)) for i in real]


def test_rows_hold_every_word_of_a_text_in_both_forms() -> None:
    pieces = tiny_words.pieces()
    V = pieces.vocab_size
    for text in tiny_words.TEXTS:
        found = word_rows.words_of(text, pieces, SHAPE)
        rows = word_rows.rows_of(found, pieces, SHAPE)
        words = [word for row in rows for word in words_of_row(row)]
        assert spaced_words.join(words) == text
        assert sum((row["special"] == caw.EOS).sum() for row in rows) == 1  # of the last row
        for row in rows:
            count = int((row["special"] != caw.PAD).sum())
            assert row["special"][0] == caw.CLS and row["special"][count - 1] == caw.SEP
            assert (row["special"][count:] == caw.PAD).all()
            assert (row["words"] == SHAPE.num_words).sum() == (row["tokens"] == V + caw.PAD).sum()
            for number in range(count):
                tokens = row["tokens"][row["words"] == number]
                assert row["tokens"][row["first"][number]] == tokens[0]
                special = row["special"][number]
                if special != caw.WORD:
                    assert tokens.tolist() == [V + special]
                    continue
                word = bytes(row["symbols"][number, : row["lengths"][number]].astype(np.uint8))
                assert pieces.decode(tokens.tolist()) == word
                assert row["counts"][number] == len(tokens)
                kept = row["pieces"][number, : len(tokens)]
                np.testing.assert_array_equal(kept, tokens[: SHAPE.num_slots])


def test_pieces_reconstruct_words_that_fit_their_slots() -> None:
    pieces, several = tiny_words.pieces(), 0
    for row in tiny_words.rows():
        real = np.flatnonzero(row["special"] == caw.WORD)
        for number, word in zip(real, words_of_row(row), strict=True):
            count = row["counts"][number]
            if count <= SHAPE.num_slots:
                assert pieces.decode(row["pieces"][number, :count].tolist()) == word
                several += count > 1
    assert several > 5
    for row in tiny_words.rows():
        end = row["special"] == caw.EOS
        assert (row["counts"][end] == 1).all()
        assert (row["pieces"][end, 0] == word_pieces.EOS_ID).all()


def test_a_row_ends_where_its_tokens_do() -> None:
    narrow = RowShape(num_words=12, width=9, num_slots=3, num_tokens=12)
    found = word_rows.words_of(tiny_words.TEXTS[3], tiny_words.pieces(), narrow)
    rows = word_rows.rows_of(found, tiny_words.pieces(), narrow)
    assert len(rows) > 2
    assert sum(len(words_of_row(row)) for row in rows) == len(found.lengths)


def test_counts() -> None:
    examples = [{"text": text} for text in tiny_words.TEXTS]
    documents = word_rows.WordDocuments(examples, tiny_words.pieces(), SHAPE)
    counts = documents.counts()
    total = sum(len(spaced_words.split(text, SHAPE.width - 1)) for text in tiny_words.TEXTS)
    assert counts["words"] == total
    assert counts["cut"] == 1  # 'internationalisation'
    assert counts["beyond_slots"] > 0


def test_batches_go_on_where_they_were() -> None:
    examples = [{"text": f"{text} {i}"} for i in range(5) for text in tiny_words.TEXTS]
    make = lambda: word_rows.train_batches(  # noqa: E731
        word_rows.WordDocuments(examples, tiny_words.pieces(), SHAPE),
        batch_size=4,
        seed=1,
        window=16,
    )
    first = make()
    for _ in range(3):
        next(first)
    position = first.get_state()
    expected = [next(first) for _ in range(3)]
    second = make()
    second.set_state(position)
    for batch in expected:
        again = next(second)
        for name, value in batch.items():
            np.testing.assert_array_equal(again[name], value)
    assert expected[0]["symbols"].shape == (4, SHAPE.num_words, SHAPE.width)


def test_evaluation_is_of_whole_batches() -> None:
    examples = [{"text": text} for text in tiny_words.TEXTS]
    documents = word_rows.WordDocuments(examples, tiny_words.pieces(), SHAPE)
    for size in (2, 64):
        found = word_rows.eval_batches(documents, batch_size=size, num_rows=6)
        assert found and all(len(batch["special"]) == size for batch in found)


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"rows.num_words: 2 must be at least 3"):
        RowShape(num_words=2)
    with pytest.raises(InputError, match=r"rows.num_tokens: 10 must be at least 19"):
        RowShape(num_tokens=10)
    with pytest.raises(InputError, match=r"examples: the data source has no examples"):
        word_rows.WordDocuments([], tiny_words.pieces(), SHAPE)
