import numpy as np
import pytest

from models import words
from models.errors import InputError
from models.hierarchical import DOCUMENT_END
from tests.models.tiny_hierarchical import HAT, POOLED
from training import word_batches
from training.word_batches import WordDocuments

TEXTS = [
    "the cat sat on the mat",
    "für überlängte wörter",
    "a",
    "one two three four five six seven eight nine ten",
]
N, B = 8, 2


def documents(texts=TEXTS, config=HAT, **more):
    return WordDocuments([{"text": text} for text in texts], config, **more)


def batches(**more):
    return word_batches.train_batches(documents(), batch_size=B, num_words=N, **more)


def segments(batch):
    """(row, places) of every segment."""
    for row in range(len(batch["segment_ids"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            yield row, np.flatnonzero(batch["segment_ids"][row] == segment)


def text_of(units, lengths):
    return b"".join(bytes(u[:n].tolist()) for u, n in zip(units, lengths, strict=True))


def test_a_pass_holds_every_word_once_and_every_byte():
    seen = []
    found = list(word_batches.eval_batches(documents(), batch_size=B, num_words=N))
    for batch in found:
        assert batch["target"].shape == (B, N, HAT.max_word)
        for row, at in segments(batch):
            seen.append(text_of(batch["target"][row, at], batch["target_lengths"][row, at]))
    ended = b"".join(sorted(seen))
    assert ended.count(bytes([DOCUMENT_END])) == len(TEXTS)
    expected = sum(len(text.encode()) for text in TEXTS)
    assert len(ended) - len(TEXTS) == expected
    assert sum(int(batch["target_bytes"].sum()) for batch in found) == expected
    assert any(text.startswith(b"the cat sat on the mat") for text in seen)


def test_targets_follow_their_source_and_windows_lose_nothing():
    for batch in word_batches.eval_batches(documents(), batch_size=B, num_words=N):
        for row, at in segments(batch):
            source, target = batch["source"][row, at], batch["target"][row, at]
            np.testing.assert_array_equal(source[1:], target[:-1])
            starts = batch["source_lengths"][row, at] == 0
            assert not starts[1:].any()
            # Words of a document have places 0, 1, ...; the nothing before the first has none.
            expected = np.maximum(np.arange(len(at)) - starts[0], 0)
            assert batch["positions"][row, at].tolist() == expected.tolist()
    # 'one ... ten' has ten words and an end: one window of eight targets, one of three.
    long = list(word_batches.eval_batches(documents(TEXTS[3:]), batch_size=1, num_words=N))
    sizes = [int((b["segment_ids"] == s).sum()) for b in long for s in (1, 2)]
    assert sorted(size for size in sizes if size) == [3, 8]


def test_words_are_those_of_the_rule_and_never_too_long():
    document = documents()[1]
    pieces = words.split(TEXTS[1], HAT.rule, HAT.max_word)
    assert [len(piece) for piece in pieces] == document["target_lengths"][:-1].tolist()
    assert document["target_lengths"].max() <= HAT.max_word
    assert document["target"][-1].tolist() == [DOCUMENT_END, 0, 0, 0, 0, 0]
    joined = text_of(document["target"][:-1], document["target_lengths"][:-1])
    assert joined.decode() == TEXTS[1]


def test_position_is_saved_and_restored(monkeypatch):
    monkeypatch.setattr(word_batches, "_MAX_PACKING_ROWS", 16)
    first = batches(seed=1)
    for _ in range(3):
        next(first)
    state = first.get_state()
    expected = [next(first) for _ in range(3)]
    again = batches(seed=1)
    again.set_state(state)
    for batch in expected:
        found = next(again)
        for field, value in batch.items():
            np.testing.assert_array_equal(found[field], value)
    other, same = next(batches(seed=2)), next(batches(seed=1))
    assert any((other[field] != same[field]).any() for field in batch)


def test_other_units_come_from_a_split_of_their_own():
    def letters(text):
        return [[ord(c) - 97 for c in word][:3] for word in text.split()]

    found = documents(["abc de", "a"], POOLED, split=letters, count_bytes=lambda word: 10)
    assert found[0]["target"].tolist() == [[0, 1, 2], [3, 4, 0], [6, 0, 0]]
    assert found[0]["target_bytes"].tolist() == [10, 10, 0]
    with pytest.raises(InputError, match="split: needed for a model whose units are 'ids'"):
        documents(config=POOLED)
    with pytest.raises(InputError, match="a word has 4 units; allowed: 1 to 3"):
        documents(["x"], POOLED, split=lambda text: [[1, 1, 1, 1]])[0]


def test_bad_input_is_named():
    with pytest.raises(InputError, match="no field 'text' among body"):
        WordDocuments([{"body": "x"}], HAT)
    with pytest.raises(InputError, match="no examples"):
        WordDocuments([], HAT)
    with pytest.raises(InputError, match="num_words: 0"):
        word_batches.train_batches(documents(), batch_size=1, num_words=0)
    with pytest.raises(InputError, match="5 processes cannot share 4 documents"):
        batches(process_index=0, process_count=5)
