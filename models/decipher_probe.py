"""The probe that reads a cipher's key off a lexinvariant model (arXiv 2305.16349, section 4.2).

A network of two layers turns the frozen model's last activation at position n into a vector, whose
products with the rows of a learned table, not a random one, are logits of the plain token x_n. So
its output is a row of the key as far as x_1..n tell, P(pi^-1(x_n) | x_1..n). The paper gives
neither the hidden width nor the activation: D and GELU here.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from models import parameter_files
from models.errors import InputError

KIND = "decipher_probe"


@dataclasses.dataclass(frozen=True)
class DecipherProbeConfig:
    """A probe's sizes.

    Attributes:
      vocab_size: plain tokens [V].
      embed_dim: width of the activations that it reads, and of its table [D].
      hidden_dim: of its hidden layer [F].
    """

    vocab_size: int
    embed_dim: int
    hidden_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise InputError(f"probe.{field.name}: {value} must be at least 1")


@functools.partial(jax.jit, static_argnames="config")
def init(config: DecipherProbeConfig, key: jax.Array) -> Any:
    """Random float32 parameters: up and down with kernel and bias, table with embedding [V, D]."""
    D, F = config.embed_dim, config.hidden_dim
    up, down, table = jax.random.split(key, 3)
    return {
        "up": {"kernel": jax.random.normal(up, (D, F)) * D**-0.5, "bias": jnp.zeros((F,))},
        "down": {"kernel": jax.random.normal(down, (F, D)) * F**-0.5, "bias": jnp.zeros((D,))},
        "table": {"embedding": jax.random.normal(table, (config.vocab_size, D)) * D**-0.5},
    }


def apply(params: Any, hidden: jnp.ndarray) -> jnp.ndarray:
    """Logits float32 [..., V] of the plain token under activations [..., D]."""
    inner = hidden.astype(jnp.float32) @ params["up"]["kernel"] + params["up"]["bias"]
    inner = jax.nn.gelu(inner, approximate=False)
    vector = inner @ params["down"]["kernel"] + params["down"]["bias"]
    return vector @ params["table"]["embedding"].T


def save(directory: str | os.PathLike[str], config: DecipherProbeConfig, params: Any) -> None:
    """Writes a probe; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: str | os.PathLike[str]) -> tuple[DecipherProbeConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""

    def shapes(config: DecipherProbeConfig) -> Any:
        return jax.eval_shape(lambda: init(config, jax.random.key(0)))

    return parameter_files.load(directory, KIND, DecipherProbeConfig, shapes)
