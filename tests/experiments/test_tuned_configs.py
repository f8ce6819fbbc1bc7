"""Configs of methods with models of their own: everything they name is there."""

import pytest
from ml_collections import ConfigDict

from decoding import methods
from experiments import cli, comparison, fine_tuned_models, sweep
from models.errors import InputError
from training import fine_tuned

NAMES = ("lud", "skipdecode")


@pytest.fixture
def made(monkeypatch):
    """Recipes and tunings of the copies that would be trained."""
    found = []

    def ensure(recipe, tuning):
        found.append((recipe, tuning))
        return f"copy {len(found)}"

    monkeypatch.setattr(fine_tuned, "ensure", ensure)
    return found


def check(config):
    for model in config.models.values():
        fine_tuned_models.source_of(model)
    labels = [entry.label for entry in config.decode.methods]
    assert len(set(labels)) == len(labels)
    for entry in config.decode.methods:
        assert entry.role in config.models
        methods.parse_options(entry.method, entry.options.to_dict())
    for claim in config.claims:
        assert claim.label in labels and (not claim.over or claim.over in labels)
        assert claim.batch_size in config.decode.batch_sizes
    assert set(config.analyses) <= set(comparison.ANALYSES)


@pytest.mark.parametrize("name", NAMES)
def test_presets_and_sweeps_are_whole(name, made):
    path = f"experiments/configs/{name}.py"
    for preset in ("", ":offline"):
        check(cli.load_config_file(path + preset))
    assert made
    for config in sweep.settings(f"{path}:offline"):
        check(config)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_presets_are_refused(name):
    with pytest.raises(InputError, match="preset: 'none'"):
        cli.load_config_file(f"experiments/configs/{name}.py:none")


def test_a_copy_decodes_with_the_schedule_that_it_was_trained_for(made):
    """Every schedule of the offline comparison, read off the recipe and off the method."""
    config = cli.load_config_file("experiments/configs/skipdecode.py:offline")
    checked = 0
    for entry in config.decode.methods:
        model = config.models[entry.role]
        if entry.method == "skip_decode" and isinstance(model, ConfigDict):
            settings = model.settings.to_dict()
            assert {**entry.options.to_dict()} == settings
            checked += 1
    assert checked == 8
