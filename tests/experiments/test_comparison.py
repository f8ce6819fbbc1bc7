"""What a comparison's methods begin with, and which model they decode with."""

import json

import jax
import numpy as np
import pytest

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from experiments import comparison, method_parts
from experiments.config_parts import comparison as comparison_config
from experiments.config_parts import method
from experiments.generate import FLAGS, main
from models import hf_checkpoint, sizes, transformer
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import corpus_stores, trigrams

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A random target, another random model, and a store of what the target writes."""
    directory = tmp_path_factory.mktemp("models")
    config = sizes.get("tiny_llama")
    for number, name in enumerate(("target", "other")):
        params = transformer.init(config, jax.random.key(number))
        hf_checkpoint.save(directory / name, config, params)
    settings = small_config(directory)
    models = comparison.load_models(settings)
    prompts = comparison.held_out_prompts(settings, models.tokenizer).ids
    rows = generation.generate(
        models.params, prompts,
        methods.build("autoregressive", models.configs, SamplingConfig()),
        generation.stop_config(config, NEW_TOKENS, ()),
    )  # fmt: skip
    (directory / "store").mkdir()
    store = trigrams.build([[*row.prompt_ids, *row.token_ids] for row in rows], slots=512)
    trigrams.save(directory / "store" / trigrams.STORE_FILE, store)
    return directory


def small_config(directory):
    config = comparison_config("small")
    config.models.target = str(directory / "target")
    config.models.draft = str(directory / "other")
    config.data.update(num_prompts=2, prompt_tokens=16)
    config.decode.update(max_new_tokens=NEW_TOKENS, repeats=1, temperatures=(0.0,))
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("empty", "aded", update=False, search="best_first"),
        method("from corpus", "aded", corpus=True, update=False, search="best_first"),
        method("other model", "autoregressive", role="draft"),
    )
    return config


def test_a_store_and_another_model_reach_their_methods_only(directories, monkeypatch):
    asked = []

    def ensure(*arguments, **options):
        asked.append((arguments[0], options["split"]))
        return directories / "store"

    monkeypatch.setattr(corpus_stores, "ensure", ensure)
    found = comparison.run(small_config(directories), directories)
    by_label = {r["label"]: r for r in found["runs"]}
    assert asked == [("stdlib_code", "train")]
    assert by_label["empty"]["tokens_per_target_call"] == 1
    assert by_label["from corpus"]["tokens_per_target_call"] > 1.5
    assert by_label["from corpus"]["lossless"]["held"]
    assert by_label["other model"]["agreement"] < 1
    assert "draft model alone" in by_label["other model"]["lossless"]["check"]
    assert not any("other model" in claim.name for claim in found["claims"])


def test_a_store_is_counted_from_another_split_than_the_prompts(directories, tmp_path):
    config = small_config(directories)
    tokenizer = Tokenizer(None, sizes.get("tiny_llama"))
    config.corpus.split = "test"
    with pytest.raises(InputError, match=r"corpus.split: 'test' is what the prompts are from"):
        comparison.corpus_store(config, tokenizer)
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"prompt": "abc" * 5}) + "\n")
    config.corpus.update(dataset="jsonl_prompts", text_field="prompt", slots=64)
    config.corpus.builder_options = {"path": str(path)}
    store = comparison.corpus_store(config, tokenizer)
    pairs = {tuple(pair) for pair in np.asarray(store.keys).tolist() if pair[0] >= 0}
    assert pairs == {(97, 98), (98, 99), (99, 97)}
    config.decode.methods = config.decode.methods[:2]
    assert comparison.corpus_store(config, tokenizer) is None


def test_generate_begins_with_the_store_of_a_directory(directories, capsys):
    def calls(*more):
        FLAGS.unparse_flags()
        FLAGS([
            "generate", f"--checkpoint={directories / 'target'}", "--prompt_ids=1,2,3,4",
            "--max_new_tokens=12", "--method=aded", "--json", "--method_option=update=false",
            "--method_option=search=best_first", *more,
        ])  # fmt: skip
        main([])
        line = json.loads(capsys.readouterr().out)
        return line["stats"]["target_calls"], line["token_ids"]

    cold = calls()
    store = trigrams.build([[1, 2, 3, 4, *cold[1]]], slots=512)
    trigrams.save(directories / trigrams.STORE_FILE, store)
    warm = calls(f"--method_params={directories}")
    assert warm[1] == cold[1] and warm[0] < cold[0] == 12
    with pytest.raises(InputError, match=r"store: .*cannot be read"):
        method_parts.load_memory("aded", directories / "target")
    assert method_parts.load_memory("autoregressive", directories) is None
