"""The suite of tokens: models of equal size, what merging costs, tables of what was measured."""

import pytest
from ml_collections import ConfigDict

from experiments.benchmarks import tokens
from experiments.hierarchical_parts import Setting
from training import tokenizers as training

TEXTS = ["the quick brown foxes are jumping over all of the lazy dogs again and again\n" * 3] * 40


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {}
    for label, size in ((tokens.BYTES, 257), (tokens.BPE, 280)):
        found[label] = tmp_path_factory.mktemp(label)
        training.save(training.train_bpe(TEXTS, size), found[label])
    return found


def test_models_are_of_equal_size(tokenizers, tmp_path):
    config = tokens.config()
    setting = Setting(config, tmp_path, {"train": TEXTS}, "x", tokenizers[tokens.BPE], {}, [])
    models = tokens.architectures(setting, tokenizers)
    sizes = {label: model.num_params() for label, model in models.items()}
    assert set(sizes) == {tokens.BYTES, tokens.BPE, tokens.WORDS, tokens.POOLED}
    assert max(sizes.values()) < 1.05 * min(sizes.values())
    assert models[tokens.POOLED].num_prefix == 4
    assert models[tokens.BYTES].vocab_size == 257


def test_merging_is_counted_and_timed(tokenizers):
    found = tokens.merge_cost(tokenizers[tokens.BPE], TEXTS, 1)
    assert found["sequences"] == 32
    assert 0 < found["shorter, share"] < 1
    assert 0 < found["merges to half of that"] < found["merges to words"]
    assert found["milliseconds a batch"] > 0


def test_tables_and_charts_show_every_model():
    row = dict.fromkeys(tokens._COLUMNS, 1.0)
    found = {
        "models": {tokens.BYTES: row, tokens.WORDS: row | {"bits_per_byte": 2.5}},
        "merging": {"tokens": 5.0},
        "tables": {"seconds a table": 0.5},
    }
    text = tokens.table(found)
    assert "2.5" in text and "seconds a table" in text
    charts = tokens.charts(found)
    assert [series["label"] for series in charts[0]["series"]] == [tokens.BYTES, tokens.WORDS]
    assert isinstance(tokens.config(), ConfigDict)
