"""Rollouts are what decoding gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import stopping
from models import hf_checkpoint
from models.errors import InputError
from tests.decoding import masked, tiny
from training import base_models, recipes, rollouts

TINY = {
    "dataset_options": {"size": 400, "levels": [6]},
    "vocab_size": 272,
    "eval_batches": 1,
    "train.num_steps": 2,
    "train.batch_size": 8,
    "train.model.num_layers": 1,
    "train.model.embed_dim": 16,
    "train.model.num_heads": 2,
    "train.model.num_kv_heads": 2,
    "train.model.head_dim": 8,
    "train.model.mlp_dim": 32,
}


def test_completions_are_the_texts_of_generate():
    method = tiny.build("llada21", mode="S", block_length=8)
    tokens = np.full((8, 64), masked.MASK)
    for row, prompt in enumerate(tiny.PROMPTS):
        tokens[row, : len(prompt)] = prompt
    rollout = rollouts.completer(method, masked.CONFIG)
    params = masked.params()
    lengths = jnp.array([len(prompt) for prompt in tiny.PROMPTS])
    found = np.asarray(
        rollout(params["target"], tokens=tokens, prompt_lengths=lengths, key=jax.random.key(3))
    )
    stop = stopping.StopConfig(64, (masked.EOS,), max_position=64)
    rows = masked.decode(method, stop=stop)
    for prompt, row, completion in zip(tiny.PROMPTS, rows, found, strict=True):
        text = [*prompt, *row.token_ids]
        assert completion.tolist() == text + [masked.EOS] * (64 - len(text))


def test_bad_input():
    with pytest.raises(InputError, match="method: autoregressive writes from left to right"):
        rollouts.completer(tiny.build("autoregressive"), tiny.TARGET)
    method = tiny.build("llada21", mode="S", block_length=8)
    with pytest.raises(InputError, match="eos_token_ids: none"):
        rollouts.completer(method, masked.CONFIG.replace(eos_token_ids=()))
    with pytest.raises(InputError, match="method: learn2pd needs models"):
        rollouts.completer(tiny.build("learn2pd"), masked.CONFIG)
    rollout = rollouts.completer(method, masked.CONFIG)
    with pytest.raises(InputError, match="tokens: rows of 12 must be a multiple of 8"):
        rollout({}, tokens=np.zeros((2, 12)), prompt_lengths=np.ones(2), key=jax.random.key(0))


def test_a_model_is_reinforced_from_another(tmp_path):
    overrides = {
        f"{prefix}{field}": value
        for prefix in ("", "start.", "start.start.")
        for field, value in TINY.items()
    }
    directory = base_models.ensure("arithmetic_wide_rl", cache_dir=tmp_path, overrides=overrides)
    (start,) = (tmp_path / "models").glob("arithmetic_wide_edit-*")
    config, params = hf_checkpoint.load(directory)
    before, old = hf_checkpoint.load(start)
    assert config == before
    # Nothing was right, so nothing was learned: all advantages are zero.
    jax.tree.map(np.testing.assert_array_equal, params, old)


def test_bad_recipes():
    for changes, message in (
        ({"starts_from": None}, "starts_from: None; reinforcement needs a model"),
        ({"temperature": 0.0}, "temperature: 0.0 must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            recipes.recipe("arithmetic_wide_rl", changes)
