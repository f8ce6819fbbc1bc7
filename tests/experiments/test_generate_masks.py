"""The generate program and traces with methods that fill masks, on a LLaDA directory."""

import functools
import json

import jax
import pytest

from decoding import generation, methods, stopping
from decoding.sampling import SamplingConfig
from experiments import unmasking_trace
from models import hf_checkpoint, transformer
from models.config import TransformerConfig
from models.tokenizer import Tokenizer
from training import tokenizers as bpe

TEXT = "for word in words: print(word)"
NEW = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random LLaDA checkpoint whose last token is the mask."""
    path = tmp_path_factory.mktemp("checkpoint") / "llada"
    tokenizer = bpe.train_bpe([TEXT] * 4, 280)
    vocab = tokenizer.get_vocab_size() + 1
    config = TransformerConfig(
        vocab, 16, 2, 4, 4, 4, 32, 128, family="llada", causal=False, mask_token_id=vocab - 1
    )
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(0, impl="rbg"))
    hf_checkpoint.save(path, config, params)
    bpe.save(tokenizer, path)
    return path


def built(directory):
    config, params = hf_checkpoint.load(directory)
    options = {"block_length": 4, "cache": "dual"}
    method = methods.build("llada", {"target": config}, SamplingConfig(), options)
    return config, {"target": params}, method


ARGUMENTS = ("--method=llada", f"--max_new_tokens={NEW}", "--prompt=for word", "--prompt=print(")
OPTIONS = ("--method_option=block_length=4", "--method_option=cache=dual")


def test_rows_are_those_of_the_library(directory, run):
    status, out, err = run(f"--checkpoint={directory}", *ARGUMENTS, *OPTIONS, "--json")
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    config, params, method = built(directory)
    tokenizer = Tokenizer.from_directory(directory, config)
    prompts = [tokenizer.encode(text) for text in ("for word", "print(")]
    stop = generation.stop_config(config, NEW)
    expected = generation.generate(params, prompts, method, stop)
    assert [row["token_ids"] for row in rows] == [row.token_ids for row in expected]
    assert rows[0]["stats"]["full_calls"] == 3
    assert rows[0]["text"] is not None and config.mask_token_id not in rows[0]["token_ids"]


def test_a_row_is_streamed(directory, run):
    arguments = (f"--checkpoint={directory}", *ARGUMENTS[:3], *OPTIONS)
    whole = run(*arguments)[1].splitlines()
    streamed = run(*arguments, "--stream")[1].splitlines()
    assert streamed == whole


def test_methods_and_models_that_do_not_fit(directory, run):
    status, _, err = run(f"--checkpoint={directory}", "--prompt=x", "--method=autoregressive")
    assert status == 2 and "is bidirectional; allowed: causal models" in err
    status, _, err = run("--checkpoint=random:tiny_llama", "--prompt=x", "--method=llada")
    assert status == 2 and "is causal; allowed: bidirectional models" in err


def test_traces_end_in_the_text(directory):
    config, params, method = built(directory)
    tokenizer = Tokenizer.from_directory(directory, config)
    prompt, stop = tokenizer.encode("for word"), stopping.StopConfig(NEW)
    row = generation.generate(params, [prompt], method, stop)[0]
    trace = unmasking_trace.record(params, prompt, method, stop, tokenizer)
    assert trace["rounds"] == row.stats["target_calls"] == NEW
    assert [cell[-1][1] for cell in trace["cells"]] == [
        tokenizer.decode([token]) for token in row.token_ids
    ]
    assert sorted(cell[0][0] for cell in trace["cells"]) == list(range(1, NEW + 1))
