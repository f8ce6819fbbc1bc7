import dataclasses

import pytest

from models import tfree_hat
from models.errors import InputError
from models.hierarchical import DOCUMENT_END
from tests.models.tiny_hierarchical import HAT
from training import tfree_language_model, word_batches
from training.fitting import TrainConfig
from training.optimizers import OptimizerConfig
from training.tfree_language_model import Streams, to_stream
from training.word_batches import WordDocuments

CONFIG = tfree_hat.tfree(
    width=16, layers=2, backbone_width=16, backbone_layers=1, window=6, head_dim=8
)
TEXTS = [f"the {a} {b} the mat." for a in ("cat", "dog") for b in ("sat on", "left")]
N, B, T = 8, 4, 40
RUN = TrainConfig(
    model=CONFIG.encoder,
    optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=2),
    num_steps=40,
    batch_size=B,
    sequence_length=T,
)


def words_of(texts=TEXTS):
    documents = WordDocuments([{"text": text} for text in texts], HAT)
    return word_batches.eval_batches(documents, batch_size=B, num_words=N)


def test_a_stream_is_its_words_one_after_another():
    for batch in words_of():
        stream = to_stream(batch, T)
        for row in range(B):
            n = int(stream["weights"][row].sum()) + 1
            units, word_of = stream["units"][row, :n], stream["word_of"][row, :n]
            start = 0
            for number, (word, size) in enumerate(
                zip(batch["target"][row], batch["target_lengths"][row], strict=True)
            ):
                if batch["segment_ids"][row, number] == 0:
                    continue
                assert units[start : start + size].tolist() == word[:size].tolist()
                assert (word_of[start : start + size] == number).all()
                start += size
            assert start in (0, n)
            text = int((units[1:] != DOCUMENT_END).sum())
            assert stream["target_bytes"][row].sum() == text
    cut = to_stream(next(iter(words_of())), 10)
    assert cut["units"].shape == (B, 10) and cut["weights"].sum(axis=1).max() == 9


def test_training_learns_and_goes_through_the_shared_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(word_batches, "_MAX_PACKING_ROWS", 16)
    documents = WordDocuments([{"text": text} for text in TEXTS], HAT)
    held_out = [to_stream(batch, T) for batch in words_of()]

    def go(workdir, steps):
        rows = word_batches.train_batches(documents, batch_size=B, num_words=N)
        return tfree_language_model.train(
            CONFIG,
            dataclasses.replace(RUN, num_steps=steps),
            num_words=N,
            train_batches=Streams(rows, T),
            eval_batches=held_out,
            workdir=tmp_path / workdir,
        )

    first, last = go("short", 1).metrics, go("long", 40).metrics
    assert last["eval_bits_per_byte"] < 0.6 * first["eval_bits_per_byte"]
    with pytest.raises(InputError, match="not the model's encoder"):
        tfree_language_model.train(
            CONFIG,
            TrainConfig(model=CONFIG.backbone),
            num_words=N,
            train_batches=Streams(
                word_batches.train_batches(documents, batch_size=B, num_words=N), T
            ),
            eval_batches=None,
            workdir=tmp_path / "wrong",
        )
