"""Objectives of the resamplers against NumPy, where their gradients go, and short runs of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import row_causal, vq
from models.errors import InputError
from models.row_causal import ResamplerConfig
from training import image_samplers
from training.data_parallel import RunConfig
from training.image_batches import ImageData
from training.image_samplers import SamplerModel, TrainConfig
from training.optimizers import OptimizerConfig

VQ = vq.VQConfig(base_width=4, multipliers=(1, 1, 1), norm_groups=2, codebook_size=8, embed_dim=3)
MODEL = ResamplerConfig("up", embed_dim=3, width=8, num_layers=1)
RUN = RunConfig(num_steps=6, batch_size=4, log_every=1, eval_every=6)
CONFIG = TrainConfig(MODEL, "pixels", 0.25, RUN, OptimizerConfig(1e-2, warmup_steps=0))
CHOSEN = SamplerModel(
    ImageData(options={"variants": 1}, sizes=(16, 32)), CONFIG, "unused", eval_images=8
)


@pytest.fixture(scope="module")
def frozen():
    params = vq.init(VQ, jax.random.key(0))
    return {**params, "codebook": jax.random.normal(jax.random.key(1), (8, 3))}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # the digits are drawn once


def batch():
    rng = np.random.default_rng(2)
    return {
        "source": jnp.asarray(rng.integers(0, 8, (4, 16))),
        "target": jnp.asarray(rng.integers(0, 8, (4, 64))),
        "images": jnp.asarray(rng.random((4, 32, 32, 1)), jnp.float32),
    }


def test_both_objectives_are_what_they_say(frozen):
    params = row_causal.init(MODEL, jax.random.key(3))
    params = jax.tree.map(lambda x: x + 0.1, params)
    data = batch()
    grid = frozen["codebook"][data["source"].reshape(4, 4, 4)]
    found = np.asarray(row_causal.vectors(MODEL, params, grid), np.float64)
    codebook = np.asarray(frozen["codebook"], np.float64)
    distance = ((found[..., None, :] - codebook) ** 2).sum(axis=-1)
    ids = distance.argmin(axis=-1)
    images = np.asarray(vq.decode_embeddings(VQ, frozen, frozen["codebook"][ids]))
    error = ((images - np.asarray(data["images"])) ** 2).mean()
    commitment = ((found - codebook[ids]) ** 2).mean()
    scores = -distance * np.exp(0.1)
    log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    target = np.asarray(data["target"]).reshape(4, 8, 8)
    nats = -np.take_along_axis(log_p, target[..., None], axis=-1).mean()
    for objective, loss in (("pixels", error + 0.25 * commitment), ("tokens", nats)):
        config = dataclasses.replace(CONFIG, objective=objective)
        got = image_samplers.measure(config, VQ, frozen, params, data)
        np.testing.assert_allclose(got.loss, loss, rtol=2e-4)
        np.testing.assert_allclose(got.squared_error, error, rtol=2e-4)
        np.testing.assert_allclose(got.cross_entropy, nats, rtol=2e-4)
        np.testing.assert_allclose(got.accuracy, (ids == target).mean())


def test_pixels_reach_the_vectors_straight_through(frozen):
    """Without commitment, the gradient at the output bias is the decoder's at the chosen codes."""
    config = dataclasses.replace(CONFIG, commitment=0.0)
    params, data = row_causal.init(MODEL, jax.random.key(3)), batch()

    def loss(params):
        return image_samplers.measure(config, VQ, frozen, params, data).loss

    gradient = jax.grad(loss)(params)["out"]["bias"].reshape(2, 2, 3).sum(axis=(0, 1))
    ids = row_causal.resample(MODEL, params, frozen["codebook"], data["source"].reshape(4, 4, 4))

    def decoded(shift):
        images = vq.decode_embeddings(VQ, frozen, frozen["codebook"][ids] + shift)
        return jnp.mean((images - data["images"]) ** 2)

    np.testing.assert_allclose(gradient, jax.grad(decoded)(jnp.zeros(3)), rtol=1e-3, atol=1e-7)
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(("direction", "objective"), [("up", "pixels"), ("down", "tokens")])
def test_a_short_run_learns_and_is_not_repeated(tmp_path, cache, frozen, direction, objective):
    vq.save(tmp_path / "vq", VQ, frozen)
    model = dataclasses.replace(MODEL, direction=direction)
    config = dataclasses.replace(CONFIG, model=model, objective=objective)
    chosen = dataclasses.replace(CHOSEN, train=config)

    def run(name):
        place = {"workdir": tmp_path / name, "description": name}
        return image_samplers.train(chosen, tmp_path / "vq", cache, **place)

    first = run("a")
    again = run("a")  # finished: nothing is done again
    assert again.step == first.step == 6 and again.metrics == first.metrics
    jax.tree.map(np.testing.assert_array_equal, first.state.params, again.state.params)
    start = image_samplers.init_state(config).params
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), start, first.state.params)
    assert moved["out"]["kernel"] > 0
    assert set(first.metrics) == {
        "eval_loss", "eval_cross_entropy", "eval_accuracy", "eval_squared_error",
    }  # fmt: skip


def test_bad_input(tmp_path, frozen):
    with pytest.raises(InputError, match="objective: 'gan'"):
        dataclasses.replace(CONFIG, objective="gan")
    with pytest.raises(InputError, match="must be two sizes, the second 2 times the first"):
        dataclasses.replace(CHOSEN, data=ImageData(sizes=(16, 64)))
    vq.save(tmp_path / "vq", VQ, frozen)
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, embed_dim=4))
    with pytest.raises(InputError, match="embed_dim: 4 must be the tokeniser's 3"):
        image_samplers.train(
            dataclasses.replace(CHOSEN, train=wide), tmp_path / "vq", tmp_path, workdir=tmp_path
        )
