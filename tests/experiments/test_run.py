"""The comparison from config to report, on random models, and what it records."""

import json
import re

import jax
import numpy as np
import pytest

from experiments import lossless, plots, report, results, run, timing
from experiments.configs import quickstart
from models import hf_checkpoint, sizes, transformer
from models.errors import InputError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A random byte-level target, and itself as its draft."""
    directory = tmp_path_factory.mktemp("models")
    config = sizes.get("tiny_llama")
    params = transformer.init(config, jax.random.key(0))
    hf_checkpoint.save(directory / "target", config, params)
    return directory


def small_config(checkpoints):
    config = quickstart.get_config("smoke")
    config.models.target = config.models.draft = str(checkpoints / "target")
    config.data.num_prompts = 2
    config.data.prompt_tokens = 16
    config.decode.max_new_tokens = 8
    config.decode.batch_sizes = (2,)
    config.lossless.samples = 512
    return config


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run.execute(small_config(checkpoints), workdir)


def test_every_method_is_recorded_at_every_temperature(finished):
    _, found = finished
    settings = {(r["label"], r["temperature"], r["batch_size"]) for r in found["runs"]}
    labels = ("plain", "prompt lookup", "draft model")
    assert settings == {(label, t, 2) for label in labels for t in (0.0, 1.0)}
    for record in found["runs"]:
        tokens = record["stats"]["tokens_emitted"]
        assert tokens == 2 * 8
        assert record["tokens_per_target_call"] == tokens / record["stats"]["target_calls"]
        assert record["tokens_per_second"] == pytest.approx(tokens / record["seconds"][0])
    # The draft is the target itself: every draft is right, at temperature 0.
    greedy = next(r for r in found["runs"] if (r["label"], r["temperature"]) == ("draft model", 0))
    assert greedy["stats"]["target_calls"] == 2 * 2  # 7 tokens a call at most, 8 wanted


def test_losslessness_is_checked_and_claimed(finished):
    _, found = finished
    assert all(record["lossless"]["held"] for record in found["runs"])
    claims = [claim for claim in found["claims"] if "lossless" in claim.name]
    assert len(claims) == 4 and all(claim.held for claim in claims)
    sampled = next(r for r in found["runs"] if (r["label"], r["temperature"]) == ("draft model", 1))
    assert sampled["lossless"]["degrees_of_freedom"] > 10


def test_the_work_directory_holds_results_events_and_a_report(finished):
    workdir, _ = finished
    recorded = json.loads((workdir / "results.json").read_text())
    assert recorded["config"]["decode"]["methods"][1]["method"] == "prompt_lookup"
    assert recorded["machine"]["cores"] >= 1 and recorded["git_revision"]
    assert list((workdir / "tensorboard").glob("events.*"))
    page = (workdir / "report.html").read_text()
    assert page.count("<svg") >= 3 and "draft model" in page and "lossless" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)  # nothing is fetched


def test_another_config_is_refused_until_a_fresh_start(finished, checkpoints, tmp_path):
    workdir, _ = finished
    config = small_config(checkpoints)
    config.seed = 7
    with pytest.raises(InputError, match=r"another config: seed is 0 there and 7 here"):
        run.execute(config, workdir)


def test_an_unknown_experiment_or_too_few_documents_is_bad_input(checkpoints, tmp_path):
    config = small_config(checkpoints)
    config.experiment = "comparisom"
    with pytest.raises(InputError, match="did you mean 'comparison'"):
        run.execute(config, tmp_path / "a")
    config = small_config(checkpoints)
    config.data.num_prompts = 10**6
    with pytest.raises(InputError, match=r"data.num_prompts: 1000000 wanted"):
        run.execute(config, tmp_path / "b")
    assert not (tmp_path / "b" / "results.json").exists()


def test_reports_need_results(tmp_path):
    with pytest.raises(InputError, match=r"has no results.json"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        report.write(tmp_path)


def test_pooling_keeps_the_counts_and_fills_every_bin():
    rng = np.random.default_rng(0)
    expected = np.sort(rng.dirichlet(np.full(300, 0.1)))[::-1] * 700
    counts = rng.poisson(expected).astype(float)
    observed, wanted = lossless.pool(counts, expected, 1000.0)
    assert observed.sum() == pytest.approx(1000) and wanted.sum() == pytest.approx(1000)
    assert (wanted >= 8).all() and len(wanted) > 10
    observed, wanted = lossless.pool(np.array([3.0]), np.array([4.0]), 4.0)
    assert (observed.tolist(), wanted.tolist()) == ([4.0], [4.0])


def test_times_are_taken_in_turn():
    calls = []
    measured = timing.side_by_side({n: lambda n=n: calls.append(n) for n in "ab"}, 3)
    assert "".join(calls) == "ab" + "ab" * 3
    assert len(measured["a"]["seconds"]) == 3
    assert timing.speedup([2.0, 4.0, 6.0], [1.0, 1.0, 6.0]) == 2.0


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    results.write(tmp_path, {"a": np.float32(1.5), "b": [np.arange(2)]})
    before = (tmp_path / "results.json").read_text()
    assert json.loads(before) == {"a": 1.5, "b": [[0, 1]]}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        results.write(tmp_path, {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == before


def test_a_report_without_training_curves_draws_none():
    assert plots.training_curves([{"role": "target"}]) is None
