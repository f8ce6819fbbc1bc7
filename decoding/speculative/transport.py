"""Choosing one of k drafts as optimal transport: the numbers behind multi-draft verification.

Sun et al., 'SpecTr: fast speculative decoding via optimal transport', arXiv 2310.15141. The output
token should be one of k drafts as often as possible while it follows the target's distribution p.
`deflation` is what K-SEQ needs; `optimal_acceptance` is the bound that no rule for independent
drafts can exceed. (The paper writes p for the draft and q for the target; here q drafts.)
"""

import jax
import jax.numpy as jnp

# Halvings of an interval of at most 63 drafts: float32 has nothing more to give.
_HALVINGS = 25


def covered(q: jnp.ndarray, p: jnp.ndarray, rho: jnp.ndarray) -> jnp.ndarray:
    """beta = sum_v min(q_v, p_v / rho): probability that one deflated trial accepts; float [...].

    Args:
      q: float32 [..., V], the drafter's distribution.
      p: float32 [..., V], the target's.
      rho: float [...].
    """
    return jnp.minimum(q, p / rho[..., None]).sum(axis=-1)


def any_of(beta: jnp.ndarray, k: jnp.ndarray) -> jnp.ndarray:
    """1 - (1 - beta)^k: probability that one of k independent trials accepts."""
    return 1 - (1 - jnp.minimum(beta, 1.0)) ** k


def deflation(q: jnp.ndarray, p: jnp.ndarray, k: jnp.ndarray) -> jnp.ndarray:
    """The smallest rho in [1, k], from above, for which K-SEQ is exact.

    The root of 1 - (1 - beta(rho))^k = rho beta(rho). Any rho above the root keeps the target's
    law; below it the residual would be negative somewhere. So the upper end of the bisection is
    returned.

    Args:
      q: float32 [..., V].
      p: float32 [..., V].
      k: float [...], drafts that are alive; 0 counts as 1.

    Returns:
      float32 [...].
    """
    k = jnp.maximum(k.astype(q.dtype), 1.0)

    def halve(_: int, ends: tuple[jnp.ndarray, jnp.ndarray]) -> tuple[jnp.ndarray, jnp.ndarray]:
        low, high = ends
        middle = (low + high) / 2
        beta = covered(q, p, middle)
        too_small = any_of(beta, k) >= middle * beta
        return jnp.where(too_small, middle, low), jnp.where(too_small, high, middle)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.ones_like(k), k))[1]


def k_seq_residual(q: jnp.ndarray, p: jnp.ndarray, k: jnp.ndarray, rho: jnp.ndarray) -> jnp.ndarray:
    """What K-SEQ draws from when no draft is accepted: float32 [..., V], not normalised.

    Its sum is 1 - `any_of`, up to rounding. Arguments as `deflation`, and its result.
    """
    beta = covered(q, p, rho)
    share = any_of(beta, jnp.maximum(k.astype(q.dtype), 1.0)) / jnp.maximum(beta, 1e-30)
    return p - jnp.minimum(q, p / rho[..., None]) * share[..., None]


def k_seq_acceptance(q: jnp.ndarray, p: jnp.ndarray, k: jnp.ndarray) -> jnp.ndarray:
    """Probability that K-SEQ returns one of k drafts: float32 [...]. Arguments as `deflation`."""
    return any_of(covered(q, p, deflation(q, p, k)), jnp.maximum(k.astype(q.dtype), 1.0))


def optimal_acceptance(q: jnp.ndarray, p: jnp.ndarray, k: jnp.ndarray) -> jnp.ndarray:
    """The optimum over all rules for k independent drafts from q: float32 [...].

    The linear program's value by max-flow/min-cut: the minimum over token sets H of
    1 + p(H) - q(H)^k, whose minimiser is a prefix of the tokens sorted by p / q.
    Arguments as `deflation`.
    """
    order = jnp.argsort(p / jnp.maximum(q, 1e-30), axis=-1)
    p_sum, q_sum = (jnp.cumsum(jnp.take_along_axis(x, order, axis=-1), axis=-1) for x in (p, q))
    values = 1 + p_sum - q_sum ** k[..., None]
    return jnp.minimum(values.min(axis=-1), 1.0)
