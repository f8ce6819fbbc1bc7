"""Noise belongs to seed, row number, position and purpose, and to nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from decoding import randomness

PURPOSES = (randomness.SAMPLE, randomness.DRAFT, randomness.ACCEPT, randomness.RESIDUAL)


def bits(keys: jax.Array) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()]


def test_a_rows_key_does_not_depend_on_the_batch():
    batch = bits(randomness.row_keys(3, jnp.array([4, 0, 9])))
    assert batch == [bits(randomness.row_keys(3, jnp.array([row])))[0] for row in (4, 0, 9)]


def test_every_seed_row_position_and_purpose_has_its_own_key():
    rows, positions = np.arange(5), np.arange(6)
    seen = []
    for seed, position, purpose in itertools.product((0, 1), positions, PURPOSES):
        keys = randomness.row_keys(seed, jnp.asarray(rows))
        seen += bits(randomness.at(keys, jnp.full(5, position), purpose))
    assert len(set(seen)) == 2 * 5 * 6 * 4


def test_at_takes_each_rows_own_position():
    keys = randomness.row_keys(0, jnp.arange(3))
    positions = jnp.array([7, 2, 7])
    mixed = bits(randomness.at(keys, positions, randomness.DRAFT))
    for row, position in enumerate((7, 2, 7)):
        alone = randomness.at(keys[row : row + 1], jnp.array([position]), randomness.DRAFT)
        assert bits(alone) == [mixed[row]]


def test_noise_has_its_distribution():
    keys = randomness.row_keys(5, jnp.arange(4000))
    uniform = np.asarray(randomness.uniform(keys))
    assert uniform.shape == (4000,)
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    gumbel = np.asarray(randomness.gumbel(keys, 3))
    assert gumbel.shape == (4000, 3)
    assert gumbel.dtype == np.float32
    for column in gumbel.T:
        assert stats.kstest(column, "gumbel_r").pvalue > 1e-3
    assert abs(np.corrcoef(gumbel.T)[np.triu_indices(3, 1)]).max() < 0.06
