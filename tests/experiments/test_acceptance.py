"""Acceptance of the rules on given pairs of distributions."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import acceptance

Q, P = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def test_golden_numbers_and_the_order_on_average():
    """The published three-token pair; then one < with replacement < K-SEQ < optimum."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.full(50, 0.3), 200) + 1e-6
    p = 0.6 * q + 0.4 * (rng.dirichlet(np.full(50, 0.3), 200) + 1e-6)
    q, p = (x / x.sum(axis=1, keepdims=True) for x in (q, p))
    # The pair among them, over a vocabulary of 50.
    q[0], p[0] = np.pad(Q, (0, 47)), np.pad(P, (0, 47))
    found = acceptance.by_rule(
        jnp.asarray(q, jnp.float32), jnp.asarray(p, jnp.float32), jax.random.key(0), most=3,
        draws=1024,
    )  # fmt: skip
    pair = {name: np.asarray(values[:, 0]) for name, values in found.items()}
    np.testing.assert_allclose(pair[acceptance.ONE], 0.7, atol=1e-5)
    np.testing.assert_allclose(pair[acceptance.WITH_REPLACEMENT], [0.7, 0.76, 0.808], atol=1e-5)
    np.testing.assert_allclose(pair[acceptance.K_SEQ], [0.7, 0.7914, 0.8585], atol=1e-4)
    np.testing.assert_allclose(pair[acceptance.WITHOUT_REPLACEMENT], [0.7, 0.82, 1], atol=0.02)
    np.testing.assert_allclose(pair[acceptance.OPTIMUM], [0.7, 0.86, 0.988], atol=1e-5)
    mean = {name: float(values[2].mean()) for name, values in found.items()}
    order = (
        acceptance.ONE, acceptance.WITH_REPLACEMENT, acceptance.K_SEQ, acceptance.OPTIMUM,
    )  # fmt: skip
    assert sorted(order, key=mean.__getitem__) == list(order)
