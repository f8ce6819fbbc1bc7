"""The suite of draft trees: equal budgets, what is timed and how much memory follows N times V."""

import numpy as np
import pytest

from decoding import methods
from decoding.sampling import SamplingConfig
from experiments import benchmark
from experiments.benchmarks import tree_cost, trees
from models import sizes
from models.errors import InputError

TINY = {role: sizes.get("tiny_llama") for role in ("target", "draft")}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_method_has_the_same_nodes(temperature):
    """A call on a budget's tree writes so many slots; DySpec's last layer may need more."""
    sampling = SamplingConfig(temperature=temperature)
    for budget in trees.BUDGETS:
        for label, (name, options) in trees.entries(budget).items():
            method = methods.build(name, TINY, sampling, options)
            scratch = {"DySpec": min(32, budget), "DySpec heap": 1}.get(label, 0)
            nodes = 0 if label == "plain" else budget
            assert method.lookahead == nodes + 1 + scratch, (label, budget)
    for name, options in tree_cost.METHODS.values():
        method = methods.build(name, TINY, sampling, options)
        assert method.lookahead - 1 in (tree_cost.NODES, tree_cost.NODES + tree_cost.LAYER)


def test_memory_that_follows_the_vocabulary_is_logits_and_the_drafters_distributions():
    """Arrays [N, V] alive at once: one for deterministic drafts, at most two for a sampled beam."""
    chosen = {
        "RSD-S": ("rsd_s", {"width": 8, "depth": 4}),
        "Token Recycling": ("token_recycling", {"template": "nodes32"}),
    }
    found = tree_cost.memory(TINY, vocabularies=(2048, 4096), slots=128, nodes=32, entries=chosen)
    arrays = {r["label"]: r["arrays"] for r in found}
    assert 1 <= arrays["Token Recycling"] < 1.4  # the table, [V, 8], is 0.25 of it
    assert 1 <= arrays["RSD-S"] < 2.2
    assert all(r["temporaries_bytes"] > r["logits_bytes"] for r in found)
    assert "| RSD-S |" in tree_cost.table({"memory": found})


def test_a_round_takes_longer_than_its_model_calls():
    configs = tree_cost.configs("tiny_llama", "tiny_llama")
    params = tree_cost.weights(configs)
    chosen = {"Token Recycling": tree_cost.METHODS["Token Recycling"]}
    (found,) = tree_cost.overhead(configs, params, 3, chosen)
    assert found["nodes"] == 64 and found["draft_calls"] == 0
    assert 0 < found["overhead_share"] < 1
    assert found["round_ms"] > found["model_calls_ms"] > 0
    verified = tree_cost.verification(configs, params, 3)
    assert verified["ratio"] == verified["tree_ms"] / verified["one_token_ms"] > 1
    assert "on one token" in tree_cost.table({"verification": verified})


def test_sizes_share_a_vocabulary_and_a_dtype():
    found = tree_cost.configs("llama3_8b", "llama3_2_1b")
    assert {(c.vocab_size, c.dtype) for c in found.values()} == {(128256, "bfloat16")}
    found = tree_cost.configs("bench_85m", "tiny_llama", "bfloat16")
    assert {(c.vocab_size, c.dtype) for c in found.values()} == {(256, "bfloat16")}


def test_records_become_tables_and_charts():
    records = [
        {
            "label": label, "temperature": t, "budget": n, "speedup": 0.5, "error": 0.1,
            "tokens_per_target_call": 1 + np.log2(n) * (label != "plain") + t,
        }
        for t in (0.0, 1.0)
        for n in (8, 16)
        for label in ("plain", "beam")
    ]  # fmt: skip
    table = trees.table(records)
    assert "| beam | 4.00 (0.50x) | 5.00 (0.50x) |" in table
    assert table.count("### temperature") == 2
    charts = trees.charts(records)
    assert [c["series"] for c in charts] == [
        [{"label": "beam", "x": [8, 16], "y": [4.0 + t, 5.0 + t]}] for t in (0, 1)
    ]


@pytest.mark.parametrize("flag", ["--parts=budget", "--target=bench_8m"])
def test_mistakes_are_named_before_anything_is_measured(flag):
    benchmark.FLAGS.unparse_flags()
    benchmark.FLAGS(["benchmark", "--suite=trees", flag])
    with pytest.raises(InputError, match=r"did you mean"):
        benchmark.main([])
    benchmark.FLAGS.unparse_flags()
