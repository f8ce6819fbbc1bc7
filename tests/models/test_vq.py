"""The VQ tokeniser against the same network in PyTorch, NumPy's nearest codes and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import vq
from models.errors import InputError

TINY = vq.VQConfig(
    channels=2, base_width=4, multipliers=(1, 2), norm_groups=2, codebook_size=8, embed_dim=3
)


@functools.cache
def tiny_params():
    """Random parameters, biases and scales included, so that every one of them matters."""
    params = init(TINY, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


# One compilation for all tests.
init = jax.jit(vq.init, static_argnums=0)
latents_of = jax.jit(vq.latents, static_argnums=0)
IMAGES = np.random.default_rng(0).uniform(size=(3, 8, 6, 2)).astype(np.float32)


def conv(x, p, padding="same", stride=1):
    weight = torch.from_numpy(np.array(p["kernel"])).permute(3, 2, 0, 1)
    bias = torch.from_numpy(np.array(p["bias"])) if "bias" in p else None
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def norm_swish(x, p):
    scale, bias = (torch.from_numpy(np.array(p[name])) for name in ("scale", "bias"))
    return F.silu(F.group_norm(x, TINY.norm_groups, scale, bias, eps=1e-6))


def block(x, p):
    y = conv(norm_swish(x, p["norm_0"]), p["conv_0"])
    y = conv(norm_swish(y, p["norm_1"]), p["conv_1"])
    return y + (conv(x, p["shortcut"]) if "shortcut" in p else x)


def torch_encoder(p, images, pooled=True):
    x = conv(torch.from_numpy(images).permute(0, 3, 1, 2), p["conv_in"])
    x = block(x, p["level_0_block_0"])
    if pooled:
        x = F.avg_pool2d(x, 2)
    else:
        x = conv(F.pad(x, (0, 1, 0, 1)), p["level_0_down"], padding=0, stride=2)
    x = block(block(x, p["level_1_block_0"]), p["middle_block_0"])
    return conv(norm_swish(x, p["norm_out"]), p["conv_out"]).permute(0, 2, 3, 1).numpy()


def torch_decoder(p, codes):
    x = conv(torch.from_numpy(codes).permute(0, 3, 1, 2), p["conv_in"])
    x = block(block(x, p["middle_block_0"]), p["level_1_block_0"])
    x = conv(F.interpolate(x, scale_factor=2, mode="nearest"), p["level_1_up"])
    x = block(x, p["level_0_block_0"])
    return conv(norm_swish(x, p["norm_out"]), p["conv_out"]).permute(0, 2, 3, 1).numpy()


def test_encoder_and_codes_are_those_of_the_same_network_in_torch():
    params = tiny_params()
    latents = torch_encoder(params["encoder"], IMAGES)
    np.testing.assert_allclose(latents_of(TINY, params, IMAGES), latents, atol=1e-4)
    codebook = np.asarray(vq.embeddings(params))
    distances = ((latents[..., None, :] - codebook) ** 2).sum(-1)
    ids = jax.jit(vq.encode, static_argnums=0)(TINY, params, IMAGES)
    assert ids.shape == (3, 4, 3)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, distances.argmin(-1))
    assert len(np.unique(ids)) > 2


def test_decoder_is_that_of_the_same_network_in_torch():
    params = tiny_params()
    ids = np.random.default_rng(1).integers(0, 8, size=(3, 4, 3))
    expected = torch_decoder(params["decoder"], np.asarray(params["codebook"])[ids])
    assert expected.shape == (3, 8, 6, 2)
    found = jax.jit(vq.decode, static_argnums=0)(TINY, params, ids)
    np.testing.assert_allclose(found, expected.clip(0, 1), atol=1e-4)
    assert (expected < 0).any()
    assert (expected > 0).any()


def test_convolutional_downsampling_pads_right_and_bottom():
    config = vq.VQConfig(**{**TINY.__dict__, "downsample": "convolution"})
    params = init(config, jax.random.key(2))
    expected = torch_encoder(params["encoder"], IMAGES, pooled=False)
    np.testing.assert_allclose(latents_of(config, params, IMAGES), expected, atol=1e-4)


def test_gradients_go_straight_through_and_each_loss_moves_its_own_side():
    params = tiny_params()

    def gradients(pick):
        return jax.jit(jax.grad(lambda p: pick(vq.reconstruct(TINY, p, IMAGES))))(params)

    def size(tree):
        return sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(tree))

    target = np.random.default_rng(2).uniform(size=IMAGES.shape).astype(np.float32)
    error = lambda images: jnp.mean((images - target) ** 2)  # noqa: E731
    through = gradients(lambda r: error(r.images))
    # The chain by hand: d error / d codes, handed to the encoder as if it had made the codes.

    @jax.jit
    def by_hand(params):
        latents, pull = jax.vjp(lambda p: vq.latents(TINY, p, IMAGES), params)
        codes = params["codebook"][vq.nearest_codes(params, latents)]
        by_code = jax.grad(lambda z: error(vq.decode_embeddings(TINY, params, z)))(codes)
        return pull(by_code)[0]["encoder"]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        through["encoder"],
        by_hand(params),
    )
    assert size(through["encoder"]) > 0
    assert size(through["codebook"]) == 0
    codebook, commitment = (
        gradients(lambda r, name=name: getattr(r, name))
        for name in ("codebook_loss", "commitment_loss")
    )
    assert size(codebook["codebook"]) > 0
    assert size(codebook["encoder"]) == size(codebook["decoder"]) == 0
    assert size(commitment["encoder"]) > 0
    assert size(commitment["codebook"]) == size(commitment["decoder"]) == 0
    found = jax.jit(vq.reconstruct, static_argnums=0)(TINY, params, IMAGES)
    expected = np.mean((np.asarray(found.latents) - np.asarray(params["codebook"])[found.ids]) ** 2)
    np.testing.assert_allclose(found.codebook_loss, expected, rtol=1e-5)
    np.testing.assert_allclose(found.commitment_loss, expected, rtol=1e-5)


def test_the_full_scale_preset_has_the_published_shapes():
    config = vq.VQGAN_F16
    assert config.factor == 16
    params = vq.param_shapes(config)
    assert params["codebook"].shape == (1024, 256)
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    assert jax.eval_shape(lambda p, x: vq.encode(config, p, x), params, image).shape == (2, 16, 16)
    # Two blocks at each of five levels and two in the middle; no bias in their convolutions.
    blocks = [name for name in params["encoder"] if "block" in name]
    assert len(blocks) == 12
    assert "bias" not in params["encoder"]["level_0_block_0"]["conv_0"]


def test_a_saved_tokeniser_is_the_same(tmp_path):
    params = tiny_params()
    vq.save(tmp_path / "vq", TINY, params)
    config, loaded = vq.load(tmp_path / "vq")
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_damaged_directories_are_refused(tmp_path):
    vq.save(tmp_path / "vq", TINY, tiny_params())
    path = tmp_path / "vq" / "config.json"
    good = path.read_text()
    for old, new, message in (
        ('"vq"', '"llama"', "model_type: 'llama' must be 'vq'"),
        ('"embed_dim": 3', '"embed_dim": 5', "has shape .*; the config asks for"),
        ("[\n    1,\n    2\n  ]", "[1, 2, 2]", "tensor 'decoder/level_2_block_0.* is missing"),
        ('"embed_dim"', '"embed_dims"', "unexpected keyword argument 'embed_dims'"),
    ):
        assert old in good
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(InputError, match=message):
            vq.load(tmp_path / "vq")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"norm_groups": 3}, "vq.norm_groups: 3 must divide"),
        ({"multipliers": ()}, "vq.multipliers"),
        ({"codebook_size": 0}, "vq.codebook_size: 0 must be at least 1"),
        ({"downsample": "max"}, "vq.downsample: 'max' is not known"),
    ],
    ids=str,
)
def test_bad_configs(options, message):
    with pytest.raises(InputError, match=message):
        vq.VQConfig(**options)


def test_images_of_the_wrong_shape():
    for shape in ((1, 7, 8, 2), (1, 8, 8, 1)):
        with pytest.raises(InputError, match="images: shape"):
            vq.latents(TINY, tiny_params(), jnp.zeros(shape))
