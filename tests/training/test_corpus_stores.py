"""Stores of a dataset: counted once, and again only when what determines them changes."""

import json
from collections import Counter

import numpy as np
import pytest

from models import sizes
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import corpus_stores, trigrams

EOS = 255
TEXTS = ["abcabcabd", "xyxyxz"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


def ensure(corpus, tmp_path, **changes):
    config = sizes.get("tiny_llama").replace(eos_token_ids=(EOS,))
    options = {
        "split": "test",
        "text_field": "prompt",
        "builder_options": {"path": str(corpus)},
        "slots": 64,
        "cache_dir": tmp_path / "cache",
    }
    return corpus_stores.ensure("jsonl_prompts", Tokenizer(None, config), **{**options, **changes})


def test_the_store_is_that_of_the_tokenised_documents(corpus, tmp_path):
    directory = ensure(corpus, tmp_path)
    store = trigrams.load(directory / trigrams.STORE_FILE)
    counts = Counter()
    for text in TEXTS:
        ids = [*text.encode(), EOS]
        counts.update(zip(ids, ids[1:], ids[2:]))
    found = {}
    for slot, pair in enumerate(np.asarray(store.keys).tolist()):
        for token, weight in zip(store.successors[slot].tolist(), store.weights[slot].tolist()):
            if token >= 0:
                found[(*pair, token)] = weight
    totals = Counter()
    for (a, b, _), count in counts.items():
        totals[a, b] += count
    expected = {t: count / totals[t[:2]] for t, count in counts.items()}
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        assert weight == pytest.approx(expected[key])


def test_it_is_counted_once_and_anew_for_other_sizes_or_texts(corpus, tmp_path, monkeypatch):
    first = ensure(corpus, tmp_path)
    calls = []
    real = trigrams.build
    monkeypatch.setattr(trigrams, "build", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert ensure(corpus, tmp_path) == first and not calls
    assert ensure(corpus, tmp_path, top=1) != first and len(calls) == 1
    corpus.write_text(json.dumps({"prompt": "another text"}) + "\n")
    assert ensure(corpus, tmp_path) != first and len(calls) == 2


def test_an_unknown_split_is_bad_input(corpus, tmp_path):
    with pytest.raises(InputError, match="split: 'nowhere'"):
        ensure(corpus, tmp_path, split="nowhere")
