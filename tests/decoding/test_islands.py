"""Dilation, components and neighbourhoods against loops in plain Python and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from decoding.images import islands, neighbourhoods
from models.errors import InputError

MAPS = np.random.default_rng(0).random((64, 4, 8)) < np.linspace(0.02, 0.9, 64)[:, None, None]


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_dilation_is_the_clipped_square(radius):
    found = np.asarray(islands.dilate(jnp.asarray(MAPS), radius))
    expected = np.zeros_like(MAPS)
    for b, i, j in np.argwhere(MAPS):
        rows = slice(max(i - radius, 0), i + radius + 1)
        expected[b, rows, max(j - radius, 0) : j + radius + 1] = True
    np.testing.assert_array_equal(found, expected)


def test_components_are_those_of_scipy():
    labels = np.asarray(jax.jit(islands.components)(jnp.asarray(MAPS)))
    for found, marks in zip(labels, MAPS):
        expected, count = ndimage.label(marks, structure=np.ones((3, 3)))
        np.testing.assert_array_equal(found >= 0, marks)
        assert sorted(set(found[marks])) == list(range(count))
        pairs = set(zip(found[marks].tolist(), expected[marks].tolist()))
        assert len(pairs) == count


def test_components_of_hand_made_maps():
    rows = ["#..#....", ".#..#..#", "#......#", ".##.#.#."]
    marks = np.array([[c == "#" for c in row] for row in rows])
    found = np.asarray(islands.components(jnp.asarray(marks)[None]))[0]
    text = ["".join("." if v < 0 else str(v) for v in row) for row in found]
    assert text == ["0..1....", ".0..1..2", "0......2", ".00.3.2."]
    checker = np.zeros((4, 8), bool)
    checker[::2, ::2] = True
    found = np.asarray(islands.components(jnp.asarray(checker)[None]))
    assert found.max() + 1 == islands.max_components(4, 8) == 8
    snake = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    assert np.asarray(islands.components(jnp.asarray(snake)[None])).max() == 0


def test_nearest_codes_are_sorted_by_distance_and_begin_with_the_code():
    codebook = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    codebook[7] = codebook[2]  # twins
    table = np.asarray(neighbourhoods.nearest_codes(jnp.asarray(codebook), 20))
    for code, near in enumerate(table):
        assert near[0] == code
        assert sorted(near) == list(range(20))
        distances = np.linalg.norm(codebook[near] - codebook[code], axis=1)
        assert (np.diff(distances) >= -1e-5).all()
    with pytest.raises(InputError, match="neighbours: 21 must be between 1 and the 20 codes"):
        neighbourhoods.nearest_codes(jnp.asarray(codebook), 21)


def test_pooling():
    rng = np.random.default_rng(2)
    codebook = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    probs = rng.dirichlet(np.ones(8), size=(3, 5)).astype(np.float32)  # two ids are no codes
    drafts = rng.integers(0, 6, (3, 5))
    before = np.zeros((3, 5))
    for count in range(1, 7):
        table = neighbourhoods.nearest_codes(codebook, count)
        found = np.asarray(neighbourhoods.pooled(jnp.asarray(probs), jnp.asarray(drafts), table))
        own = np.take_along_axis(probs, drafts[..., None], axis=-1)[..., 0]
        if count == 1:
            np.testing.assert_allclose(found, own)
        assert (found >= before).all()
        before = found
    np.testing.assert_allclose(before, probs[..., :6].sum(axis=-1), rtol=1e-6)
