"""Rotary position embedding and its length extensions (Su et al., arXiv 2104.09864)."""

import math

import jax.numpy as jnp
import numpy as np

from models.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequency of each pair of dimensions, and the scale of cos and sin.

    Args:
      config: which extension to apply.
      head_dim: H, even.

    Returns:
      Radians a position as float32 [H / 2], and the attention factor (1 except for 'yarn').
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.power(np.float32(config.theta), exponents)
    if config.kind == "linear":
        return (frequencies / config.factor).astype(np.float32), 1.0
    if config.kind == "llama3":
        return _llama3(config, frequencies).astype(np.float32), 1.0
    if config.kind == "yarn":
        factor = config.attention_factor
        if factor is None:
            factor = 1.0 if config.factor <= 1 else 0.1 * math.log(config.factor) + 1.0
        return _yarn(config, frequencies, head_dim).astype(np.float32), factor
    return frequencies.astype(np.float32), 1.0


def _llama3(config: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    turns = config.original_max_position * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / config.factor + blend * frequencies


def _yarn(config: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN's 'NTK-by-parts' interpolation (Peng et al., arXiv 2309.00071, section 3.2)."""

    def dimension_of(rotations: float) -> float:
        wavelength = config.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return frequencies / config.factor * ramp + frequencies * (1 - ramp)


def angles(
    config: RopeConfig, head_dim: int, positions: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Cosines and sines for `rotate`, computed once a call and shared by all layers.

    Args:
      config: base and extension.
      head_dim: H.
      positions: int [B, T].

    Returns:
      cos and sin, float32 [B, T, 1, H / 2].
    """
    frequencies, scale = inverse_frequencies(config, head_dim)
    radians = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(radians) * scale, jnp.sin(radians) * scale


def rotate(x: jnp.ndarray, cos: jnp.ndarray, sin: jnp.ndarray) -> jnp.ndarray:
    """Rotates each head of x [B, T, heads, H]; dimension i is paired with i + H / 2.

    With cos and sin for fewer than H / 2 pairs, these are of the leading dimensions alone.
    """
    if (width := 2 * cos.shape[-1]) < x.shape[-1]:
        leading, rest = jnp.split(x, [width], axis=-1)
        return jnp.concatenate([rotate(leading, cos, sin), rest], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
