"""Row-causality by gradients, cells against loops, and the file format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import row_causal
from models.errors import InputError
from models.row_causal import ResamplerConfig

K, Z = 9, 5
CODEBOOK = jnp.asarray(np.random.default_rng(0).normal(size=(K, Z)), jnp.float32)


def make(direction, factor=2):
    config = ResamplerConfig(direction, factor=factor, embed_dim=Z, width=8, num_layers=2)
    params = row_causal.init(config, jax.random.key(1))
    rng = np.random.default_rng(2)  # nothing stays at zero
    return config, jax.tree.map(
        lambda x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )


@pytest.mark.parametrize("direction", row_causal.DIRECTIONS)
def test_no_gradient_from_rows_below(direction):
    config, params = make(direction)
    h, w = (4, 3) if direction == "up" else (8, 6)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, h, w, Z)), jnp.float32)

    def rows(x):  # a sum a row of the output, so that the Jacobian is [rows, h]
        return (row_causal.vectors(config, params, x) ** 2).sum(axis=(0, 2, 3))

    jacobian = np.abs(jax.jit(jax.jacobian(rows))(x)).sum(axis=(1, 3, 4))
    out, given = (8, 4) if direction == "up" else (4, 8)
    assert jacobian.shape == (out, given)
    for i in range(out):
        seen = i // 2 if direction == "up" else 2 * i + 1
        assert (jacobian[i, seen + 1 :] == 0).all()
        assert jacobian[i, seen] > 0
        if seen:
            assert jacobian[i, seen - 1] > 0


def test_cells_are_those_of_a_loop():
    x = np.random.default_rng(4).normal(size=(2, 4, 6, 3)).astype(np.float32)
    found = np.asarray(row_causal.gather_cells(jnp.asarray(x), 2))
    for i, j in np.ndindex(2, 3):
        cell = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, -1)
        np.testing.assert_array_equal(found[:, i, j], cell)
    np.testing.assert_array_equal(row_causal.spread_cells(jnp.asarray(found), 2), x)


def test_an_untrained_network_scales_by_nearest_neighbour_and_averages():
    ids = jnp.asarray(np.random.default_rng(5).integers(0, K, (2, 4, 4)))
    up = ResamplerConfig("up", factor=4, embed_dim=Z, width=8)
    high = row_causal.resample(up, row_causal.init(up, jax.random.key(0)), CODEBOOK, ids)
    np.testing.assert_array_equal(high, np.repeat(np.repeat(ids, 4, axis=1), 4, axis=2))
    down = ResamplerConfig("down", factor=4, embed_dim=Z, width=8)
    params = row_causal.init(down, jax.random.key(0))
    # What was scaled up comes back: the round trip is the identity before training.
    np.testing.assert_array_equal(row_causal.resample(down, params, CODEBOOK, high), ids)


def test_the_best_score_is_the_nearest_code():
    found = jnp.asarray(np.random.default_rng(6).normal(size=(50, Z)), jnp.float32)
    scores = row_causal.logits({"log_scale": jnp.array([0.7])}, CODEBOOK, found)
    distance = np.linalg.norm(np.asarray(found)[:, None] - np.asarray(CODEBOOK), axis=-1)
    np.testing.assert_array_equal(np.argmax(scores, axis=-1), distance.argmin(axis=-1))


def test_saved_and_loaded(tmp_path):
    config, params = make("down")
    row_causal.save(tmp_path / "model", config, params)
    read, found = row_causal.load(tmp_path / "model")
    assert read == config
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_bad_input():
    for change in ({"direction": "left"}, {"factor": 1}, {"num_layers": 0}):
        with pytest.raises(InputError, match=f"resampler.{next(iter(change))}"):
            ResamplerConfig(**{"direction": "up"} | change)
    config, params = make("down")
    with pytest.raises(InputError, match="a grid of 3x4 cannot be brought down by 2"):
        row_causal.vectors(config, params, jnp.zeros((1, 3, 4, Z)))
