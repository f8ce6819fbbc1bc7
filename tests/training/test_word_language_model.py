import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from models import hierarchical, sharding, transformer, words
from models.config import TransformerConfig
from models.errors import InputError
from tests.models.tiny_hierarchical import HAT, POOLED, params
from training import compute, text_scores, tokenizers, word_batches, word_language_model
from training.optimizers import OptimizerConfig
from training.text_scores import Passage
from training.word_batches import WordDocuments

TEXTS = [f"the {a} {b} the mat." for a in ("cat", "dog", "übung") for b in ("sat on", "left")]
N, B = 8, 4
RUN = word_language_model.run_config(
    HAT,
    optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=2),
    num_steps=30,
    batch_size=B,
    sequence_length=N,
    log_every=5,
    eval_every=30,
    checkpoint_every=10,
)


def documents(texts=TEXTS):
    return WordDocuments([{"text": text} for text in texts], HAT)


@functools.cache
def held_out():
    return list(word_batches.eval_batches(documents(), batch_size=B, num_words=N))


def score(model, batch):
    return jax.jit(functools.partial(word_language_model.scores, HAT))(model, batch)


def trained(workdir, mesh=(1, 1)):
    return word_language_model.train(
        HAT,
        dataclasses.replace(RUN, mesh=mesh),
        train_batches=word_batches.train_batches(documents(), batch_size=B, num_words=N),
        eval_batches=held_out(),
        workdir=workdir,
    )


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """First fit among few rows: the texts are short and repeat themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_batches, "_MAX_PACKING_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


def test_what_is_summed_is_what_each_symbol_costs():
    """A loop over words and their symbols, in NumPy."""
    batch, model = held_out()[0], params()
    found = score(model, batch)
    logits = hierarchical.apply(
        HAT, model, batch["source"], batch["source_lengths"], batch["target"],
        segment_ids=batch["segment_ids"], positions=batch["positions"],
    )  # fmt: skip
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nats = symbols = units = unit_hits = total = right = 0
    for row, n in zip(*np.nonzero(batch["segment_ids"]), strict=True):
        size = batch["target_lengths"][row, n]
        word = batch["target"][row, n, :size].tolist()
        is_end = word == [HAT.document_end]
        spelled = word if is_end or size == HAT.max_word else [*word, HAT.word_end]
        best = log_p[row, n].argmax(axis=-1)
        nats -= sum(log_p[row, n, k, unit] for k, unit in enumerate(spelled))
        symbols += len(spelled)
        if not is_end:
            units += size
            unit_hits += sum(best[k] == unit for k, unit in enumerate(word))
            total += 1
            right += all(best[k] == unit for k, unit in enumerate(spelled))
    assert float(found.nats) == pytest.approx(nats, rel=1e-5)
    assert (int(found.symbols), int(found.units), int(found.words)) == (symbols, units, total)
    assert (int(found.unit_hits), int(found.word_hits)) == (unit_hits, right)
    assert int(found.bytes) == batch["target_bytes"].sum() == units


def test_training_learns_and_evaluates(run):
    before = score(hierarchical.init(HAT, jax.random.key(0)), held_out()[0])
    first = float(before.nats / before.bytes) / math.log(2)
    assert run.metrics["eval_bits_per_byte"] < 0.5 * first
    assert run.metrics["eval_word_accuracy"] > 0.3
    assert run.metrics["eval_unit_accuracy"] > run.metrics["eval_word_accuracy"]


def test_sharded_training_is_that_of_one_device(run, tmp_path):
    found = trained(tmp_path, mesh=(2, 2))
    for name, value in run.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=2e-2), name


def test_a_killed_run_goes_on_with_the_same_numbers(run, tmp_path):
    class KilledError(Exception):
        pass

    class Batches:
        def __init__(self, inner, stop):
            self._inner, self._left = inner, stop
            self.get_state, self.set_state = inner.get_state, inner.set_state

        def __next__(self):
            self._left -= 1
            if self._left < 0:
                raise KilledError
            return next(self._inner)

    def go(stop):
        fresh = word_batches.train_batches(documents(), batch_size=B, num_words=N)
        return word_language_model.train(
            HAT, RUN, train_batches=Batches(fresh, stop), eval_batches=held_out(), workdir=tmp_path
        )

    with pytest.raises(KilledError):
        go(17)
    found = go(100)
    assert found.metrics == run.metrics
    jax.tree.map(np.testing.assert_array_equal, found.state.params, run.state.params)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match="not the model's backbone"):
        word_language_model.train(
            POOLED, RUN, train_batches=iter([]), eval_batches=None, workdir=tmp_path
        )
    mesh = sharding.make_mesh(1, 1)
    batch = dict(held_out()[0])
    with pytest.raises(InputError, match=r"batch.positions: missing"):
        word_language_model.put({k: batch[k] for k in batch if k != "positions"}, HAT, RUN, mesh)
    batch["source"] = batch["source"] + 256
    with pytest.raises(InputError, match=r"batch.source: unit \d+ is out of range"):
        word_language_model.put(batch, HAT, RUN, mesh)


# Both kinds of model on the same texts.


@functools.cache
def bpe():
    return tokenizers.train_bpe(TEXTS * 3, 280)


@functools.cache
def token_model():
    config = TransformerConfig(
        vocab_size=bpe().get_vocab_size(), embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2,
        head_dim=8, mlp_dim=32, max_position=64, eos_token_ids=(0,),
    )  # fmt: skip
    return config, transformer.init(config, jax.random.key(0))


PASSAGES = [Passage(text) for text in TEXTS] + [Passage("dog left", "the übung sat on the mat. ")]


def token_scores(passages=PASSAGES):
    config, model = token_model()
    return text_scores.score_tokens(
        config, model, bpe(), passages,
        rule=HAT.rule, max_word=HAT.max_word, num_tokens=40, batch_size=4,
    )  # fmt: skip


def word_scores(passages=PASSAGES, model=None):
    model = params() if model is None else model
    return text_scores.score_words(HAT, model, passages, num_words=12, batch_size=4)


def test_both_kinds_are_measured_on_the_same_bytes_and_words():
    by_words, by_tokens = word_scores(), token_scores()
    assert by_words.bytes == by_tokens.bytes == sum(len(p.text.encode()) for p in PASSAGES)
    expected = sum(len(words.split(p.text, HAT.rule, HAT.max_word)) for p in PASSAGES)
    assert by_words.words == by_tokens.words == by_words.positions == expected
    tokens = sum(len(bpe().encode(p.text).ids) for p in PASSAGES)
    assert by_tokens.positions == tokens
    for found in (by_words, by_tokens):
        report = found.report()
        assert report["bits_per_byte"] == pytest.approx(found.nats / math.log(2) / found.bytes)
        assert report["bytes_per_position"] == found.bytes / found.positions


def test_passages_are_scored_as_in_training(run):
    """The pipeline's own sums over documents, less what the end of the document costs."""
    model = run.state.params
    passages = [Passage(text) for text in TEXTS]
    found = word_scores(passages, model)
    sums = [score(model, batch) for batch in held_out()]
    assert found.right_words == sum(int(part.word_hits) for part in sums)
    assert found.right_bytes == sum(int(part.unit_hits) for part in sums)
    assert 0 < sum(float(part.nats) for part in sums) - found.nats < 0.2 * found.nats + 20


