"""What the model says about each position of the canvas: the token, and how sure it is."""

import dataclasses
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding.sampling import SamplingConfig, log_probs
from decoding.unmasking.canvas import View

# (logits [B, T, V], positions [B, T], or None for all S of them) -> Prediction.
Reader = Callable[[jnp.ndarray, jnp.ndarray | None], "Prediction"]

# (view, logits [B, T, V], positions [1 or B, T]) -> logits that the token is chosen by.
Adjust = Callable[[View, jnp.ndarray, jnp.ndarray], jnp.ndarray]

FEATURES = ("peak", "best", "entropy", "margin")


class Prediction(struct.PyTreeNode):
    """The model's word on the positions of the canvas, all [B, S].

    Attributes:
      known: bool, positions that this call predicted; all else is 0 elsewhere.
      tokens: int32, the token drawn for each position (the arg-max at temperature 0).
      confidence: float32, its probability.
      features: what else a selector asked for: 'peak' and 'best', the largest probability and its
        token; 'entropy' in nats; 'margin' between the two largest probabilities.
    """

    known: jnp.ndarray
    tokens: jnp.ndarray
    confidence: jnp.ndarray
    features: dict[str, jnp.ndarray]


def reader(
    view: View,
    sampling: SamplingConfig,
    mask_id: int,
    *,
    features: Collection[str] = (),
    filtered: bool = False,
    adjust: Adjust | None = None,
) -> Reader:
    """How this round's logits become predictions.

    The mask is never predicted. At a temperature above 0 the token is drawn from the filtered
    distribution by the Gumbel-max trick; noise is keyed by (row, call of the row, position).

    Args:
      view: of the round.
      sampling: how tokens are chosen.
      mask_id: of the model.
      features: names of `FEATURES` to compute.
      filtered: confidence is the probability that the sampler gave the token (LLaDA 2), and not
        the model's own, whatever the temperature and filters (LLaDA); features are of the
        filtered distribution too, at temperature 0 with its filters at temperature 1 (Dream).
      adjust: changes the logits before anything is read off them.
    """

    def read(logits: jnp.ndarray, positions: jnp.ndarray | None) -> Prediction:
        at = view.index[None] if positions is None else positions
        if adjust is not None:
            logits = adjust(view, logits, at)
        logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
        law = jax.nn.log_softmax(logits, axis=-1)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        tokens, source = best, law
        if not sampling.greedy:
            own = log_probs(logits, sampling)
            at = jnp.broadcast_to(at, tokens.shape)
            keys = jax.vmap(jax.random.fold_in)(view.keys, view.calls)
            noise = randomness.gumbel(randomness.each(keys, at, randomness.SAMPLE), own.shape[-1])
            tokens = jnp.argmax(own + noise, axis=-1).astype(jnp.int32)
            source = own if filtered else law
        confidence = jnp.exp(jnp.take_along_axis(source, tokens[..., None], axis=-1)[..., 0])
        kept = law
        if filtered and features:
            warm = dataclasses.replace(sampling, temperature=sampling.temperature or 1.0)
            kept = log_probs(logits, warm)
        found = {name: _FEATURES[name](kept, best) for name in features}
        place = _placing(view, positions)
        known = place(jnp.ones_like(tokens, bool)) & (view.index < view.ends[:, None])
        return Prediction(
            known, place(tokens), place(confidence), {n: place(v) for n, v in found.items()}
        )

    return read


def _placing(view: View, positions: jnp.ndarray | None) -> Callable[[jnp.ndarray], jnp.ndarray]:
    """From values at `positions` [B, T] to values at every position [B, S], 0 where none is."""
    if positions is None:
        return lambda values: values
    B, S = view.tokens.shape
    rows = jnp.arange(B)[:, None]
    # A negative index would count from the end.
    at = jnp.where(positions < 0, S, positions)
    return lambda values: jnp.zeros((B, S), values.dtype).at[rows, at].set(values, mode="drop")


def _entropy(law: jnp.ndarray, best: jnp.ndarray) -> jnp.ndarray:
    del best
    return -jnp.sum(jnp.where(law > -jnp.inf, jnp.exp(law) * law, 0.0), axis=-1)


def _margin(law: jnp.ndarray, best: jnp.ndarray) -> jnp.ndarray:
    del best
    two = jnp.exp(jax.lax.top_k(law, 2)[0])
    return two[..., 0] - two[..., 1]


_FEATURES: dict[str, Callable[[jnp.ndarray, jnp.ndarray], jnp.ndarray]] = {
    "peak": lambda law, best: jnp.exp(law.max(axis=-1)),
    "best": lambda law, best: best,
    "entropy": _entropy,
    "margin": _margin,
}
