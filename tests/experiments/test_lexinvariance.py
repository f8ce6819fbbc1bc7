"""The experiment end to end on models of a few steps, and its measures on cases known by hand."""

import importlib

import numpy as np
import pytest

from decoding import methods
from decoding.sampling import SamplingConfig
from experiments import cipher_keys, lexinvariant_measures, loading, run, symbol_tasks
from models.errors import InputError
from models.random_embeddings import LexinvariantConfig

LETTERS = (0, 1, 2)


def test_keys_are_found_by_majority_and_precision_counts_letters_that_occur():
    keys = np.array([[3, 0, 1, 2]])  # plain token -> cipher token
    plain = np.array([[0, 0, 0, 1, 1, 3]])
    cipher = cipher_keys.encrypt(plain, keys)
    np.testing.assert_array_equal(cipher, [[3, 3, 3, 0, 0, 2]])
    said = np.array([[0, 0, 2, 2, 2, 3]])  # letter 0 right by two votes of three, letter 1 wrong
    np.testing.assert_array_equal(cipher_keys.majority(said, cipher, 4), [2, -1, 3, 0])
    assert cipher_keys.precision(said, cipher, keys, LETTERS) == [0.5]
    assert np.isnan(cipher_keys.precision(said[:, 5:], cipher[:, 5:], keys, LETTERS))[0]
    sure = np.log(np.eye(4)[plain] * 0.96 + 0.01)
    entries = [
        cipher_keys.soft_entries(sure, cipher, keys, LETTERS, temperature)
        for temperature in (1.0, 3.0)
    ]
    assert entries[0] == pytest.approx(0.97) and 0.25 < entries[1] < 0.97


def test_random_keys_leave_fixed_tokens_alone():
    model = LexinvariantConfig(8, 8, 1, 1, 1, 8, 8, 16, fixed_ids=(7,))
    keys = cipher_keys.random_keys(np.random.default_rng(0), model, 50)
    assert (np.sort(keys, axis=1) == np.arange(8)).all()
    assert (keys[:, 7] == 7).all() and len(np.unique(keys[:, 0])) > 3


def test_tasks_are_solvable_from_their_prompts_alone():
    """A reader that knows nothing of symbols but equality finds every answer."""
    separators = {"->": [20, 21], "\n": [22]}
    encode = separators.__getitem__
    counts = np.r_[np.arange(20, 0, -1), 500, 500, 500]
    for symbols in symbol_tasks.SYMBOLS:
        drawn = symbol_tasks.weights(symbols, counts, (20, 21, 22))
        assert drawn[20:].sum() == 0 and drawn.sum() == pytest.approx(1)
        task = symbol_tasks.look_up(encode, drawn, 50, seed=1)
        for prompt, (answer,) in zip(task.prompts, task.answers, strict=True):
            key = prompt[-3]
            assert prompt[prompt.index(key) + 3] == answer
            assert 3 <= prompt.count(22) <= 8
        task = symbol_tasks.permutation(encode, drawn, 50, seed=1)
        for prompt, answer in zip(task.prompts, task.answers.tolist(), strict=True):
            lines = [prompt[i : i + 8] for i in range(0, len(prompt) - 5, 8)]
            assert len(lines) == 4
            for line in lines:
                chosen = [line[:3].index(symbol) for symbol in line[5:7]]
                assert [prompt[-5:-2][place] for place in chosen] == answer
    uniform = symbol_tasks.weights("uniform", counts, (20, 21, 22))
    assert len(set(uniform[:20])) == 1


def test_smoothing_is_a_mean_around_each_position():
    x, y = lexinvariant_measures.smooth(np.array([1.0, 2.0, 6.0, 3.0]), 2)
    np.testing.assert_allclose(x, [1.5, 2.5, 3.5])
    np.testing.assert_allclose(y, [1.5, 4.0, 4.5])


def test_the_config_runs_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    config = importlib.import_module("experiments.configs.lexinvariant").get_config("offline")
    config.overrides = (
        ("train.num_steps", 4), ("train.eval_every", 2), ("train.batch_size", 4),
        ("train.sequence_length", 32), ("eval_batches", 1),
    )  # fmt: skip
    config.probe.overrides = (("num_steps", 2), ("batch_size", 4), ("sequence_length", 32),
                              ("eval_batches", 1))  # fmt: skip
    config.probe.update(window=20, windows=2, soft_window=10)
    config.context.update(rows=8, length=48, window=8, batch_size=8)
    config.tasks.update(examples=8, batch_size=8)
    config.language.update(rows=40, sizes=(3,), theorem_length=20)
    config.texts = config.texts[:1]
    found = run.execute(config, tmp_path / "run")
    assert found["draws"] == 1
    assert {"language", "theorem", "perplexity", "key precision", "tasks"} == set(found["figures"])
    names = [claim.name for claim in found["claims"]]
    assert len(names) == len(set(names)) >= 14
    by_role = {model["role"] for model in found["models"]}
    assert {"prose, lexinvariant", "prose, standard", "language, lexinvariant"} <= by_role
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    # What was saved is opened as any checkpoint is, with its tokeniser.
    (directory,) = (tmp_path / "cache" / "models").glob("prose_lexinvariant-*")
    (model,) = loading.load_configs("lexinvariant", {"target": str(directory)}).values()
    loaded, params = loading.load_model(str(directory))
    assert loaded == model and "embedder" not in params
    assert loading.load_tokenizer(str(directory), model).encode("Ab") == [2, 3]
    with pytest.raises(InputError, match="method autoregressive: the target model"):
        methods.build("autoregressive", {"target": model}, SamplingConfig())
