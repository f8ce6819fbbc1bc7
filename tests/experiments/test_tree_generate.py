"""Tree methods from the command line, on a pair of checkpoints in Hugging Face's format."""

import json

import jax
import jax.numpy as jnp
import pytest

from decoding import loop, methods, randomness
from decoding.sampling import SamplingConfig
from experiments.generate import FLAGS, main
from models import hf_checkpoint, sizes, transformer
from tests.decoding import tiny

SMALL = {
    "spectr": ("num_sequences=2", "length=2"),
    "rsd_c": ("branching=2-1",),
    "rsd_s": ("width=2", "depth=2"),
    "dyspec": ("budget=4",),
    "token_recycling": ("template=nodes8",),
    "aded": ("search=best_first", "budget=8"),
    "bild": ("rollback=0", "max_small=3"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    config = sizes.get("tiny_llama")
    target = transformer.init(config, jax.random.key(0))
    hf_checkpoint.save(directory / "target", config, target)
    # Near the target, so that drafts are right now and then.
    other = transformer.init(config, jax.random.key(1))
    draft = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, target, other)
    hf_checkpoint.save(directory / "draft", config, draft)
    return directory


def run(pair, capsys, method, options=()):
    FLAGS.unparse_flags()
    flags = [f"--checkpoint={pair / 'target'}", f"--method={method}", "--prompt_ids=7,8,9,7,8"]
    if "draft" in methods.spec(method).roles:
        flags.append(f"--draft={pair / 'draft'}")
    flags += [f"--method_option={option}" for option in options]
    FLAGS(["generate", "--json", "--max_new_tokens=16", *flags])
    main([])
    FLAGS.unparse_flags()
    return json.loads(capsys.readouterr().out)


def test_every_system_writes_what_plain_decoding_writes(pair, capsys):
    plain = run(pair, capsys, "autoregressive")
    assert plain["stats"]["target_calls"] == len(plain["token_ids"]) == 16
    for method, options in SMALL.items():
        found = run(pair, capsys, method, options)
        assert found["token_ids"] == plain["token_ids"], method
        assert found["stats"]["target_calls"] <= 16, method


@pytest.mark.parametrize("name", ["spectr", "rsd_c", "rsd_s", "dyspec", "top_tree"])
def test_every_sampled_tree_takes_drafts_from_the_text_alone(name):
    """Traced, not run: a round without parameters or cache of a draft model."""
    configs = {"target": tiny.SMALL}
    method = methods.build(name, configs, SamplingConfig(1.0), {"source": "ngram"})
    assert method.roles == ("target",)
    params = {"target": tiny.params(tiny.SMALL)["target"]}
    row = jnp.ones((1,), jnp.int32)
    keys = randomness.row_keys(0, jnp.zeros(1, int))
    slots = 8 + method.lookahead

    def one_round(params):
        tokens = jnp.ones((1, 4), jnp.int32)
        state = loop.start(params, tokens, 4 * row, keys, method=method, slots=slots, buffer=32)
        return method.step(params, state)[1]

    emission = jax.eval_shape(one_round, params)
    assert emission.tokens.shape == (1, method.depth + 1)
