"""Which layers run for which token: SkipDecode's schedule (Del Corro et al., arXiv 2307.02628).

The layers that a token runs depend on how many were generated before it and on nothing else, and
later tokens run fewer. A few warm-up layers at the bottom always run, and the rest of the budget is
the layers at the top: so where a token runs a layer, every token before it has run it too, and has
keys and values there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import masks, transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice

PLACES = ("top", "bottom", "spread")


@dataclasses.dataclass(frozen=True)
class SkipSchedule:
    """Layers by number of generated tokens, linear from most to fewest (section 3).

    Attributes:
      max_layers, min_layers: of the first token, and of token `span` and all after it; warm-up
        layers count.
      span: G, tokens over which it falls.
      warmup: W, layers at the bottom that always run.
      place: where the other layers are: at the 'top' (published), or at the 'bottom' above the
        warm-up, which is early termination by the same schedule (truncation, where it does not
        fall); or 'spread' evenly from the first to the last, which must not fall (Unified Layer
        Skipping).
    """

    max_layers: int
    min_layers: int
    span: int
    warmup: int = 1
    place: str = "top"

    def __post_init__(self) -> None:
        check_choice("place", self.place, PLACES)
        if self.span < 1:
            raise InputError(f"span: {self.span} must be at least 1")
        if self.warmup < 0:
            raise InputError(f"warmup: {self.warmup} must be at least 0")
        if self.min_layers < self.warmup + 1:
            raise InputError(
                f"min_layers: {self.min_layers} must be at least {self.warmup + 1}: a layer above "
                f"the {self.warmup} of the warm-up"
            )
        if self.max_layers < self.min_layers:
            raise InputError(
                f"max_layers: {self.max_layers} must be at least min_layers {self.min_layers}"
            )

        if self.place == "spread" and not 2 <= self.max_layers == self.min_layers:
            raise InputError(
                f"place: 'spread' needs as many layers for all tokens, at least 2; max_layers is "
                f"{self.max_layers}, min_layers {self.min_layers}"
            )

    def check(self, config: TransformerConfig) -> None:
        """Raises InputError where the model has fewer layers than the schedule wants."""
        if self.max_layers > config.num_layers:
            raise InputError(
                f"max_layers: {self.max_layers} must be at most the model's {config.num_layers}"
            )

    @property
    def mean_layers(self) -> float:
        """Mean over the first `span` tokens."""
        return float(np.mean([int(self.layers(t)) for t in range(self.span)]))

    def layers(self, generated: Any) -> Any:
        """n(t): layers of the token after `generated` ones; of NumPy or JAX integers."""
        fall = (self.max_layers - self.min_layers) / max(self.span - 1, 1)
        xp = jnp if isinstance(generated, jax.Array) else np
        budget = xp.floor(self.max_layers - fall * xp.asarray(generated, xp.float32) + 0.5)
        return xp.clip(budget, self.min_layers, self.max_layers).astype(xp.int32)

    def runs(self, layer: int, num_layers: int, budget: Any) -> Any:
        """Whether a token of `budget` layers runs `layer`; of NumPy or JAX integers."""
        if self.place == "bottom":
            return layer < budget
        if self.place == "spread":  # a prompt may run all layers
            steps = self.max_layers - 1
            kept = {(2 * i * (num_layers - 1) + steps) // (2 * steps) for i in range(steps + 1)}
            return (layer in kept) | (budget >= num_layers)
        return (layer < self.warmup) | (layer >= num_layers - (budget - self.warmup))


def gated(
    config: TransformerConfig,
    params: transformer.Params,
    tokens: jnp.ndarray,
    generated: jnp.ndarray,
    schedule: SkipSchedule,
    *,
    positions: jnp.ndarray | None = None,
    mask: jnp.ndarray | None = None,
    prompt_layers: int | None = None,
    remat: bool = False,
) -> jnp.ndarray:
    """Logits of all tokens at once, each run through its own layers: what skipping decodes.

    It saves nothing: it is how the schedule is trained, and what decoding is tested against. No
    further mask is needed, since layers are nested.

    Args:
      config, params: the model.
      tokens: int [B, T].
      generated: int [B, T], generated tokens before the one that each token leads to; negative
        within the prompt.
      schedule: see `SkipSchedule`.
      positions, mask: as `transformer.apply`.
      prompt_layers: layers of the prompt; None for all.

    Returns:
      float32 [B, T, V].

    Raises:
      InputError: as `SkipSchedule.check`.
    """
    schedule.check(config)
    L = config.num_layers
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if mask is None:
        mask = masks.causal(positions, tokens.shape[1])
    budget = jnp.where(generated < 0, prompt_layers or L, schedule.layers(generated))
    x = transformer.embed(config, params, tokens, positions)
    for layer in range(L):
        out = transformer.apply(
            config,
            params,
            x if layer else tokens,  # the first layer's call embeds them itself
            positions=positions,
            mask=mask,
            layers=(layer, layer + 1),
            with_logits=False,
            collect=(layer + 1,),
            remat=remat,
        )
        x = jnp.where(schedule.runs(layer, L, budget)[..., None], out.collected[0], x)
    return transformer.unembed(config, params, transformer.final_norm(config, params, x))
