"""Losses over tokens. Everything is computed in float32 and measured in nats."""

import math

import jax
import jax.numpy as jnp


def cross_entropy(logits: jnp.ndarray, targets: jnp.ndarray) -> jnp.ndarray:
    """-log softmax(logits)[target] of every token.

    The target's logit is picked by comparison rather than by a gather: its gradient is then one
    elementwise pass instead of a scatter, and nothing is gathered when V is sharded.

    Args:
      logits: [..., V].
      targets: int [...].

    Returns:
      Nats, float32 [...].
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def forward_kl(
    logits: jnp.ndarray, target_logits: jnp.ndarray, temperature: float = 1.0
) -> jnp.ndarray:
    """KL(target || model) of every token, both softened by a temperature.

    Scaled by temperature squared, so that its gradient keeps its size beside a hard loss
    (Hinton et al., arXiv 1503.02531, section 2). No gradient flows into the target.

    Args:
      logits: [..., V], the model that learns.
      target_logits: [..., V], the frozen model.
      temperature: positive.

    Returns:
      Nats times temperature squared, float32 [...].
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    frozen = jax.lax.stop_gradient(target_logits).astype(jnp.float32)
    log_p = jax.nn.log_softmax(frozen / temperature)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) * temperature**2


def distillation(
    logits: jnp.ndarray,
    target_logits: jnp.ndarray,
    targets: jnp.ndarray,
    *,
    weight: float,
    temperature: float = 1.0,
) -> jnp.ndarray:
    """weight * forward KL from the target + (1 - weight) * cross-entropy, float32 [...].

    Args:
      logits: [..., V].
      target_logits: [..., V], from the frozen target.
      targets: int [...].
      weight: between 0 (hard labels alone) and 1 (the target alone).
      temperature: of the KL term alone.
    """
    hard = cross_entropy(logits, targets)
    soft = forward_kl(logits, target_logits, temperature)
    return weight * soft + (1.0 - weight) * hard


def masked_mean(values: jnp.ndarray, mask: jnp.ndarray) -> jnp.ndarray:
    """Mean of `values` [...] weighted by `mask` [...]; 0 when the mask is empty."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Bits a byte of text from the summed nats and the summed bytes of its tokens."""
    return nats / (math.log(2.0) * num_bytes)