def test_context_is_read_and_not_scored():
    whole, text = "the cat sat on the mat.", "on the mat."
    first = word_scores([Passage("the cat sat ")])
    rest = word_scores([Passage(text, "the cat sat ")])
    both = word_scores([Passage(whole)])
    assert first.nats + rest.nats == pytest.approx(both.nats, rel=1e-5)
    assert first.right_words + rest.right_words == both.right_words
    alone = word_scores([Passage(text)])
    assert abs(alone.nats - rest.nats) > 0.1


def test_a_word_is_right_when_all_tokens_over_it_are():
    # 'the |cat |sat' by bytes; tokens 'th' 'e c' 'at ' 'sat'.
    sizes = np.array([2, 3, 3, 3])
    count = functools.partial(text_scores.covered_words, [4, 4, 3], sizes)
    assert count(np.array([True, True, True, True])) == 3
    assert count(np.array([True, False, True, True])) == 1
    assert count(np.array([True, True, False, True])) == 2
    assert count(np.array([True, True, True, False])) == 2
    with pytest.raises(InputError, match="10 bytes; the words have 11"):
        text_scores.covered_words([11], np.array([10]), np.array([True]))


def test_tokens_are_counted_in_bytes():
    sizes = text_scores.token_bytes(bpe())
    for text in (*TEXTS, "日本語 ünd"):
        assert sizes[bpe().encode(text).ids].sum() == len(text.encode())
    assert sizes[0] == 0


def test_work_per_byte():
    """Against a count by hand of a tiny model's products."""
    config = token_model()[0]
    D, F, V, keys = 16, 32, config.vocab_size, 5
    by_hand = 2 * (4 * D * D + 3 * D * F + 2 * keys * D + V * D)
    assert compute.position(config, keys) == by_hand
    found = compute.per_byte(config, bytes_per_position=2.0, context_bytes=8.0)
    assert found == by_hand / 2
    # Twice the backbone's layers: as much more as these cost, once a word.
    deeper = dataclasses.replace(HAT, backbone=HAT.backbone.replace(num_layers=4))
    more = compute.word(deeper, 4.0, 10) - compute.word(HAT, 4.0, 10)
    assert more == pytest.approx(compute.position(HAT.backbone, 10, logits=False))
    assert compute.word(POOLED, 2.0, 10) > 0
