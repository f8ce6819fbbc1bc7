"""Merging at drawn granularities: curves, laws of the budget, and adapters that learn from it."""

import functools

import jax
import numpy as np
import pytest

from decoding.dynamic_vocabulary import merging
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from models.errors import InputError
from models.lora import LoraConfig
from tests.decoding.test_embedding_cache import CONFIG, fvt, params
from tests.decoding.test_merging import TEXTS, encode, rule, tokenizer
from training import fitting, granularity, merged_classifier, passages
from training.granularity import Granularity
from training.merged_classifier import Task
from training.optimizers import OptimizerConfig
from training.passages import Passage


def test_the_curve_is_a_mean_over_batches():
    batches = [encode(TEXTS[:2]), encode(TEXTS[2:])]
    found = granularity.curve(batches, rule("pretokens"))
    each = [merging.merge(batch, None, rule("pretokens")).lengths for batch in batches]
    for m in (0, 3, len(found) - 1):
        total = sum(lengths[min(m, len(lengths) - 1)] for lengths in each)
        assert found[m] == pytest.approx(total / 5)
    assert found == sorted(found, reverse=True)
    with pytest.raises(InputError, match="there are none"):
        granularity.curve([], rule("pretokens"))


# Concave, as measured ones are: 100 tokens, 40 at word level.
LENGTHS = [40 + 60 * 0.97**m for m in range(150)] + [40.0]
HOW = Granularity(bins=30)


def test_bins_are_of_relative_reduction_and_word_level_has_a_budget_of_its_own():
    budgets = granularity.bins_of(LENGTHS, HOW)
    assert len(budgets) == 30
    assert budgets[-1][-1] == 200
    relative = [at.relative for at in merging.reductions(LENGTHS, 40.0)]
    for b, inside in enumerate(budgets):
        for m in inside:
            if m != 200:
                assert b / 30 <= relative[m] < (b + 1) / 30
    assert sorted(m for inside in budgets for m in inside) == [*range(150), 200]


def histogram(how, count=6000):
    budgets = granularity.bins_of(LENGTHS, how)
    where = {m: b for b, inside in enumerate(budgets) for m in inside}
    rng = np.random.default_rng(0)
    drawn = [granularity.draw(budgets, how, rng) for _ in range(count)]
    return np.bincount([where[m] for m in drawn], minlength=how.bins), drawn


def test_uniform_over_reduction_is_not_uniform_over_merges():
    counts, drawn = histogram(HOW)
    expected = 6000 / 30
    assert (counts > 0).all()
    assert ((counts - expected) ** 2 / expected).sum() < 58  # chi-square, 29 degrees, 0.1 %
    assert np.median(drawn) < 40  # of 150 merges
    # Within a bin, budgets are drawn evenly too.
    last = granularity.bins_of(LENGTHS, HOW)[-2]
    inside = np.bincount([m for m in drawn if m in last])[last]
    assert inside.min() > 0


def test_around_the_middle():
    counts, _ = histogram(Granularity("gaussian"))
    share = np.arange(30) @ counts / 6000
    assert abs(share - 15) < 0.3
    deviation = np.sqrt((np.arange(30) - share) ** 2 @ counts / 6000)
    assert abs(deviation - 5) < 0.4
    for kind in ("cauchy", "student_t"):
        heavy, _ = histogram(Granularity(kind))
        assert abs(np.arange(30) @ heavy / 6000 - 15) < 0.7
        assert heavy[0] + heavy[-1] > 3 * (counts[0] + counts[-1])  # tails end in the outer bins


