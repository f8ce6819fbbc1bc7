"""The image generation experiment, whole, on random networks; its probes and pictures."""

import base64
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from decoding import randomness
from decoding.images import mask_predict
from experiments import cli, image_generation, image_probes, pictures, run, sweep
from experiments.configs import enat as enat_config
from models import enat, image_classifier, vq
from models.errors import InputError
from training.image_tokens import TokenImages

TOKENIZER = vq.VQConfig(
    base_width=4, multipliers=(1, 1, 1), norm_groups=2, codebook_size=8, embed_dim=2
)
MODEL = enat.ENATConfig(
    num_codes=8, num_tokens=16, embed_dim=8, num_heads=2, encoder_layers=1, decoder_layers=1
)
UNIFORM = enat.ENATConfig(
    num_codes=8, num_tokens=16, embed_dim=8, num_heads=2, encoder_layers=1, disentangled=False
)
CLASSIFIER = image_classifier.ClassifierConfig(size=16, widths=(4, 4), num_features=6)


def _noisy(x, noise):
    return np.asarray(x) + 0.3 * noise.normal(size=x.shape).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random networks in directories, as a user's own models are."""
    folder, key = tmp_path_factory.mktemp("models"), jax.random.key(0)
    made = (
        ("tokenizer", vq, TOKENIZER),
        ("classifier", image_classifier, CLASSIFIER),
        ("uniform", enat, UNIFORM),
        ("enat", enat, MODEL),
    )
    for name, module, config in made:
        params = jax.jit(module.init, static_argnums=0)(config, key)
        noise = np.random.default_rng(1)
        params = jax.tree.map(lambda x: _noisy(x, noise), params)  # noqa: B023
        module.save(folder / name, config, params)
    return folder


def tiny_config(models):
    config = enat_config.get_config()
    for role in config.models:
        config.models[role] = str(models / role)
    config.data.update(dataset="digit_scenes", size=16, split="test")
    config.data.builder_options = ConfigDict({"variants": 1})
    config.decode.sampler.steps = 3
    config.decode.update(batch_size=8, repeats=1)
    config.quality.update(num_images=20, num_real=40, batch_size=8)
    config.probes.num_images = 8
    config.pictures.update(columns=5, rows=1)
    config.claims = (
        image_generation.claim("less", "mmacs_per_image", "ENAT", "ENAT, no reuse", at_most=1.0),
        image_generation.claim("more", "mmacs_per_image", "ENAT", "ENAT, no reuse", at_least=1.0),
    )
    return config


