"""Rollouts are what decoding gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import stopping
from models.errors import InputError
from tests.decoding import masked, tiny
from training import rollouts


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
