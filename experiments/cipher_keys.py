"""How much of a substitution cipher's key a probe reads off a lexinvariant model.

Huang et al., arXiv 2305.16349, section 4.2. Text is encrypted with a random substitution of its
symbols; in a window each cipher symbol that occurs is taken for what the probe says at most of its
places. Precision is the share of right entries among the cipher symbols of letters.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import decipher_probe
from models.random_embeddings import LexinvariantConfig
from training import decipher_probe as probing


def encrypt(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Rows int [N, T] under keys int [N, V] or [V] (plain token -> cipher token)."""
    return np.take_along_axis(np.broadcast_to(keys, (len(rows), keys.shape[-1])), rows, axis=1)


def random_keys(rng: np.random.Generator, model: LexinvariantConfig, count: int) -> np.ndarray:
    """Int [count, V]: permutations of all tokens but the fixed ones."""
    keys = np.tile(np.arange(model.vocab_size), (count, 1))
    free = np.array(model.free_ids)
    for key in keys:
        key[free] = rng.permutation(free)
    return keys


def read(
    model: LexinvariantConfig,
    params: Any,
    probe: Any,
    rows: np.ndarray,
    *,
    batch_size: int,
    seed: int,
) -> np.ndarray:
    """The probe's log probabilities float32 [N, T, V] of the plain token at every position.

    One draw of the table a row; N must be a multiple of `batch_size`.
    """
    run = _reader(model)
    keys = jax.random.split(jax.random.key(seed), len(rows))
    parts = [
        np.asarray(run(params, probe, rows[i : i + batch_size], keys[i : i + batch_size]))
        for i in range(0, len(rows), batch_size)
    ]
    return np.concatenate(parts)


@functools.cache
def _reader(model: LexinvariantConfig) -> Any:
    def run(params: Any, probe: Any, rows: jnp.ndarray, keys: jax.Array) -> jnp.ndarray:
        hidden = probing.activations(model, params, rows, keys)
        return jax.nn.log_softmax(decipher_probe.apply(probe, hidden))

    return jax.jit(run)


def majority(said: np.ndarray, cipher: np.ndarray, size: int) -> np.ndarray:
    """The plain token that most places of each cipher token were taken for; -1 where it is absent.

    Args:
      said: int [...], the deciphered token of each place.
      cipher: int [...], what stands there.
      size: V.

    Returns:
      int [V] by cipher token.
    """
    votes = np.zeros((size, size), int)
    np.add.at(votes, (cipher.ravel(), said.ravel()), 1)
    return np.where(votes.any(axis=1), votes.argmax(axis=1), -1)


def precision(
    said: np.ndarray, cipher: np.ndarray, keys: np.ndarray, letters: Sequence[int]
) -> np.ndarray:
    """Share of right entries among each row's cipher symbols of letters: float [N]; NaN for none.

    Args:
      said: int [N, W], deciphered tokens of a window.
      cipher: int [N, W], the window.
      keys: int [N, V], plain token -> cipher token.
      letters: plain tokens whose entries count.
    """
    found = np.full(len(said), np.nan)
    for row in range(len(said)):
        voted = majority(said[row], cipher[row], keys.shape[1])[keys[row, list(letters)]]
        there = voted >= 0
        if there.any():
            found[row] = (voted == np.array(letters))[there].mean()
    return found


def soft_entries(
    log_probs: np.ndarray,
    cipher: np.ndarray,
    keys: np.ndarray,
    letters: Sequence[int],
    temperature: float,
) -> float:
    """Mean probability of the right entry when a window's log probabilities are averaged.

    Args:
      log_probs: float [N, W, V], of the plain token at every place.
      temperature: divides the averages before they are normalised again.
      cipher, keys, letters: as `precision`.
    """
    found = []
    for row in range(len(cipher)):
        for letter in letters:
            places = cipher[row] == keys[row, letter]
            if places.any():
                mean = log_probs[row, places].mean(axis=0) / temperature
                mean -= mean.max()
                found.append(np.exp(mean[letter]) / np.exp(mean).sum())
    return float(np.mean(found))
