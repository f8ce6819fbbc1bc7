"""Losses of masked diffusion as functions of logits and noise, in nats.

Logits at a position are for the token of that same position. i runs over positions, b over rows.
"""

import jax
import jax.numpy as jnp

from training import losses
from training.corruption import Noisy

WEIGHTINGS = ("elbo", "mean")


def denoising(
    nats: jnp.ndarray, noisy: Noisy, changeable: jnp.ndarray, weighting: str
) -> jnp.ndarray:
    """Recovery of masked tokens, float32 [].

    'elbo': mean over rows of sum_i 1[i masked] nats_i / p, divided by the row's changeable
    positions: LLaDA's objective (arXiv 2502.09992, equation 3), whose expectation bounds the
    negative log-likelihood a token. With rows of T tokens it is the sum over B T that is used in
    pre-training, with prompts the division by the answer's length (padding with end-of-text
    included) that is used in fine-tuning (algorithms 1 and 2). Rows without a changeable position
    count as zero.

    'mean': the plain mean over masked tokens, as LLaDA2.0 is fine-tuned with (arXiv 2512.15745,
    its published training code): biased towards high mask ratios, of less variance.

    Args:
      nats: float32 [B, T], -log of the right tokens' probabilities.
      noisy: see `Noisy`.
      changeable: bool [B, T].
      weighting: one of `WEIGHTINGS`.
    """
    if weighting == "mean":
        return losses.masked_mean(nats, noisy.masked)
    weighted = jnp.where(noisy.masked, nats / noisy.probability, 0.0).sum(axis=1)
    return jnp.mean(weighted / jnp.maximum(changeable.sum(axis=1), 1))


def editing(
    nats: jnp.ndarray, noisy: Noisy, corrupted_weight: float, kept_weight: float
) -> jnp.ndarray:
    """Recovery of wrong tokens and keeping of right ones, float32 [].

    lambda_e mean over wrong tokens + lambda_k mean over right ones: the token-to-token stream of
    LLaDA2.1 (arXiv 2602.08676). The paper gives no weights; keeping is what stops needless edits.

    Args:
      nats: float32 [B, T], -log of the right tokens' probabilities.
      noisy: see `Noisy`.
      corrupted_weight, kept_weight: lambda_e and lambda_k.
    """
    corrupted = losses.masked_mean(nats, noisy.corrupted)
    return corrupted_weight * corrupted + kept_weight * losses.masked_mean(nats, noisy.kept)


def confidence(logits: jnp.ndarray, targets: jnp.ndarray, noisy: Noisy) -> jnp.ndarray:
    """Mean entropy over masked positions whose most likely token is the right one, float32 [].

    The confidence-aware term of LLaDA2.0 (arXiv 2512.15745, 'CAP'): a model that is sure where it
    is right can write more tokens at a time.

    Args:
      logits: float32 [B, T, V].
      targets: int [B, T].
      noisy: see `Noisy`.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    right = jnp.argmax(logits, axis=-1) == targets
    return losses.masked_mean(entropy, noisy.masked & right)
