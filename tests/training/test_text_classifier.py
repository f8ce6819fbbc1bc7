"""Classifiers: the head is gone, any script can be read, rows that fill a batch do not count."""

from pathlib import Path

import jax
import numpy as np
import pytest

from models import masked_words, word_pieces
from models.errors import InputError
from tests.training import tiny_words
from training import fitting, text_classifier
from training.optimizers import OptimizerConfig
from training.text_classifier import LabelledRows
from training.word_rows import RowShape

SHAPE = RowShape(num_words=12, width=9, num_slots=3, num_tokens=40)
TEXTS = [
    f"{word} the {animal}" for word in ("see", "hear", "a", "that") for animal in ("cat", "dog")
]
LABELS = [i % 2 for i in range(len(TEXTS))]


def test_it_learns_after_the_head_is_deleted_and_is_read_again(tmp_path: Path) -> None:
    reader, params = tiny_words.model("words")
    pieces = tiny_words.pieces()
    rows = LabelledRows(TEXTS, LABELS, pieces, SHAPE)
    held_out = LabelledRows(["hear that cat", "this dog", "Котёнок"], [0, 1, 1], pieces, SHAPE)
    config = fitting.TrainConfig(
        tiny_words.config("words").backbone,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        num_steps=40, batch_size=8, sequence_length=12, eval_every=40, checkpoint_every=40,
    )  # fmt: skip
    result = text_classifier.train(
        config, reader, params, 2,
        train_batches=text_classifier.train_batches(rows, batch_size=8, seed=0),
        eval_batches=text_classifier.in_order(held_out, 8), workdir=tmp_path / "run",
    )  # fmt: skip
    trained = result.state.params
    assert set(trained) == {"encoder", "backbone", "classifier"}
    # Three texts in a batch of eight: the five that fill it up are not counted.
    assert result.metrics["eval_accuracy"] in (2 / 3, 1.0)

    saved = tiny_words.config("words")
    saved = saved.replace(num_classes=2)
    masked_words.save(tmp_path / "model", saved, trained)
    pieces.save(tmp_path / "model")
    again, loaded = masked_words.load(tmp_path / "model")
    assert again == saved and "head" not in loaded
    assert word_pieces.load(tmp_path / "model").vocab_size == pieces.vocab_size
    batch = text_classifier.in_order(held_out, 8)[0]
    logits = jax.jit(lambda params, batch: text_classifier.logits(reader, params, batch))
    found = np.asarray(logits(loaded, batch))
    np.testing.assert_allclose(found, logits(trained, batch), atol=1e-6)
    assert found[:2].argmax(1).tolist() == [0, 1]
    assert np.isfinite(found).all()
    # Another word of a script that was never seen is another input.
    other = LabelledRows(["Кошечка"], [1], pieces, SHAPE)
    changed = np.asarray(logits(loaded, text_classifier.in_order(other, 8)[0]))
    assert abs(changed[0] - found[2]).max() > 1e-4


def test_batches_go_on_where_they_were() -> None:
    rows = LabelledRows(TEXTS, LABELS, tiny_words.pieces(), SHAPE)
    first = text_classifier.train_batches(rows, batch_size=3, seed=2)
    next(first)
    position = first.get_state()
    expected = next(first)
    second = text_classifier.train_batches(rows, batch_size=3, seed=2)
    second.set_state(position)
    again = next(second)
    np.testing.assert_array_equal(again["labels"], expected["labels"])
    np.testing.assert_array_equal(again["symbols"], expected["symbols"])


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"labels: 1 for 2 texts"):
        LabelledRows(["a", "b"], [0], tiny_words.pieces(), SHAPE)
