"""Image batches and tokens, training of tokeniser and classifier, the cache of recipes."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import image_classifier, vq
from models.errors import InputError
from training import (
    artifacts,
    image_batches,
    image_models,
    image_tokens,
    optimizers,
    vq_tokenizer,
)
from training import image_classifier as classifier_training
from training.data_parallel import RunConfig
from training.datasets import registry
from training.image_batches import ImageData, LabelledImages
from training.image_models import ClassifierModel, MaskedImageModel, VQModel
from training.optimizers import OptimizerConfig

VQ = vq.VQConfig(base_width=4, multipliers=(1, 1), norm_groups=2, codebook_size=8, embed_dim=2)
TRAIN_VQ = vq_tokenizer.TrainConfig(
    model=VQ,
    run=RunConfig(
        num_steps=30,
        batch_size=8,
        log_every=10,
        eval_every=15,
        checkpoint_every=15,
        keep_checkpoints=2,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.0),
    restart_every=5,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def digits(cache, split="test"):
    data = ImageData(options={"variants": 1}, sizes=(16,))
    return image_batches.load_images(data, split, 16, cache)


def test_centre_crop():
    image = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    np.testing.assert_array_equal(image_batches.centre_crop(image, 6), image[:, 2:8])
    halved = image_batches.centre_crop(image, 3)
    means = image[:, 2:8].astype(float).reshape(3, 2, 3, 2, 3).mean((1, 3))
    assert np.abs(halved - means).max() <= 1
    assert image_batches.centre_crop(image[..., :1], 12).shape == (12, 12, 1)


def test_labelled_images(cache):
    source = digits(cache)
    examples = registry.load(
        "digit_scenes", "test", data_dir=cache / "datasets", size=16, variants=1
    )
    np.testing.assert_allclose(source[3]["images"] * 255, examples[3]["image"], atol=1e-4)
    assert source[3]["labels"] == examples[3]["label"]
    assert source[3]["labels"].dtype == np.int32
    cropped = LabelledImages(examples, size=8)
    assert cropped[0]["images"].shape == (8, 8, 1)
    assert cropped.identity != source.identity
    with pytest.raises(InputError, match=r"image_field: 'picture' is not among .* image, label"):
        LabelledImages(examples, image_field="picture")


def test_a_prepared_folder_is_a_dataset_too(cache):
    """What a public dataset is to a config: a name and a folder, cropped to the size asked for."""
    own = digits(cache)
    folder = next((cache / "datasets").rglob("dataset_info.json")).parent
    data = ImageData(str(folder), sizes=(8,))
    source = image_batches.load_images(data, "test", 8, cache)
    assert len(source) == len(own)
    halved = own[0]["images"].reshape(8, 2, 8, 2, 1).mean((1, 3))
    np.testing.assert_allclose(source[0]["images"], halved, atol=1.01 / 255)  # rounded once more
    assert image_batches.data_identity(data, cache) == [source.identity]


def test_the_published_training():
    chosen = image_models.recipe("imagenet_enat_l", {"data.dataset": "mine"})
    assert (chosen.data.dataset, chosen.data.sizes, chosen.flip) == ("mine", (256,), True)
    train = chosen.train
    assert (train.run.num_steps, train.run.batch_size) == (500_000, 2048)
    rates = optimizers.schedule(train.optimizer, train.run.num_steps)
    assert [float(rates(step)) for step in (0, 2500, 5000, 499_999)] == pytest.approx(
        [0, 2e-4, 4e-4, 4e-4]
    )
    assert (train.optimizer.beta1, train.optimizer.beta2) == (0.99, 0.99)
    assert (train.optimizer.weight_decay, train.ema_decay) == (0.03, 0.9999)
    assert (train.label_smoothing, train.reuse_probability) == (0.1, 0.5)
    assert (train.model.encoder_layers, train.model.decoder_layers) == (22, 2)


def test_batches_of_several_sources_come_in_turn_and_go_on_where_they_were():
    class Numbers:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return {"n": np.int32(index), "size": np.int32(self.count)}

    def make(seed=0):
        return image_batches.train_batches([(Numbers(6), 3), (Numbers(8), 2)], seed=seed)

    batches = make()
    first = [next(batches) for _ in range(8)]
    assert [len(batch["n"]) for batch in first] == [3, 2] * 4
    epochs = [np.concatenate([first[i]["n"] for i in pair]) for pair in ((0, 2), (4, 6))]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    again = make()
    for _ in range(3):
        next(again)
    state = again.get_state()
    expected = [next(again)["n"].tolist() for _ in range(4)]
    resumed = make()
    resumed.set_state(state)
    assert [next(resumed)["n"].tolist() for _ in range(4)] == expected
    assert next(make(1))["n"].tolist() != first[0]["n"].tolist()
    with pytest.raises(InputError, match="batch_size: 9 must be between 1 and 8"):
        image_batches.train_batches([(Numbers(8), 9)])
    parts = list(image_batches.in_order(Numbers(8), 3, 7))
    assert [part["n"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]


def test_dead_codes_are_restarted_on_latents():
    codebook = jnp.arange(8.0).reshape(4, 2)
    latents = 100 + jnp.arange(12.0).reshape(1, 2, 3, 2)
    dead = jnp.array([False, True, False, True])
    moved = np.asarray(vq_tokenizer.restart(codebook, dead, latents, jax.random.key(0)))
    np.testing.assert_array_equal(moved[[0, 2]], codebook[jnp.array([0, 2])])
    known = {tuple(row) for row in np.asarray(latents).reshape(-1, 2)}
    assert all(tuple(row) in known for row in moved[[1, 3]])


def test_beta_weighs_the_loss_that_is_named():
    params = vq.init(VQ, jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 1)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(beta_on):
        config = dataclasses.replace(TRAIN_VQ, beta=3.0, beta_on=beta_on)
        return jax.grad(lambda p: vq_tokenizer.loss_fn(config, p, images)[0])(params)["codebook"]

    plain = jax.jit(jax.grad(lambda p: vq.reconstruct(VQ, p, images).codebook_loss))(params)
    np.testing.assert_allclose(gradient("commitment"), plain["codebook"], atol=1e-5)
    np.testing.assert_allclose(gradient("codebook"), 3 * plain["codebook"], atol=1e-5)


def test_a_tokeniser_learns_uses_its_codes_and_goes_on_bit_for_bit(cache, tmp_path):
    source = digits(cache)

    def fit(workdir):
        return vq_tokenizer.train(
            TRAIN_VQ,
            train_batches=image_batches.train_batches([(source, 8)]),
            eval_batches=lambda: image_batches.in_order(source, 64, 64),
            workdir=workdir,
        )

    whole = fit(tmp_path / "whole")
    variance = np.var([source[i]["images"] for i in range(64)])
    assert whole.metrics["eval_loss"] < 0.5 * variance
    assert whole.metrics["codebook_usage"] > 0.5
    assert whole.metrics["eval_psnr"] == pytest.approx(-10 * np.log10(whole.metrics["eval_loss"]))
    # The checkpoint of step 15 is what a run that was killed after it goes on from.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "30")
    resumed = fit(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    np.testing.assert_array_equal(resumed.state.usage, whole.state.usage)


def test_recipes_are_made_once_and_kept_by_what_they_are(cache, monkeypatch):
    data = ImageData(options={"variants": 1}, sizes=(16,))
    short = RunConfig(num_steps=2, batch_size=8, eval_every=2)
    tokenizer = VQModel(data, dataclasses.replace(TRAIN_VQ, run=short), eval_images=16)
    directory = image_models.ensure_recipe("tiny_vq", tokenizer, cache)
    assert vq.load(directory)[0] == VQ
    made = list(image_models.MAKERS)
    monkeypatch.setattr(image_models, "MAKERS", {})  # whatever is made anew now fails
    assert image_models.ensure_recipe("tiny_vq", tokenizer, cache) == directory
    changed = dataclasses.replace(tokenizer, train=dataclasses.replace(tokenizer.train, beta=0.5))
    with pytest.raises(KeyError):
        image_models.ensure_recipe("tiny_vq", changed, cache)
    monkeypatch.undo()
    assert MaskedImageModel in made
    # A model of its tokens, from the directory.
    masked = image_models.recipe("digits_nat_l3")
    model = dataclasses.replace(
        masked.train.model, num_codes=8, embed_dim=8, num_heads=2, encoder_layers=1
    )
    train = dataclasses.replace(masked.train, model=model, run=short)
    chosen = dataclasses.replace(masked, data=data, train=train, tokenizer=str(directory))
    trained = image_models.ensure_recipe("tiny_nat", chosen, cache)
    assert (trained / "training_summary.json").is_file()
    wrong = dataclasses.replace(
        chosen, train=dataclasses.replace(train, model=dataclasses.replace(model, num_codes=9))
    )
    with pytest.raises(InputError, match=r"num_codes, num_tokens: \(9, 64\) must be \(8, 64\)"):
        image_models.ensure_recipe("wrong_nat", wrong, cache)
    with pytest.raises(InputError, match=r"image model: 'digits_vq3' is not known .*digits_vq32"):
        image_models.recipe("digits_vq3")


def test_tokens_are_the_tokenisers_own_and_kept(cache, tmp_path):
    params = vq.init(VQ, jax.random.key(3))
    vq.save(tmp_path / "vq", VQ, params)
    data = ImageData(options={"variants": 1}, sizes=(16,))
    plain = image_tokens.ensure(tmp_path / "vq", data, "test", cache)
    source = digits(cache)
    assert plain.ids.shape == (len(source), 64)
    encode = jax.jit(vq.encode, static_argnums=0)
    for index in (0, len(source) - 1):
        expected = encode(VQ, params, source[index]["images"][None])
        np.testing.assert_array_equal(plain[index]["ids"], np.asarray(expected).ravel())
        assert plain[index]["labels"] == source[index]["labels"]
    folders = lambda: len(list((cache / "image_tokens").glob("digit_scenes-test-*")))  # noqa: E731
    before = folders()
    again = image_tokens.ensure(tmp_path / "vq", data, "test", cache)
    np.testing.assert_array_equal(again.ids, plain.ids)
    assert folders() == before
    flipped = image_tokens.tokenise(VQ, params, source, flip=True)
    assert len(flipped) == 2 * len(plain)
    mirror = encode(VQ, params, source[0]["images"][None, :, ::-1])
    assert any((flipped.ids[i] == np.asarray(mirror).ravel()).all() for i in range(len(flipped)))
    # Other weights in the same place are other tokens.
    vq.save(tmp_path / "vq", VQ, vq.init(VQ, jax.random.key(4)))
    image_tokens.ensure(tmp_path / "vq", data, "test", cache)
    assert folders() == before + 1


def test_a_classifier_learns(cache):
    data = ImageData(options={"variants": 1}, sizes=(16,))
    config = classifier_training.TrainConfig(
        image_classifier.ClassifierConfig(size=16, widths=(8, 16), num_features=32),
        RunConfig(num_steps=80, batch_size=32, eval_every=80, log_every=20),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    )
    directory = image_models.ensure_recipe("tiny", ClassifierModel(data, config), cache)
    model, params = image_classifier.load(directory)
    source = digits(cache)
    batch = next(image_batches.in_order(source, len(source)))
    logits = jax.jit(image_classifier.apply, static_argnums=0)(
        model, params, batch["images"]
    ).logits
    assert np.mean(np.argmax(logits, -1) == batch["labels"]) > 0.6


def test_content_hash_follows_config_and_weights(tmp_path):
    vq.save(tmp_path / "a", VQ, vq.init(VQ, jax.random.key(0)))
    first = artifacts.content_hash(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("more")
    assert artifacts.content_hash(tmp_path / "a") == first
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text() + " ")
    assert artifacts.content_hash(tmp_path / "a") != first
