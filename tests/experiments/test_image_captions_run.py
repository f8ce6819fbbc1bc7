"""Images from captions as an experiment: the presets of text on tiny random networks."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import image_generation, image_judge, image_networks, run
from experiments.configs import enat as enat_config
from models import enat, image_classifier, vq
from models.errors import InputError
from tests.training import tiny_captions
from training.datasets import digit_scenes

TOKENIZER = vq.VQConfig(
    base_width=4, multipliers=(1, 1, 1), norm_groups=2, codebook_size=8, embed_dim=2
)
MODEL = enat.TextENATConfig(
    num_codes=8, num_tokens=64, embed_dim=8, num_heads=2, encoder_layers=1, text_dim=16
)
CLASSIFIER = image_classifier.ClassifierConfig(size=16, widths=(4, 4), num_features=6)


def save_models(folder, channels, model):
    tokenizer = dataclasses.replace(TOKENIZER, channels=channels)
    classifier = dataclasses.replace(CLASSIFIER, channels=channels)
    made = (
        ("tokenizer", vq, tokenizer),
        ("classifier", image_classifier, classifier),
        ("enat", enat, model),
    )
    for name, module, config in made:
        params = jax.jit(module.init, static_argnums=0)(config, jax.random.key(0))
        noise = np.random.default_rng(1)
        params = jax.tree.map(
            lambda x: np.asarray(x) + 0.3 * noise.normal(size=x.shape).astype(np.float32),  # noqa: B023
            params,
        )
        module.save(folder / name, config, params)
    (folder / "text_model").mkdir()
    tiny_captions.save_text_model(folder / "text_model")
    return folder


def tiny(preset, models):
    config = enat_config.get_config(preset)
    for role in config.models:
        config.models[role] = str(models / role)
    config.decode.sampler.steps = 2
    config.decode.update(batch_size=8, repeats=1)
    config.decode.methods = config.decode.methods[:1]
    config.pictures.update(columns=3, rows=1)
    config.claims = ()
    return config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), 1, MODEL)


def tiny_digits(models):
    config = tiny("captions", models)
    config.data.builder_options = ConfigDict({"variants": 1, "grid": 2, "captions": True})
    config.quality.update(num_images=24, num_real=40, batch_size=8)
    return config


def test_digits_are_judged_cell_by_cell(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    config = tiny_digits(models)
    config.claims = (
        image_generation.claim(
            "c", "accuracy", "ENAT", "ENAT", over_metric="accuracy", at_least=1.0
        ),
    )
    found = run.execute(config, tmp_path / "run")
    quality = found["runs"][0]["quality"]
    assert set(quality) >= {"accuracy", "scenes", "unseen", "other_caption", "frechet"}
    assert 0 <= quality["scenes"] <= quality["accuracy"] <= 1
    assert len(found["analyses"]["captions"]) == 3
    assert all(" above " in text for text in found["analyses"]["captions"])
    assert found["claims"][0].held
    assert [model["role"] for model in found["models"]] == [
        "tokenizer", "classifier", "text_model", "enat",
    ]  # fmt: skip
    json.dumps(found["runs"])

    networks = image_networks.load_networks(config)
    wanted = image_judge.asked(networks)
    assert wanted.labels.shape == (len(wanted.texts), 4)
    for text, labels in zip(wanted.texts, wanted.labels, strict=True):
        assert text == digit_scenes.caption(labels.tolist(), 2)
    assert wanted.conditions.shape == (len(wanted.texts), 16)
    assert 0 < wanted.unseen.mean() < 1
    # Real images are judged against their own labels.
    images_of = image_networks.decoder(networks)
    real = image_judge.judge(config, networks, wanted, images_of)(None)
    assert 0 <= real["classifier_accuracy"] <= 1


def test_what_does_not_fit_is_refused(models):
    config = tiny_digits(models)
    config.data.label_field = "label"
    with pytest.raises(InputError, match=r"label_field: 'label' has 1 labels; an image has 4"):
        image_judge.asked(image_networks.load_networks(config))
    config = tiny_digits(models)
    del config.models["text_model"]
    with pytest.raises(InputError, match=r"text_model: None does not fit models.enat"):
        image_networks.load_networks(config)


def test_cells_in_reading_order():
    images = np.arange(2 * 4 * 4).reshape(2, 4, 4, 1)
    found = image_judge.cells(images, 2)
    assert found.shape == (8, 2, 2, 1)
    for i in range(2):
        for row in range(2):
            for column in range(2):
                cell = images[i, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                np.testing.assert_array_equal(found[4 * i + 2 * row + column], cell)


def test_accuracies_by_hand():
    labels = np.array([[1, 2], [3, 4], [1, 2]])
    taken = np.array([1, 2, 3, 0, 0, 2])
    found = image_judge._caption_accuracy(np.eye(5)[taken], labels, np.array([0, 1, 1], bool))
    # Against the next image's labels, in a circle, only the last image has any right: the 2.
    assert found == pytest.approx({"scenes": 1 / 3, "unseen": 0.5, "other_caption": 1 / 6})


def test_coco_as_it_is_run(tmp_path, monkeypatch):
    """The full-scale preset but for its sizes: names, fields, splits and the text model's folder.

    Colour images without labels, networks from directories.
    """
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    model = dataclasses.replace(MODEL, num_tokens=16)
    (tmp_path / "models").mkdir()
    models = save_models(tmp_path / "models", 3, model)
    config = tiny("coco", models)
    config.data.update(size=16, data_dir=str(tiny_captions.prepare_coco(tmp_path / "coco")))
    config.quality.update(num_images=10, num_real=4, batch_size=8)
    config.pictures.columns = 2
    found = run.execute(config, tmp_path / "run")
    quality = found["runs"][0]["quality"]
    assert "accuracy" not in quality
    assert quality["frechet"] > 0
    assert found["analyses"]["captions"] == ["w0 w0", "w1 w0"]  # the first of each image


def test_the_presets():
    coco = enat_config.get_config("coco")
    assert (coco.data.dataset, coco.data.size, coco.captions.field) == (
        "coco_captions", 256, "captions.text",
    )  # fmt: skip
    assert coco.decode.sampler.steps == 8
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(enat.param_shapes(enat.ENAT_B)))
    # With the official code's MLP of 8 d^2 that is never used.
    assert count + 8 * 768**2 == pytest.approx(219e6, rel=0.01)
