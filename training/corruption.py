"""Noise of masked diffusion: which tokens of a row are hidden, which are replaced by wrong ones.

Everything is drawn from a step's key and a row's number, so that a row's noise does not depend
on its neighbours or on how the batch is split over devices.
"""

import jax
import jax.numpy as jnp
from flax import struct

# What a draw is for.
_RATIO, _MASK, _RATE, _CORRUPT, _TOKEN, _REMASK, _CUT, _LENGTH = range(8)


class Noisy(struct.PyTreeNode):
    """Rows as the model sees them, and what it is asked about each position.

    The three kinds of position are disjoint; they make up the positions that may be changed.

    Attributes:
      tokens: int [B, T].
      masked: bool [B, T]; the mask token stands there.
      corrupted: bool [B, T]; a wrong token stands there.
      kept: bool [B, T]; the right token stands there.
      probability: float32 [B, 1], of a position's being masked.
    """

    tokens: jnp.ndarray
    masked: jnp.ndarray
    corrupted: jnp.ndarray
    kept: jnp.ndarray
    probability: jnp.ndarray


def mask_probabilities(
    key: jax.Array, rows: int, band: tuple[float, float], floor: float
) -> jnp.ndarray:
    """p = (1 - floor) t + floor with t spread evenly over `band`: float32 [rows, 1].

    t of row i is the fractional part of u + i / rows with one uniform u a step: uniform for each
    row, and of far less variance over a batch than independent draws (Kingma et al.,
    'Variational Diffusion Models', arXiv 2107.00630, appendix I.1).

    Args:
      key: of the step.
      rows: B.
      band: least and greatest t.
      floor: least probability, LLaDA's epsilon (arXiv 2502.09992, algorithm 1).
    """
    shift = jax.random.uniform(jax.random.fold_in(key, _RATIO))
    t = (shift + jnp.arange(rows) / rows) % 1.0
    low, high = band
    t = low + (high - low) * t
    return ((1.0 - floor) * t + floor)[:, None]


def mask(
    key: jax.Array,
    tokens: jnp.ndarray,
    changeable: jnp.ndarray,
    probability: jnp.ndarray,
    mask_token_id: int,
) -> Noisy:
    """Hides each changeable position with its row's probability.

    Args:
      key: of the step.
      tokens: int [B, T], the clean rows.
      changeable: bool [B, T]; False on prompts and padding.
      probability: float32 [B, 1].
      mask_token_id: what stands at a hidden position.
    """
    masked = (_uniform(key, _MASK, tokens.shape) < probability) & changeable
    return Noisy(
        tokens=jnp.where(masked, mask_token_id, tokens),
        masked=masked,
        corrupted=jnp.zeros_like(masked),
        kept=changeable & ~masked,
        probability=probability,
    )


def corrupt(
    key: jax.Array, noisy: Noisy, rate: float, vocab_size: int, mask_token_id: int
) -> Noisy:
    """Replaces kept tokens by wrong ones, each row at a share drawn from U(0, rate).

    A wrong token is uniform over the vocabulary without the right one and the mask token
    (LLaDA2.1, arXiv 2602.08676: token-to-token recovery from random replacements).

    Args:
      key: of the step.
      noisy: before the replacements.
      rate: greatest share.
      vocab_size: V.
      mask_token_id: never a replacement.
    """
    shape = noisy.tokens.shape
    share = rate * _uniform(key, _RATE, (shape[0], 1))
    chosen = noisy.kept & (_uniform(key, _CORRUPT, shape) < share)
    # Uniform over V - 2 numbers, counted past the two that are not allowed.
    drawn = jnp.floor(_uniform(key, _TOKEN, shape) * (vocab_size - 2)).astype(noisy.tokens.dtype)
    low = jnp.minimum(noisy.tokens, mask_token_id)
    high = jnp.maximum(noisy.tokens, mask_token_id)
    wrong = drawn + (drawn >= low)
    wrong = wrong + (wrong >= high)
    return noisy.replace(
        tokens=jnp.where(chosen, wrong, noisy.tokens),
        corrupted=noisy.corrupted | chosen,
        kept=noisy.kept & ~chosen,
    )


def fill(
    key: jax.Array, noisy: Noisy, fills: jnp.ndarray, clean: jnp.ndarray, remask: float
) -> Noisy:
    """The next turn's rows: masks are filled with the model's own tokens, some are left.

    Args:
      key: of the step.
      noisy: the turn before.
      fills: int [B, T], the model's tokens.
      clean: int [B, T], the right tokens.
      remask: probability that a mask is left as it is.
    """
    masked = noisy.masked & (_uniform(key, _REMASK, clean.shape) < remask)
    filled = noisy.masked & ~masked
    tokens = jnp.where(filled, fills, noisy.tokens)
    visible = filled | noisy.corrupted | noisy.kept
    return Noisy(
        tokens=tokens,
        masked=masked,
        corrupted=visible & (tokens != clean),
        kept=visible & (tokens == clean),
        probability=noisy.probability * remask,
    )


def truncated_lengths(key: jax.Array, rows: int, length: int, share: float) -> jnp.ndarray:
    """Lengths of rows, a share of which are cut to a length of U{1 .. length}: int32 [rows, 1].

    LLaDA pre-trains so on 1% of its batches, that shorter sequences be known (section 2.2); here
    rows are cut rather than batches.
    """
    cut = _uniform(key, _CUT, (rows, 1)) < share
    drawn = 1 + jnp.floor(_uniform(key, _LENGTH, (rows, 1)) * length).astype(jnp.int32)
    return jnp.where(cut, drawn, length)


def _uniform(key: jax.Array, purpose: int, shape: tuple[int, ...]) -> jnp.ndarray:
    """Uniforms [rows, ...] of one purpose, row by row."""
    key = jax.random.fold_in(key, purpose)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(shape[0]))
    return jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(keys)
