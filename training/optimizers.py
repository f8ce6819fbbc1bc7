"""AdamW, Muon or Adafactor with warm-up, cosine decay and clipping, as one configuration."""

import dataclasses
from typing import Any

import jax
import optax
from optax import contrib

from models.errors import InputError, check_choice
from models.sharding import path_string

# How Muon reads matrices of several axes: path -> (axes of the input, axes of the output); queries,
# keys and values are matrices of their own, as are gate and up. What is not here (norms, biases,
# embeddings, experts, the logits' kernel) is left to AdamW, without weight decay.
_MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "attention/qkv/kernel": ((0,), (1, 3)),
    "attention/out/kernel": ((0, 1, 2), (3,)),
    "mlp/gate_up/kernel": ((0,), (2,)),
    "mlp/up/kernel": ((0,), (1,)),
    "mlp/down/kernel": ((0,), (1,)),
}

# Parameters by these names are not pulled towards zero: norms, biases and lookup tables.
UNDECAYED = ("scale", "bias", "embedding", "positions")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
      learning_rate: peak, reached at the end of the warm-up.
      warmup_steps: updates of linear warm-up from zero.
      final_fraction: learning rate at the last update, as a fraction of the peak.
      weight_decay: decoupled; matrices only, see `UNDECAYED`.
      beta1, beta2, epsilon: of Adam.
      clip_norm: largest global norm of the gradient; None for no clipping.
      accumulate: batches whose gradients are averaged into one update.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 20
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        checks = {
            "learning_rate": (self.learning_rate > 0, "positive"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "final_fraction": (0 <= self.final_fraction <= 1, "between 0 and 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "beta1": (0 <= self.beta1 < 1, "at least 0 and below 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and below 1"),
            "epsilon": (self.epsilon > 0, "positive"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "positive or None"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
        }
        for field, (fine, allowed) in checks.items():
            if not fine:
                raise InputError(f"optimizer.{field}: {getattr(self, field)} must be {allowed}")


@dataclasses.dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside blocks (Jordan et al. 2024), AdamW for the rest.

    Its orthogonalised updates are scaled to the size that AdamW's have (Liu et al., 'Muon is
    scalable for LLM training', arXiv 2502.16982, section 2.2), so that one learning rate serves
    both.

    Attributes:
      momentum: of the gradient that is orthogonalised.
      update_rms: root mean square of an update before the learning rate.
    """

    momentum: float = 0.95
    update_rms: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.momentum: {self.momentum} must be at least 0 and below 1")
        if self.update_rms <= 0:
            raise InputError(f"optimizer.update_rms: {self.update_rms} must be positive")


@dataclasses.dataclass(frozen=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235), with the learning rate as it is given.

    Second moments are kept as row and column means, momentum is not kept at all: `beta1`, `beta2`
    and `epsilon` have no meaning here.

    Attributes:
      scale_by_parameter: multiply updates by the root mean square of what they change, as T5 does.
    """

    scale_by_parameter: bool = True


KINDS = {"adamw": OptimizerConfig, "muon": MuonConfig, "adafactor": AdafactorConfig}


def from_fields(kind: str = "adamw", **fields: Any) -> OptimizerConfig:
    """The optimiser that a config file describes: its kind, and the fields of that kind's class.

    Raises:
      InputError: an unknown kind, or a value that the class refuses.
      TypeError: an unknown field.
    """
    check_choice("optimizer.kind", kind, KINDS)
    return KINDS[kind](**fields)


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of batch number 0 .. num_steps - 1: linear warm-up, then a cosine."""
    updates = -(-num_steps // config.accumulate)
    warmup = min(config.warmup_steps, updates)
    by_update = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(updates, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda step: by_update(step // config.accumulate)


def decayed(params: Any) -> Any:
    """A tree like `params`: True where weight decay applies."""

    def one(path: tuple[Any, ...], _: Any) -> bool:
        return path_string(path).split("/")[-1] not in UNDECAYED

    return jax.tree_util.tree_map_with_path(one, params)


def create(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `num_steps` batches."""
    rate = schedule(config, num_steps)
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]

    def by_update(update: Any) -> Any:
        return rate(update * config.accumulate)

    if isinstance(config, MuonConfig):
        main = _muon(config, by_update)
    elif isinstance(config, AdafactorConfig):
        main = _adafactor(config, by_update)
    else:
        main = _adamw(config, by_update)
    chain = optax.chain(*clip, main)
    if config.accumulate > 1:
        return optax.MultiSteps(chain, config.accumulate).gradient_transformation()
    return chain


def _adamw(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _muon(config: MuonConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return contrib.muon(
        rate,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        weight_decay_mask=decayed,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        eps=config.epsilon,
        muon_weight_dimension_numbers=_dimension_numbers,
        consistent_rms=config.update_rms,
    )


def _adafactor(config: AdafactorConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=config.scale_by_parameter,
        weight_decay_rate=config.weight_decay or None,
        weight_decay_mask=decayed,
    )


def _dimension_numbers(params: Any) -> Any:
    """A tree like `params`: which axes Muon reads as rows and columns, None for AdamW."""

    def one(path: tuple[Any, ...], _: Any) -> contrib.MuonDimensionNumbers | None:
        name = path_string(path)
        for ending, axes in _MATRICES.items():
            if name.endswith(ending):
                return contrib.MuonDimensionNumbers(*axes)
        return None

    return jax.tree_util.tree_map_with_path(one, params)
