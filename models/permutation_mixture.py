"""The lexinvariant model of a known language, exactly: the average over all permutations of V.

p'(x) = E_pi[p(pi^-1(x_1) .. pi^-1(x_n))] with uniform pi (Huang et al., arXiv 2305.16349, section
2). By steps it is a Bayesian reader of an unknown cipher:

    p'(x_n+1 | x_1..n) = sum_pi P(pi | x_1..n) p(pi^-1(x_n+1) | pi^-1(x_1..n)),

which is computed as such, with a log weight for each of V! permutations. No model that is blind to
the symbols' identity can have a smaller expected loss. For small V alone: 7! is 5040.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError

MAX_SYMBOLS = 7


@dataclasses.dataclass(frozen=True)
class MarkovLanguage:
    """A language of order one in which each symbol is followed by few others most of the time.

    The symbols stand in a circle, in a random order; the next one is the k-th after the current one
    with probability `next_probs[k - 1]`, and the rest of the probability is spread evenly over all
    others, the current one included. The first symbol is uniform, and so is every symbol by itself.

    Attributes:
      num_symbols: V.
      next_probs: of the next symbols of the circle.
      seed: of the order.
    """

    num_symbols: int = 6
    next_probs: tuple[float, ...] = (0.6, 0.32)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.num_symbols <= MAX_SYMBOLS:
            raise InputError(f"num_symbols: {self.num_symbols} must be 2 to {MAX_SYMBOLS}")
        fits = len(self.next_probs) < self.num_symbols and min(self.next_probs, default=0) > 0
        if not fits or not sum(self.next_probs) < 1:
            raise InputError(
                f"next_probs: {self.next_probs} must be positive, fewer than {self.num_symbols} "
                "and sum to less than 1"
            )

    def transition(self) -> np.ndarray:
        """Float64 [V, V], rows sum to one: p(next | current)."""
        V, given = self.num_symbols, self.next_probs
        rest = (1 - sum(given)) / (V - len(given))
        steps = np.array([rest, *given, *[rest] * (V - 1 - len(given))])  # by places ahead
        place = np.random.default_rng(self.seed).permutation(V)
        return steps[(place[None, :] - place[:, None]) % V]

    def sample(self, rows: int, length: int, seed: int) -> np.ndarray:
        """Int32 [rows, length]."""
        rng = np.random.default_rng(seed)
        cumulative = self.transition().cumsum(axis=1)
        tokens = np.empty((rows, length), np.int32)
        tokens[:, 0] = rng.integers(self.num_symbols, size=rows)
        for t in range(1, length):
            draws = rng.random(rows)[:, None]
            # Rounding can leave the last sum a little below one.
            after = (draws >= cumulative[tokens[:, t - 1]]).sum(axis=1)
            tokens[:, t] = np.minimum(after, self.num_symbols - 1)
        return tokens

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """The true language's log p(x_t | x_<t): int [B, T] -> float64 [B, T], in nats."""
        logs = np.log(self.transition())
        first = np.full((len(tokens), 1), -np.log(self.num_symbols))
        return np.concatenate([first, logs[tokens[:, :-1], tokens[:, 1:]]], axis=1)


def predictions(transition: Any, tokens: Any) -> jnp.ndarray:
    """log p'(. | x_<t) of a language of order one whose first symbol is uniform.

    Args:
      transition: [V, V], p(next | current), all positive; V is at most `MAX_SYMBOLS`.
      tokens: int [B, T].

    Returns:
      Float32 [B, T, V], in nats; entry [b, t] is what p' says of x_t.
    """
    V = len(transition)
    if V > MAX_SYMBOLS:
        raise InputError(f"num_symbols: {V} must be at most {MAX_SYMBOLS}")
    # Under pi^-1 = ciphers[k]: the log probability of cipher symbol y after cipher symbol x.
    ciphers = jnp.array(list(itertools.permutations(range(V))))
    logs = jnp.log(jnp.asarray(transition, jnp.float32))
    by_cipher = logs[ciphers[:, :, None], ciphers[:, None, :]]  # [V!, V, V]

    def step(weights: jnp.ndarray, pair: tuple) -> tuple[jnp.ndarray, jnp.ndarray]:
        before, now = pair
        after = by_cipher[:, before]  # [V!, B, V]
        said = jax.nn.logsumexp(weights[:, :, None] + after, axis=0)
        rows = jnp.arange(len(now))
        weights = weights + after[:, rows, now]
        return weights - jax.nn.logsumexp(weights, axis=0), said

    tokens = jnp.asarray(tokens)
    B = tokens.shape[0]
    even = jnp.full((len(ciphers), B), -jnp.log(float(len(ciphers))))
    pairs = (tokens[:, :-1].T, tokens[:, 1:].T)
    _, said = jax.lax.scan(step, even, pairs)
    first = jnp.full((1, B, V), -jnp.log(float(V)))
    return jnp.concatenate([first, said]).swapaxes(0, 1)


def log_probs(transition: Any, tokens: Any) -> jnp.ndarray:
    """log p'(x_t | x_<t), float32 [B, T]; arguments as `predictions`."""
    tokens = jnp.asarray(tokens)
    said = predictions(transition, tokens)
    return jnp.take_along_axis(said, tokens[:, :, None], axis=2)[:, :, 0]
