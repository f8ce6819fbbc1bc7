"""Every family agrees with transformers on a random small checkpoint: logits and greedy text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from models import hf_checkpoint, transformer
from tests.models import hf_fixtures

LENGTHS = (11, 23, 5, 17)  # a batch of different prompt lengths
NEW_TOKENS = 64
WIDTH = max(LENGTHS) + NEW_TOKENS


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, hf_fixtures.VOCAB, length) for length in LENGTHS]


def padded(rows: list[np.ndarray], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), width), np.int32)
    valid = np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[b, where], valid[b, where] = row, True
    return tokens, valid


def greedy(logits_of, rows: list[np.ndarray], steps: int) -> np.ndarray:
    """Argmax continuations [B, steps] by running the whole right-padded sequence each time."""
    tokens, _ = padded(rows, WIDTH, left=False)
    for step in range(steps):
        logits = np.asarray(logits_of(tokens))
        for b, row in enumerate(rows):
            at = len(row) + step
            tokens[b, at] = logits[b, at - 1].argmax()
    return np.stack([tokens[b, len(row) : len(row) + steps] for b, row in enumerate(rows)])


@functools.cache
def reference(name: str):
    # Seeds whose greedy text is varied and has no near-ties, which the test checks.
    return hf_fixtures.build(name, seed=2 if name == "gemma3_text" else 1)


@pytest.fixture(scope="module", params=list(hf_fixtures.CASES))
def case(request, tmp_path_factory):
    model = reference(request.param)
    directory = hf_fixtures.save(model, tmp_path_factory.mktemp(request.param))
    config, params = hf_checkpoint.load(directory)
    # One shape, so that each model is compiled once.
    return model, jax.jit(lambda tokens: transformer.apply(config, params, tokens).logits)


def test_logits(case):
    model, logits_of = case
    tokens, valid = padded(prompts(), WIDTH, left=False)
    with torch.no_grad():
        expected = model(
            torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(valid).long()
        ).logits.numpy()
    logits = logits_of(tokens)
    assert logits.dtype == jnp.float32
    difference = np.abs(np.asarray(logits) - expected)[valid]
    assert difference.max() <= 1e-4
    # The comparison means something: logits vary, between tokens and between positions.
    assert expected[valid].std(axis=-1).min() > 0.2
    assert expected[valid].std(axis=0).min() > 0.1


def test_greedy_continuations(case):
    model, logits_of = case
    rows = prompts()
    tokens, valid = padded(rows, max(LENGTHS), left=True)
    result = model.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(valid).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = result.sequences[:, max(LENGTHS) :].numpy()
    best, second = torch.stack(result.logits).topk(2, dim=-1).values.unbind(-1)
    assert (best - second).min() > 2e-4, "near-tie: choose another seed"
    np.testing.assert_array_equal(greedy(logits_of, rows, NEW_TOKENS), expected)
    assert len(np.unique(expected)) > 10  # not one token over and over


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "gemma2", "gemma3_text"])
def test_window_matters(name, tmp_path):
    """Without its window the model gives other logits, so the agreement covers it."""
    config, params = hf_checkpoint.load(hf_fixtures.save(reference(name), tmp_path))
    tokens = jnp.asarray(prompts()[1])[None]
    unbounded = config.replace(window=None, local_layers=())
    with_window, without = (
        jax.jit(lambda t, c=c: transformer.apply(c, params, t).logits)(tokens)
        for c in (config, unbounded)
    )
    assert jnp.abs(with_window - without).max() > 1e-2


def test_llada(tmp_path):
    """LLaDA is Llama without the causal mask, under other names."""
    llama = reference("llama")
    config, params = hf_checkpoint.load(hf_fixtures.llada_checkpoint(llama, tmp_path))
    assert not config.causal
    tokens, valid = padded(prompts(), max(LENGTHS), left=False)
    everything = torch.tensor(valid)[:, None, None, :].expand(-1, 1, max(LENGTHS), -1)
    bias = torch.where(everything, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = llama(torch.tensor(tokens, dtype=torch.long), attention_mask=bias).logits.numpy()
        causal = llama(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    mask = jnp.broadcast_to(valid[:, None, :], (*tokens.shape, tokens.shape[1]))
    run = jax.jit(lambda tokens, mask: transformer.apply(config, params, tokens, mask=mask).logits)
    logits = run(tokens, mask)
    assert np.abs(np.asarray(logits) - expected)[valid].max() <= 1e-4
    assert np.abs(expected - causal)[valid].max() > 0.1  # the mask was really bidirectional
