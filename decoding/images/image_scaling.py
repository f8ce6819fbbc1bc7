"""Ways between the code grids of two resolutions, as `multi_scale.Pair` wants them.

Learned row-causal networks, or through pixels: decode, scale the image, encode again (MuLo-SD's
training-free default). Pixels of a row that is known depend on rows below that are not; these are
filled with copies of the last known row, and what was settled is never computed anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models import row_causal, vq
from models.row_causal import ResamplerConfig
from models.vq import VQConfig

# (params, codes int32 [B, n, n], rows int []) -> codes at the other resolution.
Scaling = Callable[[Any, jnp.ndarray, jnp.ndarray], jnp.ndarray]


@functools.cache
def learned(config: ResamplerConfig, role: str) -> Scaling:
    """By a network whose parameters are `params[role]`; needs the codebook in `params['vq']`."""

    def scale(params: Any, codes: jnp.ndarray, rows: jnp.ndarray) -> jnp.ndarray:
        del rows  # row-causal: what is below is not looked at
        return row_causal.resample(config, params[role], vq.embeddings(params["vq"]), codes)

    return scale


@functools.cache
def through_pixels(tokenizer: VQConfig, factor: float) -> Scaling:
    """By the tokeniser in `params['vq']` and bicubic scaling of the image by `factor`.

    Going down, the kernel is widened against aliasing.
    """

    def scale(params: Any, codes: jnp.ndarray, rows: jnp.ndarray) -> jnp.ndarray:
        # Rows that are not known repeat the last one that is.
        index = jnp.minimum(jnp.arange(codes.shape[1]), rows - 1)
        images = vq.decode(tokenizer, params["vq"], codes[:, index])
        B, H, W, C = images.shape
        shape = (B, round(H * factor), round(W * factor), C)
        scaled = jax.image.resize(images, shape, "cubic", antialias=factor < 1)
        return vq.encode(tokenizer, params["vq"], jnp.clip(scaled, 0, 1))

    return scale
