"""What dynamic tokenisation is measured with, on a tiny model, against naive counts."""

import functools

import numpy as np
import pytest

from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from experiments import (
    dynamic_tokenization,
    language_lengths,
    merged_scoring,
    sweep,
    vocabulary_search,
)
from experiments.configs import dynamic_tokenization as configs
from experiments.dynamic_parts import Setting
from models.errors import InputError
from tests.decoding.test_embedding_cache import CONFIG as TINY
from tests.decoding.test_embedding_cache import fvt, plain, source
from tests.decoding.test_embedding_cache import params as tiny_params
from tests.decoding.test_merging import TEXTS, rule
from training import ann_index

CONFIG = TINY.replace(eos_token_ids=(0,))
LONG = [text * 8 for text in TEXTS]


@functools.cache
def setting() -> Setting:
    splits = {"test": [{"text": text, "path": "a.py"} for text in LONG]}
    return Setting(
        CONFIG, tiny_params(), source(), rule("pretokens"), {"fvt": fvt()}, {"fvt": {}}, splits, []
    )


def tiny_config():
    config = configs.get_config("averages")
    config.data.splits = ("test",)
    config.curve.update(batch_sizes=(1, 4), windows=8, tokens=32)
    config.contexts.update(
        tokens=24, ending=8, windows=8, batch_size=4, shares=(0.0, 0.5, 1.0), capacity=300
    )
    config.languages.update(locales=("en", "de", "ru"), budget=60)
    return config


def held_out():
    return merged_scoring.windows(LONG, source(), context=24, ending=8, count=8, seed=0)


def test_windows_are_text_cut_in_two():
    found = held_out()
    whole = "".join(LONG).encode()
    for tokens, ending, size in zip(*found, strict=True):
        assert len(tokens) == 24
        own = {token: i for i, token in enumerate(source().tokens)}
        ids = [own[token] for token in tokens]
        assert len(source().decode(ending.tolist()).encode()) >= size - 3
        text = source().decode([*ids, *ending.tolist()]).strip("\ufffd")
        assert text.encode() in whole


