"""AdamW with warm-up, cosine decay and clipping, as one configuration."""

import dataclasses
from typing import Any

import jax
import optax

from models.errors import InputError
from models.sharding import path_string

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
    adamw = optax.adamw(
        # Counts updates, not batches.
        lambda update: rate(update * config.accumulate),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    chain = optax.chain(*clip, adamw)
    if config.accumulate > 1:
        return optax.MultiSteps(chain, config.accumulate).gradient_transformation()
    return chain
