"""Rows of image models against a loop; recipes that do not fit; a short resumed run."""

import dataclasses

import jax
import numpy as np
import pytest

from models import hf_checkpoint, vq
from models.errors import InputError
from training import image_language_model as ilm
from training.image_batches import ImageData
from training.language_model import TrainConfig
from training.optimizers import OptimizerConfig

VQ = vq.VQConfig(base_width=4, multipliers=(1, 1, 1), norm_groups=2, codebook_size=8, embed_dim=3)
MODEL = ilm.architecture(side=4, num_codes=8, num_classes=10, layers=1, width=16, head_dim=8)
TRAIN = TrainConfig(
    MODEL, OptimizerConfig(warmup_steps=1), num_steps=4, batch_size=4, sequence_length=16,
    log_every=1, eval_every=4, checkpoint_every=2,
)  # fmt: skip
CHOSEN = ilm.ImageLanguageModel(
    ImageData(options={"variants": 1}, sizes=(16,)), TRAIN, 10, "unused", class_dropout=0.5
)


class Rows(ilm.CodeRows):
    """Codes that name their image and place."""

    def __init__(self, count, side=3):
        self.codes = (np.arange(count)[:, None] * 7 + np.arange(side)).astype(np.int32) % 8
        self.labels = (np.arange(count) % 10).astype(np.int32)


def test_fields_are_the_class_and_the_codes_shifted_by_one():
    rows = Rows(5)
    batch = ilm.to_fields({"codes": rows.codes, "labels": rows.labels}, 8)
    for b in range(5):
        row = [8 + int(rows.labels[b]), *rows.codes[b].tolist()]
        assert batch["tokens"][b].tolist() == row[:-1]
        assert batch["targets"][b].tolist() == row[1:]
        assert batch["positions"][b].tolist() == [0, 1, 2]
    assert batch["loss_mask"].all() and (batch["segment_ids"] == 1).all()


def test_training_rows_are_shuffled_dropped_at_the_rate_and_resumable():
    rows = Rows(40)
    stream = ilm.train_batches(rows, CHOSEN, 8)
    taken = [next(stream) for _ in range(3)]
    state = stream.get_state()
    more = [next(stream) for _ in range(40)]
    other = ilm.train_batches(rows, CHOSEN, 8)
    other.set_state(state)
    for mine, theirs in zip(more, [next(other) for _ in range(40)]):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    classes = np.concatenate([batch["tokens"][:, 0] for batch in taken + more])
    null = classes == 18
    assert 0.35 < null.mean() < 0.65
    first = np.concatenate([batch["targets"][:, 0] for batch in taken + more[:7]])
    assert sorted(first) == sorted(rows.codes[:, 0])  # an epoch has every image once
    assert first.tolist() != rows.codes[:, 0].tolist()
    # A row keeps its own class unless it is dropped.
    ends = ("tokens", "targets")
    kept = {tuple(int(batch[end][b, 0]) for end in ends) for batch in more for b in range(4)}
    own = {(8 + int(label), int(codes[0])) for label, codes in zip(rows.labels, rows.codes)}
    assert {pair for pair in kept if pair[0] != 18} <= own


def test_evaluation_counts_every_image_once():
    batches = list(ilm.eval_batches(Rows(10), 4, 8))
    assert [int(batch["loss_mask"].sum()) for batch in batches] == [12, 12, 6]
    assert {batch["tokens"].shape for batch in batches} == {(4, 3)}


class Broken:
    """Batches that fail at the third."""

    def __init__(self, batches):
        self.batches, self.left = batches, 3

    def __next__(self):
        self.left -= 1
        if not self.left:
            raise RuntimeError("killed")
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def test_a_run_goes_on_where_it_was_killed_and_the_model_is_a_checkpoint(tmp_path, monkeypatch):
    tokenizer = tmp_path / "vq"
    vq.save(tokenizer, VQ, vq.init(VQ, jax.random.key(0)))

    def run(name):
        return ilm.train(CHOSEN, tokenizer, tmp_path, workdir=tmp_path / name, description=name)

    whole = run("a")
    assert np.isfinite(whole.metrics["eval_loss"]) and whole.step == 4
    make = ilm.train_batches
    with monkeypatch.context() as patch:
        patch.setattr(ilm, "train_batches", lambda *given: Broken(make(*given)))
        with pytest.raises(RuntimeError, match="killed"):
            run("b")
    again = run("b")
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, again.state.params)
    assert whole.metrics == again.metrics
    hf_checkpoint.save(tmp_path / "model", MODEL, whole.state.params)
    config, params = hf_checkpoint.load(tmp_path / "model")
    assert (config.vocab_size, config.max_position, config.positions) == (19, 17, "learned")
    jax.tree.map(np.testing.assert_array_equal, params, whole.state.params)


def test_recipes_that_do_not_fit():
    wrong = dataclasses.replace(CHOSEN, data=ImageData(sizes=(32,)))
    with pytest.raises(InputError, match="sequence_length: 16 must be 64, the codes of 32 pixels"):
        ilm.check(wrong, VQ)
    with pytest.raises(InputError, match="vocab_size: 19 must be 18"):
        ilm.check(dataclasses.replace(CHOSEN, num_classes=9), VQ)
    with pytest.raises(InputError, match=r"class_dropout: 1\.0 must be at least 0 and below 1"):
        dataclasses.replace(CHOSEN, class_dropout=1.0)
    with pytest.raises(InputError, match="must be one size"):
        dataclasses.replace(CHOSEN, data=ImageData(sizes=(16, 32)))
