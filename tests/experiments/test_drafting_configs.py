"""Configs of FSPAD and PPD: what they name is there, and a comparison of both runs to its end."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from decoding import methods
from decoding.speculative import prompt_trees
from experiments import cli, comparison, prompt_tree_size, sweep, trained_parts
from experiments.config_parts import comparison as base
from experiments.config_parts import feature_head, medusa_heads, method, prompt_tokens
from tests.experiments import tiny_target
from training import prompt_marginals


def check(config):
    labels = [entry.label for entry in config.decode.methods]
    assert len(set(labels)) == len(labels)
    for entry in config.decode.methods:
        assert not entry.part or entry.part in config.parts
        methods.parse_options(entry.method, entry.options.to_dict())
    for claim in config.claims:
        assert claim.label in labels and (not claim.over or claim.over in labels)
        assert claim.temperature in config.decode.temperatures
    assert set(config.analyses) <= set(comparison.ANALYSES)
    assert {part.kind for part in config.parts.values()} <= set(trained_parts.KINDS)


@pytest.mark.parametrize("name", ["fspad", "ppd"])
def test_presets_and_sweeps_are_whole(name):
    path = f"experiments/configs/{name}.py"
    for preset in ("", ":offline"):
        check(cli.load_config_file(path + preset))
    for config in sweep.settings(f"{path}:offline"):
        check(config)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A target of random parameters, and parts that are trained for a step."""
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    recipe = tiny_target.make(tmp_path, max_position=96)
    monkeypatch.setattr(
        prompt_marginals, "Validation",
        lambda: prompt_marginals_validation(prompts=2, prompt_tokens=16, new_tokens=8),
    )  # fmt: skip
    monkeypatch.setattr(prompt_tree_size, "LIMITS", (8, 12))
    monkeypatch.setattr(prompt_tree_size, "BATCHES", (1, 8))
    found = base("small")
    found.models = ConfigDict({"target": str(tmp_path / "target")})
    found.data.update(num_prompts=2, prompt_tokens=16)
    found.data.builder_options = ConfigDict(recipe["dataset_options"])
    found.decode.update(temperatures=(0.0,), max_new_tokens=8, repeats=1)
    found.parts = ConfigDict(
        {
            "prompt tokens": prompt_tokens({"cuts": 2}, recipe),
            "Medusa": medusa_heads(recipe, heads=3),
            "EAGLE-2": feature_head({}, recipe),
            "FSPAD": feature_head({}, recipe, fusion="product", alignment="heads"),
        }
    )
    trees = {"width": 3, "depth": 1, "num_draft": 6}
    found.decode.methods = (
        method("plain", "autoregressive"),
        method("PPD, dynamic", "ppd", part="prompt tokens", marginals="part", limit=8),
        method("PPD, chosen size", "ppd", part="prompt tokens", marginals="part", limit=0),
        method("EAGLE-2", "eagle2", part="EAGLE-2", **trees),
        method("FSPAD", "fspad", part="FSPAD", **trees),
    )
    found.analyses = (
        "prompt tokens", "prompt tree size", "prompt tree states", "feature heads", "feature errors"
    )  # fmt: skip
    return found


prompt_marginals_validation = prompt_marginals.Validation


def test_a_comparison_trains_measures_and_decodes(config, tmp_path):
    found = comparison.run(config, tmp_path / "run")
    lines = {line["label"]: line for line in found["runs"]}
    assert all(line["identical_rows"] == 2 for line in lines.values())
    part = trained_parts.directory_of(config, "prompt tokens")
    measured = np.asarray(prompt_trees.read_marginals(part))
    assert measured.shape == (3, 10) and (measured.sum(axis=1) <= 1).all()
    for name in ("PPD, dynamic", "PPD, chosen size"):
        assert lines[name]["options"]["marginals"] == str(part)
        assert lines[name]["options"]["limit"] in (8, 12)
    figures = found["figures"]
    assert {s["label"] for s in figures["prompt tokens"]["series"]} == {"prompt tokens", "Medusa"}
    assert figures["prompt tree size"]["series"][0]["x"] == [8, 12]
    planned, counted = figures["prompt tree states"]["series"]
    assert sum(planned["y"]) == pytest.approx(1) and sum(counted["y"]) == pytest.approx(1)
    assert {s["label"] for s in figures["feature heads"]["series"]} == {"EAGLE-2", "FSPAD"}
    # With the same initial values and one step, FSPAD is still close to EAGLE.
    eagle, fspad = (s["y"] for s in figures["feature errors"]["series"])
    assert fspad == pytest.approx(eagle, rel=0.1)
    assert len(found["claims"]) > 10