def naive_nats(ids, start):
    inputs = np.zeros((1, 32), np.int32)
    inputs[0, : len(ids)] = ids
    logits = np.asarray(plain(CONFIG, tiny_params(), inputs)[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -sum(log_p[i - 1, ids[i]] for i in range(start, len(ids)))


def test_without_merges_the_score_is_the_models():
    found = held_out()
    own = {token: i for i, token in enumerate(source().tokens)}
    prior = merged_scoring.alone(CONFIG, tiny_params(), found, 4)
    points, cache = merged_scoring.score(
        CONFIG, tiny_params(), lambda: EmbeddingCache(fvt(), 300, CONFIG.embedding_scale),
        rule("pretokens"), found, (0, 100), prior, batch_size=4, choices=2,
    )  # fmt: skip
    rows = [[own[t] for t in row] for row in found.contexts]
    nats = [
        naive_nats([*row, *end], 24) for row, end in zip(rows, found.endings.tolist(), strict=True)
    ]
    assert points[0].length == 24
    expected = sum(nats) / np.log(2) / found.sizes.sum()
    assert points[0].bits_per_byte == pytest.approx(expected, rel=1e-4)
    assert points[1].length < 24
    assert prior[3] == pytest.approx(naive_nats([0, *found.endings[3].tolist()], 1), rel=1e-4)
    right = 0
    for r, row in enumerate(rows):
        mate = r // 4 * 4 + (r - 1) % 4  # the neighbour whose ending is offered
        other = naive_nats([*row, *found.endings[mate].tolist()], 24)
        right += prior[r] - nats[r] >= prior[mate] - other
    assert points[0].accuracy == right / 8
    assert cache.counts.batches == 2


def test_loss_of_a_text_in_bits_per_byte():
    texts = [TEXTS[0], TEXTS[4]]
    rows = [[0, *source().encode(text)][:32] for text in texts]
    found = merged_scoring.text_bits_per_byte(
        CONFIG, tiny_params(), rows, source().token_bytes, width=32
    )
    nats = sum(naive_nats(row, 1) for row in rows)
    size = sum(source().token_bytes[row[1:]].sum() for row in rows)
    assert found == pytest.approx(nats / np.log(2) / size, rel=1e-4)


def test_curves_and_what_is_claimed_of_them():
    found = dynamic_tokenization.merge_curves(setting(), tiny_config())
    small, large = found
    assert small["relative"][-1] == large["relative"][-1] == 1
    assert small["merges"][1.0] < large["merges"][1.0]
    assert large["relative"] == sorted(large["relative"])
    figures, claims = dynamic_tokenization.summarise("merge curves", found, tiny_config())
    assert figures["merging"]["series"][0]["y"] == small["relative"]
    assert claims
    scored = dynamic_tokenization.contexts(setting(), tiny_config())
    curve = scored["curves"]["fvt"]
    assert [point["merges"] for point in curve] == scored["merges"]
    assert curve[0]["relative"] == 0
    assert curve[-1]["relative"] == pytest.approx(1)
    assert 0 < curve[-1]["absolute"] < 1
    assert scored["caches"]["fvt"]["misses"] > 0
    gaps = dynamic_tokenization.own_tokens_gap(setting(), tiny_config())
    assert gaps["fvt"] == pytest.approx(gaps["model"])  # own rows are their own averages
    _, claims = dynamic_tokenization.summarise("contexts", scored, tiny_config())
    assert {claim.bound for claim in claims} == {"<= 0.01", "<= 0.02"}


def test_languages_have_the_same_content():
    texts = language_lengths.parallel_texts(("en", "de", "ru"), 8)
    assert len({len(rows) for rows in texts.values()}) == 1
    assert all(row.count(", ") >= 7 for rows in texts.values() for row in rows)
    found = language_lengths.measure(
        source(), rule("pretokens"), ("en", "de", "ru"), names_a_row=8, budget=60
    )
    english, german, russian = found
    assert (english.script, russian.script) == ("Latn", "Cyrl")
    for row in found:
        assert row.words <= row.merged < row.before <= row.size
        assert row.mixed < row.before
        expected = sum(len(source().encode(text)) for text in texts[row.locale])
        assert row.before == expected
    # Cyrillic is two bytes a letter to this tokeniser, and gains most.
    gained = [1 - row.words / row.before for row in found]
    assert max(gained) == gained[2]
    assert language_lengths.fairness([4, 4, 4])["gini"] == 0
    fair = language_lengths.fairness([10, 20])
    assert (fair["mean_premium"], fair["largest_premium"]) == (1.5, 2)
    assert fair["gini"] == pytest.approx(1 / 6)
    with pytest.raises(InputError, match="they share"):
        language_lengths.parallel_texts(("en", "de"), 10_000)
    assert german.locale == "de"


def test_recall_of_all_lists_is_one_and_synthetic_rows_begin_with_real_ones():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = vocabulary_search.synthetic_rows(rows, 300, 0)
    assert table.shape == (300, 16)
    np.testing.assert_array_equal(table[:200], rows)
    np.testing.assert_array_equal(vocabulary_search.synthetic_rows(rows, 50, 0), rows[:50])
    queries = rng.normal(size=(9, 16)).astype(np.float32)
    _, index = ann_index.build(rows, np.ones(200), lists=12)
    few, every = vocabulary_search.recall(index, rows, queries, 5, (1, 1000))
    assert every["recall"] == 1
    assert every["mass"] == pytest.approx(1)
    assert every["compared"] == 1
    # By hand: the arg-max's list is the first one for so many queries.
    first = (queries @ np.asarray(index.centroids).T).argmax(axis=1)
    best = (queries @ rows.T).argmax(axis=1)
    hits = [best[q] in index.ids[first[q]] for q in range(9)]
    assert few["recall"] <= np.mean(hits) + 1e-9
    assert few["mass"] < 1
    seconds = vocabulary_search.step_seconds(index, rows, queries, 5, 2, 1)
    assert set(seconds) == {"index", "exhaustive"}
    assert min(seconds.values()) > 0


def test_presets_and_sweep():
    for preset in configs.PRESETS:
        assert configs.get_config(preset).experiment == "dynamic_tokenization"
    published = configs.get_config()
    assert published.vocabulary.size == 1_000_000
    assert published.vocabulary.k == 20
    assert published.adapters.lora.rank == 128
    path = "experiments/configs/dynamic_tokenization.py:averages"
    assert len(sweep.settings(path)) >= 4
