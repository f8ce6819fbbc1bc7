"""What a word of context costs a model: positions, attention, operations, and time to read it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import timing
from experiments.next_word_scores import Model
from models import hierarchical, transformer
from models.hierarchical import HierarchicalConfig
from training import compute


class Arm(NamedTuple):
    """A model with a context: a line of the results.

    Attributes:
      label: of the model, and of the context where it has several.
      role: of the model.
      context: words of a pooled model, units of a flat one.
      units: of a word and its end on average.
    """

    label: str
    role: str
    context: int
    units: float


def costs(
    config: ConfigDict, arms: Sequence[Arm], models: Mapping[str, Model]
) -> dict[str, dict[str, float]]:
    """What a word of context costs: positions, attention, operations, and time to read it.

    Operations are those of words of mean length, and of words in padded slots, as they are
    computed; attention is query-key pairs of a whole context.
    """
    t = config.examples.context_words
    found: dict[str, dict[str, float]] = {}
    runs = {}
    for arm in arms:
        model = models[arm.role]
        if isinstance(model.config, HierarchicalConfig):
            p, C = model.config.num_prefix, model.config.max_word
            length = arm.units - 1
            found[arm.label] = {
                "positions": p,
                "attention": (t * p) ** 2 + 2 * t * (p + C) ** 2,
                "operations": compute.word(model.config, length, t / 2),
                "padded operations": compute.word(model.config, C, t / 2),
            }
        else:
            words = arm.context / arm.units
            one = compute.position(model.config, arm.context / 2)
            found[arm.label] = {
                "positions": arm.units,
                "attention": arm.context**2,
                "operations": arm.units * one,
                "padded operations": arm.units * one,
            }
        words = t if model.is_pooled else arm.context / arm.units
        found[arm.label]["words in sight"] = words
        runs[arm.label] = _reader(config, arm, model)
    measured = timing.side_by_side(runs, config.timing.repeats, label="time")
    for arm in arms:
        count = config.timing.batch_size * found[arm.label]["words in sight"]
        found[arm.label]["milliseconds"] = 1e3 * measured[arm.label]["median"] / count
    return found


def _reader(config: ConfigDict, arm: Arm, model: Model) -> Any:
    """Reads a batch of contexts; one call is one forward pass without logits."""
    rng = np.random.default_rng(config.seed)
    B, architecture = config.timing.batch_size, model.config
    if isinstance(architecture, HierarchicalConfig):
        words = architecture
        shape = (B, arm.context, words.max_word)
        units = jnp.asarray(rng.integers(0, model.units.num_units, shape), jnp.int32)
        lengths = jnp.asarray(rng.integers(1, shape[-1], shape[:2]), jnp.int32)

        @jax.jit
        def pooled(params: Any) -> jax.Array:
            vectors = hierarchical.encode(words, params, units, lengths)
            return hierarchical.think(words, params, vectors)[0]

        return lambda: pooled(model.params).block_until_ready()
    stream = architecture
    size = (B, arm.context)
    tokens = jnp.asarray(rng.integers(0, model.units.num_units, size), jnp.int32)

    @jax.jit
    def flat(params: Any) -> jax.Array:
        return transformer.apply(stream, params, tokens, with_logits=False).hidden

    return lambda: flat(model.params).block_until_ready()
