"""A small network that tells from a block's confidences which predictions are already final.

Learn2PD, arXiv 2509.25188: the filter sees the confidence of every position of the current block,
visible ones included, and nothing else; what it is sure of is written at once.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from decoding.loop import ModelParams
from decoding.unmasking.canvas import View
from decoding.unmasking.prediction import Prediction
from decoding.unmasking.selectors import Choice, Selector, fill, first_best
from models import parameter_files
from models.errors import InputError

ROLE = "filter"
DEPTHS = (1, 2, 4)
_KIND = "unmask_filter"


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """The shape of a filter: with 32 positions and 2 layers, 2112 parameters.

    Attributes:
      block_length: L, positions of a block, and width of every layer.
      depth: linear layers, with a ReLU between any two: 1, 2 (published) or 4.
    """

    block_length: int = 32
    depth: int = 2

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise InputError(f"block_length: {self.block_length} must be at least 1")
        if self.depth not in DEPTHS:
            raise InputError(f"depth: {self.depth} is not known; allowed: 1, 2, 4")


def init(config: FilterConfig, key: jax.Array) -> Any:
    """Random parameters: kernels [L, L] and biases [L], uniform within 1 / sqrt(L)."""
    L = config.block_length
    bound = L**-0.5

    def layer(key: jax.Array) -> dict[str, jnp.ndarray]:
        kernel, bias = jax.random.split(key)
        return {
            "kernel": jax.random.uniform(kernel, (L, L), jnp.float32, -bound, bound),
            "bias": jax.random.uniform(bias, (L,), jnp.float32, -bound, bound),
        }

    keys = jax.random.split(key, config.depth)
    return {f"layer_{i}": layer(keys[i]) for i in range(config.depth)}


def apply(params: Any, confidence: jnp.ndarray) -> jnp.ndarray:
    """Logits of 'this prediction is final': float32 [..., L] -> [..., L]."""
    x = confidence.astype(jnp.float32)
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def save(directory: str | os.PathLike[str], config: FilterConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `models.parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(directory: str | os.PathLike[str]) -> tuple[FilterConfig, Any]:
    """Reads what `save` wrote; errors as `models.parameter_files.load`."""

    def shapes(config: FilterConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config), jax.random.key(0))

    return parameter_files.load(directory, _KIND, FilterConfig, shapes)


def block_confidence(view: View, confidence: jnp.ndarray, length: int) -> jnp.ndarray:
    """Confidences of the current block, zeros beyond the end of the canvas: [B, S] -> [B, L]."""
    positions = view.start[:, None] + jnp.arange(length)
    held = jnp.clip(positions, 0, confidence.shape[1] - 1)
    found = jnp.take_along_axis(confidence, held, axis=1)
    return jnp.where(positions < view.stop[:, None], found, 0.0)


@functools.cache
def learned_filter(threshold: float, block_length: int) -> Selector:
    """Every token of the current block that params['filter'] calls final (section 2.2).

    The most confident one is written too, so that every step writes at least one.

    Args:
      threshold: tau; a token is called final when sigmoid(logit) > tau. 1 writes one token a step,
        0 the whole block.
      block_length: L, which the filter was trained for.

    Raises:
      InputError: tau is not a probability, blocks have no length; while compiling, a filter for
        blocks of another length.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold: {threshold} must be between 0 and 1")
    if block_length < 1:
        raise InputError(f"block_length: {block_length}: a learned filter needs blocks; at least 1")

    def select(params: ModelParams, view: View, prediction: Prediction, memory: Any) -> Choice:
        del memory
        trained = params[ROLE]["layer_0"]["kernel"].shape[0]
        if trained != block_length:
            raise InputError(
                f"block_length: {block_length} given, but the filter is for blocks of {trained}"
            )
        among = view.candidates & prediction.known
        seen = block_confidence(view, prediction.confidence, block_length)
        final = jax.nn.sigmoid(apply(params[ROLE], seen)) > threshold
        offset = view.index - view.start[:, None]
        held = jnp.clip(offset, 0, block_length - 1)
        inside = (offset >= 0) & (offset < block_length)
        sure = among & inside & jnp.take_along_axis(final, held, axis=1)
        choice = fill(prediction, sure | first_best(among, prediction.confidence))
        return choice.replace(sure=sure)

    return Selector(select, roles=(ROLE,))
