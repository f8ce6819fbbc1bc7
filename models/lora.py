"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) as differences of a model's parameters.

An adapter is a pair of matrices for each kernel that it changes: kernel + scale * a @ b. The sum is
formed before the model is run, so that the model itself knows nothing of adapters, a trained one is
exported by the same function, and layers may share a batch with any others.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import parameter_files, transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.sharding import path_string

KIND = "lora"

# Kernels that can be adapted, and how many of their first axes are the input.
KERNELS: dict[str, int] = {
    "attention/qkv/kernel": 1,
    "attention/out/kernel": 3,
    "mlp/gate_up/kernel": 1,
    "mlp/up/kernel": 1,
    "mlp/down/kernel": 1,
}

# By the kernel's path, such as 'layers_0/mlp/down/kernel': a [inputs, r] and b [r, outputs].
Adapters = dict[str, dict[str, jnp.ndarray]]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The size of adapters.

    Attributes:
      rank: r.
      alpha: what a @ b is scaled by, times 1 / r; published for dynamic tokenisation: 2 r.
      kernels: which of `KERNELS`; queries, keys and values are one of them here.
      dropout: share of a kernel's inputs that an adapter does not see in a training step. They are
        drawn once a step, not for each token, since the sum is formed before the model is run.
    """

    rank: int = 8
    alpha: float = 16.0
    kernels: tuple[str, ...] = tuple(KERNELS)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank: {self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout: {self.dropout} must be at least 0 and below 1")
        for kernel in self.kernels:
            check_choice("lora.kernels", kernel, KERNELS)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapted(config: LoraConfig, params: Any) -> dict[str, tuple[int, int]]:
    """Kernels of `params` (arrays or shapes) that have adapters: path -> (inputs, outputs)."""
    found = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_string(at)
        match = re.fullmatch(r"layers_\d+/(.*)", path)
        if match and match[1] in config.kernels:
            axes = KERNELS[match[1]]
            inputs, outputs = (
                int(np.prod(part)) for part in (leaf.shape[:axes], leaf.shape[axes:])
            )
            found[path] = inputs, outputs
    return found


def init(config: LoraConfig, params: Any, key: jax.Array) -> Adapters:
    """Adapters that change nothing yet: a is random, b zero.

    Args:
      config: see `LoraConfig`.
      params: of the model, or their shapes.
      key: of the random values, normal with variance 1 / inputs.
    """
    sizes = adapted(config, params)
    keys = jax.random.split(key, max(len(sizes), 1))
    return {
        path: {
            "a": jax.random.normal(k, (inputs, config.rank)) * inputs**-0.5,
            "b": jnp.zeros((config.rank, outputs)),
        }
        for k, (path, (inputs, outputs)) in zip(keys, sizes.items(), strict=False)
    }


def merge(config: LoraConfig, params: Any, adapters: Adapters, key: jax.Array | None = None) -> Any:
    """The model's parameters with adapters added: what is trained, decoded with and exported.

    Args:
      config: of the adapters.
      params: of the model.
      adapters: see `init`.
      key: of the dropout; None for none, as after training.
    """
    names = sorted(adapters)

    def one(at: tuple[Any, ...], leaf: jnp.ndarray) -> jnp.ndarray:
        path = path_string(at)
        if path not in adapters:
            return leaf
        a, b = adapters[path]["a"], adapters[path]["b"]
        if key is not None and config.dropout:
            kept = jax.random.bernoulli(
                jax.random.fold_in(key, names.index(path)), 1 - config.dropout, a.shape[:1]
            )
            a = jnp.where(kept[:, None], a / (1 - config.dropout), 0.0)
        return leaf + (config.scale * (a @ b)).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def num_params(adapters: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def save(directory: Any, config: LoraConfig, adapters: Adapters) -> None:
    """Writes config.json and model.safetensors; errors as `models.parameter_files.save`."""
    parameter_files.save(directory, KIND, config, adapters)


def load(directory: Any, model: TransformerConfig) -> tuple[LoraConfig, Adapters]:
    """Reads what `save` wrote.

    Raises:
      InputError: as `models.parameter_files.load`, so for adapters of another architecture.
    """

    def make(**fields: Any) -> LoraConfig:
        return LoraConfig(**{**fields, "kernels": tuple(fields["kernels"])})

    def shapes(config: LoraConfig) -> Any:
        base = transformer.param_shapes(model)
        return jax.eval_shape(lambda: init(config, base, jax.random.key(0)))

    return parameter_files.load(directory, KIND, make, shapes)
