"""Canvases: prompt, answer and end-of-text; an order that can be gone on with; errors."""

import json

import numpy as np
import pytest

from models.errors import InputError
from training import batches, canvas_batches

EOS = 63
SIZES = {"batch_size": 4, "canvas": 12, "pad_id": EOS}


class Letters:
    """One id a character."""

    vocab_size = 64
    eos_ids = (EOS,)

    def encode(self, text):
        return [ord(character) - 65 for character in text]

    def decode(self, ids):
        return "".join(chr(id + 65) for id in ids)


def documents(count, loss_on="response"):
    examples = [
        {"question": "AB" * (1 + i % 2), "solution": chr(67 + i) * (1 + i % 5), "text": chr(67 + i)}
        for i in range(count)
    ]
    return batches.TokenizedDocuments(examples, Letters(), loss_on=loss_on)


def test_rows_are_prompt_answer_and_end_of_text():
    (batch,) = canvas_batches.eval_batches(documents(7), **SIZES)
    assert {name: value.dtype for name, value in batch.items()} == {
        "tokens": np.int32, "prompt_lengths": np.int32, "answer_lengths": np.int32,
    }  # fmt: skip
    expected = ["AB" "C", "ABAB" "DD", "AB" "EEE", "ABAB" "FFFF"]  # fmt: skip
    for row, text in enumerate(expected):
        ids = Letters().encode(text)
        assert batch["tokens"][row].tolist() == ids + [EOS] * (12 - len(ids))
    assert batch["prompt_lengths"].tolist() == [2, 4, 2, 4]
    assert batch["answer_lengths"].tolist() == [2, 3, 4, 5]


def test_text_alone_has_no_prompt():
    (batch,) = canvas_batches.eval_batches(documents(4, loss_on="all"), **SIZES)
    assert batch["prompt_lengths"].tolist() == [0] * 4


def test_an_epoch_has_every_document_once_in_an_order_of_its_own():
    first, second = (canvas_batches.train_batches(documents(12), seed=s, **SIZES) for s in (0, 1))
    epochs = [
        np.concatenate([next(stream)["tokens"] for _ in range(3)])
        for stream in (first, first, second)
    ]
    as_sets = [{tuple(row) for row in epoch.tolist()} for epoch in epochs]
    assert as_sets[0] == as_sets[1] == as_sets[2]
    assert len(as_sets[0]) == 12
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.any(epochs[one] != epochs[other])


def test_a_saved_position_is_gone_on_with_exactly():
    stream = canvas_batches.train_batches(documents(11), seed=3, **SIZES)
    for _ in range(4):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream)["tokens"] for _ in range(5)]
    again = canvas_batches.train_batches(documents(11), seed=3, **SIZES)
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["tokens"] for _ in range(5)], expected)


def test_the_batches_are_the_same_with_any_number_of_processes():
    sources = [documents(8) for _ in range(2)]
    parts = [
        canvas_batches.train_batches(source, process_index=i, process_count=2, **SIZES)
        for i, source in enumerate(sources)
    ]
    whole = canvas_batches.train_batches(documents(8), **SIZES)
    for batch in range(3):
        halves = [next(part)["tokens"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(halves), next(whole)["tokens"])
        if batch == 1:  # after an epoch, in which each has read its own rows only
            assert sum(len(source._cache) for source in sources) == 8
    whole = next(iter(canvas_batches.eval_batches(documents(8), **SIZES)))
    halves = [
        next(iter(canvas_batches.eval_batches(
            documents(8), process_index=i, process_count=2, **SIZES)))["tokens"]
        for i in range(2)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(halves), whole["tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"canvas": 0}, "canvas: 0 must be at least 1"),
        ({"process_index": 2}, "process_index: 2 must be at least 0 and below"),
        ({"process_count": 3}, "batch_size: 4 must be a multiple of the 3 processes"),
        ({"seed": -1}, "seed: -1 must be between 0"),
    ],
)
def test_numbers_out_of_range_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        canvas_batches.train_batches(documents(8), **{**SIZES, **changes})


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="documents: 3 do not fill one batch of 4 rows"):
        canvas_batches.eval_batches(documents(3), **SIZES)
    with pytest.raises(InputError, match="canvas: 7 tokens do not hold a document of 9"):
        list(canvas_batches.eval_batches(documents(5), **{**SIZES, "canvas": 7}))
