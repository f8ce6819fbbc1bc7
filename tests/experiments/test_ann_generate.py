"""A model with a large vocabulary as files: what other programs open, and the command line."""

import json

import jax
import numpy as np
import pytest
import transformers

from decoding.dynamic_vocabulary import inverted_lists, providers
from experiments import method_parts
from models import hf_checkpoint
from models.errors import InputError
from tests.decoding import test_embedding_cache
from tests.decoding.test_embedding_cache import fvt, source
from tests.models import random_models
from tests.training.test_large_vocabulary import tokens
from training import ann_index, large_vocabulary

CONFIG = test_embedding_cache.CONFIG.replace(embedding_scale=None, eos_token_ids=(0,))


def test_exported_directories_open_everywhere(tmp_path, run):
    config, _ = large_vocabulary.export(
        tmp_path / "large", CONFIG, random_models.params(CONFIG), source(), tokens(), fvt()
    )
    assert config.vocab_size == len(tokens())
    _, model = hf_checkpoint.load(tmp_path / "large")
    rows = providers.model_rows(config, model)
    np.testing.assert_array_equal(
        rows.output[:300], providers.model_rows(CONFIG, random_models.params(CONFIG)).output
    )
    _, made = ann_index.build(
        rows.output, large_vocabulary.token_bytes(source(), tokens()), lists=16
    )
    shape = ann_index.build(rows.output, np.zeros(config.vocab_size), lists=16)[0]
    inverted_lists.save(tmp_path / "index", shape, made)
    loaded_shape, loaded = inverted_lists.load(tmp_path / "index")
    assert loaded_shape == shape
    jax.tree.map(np.testing.assert_array_equal, loaded, made)
    text = "def longest_prefix(pairs):"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "large")
    ours = large_vocabulary.longest_prefix(source(), tokens()).encode(text).ids
    assert theirs(text)["input_ids"] == ours
    assert theirs.decode(ours) == text
    # The command line decodes with it.
    status, out, _ = run(
        f"--checkpoint={tmp_path / 'large'}", "--method=ann_vocabulary", f"--prompt={text}",
        f"--method_params={tmp_path / 'index'}", "--method_option", "k=8", "--method_option",
        "probes=99", "--max_new_tokens=12", "--json",
    )  # fmt: skip
    assert status == 0
    row = json.loads(out)
    assert row["prompt_ids"] == ours
    assert row["stats"]["bytes_emitted"] >= row["stats"]["tokens_emitted"] - 1
    with pytest.raises(InputError, match="an index is made of a model's own rows"):
        method_parts.load_method_params("ann_vocabulary", None, True)
    assert method_parts.load_method_params("ann_vocabulary", None, False, {"search": "exact"}) == {}
