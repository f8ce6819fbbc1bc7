"""The experiment on random models end to end, its cost model by hand, and its sheet of images."""

import io

import jax
import numpy as np
import PIL.Image
import pytest

from experiments import image_cost, image_methods, image_sheet, results, run, sweep
from experiments.configs import mulo_sd
from experiments.image_methods import method
from experiments.image_speculation import claim
from models import hf_checkpoint, image_classifier, transformer, vq
from models.errors import InputError
from training.image_language_model import architecture

VQ = vq.VQConfig(base_width=4, multipliers=(1, 1, 1), norm_groups=2, codebook_size=16, embed_dim=3)
CLASSIFIER = image_classifier.ClassifierConfig(size=32, widths=(4, 4), num_features=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    vq.save(root / "vq", VQ, vq.init(VQ, jax.random.key(0)))
    params = image_classifier.init(CLASSIFIER, jax.random.key(1))
    image_classifier.save(root / "classifier", CLASSIFIER, params)
    for role, side in (("target", 8), ("draft", 4)):
        model = architecture(
            side=side, num_codes=16, num_classes=10, layers=1, width=16, head_dim=8
        )
        params = transformer.init(model, jax.random.key(side))
        hf_checkpoint.save(root / role, model, params)
    return root


def small_config(models):
    config = mulo_sd.get_config("offline")
    config.models.update({role: str(models / role) for role in ("target", "draft", "classifier")})
    config.models.update(tokenizer=str(models / "vq"), up="", up_tokens="", down="")
    config.data.builder_options.variants = 1
    # One image at a time, as in the timing: a shape less to compile.
    config.quality.update(num_images=10, batch_size=1, num_real=40)
    config.decode.update(num_timed=2, repeats=1, guidance=1.0)
    config.thresholds = (0.0, 0.3, 1.1)
    local = {"neighbours": 4, "radius": 0}
    config.decode.methods = (
        method("plain", "plain"),
        method("exact", "raster", rule="exact_match"),
        method("local", "local", 0.3, **local),
    )
    config.curves = (method("local", "local", 0.3, **local),)
    config.claims = (claim("c", "tokens_per_target_call", "local", "exact", at_least=1.0),)
    return config


def test_end_to_end(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    found = run.execute(small_config(models), tmp_path / "run")
    written = results.read(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
    by_label = {record["label"]: record for record in written["runs"]}
    assert by_label["exact"]["identical_rows"] == by_label["plain"]["identical_rows"] == 10
    assert by_label["plain"]["tokens_per_target_call"] == 1 and by_label["plain"]["speedup"] == 1
    local = by_label["local"]["work"]
    assert local["window_passes"] == 4 and local["drafter_calls"] == 16
    assert 0 < local["rho"] < 1
    # Random models agree on little, and the threshold orders the work.
    curve = written["curves"][0]["points"]
    assert [point["rho"] for point in curve] == sorted(point["rho"] for point in curve)
    assert curve[0]["rho"] == 0 and curve[-1]["rho"] == 1
    assert curve[-1]["accuracy"] == by_label["plain"]["quality"]["accuracy"]
    assert {c["name"].split(":")[0] for c in written["claims"]} >= {"exact", "c", "local"}
    assert written["costs"]["methods"][0]["predicted"] > 0
    assert set(written["consistency"]) == {"pixels: up of down", "pixels: down of up"}
    assert found["seconds"] > 0
    picture = PIL.Image.open(tmp_path / "run" / "images.png")
    assert picture.size[1] > 3 * 50


def test_cost_model_by_hand():
    """The example of the sheet: r = 2, equal calls, m = 1, 32 x 32 codes."""
    given = {"factor": 2, "rows": 1, "side": 32, "draft_call": 1.0, "target_call": 1.0}
    found = image_cost.relative_time(**given, window_pass=1.5, rho=0.31)
    assert found == pytest.approx(0.25 + 16 * 1.5 / 1024 + 0.31)
    assert 1.65 < 1 / found < 1.75
    deeper = image_cost.relative_time(**given | {"factor": 4, "rows": 2}, window_pass=2.0, rho=0.0)
    assert deeper == pytest.approx(1 / 16 + 4 * 2 / 1024)


def test_sheet_tints_what_was_drawn_again():
    images = np.full((2, 8, 8, 1), 0.5)
    marked = np.zeros((2, 4), bool)
    marked[0, 3] = True
    data = image_sheet.png([("a", images, marked), ("b", images, np.ones((2, 4), bool))], 2)
    pixels = np.asarray(PIL.Image.open(io.BytesIO(data))).astype(int)
    coloured = np.argwhere(pixels[..., 0] > pixels[..., 1] + 20)
    assert len(coloured)
    top, left = coloured.min(axis=0)
    height, width = coloured.max(axis=0) - (top, left) + 1
    assert height == width == 28  # a quarter of the first cell, none of the second row


@pytest.mark.parametrize("preset", ["", *mulo_sd.OFFLINE])
def test_configs_build_and_sweep(preset):
    config = mulo_sd.get_config(preset)
    labels = [entry.label for entry in config.decode.methods]
    assert len(set(labels)) == len(labels)
    for wanted in config.claims:
        assert {wanted.label, wanted.over} <= set(labels)
    path = mulo_sd.__file__ + (f":{preset}" if preset else "")
    assert len({one.name for one in sweep.settings(path)}) == 9


def test_bad_entries(models):
    loaded = image_methods.load_models(small_config(models))
    with pytest.raises(InputError, match="kind: 'tree'"):
        image_methods.build(loaded, method("x", "tree"))
    with pytest.raises(InputError, match=r"x: options: .*speed"):
        image_methods.build(loaded, method("x", "local", speed=1))
    with pytest.raises(InputError, match="scaling: 'up' is not known"):
        image_methods.build(loaded, method("x", "local", scaling="up"))