def test_bins_that_one_merge_skips_are_never_drawn():
    how = Granularity(bins=10)
    budgets = granularity.bins_of([100, 55, 30, 10.0], how)
    assert [b for b, inside in enumerate(budgets) if inside] == [0, 5, 7, 9]
    rng = np.random.default_rng(0)
    assert {granularity.draw(budgets, how, rng) for _ in range(200)} == {0, 1, 2, 200}
    gaussian = Granularity("gaussian", bins=10, deviation=0.01)
    assert {granularity.draw(budgets, gaussian, rng) for _ in range(20)} == {1}
    assert granularity.draw([], Granularity("fixed", merges=7), rng) == 7


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"kind": "normal"}, "kind: 'normal' is not known"),
        ({"bins": 0}, "bins: 0 must be at least 1"),
        ({"merges": -1}, "merges: -1 must be at least 0"),
        ({"deviation": 0.0}, "deviation: 0.0 must be above 0"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        Granularity(**fields)


def test_passages_are_whole_lines_of_each_package():
    assert passages.cut("aa\nbb\ncccccc\nd\n", 5) == ["aa\nbb\n", "cccccc\n"]
    examples = [
        {"path": "json/decoder.py", "text": "import re\nclass Decoder:\n" * 20},
        {"path": "xml/dom.py", "text": "node = None\n" * 30},
        {"path": "json.py", "text": "not in a package\n" * 9},
    ]
    found = passages.of_packages(examples, ("json", "xml"), characters=24, most=5)
    assert sorted(p.label for p in found) == [0] * 5 + [1] * 5
    assert all(("Decoder" in p.text) == (p.label == 0) for p in found)
    with pytest.raises(InputError, match="'html' has no passage"):
        passages.of_packages(examples, ("html", "json"), characters=24, most=5)


TRAIN = fitting.TrainConfig(
    CONFIG,
    OptimizerConfig(learning_rate=2e-2, warmup_steps=2, weight_decay=0.0),
    num_steps=40,
    batch_size=8,
    sequence_length=32,
    checkpoint_every=40,
)
TASK = Task(2, LoraConfig(rank=2, alpha=4.0, dropout=0.1), Granularity(full=60))


@functools.cache
def examples() -> list[Passage]:
    rng = np.random.default_rng(0)
    words = (("pairs", "count", "return"), ("words", "Paare", "größte"))
    return [
        Passage(" ".join(rng.choice(words[label], 6)), label) for _ in range(24) for label in (0, 1)
    ]


def reader() -> merged_classifier.Reader:
    cache = EmbeddingCache(fvt(), capacity=400, scale=CONFIG.embedding_scale)
    encode_text = lambda text: tokenizer().encode(text).tokens  # noqa: E731
    return merged_classifier.Reader(
        encode_text, rule("pretokens"), cache, length=32, side=TASK.side
    )


def budgets():
    rows = [reader().tokens([p.text for p in examples()[:8]])]
    return granularity.bins_of(granularity.curve(rows, rule("pretokens")), TASK.granularity)


def test_adapters_learn_while_the_model_stays(tmp_path):
    before = jax.tree.map(np.array, params())
    done = merged_classifier.train(
        TRAIN, TASK, params(), reader(), examples(), budgets(), workdir=tmp_path / "run"
    )
    jax.tree.map(np.testing.assert_array_equal, params(), before)
    trained = done.state.params
    assert np.abs(trained["adapters"]["layers_0/mlp/down/kernel"]["b"]).max() > 0
    scores = merged_classifier.evaluate(
        TRAIN, TASK, params(), trained, reader, examples(), (0, 5, 500)
    )
    assert all(score.accuracy > 0.9 for score in scores)
    lengths = [score.length for score in scores]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0]
    chance = merged_classifier.evaluate(
        TRAIN, TASK, params(), merged_classifier.init(TASK, CONFIG, params(), jax.random.key(0)),
        reader, examples(), (0,),
    )  # fmt: skip
    assert chance[0].nats == pytest.approx(np.log(2), abs=1e-4)
    assert scores[0].nats < 0.5


def test_batches_go_on_where_they_were_and_their_merges_vary():
    make = lambda: merged_classifier.batches(examples(), budgets(), TASK, TRAIN)  # noqa: E731
    first, again = make(), make()
    seen = [next(first) for _ in range(3)]
    again.set_state(first.get_state())
    ahead, later = next(first), next(again)
    assert ahead["texts"] == later["texts"]
    assert ahead["merges"] == later["merges"]
    more = [next(first)["merges"] for _ in range(20)]
    assert len({*more}) > 3
    assert seen[0]["labels"].shape == (8,)


@pytest.mark.parametrize("pooling,causal", [("mean", True), ("first", False), ("last", True)])
def test_pooling_reads_no_padding(pooling, causal):
    task = Task(2, TASK.lora, pooling=pooling)
    model = CONFIG.replace(causal=causal, mask_token_id=None if causal else 1)
    trained = merged_classifier.init(task, model, params(), jax.random.key(0))
    trained["head"]["kernel"] = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    run = jax.jit(merged_classifier.logits, static_argnums=(0, 1))
    embeddings, rows, _ = reader()([p.text for p in examples()[:8]], 4)
    found = run(task, model, params(), trained, embeddings, rows)
    noise = np.where(rows.valid[..., None], embeddings, 100.0).astype(np.float32)
    np.testing.assert_allclose(run(task, model, params(), trained, noise, rows), found, atol=1e-4)
