"""Heads that guess ahead as parts of a comparison: trained by kind, loaded, measured."""

import json

import pytest

from experiments import guess_accuracy, trained_parts
from experiments.config_parts import chimera_heads, comparison, medusa_heads, method
from experiments.configs import chimera
from models import hf_checkpoint
from models.chimera_heads import ChimeraConfig, ChimeraHeads
from models.errors import InputError
from tests.experiments import tiny_target
from training import target_features


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A comparison of one head of either kind on a target of random parameters."""
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    recipe = tiny_target.make(tmp_path, max_position=64)
    found = comparison("small")
    found.models.target = str(tmp_path / "target")
    found.parts = {
        "Medusa-1": medusa_heads(recipe, heads=1),
        "Chimera": chimera_heads({"reads": "text"}, recipe, heads=1, context=False),
    }
    found.decode.methods = (
        method("plain", "autoregressive"),
        method("Medusa-1", "medusa", part="Medusa-1", heads=1),
        method("Chimera", "chimera", part="Chimera", heads=1),
    )
    found.guesses = {"better": "Chimera", "worse": "Medusa-1"}
    return found, hf_checkpoint.load_config(tmp_path / "target")


def test_heads_are_trained_on_first_use_and_measured(config):
    config, model = config
    parts = trained_parts.load(config, {"target": model})
    assert set(parts) == {"Medusa-1", "Chimera"}
    heads = parts["Chimera"]["chimera_heads"]
    assert isinstance(heads, ChimeraHeads) and heads.config == ChimeraConfig(1, context=False)
    assert set(parts["Medusa-1"]["medusa_heads"]) == {"block"}
    figure, claims = guess_accuracy.measure_five(config, {}, {}, [])
    shares = {series["label"]: series["y"] for series in figure["series"]}
    assert {name: len(y) for name, y in shares.items()} == {"Medusa-1": 1, "Chimera": 1}
    assert claims[0].measured == shares["Chimera"][0] - shares["Medusa-1"][0]
    path = trained_parts.directory_of(config, "Chimera") / target_features.SUMMARY_FILE
    summary = json.loads(path.read_text())
    assert shares["Chimera"] == [summary["eval_top5_0"]]
    figure, _ = guess_accuracy.measure(config, {}, {}, [])
    assert figure["series"][0]["y"] == [summary["eval_agreement_0"]]
    config.parts["Chimera"].heads.head = 3
    with pytest.raises(InputError, match=r"config\.parts\.Chimera: .*'head'"):
        trained_parts.load(config, {"target": model})


def test_the_config_names_parts_that_exist_and_what_they_are(monkeypatch, tmp_path):
    asked = []

    def ensure(recipe, part):
        asked.append((part.settings, recipe.target))
        return tmp_path

    monkeypatch.setattr(target_features, "ensure", ensure)
    for preset in chimera.PRESETS:
        config = chimera.get_config(preset)
        used = {entry.part for entry in config.decode.methods if entry.part}
        assert used == set(config.parts)
        for name in config.parts:
            trained_parts.directory_of(config, name)
    for setting in chimera.sweep():
        config.parts = setting["parts"]
        trained_parts.directory_of(config, "Chimera")
    settings = [settings for settings, _ in asked]
    assert {"heads": 4, "own_head": True} in settings  # Medusa's
    assert {"code_deep", "checkpoints/vicuna-7b-v1.3"} == {target for _, target in asked}
    without = [s["heads"] for s in settings if "objective" in s]
    for field in ("trigram", "context", "residual", "draft_states"):
        assert any(not heads[field] for heads in without)
