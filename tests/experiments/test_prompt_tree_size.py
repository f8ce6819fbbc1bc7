"""The size of prompt trees is the one with the best ratio of promise and cost."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from decoding.speculative import prompt_trees
from experiments import method_parts, prompt_tree_size, trained_parts
from experiments.config_parts import comparison, method
from models import prompt_tokens
from models.errors import InputError
from models.prompt_tokens import PromptTokensConfig
from tests.decoding import tiny

MARGINALS = prompt_trees.PUBLISHED["vicuna_7b"]


@pytest.fixture
def directory(tmp_path):
    own = PromptTokensConfig()
    prompt_tokens.save(tmp_path, own, prompt_tokens.init(own, tiny.TARGET, jax.random.key(0)))
    (tmp_path / prompt_trees.MARGINALS_FILE).write_text(json.dumps({"marginals": MARGINALS}))
    return tmp_path


def make_config(directory, *options):
    config = comparison("x")
    config.parts = ConfigDict({"p": {"kind": "prompt_tokens", "directory": str(directory)}})
    config.decode.methods = (
        method("plain", "autoregressive"),
        *(
            method(f"m{i}", "ppd", part="p", marginals="part", **mine)
            for i, mine in enumerate(options)
        ),
    )
    return config


def test_the_chosen_size_moves_with_what_positions_cost(directory, monkeypatch):
    config = make_config(directory, {"limit": 0}, {"limit": 24})

    def chosen(cost):
        monkeypatch.setattr(
            prompt_tree_size, "call_seconds",
            lambda config, params, inputs, batch: {n: cost(n) for n in inputs},
        )  # fmt: skip
        found = prompt_tree_size.resolve(config, {"target": tiny.TARGET}, {"target": None})
        assert found["plain"].method == "autoregressive"
        assert found["m1"].options.limit == 24
        assert found["m0"].options.marginals == str(directory)
        return found["m0"].options.limit

    # Free positions: the largest; a position costs as much as a token: the smallest.
    assert chosen(lambda n: 1.0) == max(prompt_tree_size.LIMITS)
    assert chosen(lambda n: float(n)) == min(prompt_tree_size.LIMITS)
    slow, fast = chosen(lambda n: 1 + n / 100), chosen(lambda n: 1 + n / 300)
    assert min(prompt_tree_size.LIMITS) < slow < fast < max(prompt_tree_size.LIMITS)
    # By hand, for one of them.
    ratio = {
        limit: plan.tokens_per_call / (1 + prompt_trees.num_inputs(plan.trees) / 100)
        for limit in prompt_tree_size.LIMITS
        for plan in [prompt_trees.shaped("dynamic", MARGINALS, limit)]
    }
    assert slow == max(ratio, key=ratio.get)


def test_calls_are_timed_on_as_many_positions_as_asked():
    model = tiny.params()["target"]
    found = prompt_tree_size.call_seconds(tiny.TARGET, model, [1, 100], 2)
    assert set(found) == {1, 100} and 0 < found[1] < found[100]


def test_a_part_is_refused_where_options_say_otherwise(directory):
    config = make_config(directory, {"limit": 24})
    params = trained_parts.load(config, {"target": tiny.TARGET})["p"]
    assert np.shape(params[prompt_tokens.ROLE]["embedding"]) == (3, tiny.TARGET.embed_dim)
    for options, message in (
        ({"ensemble": 2}, "ensemble: 2 given"),
        ({"mask": "decoder"}, "mask: 'decoder' given"),
    ):
        with pytest.raises(InputError, match=message):
            trained_parts.load(make_config(directory, options), {"target": tiny.TARGET})
    (directory / prompt_trees.MARGINALS_FILE).write_text('{"marginals": [[0.5, 0.1]]}')
    with pytest.raises(InputError, match="are of 1 distances"):
        trained_parts.load(config, {"target": tiny.TARGET})
    given = method_parts.with_directory("ppd", {"marginals": "part"}, directory)
    assert given == {"marginals": str(directory)}
    assert method_parts.with_directory("ppd", {"marginals": "part"}, None) == {"marginals": "part"}