def test_a_run_measures_reports_and_draws(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLOOM_CACHE", str(tmp_path / "cache"))
    found = run.execute(tiny_config(models), tmp_path / "run")
    records = {record["label"]: record for record in found["runs"]}
    assert list(records) == ["uniform", "ENAT, no reuse", "ENAT"]
    for record in records.values():
        assert 0 <= record["quality"]["accuracy"] <= 1
        assert record["quality"]["frechet"] > 0
        assert record["work"]["milliseconds_per_image"] > 0
    masks = mask_predict.masks_before(16, 3)
    assert records["ENAT"]["work"]["encoder_tokens"] == 16 - masks[2]
    assert records["ENAT, no reuse"]["work"]["encoder_tokens"] == sum(16 - m for m in masks[:3])
    assert records["uniform"]["work"]["encoder_tokens"] == 3 * 16
    assert records["ENAT"]["work"]["network_calls"] == 1 + 2 * 2
    less, more = found["claims"][:2]
    assert less.held
    assert not more.held
    assert len(found["claims"]) == 4  # two probes
    assert set(found["analyses"]) == {"attention", "similarity"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/gif;base64,") == 1
    assert "Quality and work" in page
    with PIL.Image.open(tmp_path / "run" / "images.png") as picture:
        assert picture.width > 5 * 16
    # Image i is of row i's key and class, wherever its batch begins.
    network = enat.load(models / "enat")
    sampler = mask_predict.SamplerConfig(steps=3)
    whole = image_generation.draw(network, sampler, count=10, batch_size=8, seed=0)
    assert whole.ids.shape == (10, 16)
    rows = jnp.arange(3, 11)
    keys = randomness.row_keys(0, rows)
    again = mask_predict.sample(network[0], sampler, network[1], keys, rows % 10)
    np.testing.assert_array_equal(whole.ids[3:], again.ids[:7])


def test_cut_masks_are_the_definition():
    masked = np.array([[True, False, True, False], [False, False, True, True]])
    for queries, keys in image_probes.DIRECTIONS.values():
        found = np.asarray(image_probes.cut_mask(jnp.asarray(masked), queries, keys))
        for b, i, j in np.ndindex(found.shape):
            cut = masked[b, i] == queries and masked[b, j] == keys and i != j
            assert found[b, i, j] == (not cut)


def test_an_attention_mask_hides_what_is_cut(models):
    """With masked-to-visible cut, the logits do not depend on visible tokens."""
    config, params = enat.load(models / "uniform")
    masked = np.tile(np.arange(16) % 2 == 0, (2, 1))
    indices = enat.indices_of(masked)
    rng = np.random.default_rng(0)
    ids = [np.where(masked, config.mask_id, rng.integers(0, 8, (2, 16))) for _ in range(2)]
    apply = jax.jit(enat.apply, static_argnums=0)
    labels = jnp.array([1, 2])
    for direction, same in (("masked to visible", True), ("visible to masked", False)):
        allowed = image_probes.cut_mask(jnp.asarray(masked), *image_probes.DIRECTIONS[direction])
        logits = [
            apply(config, params, x, labels, indices, attention_mask=allowed).logits for x in ids
        ]
        assert np.allclose(*logits, atol=1e-5) == same


def test_probes_need_a_uniform_network(models):
    network = enat.load(models / "enat")
    tokens = TokenImages(np.zeros((4, 16), np.int32), np.zeros(4, np.int32))
    for probe in image_probes.PROBES.values():
        with pytest.raises(InputError, match="need a uniform network"):
            probe(network, tokens, enat_config.get_config())


def test_neighbours_are_the_four_around():
    chosen = np.zeros((1, 16), bool)
    chosen[0, 5] = True  # row 1, column 1 of 4x4
    assert np.flatnonzero(image_probes._neighbours(chosen)[0]).tolist() == [1, 4, 6, 9]


def test_pictures():
    images = np.zeros((3, 4, 4, 1))
    images[1] = 1
    sheet = pictures.tile(images, 2)
    assert sheet.shape == (2 * 6 + 2, 2 * 6 + 2, 1)
    assert sheet[2:6, 2:6].max() == 0
    assert sheet[2:6, 8:12].min() == 255
    content = pictures.gif([sheet, 255 - sheet, sheet], zoom=1)
    with PIL.Image.open(io.BytesIO(content)) as animation:
        assert animation.n_frames == 3
        assert animation.size == (14, 14)
    uri = pictures.data_uri(pictures.png(sheet), "png")
    decoded = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    with PIL.Image.open(io.BytesIO(decoded)) as picture:
        assert picture.size == (28, 28)


def test_configs_and_sweep():
    published = enat_config.get_config()
    assert published.decode.sampler.to_dict() == {
        "steps": 8, "guidance": 2.5, "mask_temperature": 1.5, "sampling_temperature": 6.0,
    }  # fmt: skip
    assert published.data.dataset == "imagenet2012"
    settings = sweep.settings("experiments/configs/enat.py:offline")
    assert [s.decode.sampler.steps for s in settings[:4]] == [4, 8, 12, 16]
    assert [s.models.enat for s in settings[4:]] == [
        "digits_enat_e5d1", "digits_enat_e3d3", "digits_enat_e1d5",
    ]  # fmt: skip
    with pytest.raises(InputError, match="preset: 'x' is not known"):
        enat_config.get_config("x")
    assert "image_generation" in run.experiments()
    assert cli.load_config_file("experiments/configs/enat.py:offline").name == "enat offline"


def test_bad_methods(models):
    config = tiny_config(models)
    networks = image_generation.load_networks(config)
    config.decode.methods = (enat_config.method("x", "enta"),)
    with pytest.raises(InputError, match=r"model: 'enta' is not known \(did you mean 'enat'"):
        image_generation.methods_of(config, networks)
    config.decode.methods = (enat_config.method("x", "enat", step=3),)
    with pytest.raises(InputError, match=r"methods: x: .*'step'"):
        image_generation.methods_of(config, networks)
