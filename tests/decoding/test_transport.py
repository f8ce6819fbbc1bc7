"""K-SEQ's numbers and the optimal bound: published tables, a linear program, enumeration."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from decoding.speculative import transport

Q, P = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
# k, rho*, beta, K-SEQ acceptance, optimum; worked by hand and by enumeration.
GOLDEN = [
    (1, 1.0, 0.7, 0.7, 0.7),
    (2, 1.456776, 0.543224, 0.791355, 0.86),
    (3, 1.792593, 0.478926, 0.858519, 0.988),
    (4, 2.030036, 0.446301, 0.906007, 1.0),
]


def call(function, q, p, k):
    k = jnp.full(np.shape(q)[:-1], k)
    return np.asarray(function(jnp.asarray(q, jnp.float32), jnp.asarray(p, jnp.float32), k))


def random_pairs(count: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.full(vocab, 0.3), count) + 1e-6
    p = 0.6 * q + 0.4 * (rng.dirichlet(np.full(vocab, 0.3), count) + 1e-6)
    return q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("k,rho,beta,accepted,optimum", GOLDEN)
def test_golden_numbers(k, rho, beta, accepted, optimum):
    found = call(transport.deflation, Q, P, k)
    assert found == pytest.approx(rho, abs=1e-5)
    assert float(transport.covered(jnp.asarray(Q), jnp.asarray(P), found)) == pytest.approx(
        beta, abs=1e-5
    )
    assert call(transport.k_seq_acceptance, Q, P, k) == pytest.approx(accepted, abs=1e-5)
    assert call(transport.optimal_acceptance, Q, P, k) == pytest.approx(optimum, abs=1e-6)
    residual = transport.k_seq_residual(jnp.asarray(Q), jnp.asarray(P), jnp.asarray(k), found)
    np.testing.assert_allclose(residual / residual.sum(), [0, 0, 1], atol=1e-4)


@pytest.mark.parametrize(
    "q1,p1,k_seq,optimum",
    [(0.5, 1.0, 0.75, 0.75), (0.9, 0.1, 0.284582, 0.29), (0.7, 0.4, 0.825367, 0.91)],
)  # fmt: skip
def test_golden_pairs_of_two_tokens(q1, p1, k_seq, optimum):
    q, p = np.array([q1, 1 - q1]), np.array([p1, 1 - p1])
    assert call(transport.k_seq_acceptance, q, p, 2) == pytest.approx(k_seq, abs=1e-5)
    assert call(transport.optimal_acceptance, q, p, 2) == pytest.approx(optimum, abs=1e-6)


def test_duplicates_are_trials_of_their_own():
    """q one-hot at a token of probability one half: three deflated trials accept one half."""
    q, p = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    rho = call(transport.deflation, q, p, 3)
    assert rho == pytest.approx(0.5 / (1 - 0.5 ** (1 / 3)), abs=1e-4)
    assert call(transport.k_seq_acceptance, q, p, 3) == pytest.approx(0.5, abs=1e-5)
    assert call(transport.k_seq_acceptance, P, P, 3) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_bounds_on_random_pairs(k):
    """(1 - (1 - 1/k)^k) alpha <= K-SEQ <= alpha, and the residual is not negative."""
    q, p = random_pairs(1000, 50)
    accepted = call(transport.k_seq_acceptance, q, p, k)
    optimum = call(transport.optimal_acceptance, q, p, k)
    assert (accepted <= optimum + 1e-5).all()
    assert (accepted >= (1 - (1 - 1 / k) ** k) * optimum - 1e-5).all()
    rho = call(transport.deflation, q, p, k)
    assert (rho >= 1).all() and (rho <= k).all()
    residual = call(lambda q, p, k: transport.k_seq_residual(q, p, k, jnp.asarray(rho)), q, p, k)
    assert residual.min() > -1e-5
    np.testing.assert_allclose(residual.sum(-1), 1 - accepted, atol=1e-5)


def test_below_the_root_the_residual_is_negative():
    """The bracket's side matters: 0.9 of the root is biased."""
    k = jnp.asarray(2)
    rho = 0.9 * transport.deflation(jnp.asarray(Q), jnp.asarray(P), k)
    assert transport.k_seq_residual(jnp.asarray(Q), jnp.asarray(P), k, rho).min() < -1e-3


def test_disjoint_supports():
    q, p = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert call(transport.k_seq_acceptance, q, p, 2) == 0
    rho = transport.deflation(jnp.asarray(q), jnp.asarray(p), jnp.asarray(2))
    residual = transport.k_seq_residual(jnp.asarray(q), jnp.asarray(p), jnp.asarray(2), rho)
    np.testing.assert_allclose(residual, p)


def linear_program(q: np.ndarray, p: np.ndarray, k: int) -> float:
    """The optimal coupling's acceptance by a solver: unknowns pi(x_1..x_k, y)."""
    drafts = list(itertools.product(range(len(q)), repeat=k))
    shape = (len(drafts), len(p))
    cost = np.array([[float(y not in xs) for y in range(len(p))] for xs in drafts])
    rows, values = [], []
    for i, xs in enumerate(drafts):
        row = np.zeros(shape)
        row[i] = 1
        rows.append(row.ravel())
        values.append(np.prod(q[list(xs)]))
    for y in range(len(p) - 1):  # the last one follows from the others
        row = np.zeros(shape)
        row[:, y] = 1
        rows.append(row.ravel())
        values.append(p[y])
    found = optimize.linprog(cost.ravel(), A_eq=np.array(rows), b_eq=values, method="highs")
    assert found.success
    return 1 - found.fun


@pytest.mark.parametrize("vocab,k", [(3, 1), (3, 2), (3, 3), (4, 2)])
def test_the_closed_form_is_the_linear_programs_value(vocab, k):
    q, p = random_pairs(6, vocab, seed=k)
    closed = call(transport.optimal_acceptance, q, p, k)
    solved = [linear_program(a, b, k) for a, b in zip(q, p, strict=True)]
    np.testing.assert_allclose(closed, solved, atol=1e-5)
