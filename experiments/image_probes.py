"""What a masked image model attends to, and what changes between its steps.

The two findings that ENAT (arXiv 2411.06959, sections 3.1 and 3.2) is built on, measured on a
trained uniform network: which directions of attention between masked and visible tokens it
needs, and whose features change from one step to the next.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import randomness
from decoding.images import mask_predict
from decoding.images.mask_predict import SamplerConfig
from experiments import results
from models import enat
from models.enat import ENATConfig, Indices
from models.errors import InputError
from training import losses
from training.image_tokens import TokenImages

Network = tuple[ENATConfig, Any]
Found = tuple[dict[str, Any], dict[str, Any], list[results.Claim]]

# Queries and keys of a direction: whether they are masked.
DIRECTIONS = {
    "masked to visible": (True, False),
    "masked to masked": (True, True),
    "visible to visible": (False, False),
    "visible to masked": (False, True),
}
_VISIBLE_SHARES = (0.1, 0.25, 0.5)


def cut_mask(masked: jax.Array, queries: bool, keys: bool) -> jax.Array:
    """Attention mask bool [B, N, N] for masks bool [B, N] without one direction.

    A token keeps sight of itself.
    """
    cut = (masked == queries)[:, :, None] & (masked == keys)[:, None, :]
    return ~cut | jnp.eye(masked.shape[1], dtype=bool)


@functools.partial(jax.jit, static_argnums=0)
def _nats(
    config: ENATConfig, params: Any, ids: jax.Array, labels: jax.Array, masked: Indices, cut: Any
) -> jax.Array:
    """Cross entropy of masked tokens [B, m] under an attention mask."""
    hidden = enat.scatter(ids, masked.masked, jnp.full_like(masked.masked, config.mask_id))
    output = enat.apply(config, params, hidden, labels, masked, attention_mask=cut)
    targets = jnp.take_along_axis(ids, masked.masked, axis=1)
    return losses.cross_entropy(output.logits, targets)


def attention(network: Network, tokens: TokenImages, config: ConfigDict) -> Found:
    """Held-out loss of masked tokens with each direction of attention cut.

    Args:
      network: uniform.
      tokens: held-out images.
      config: `config.probes.num_images` and `config.seed`.

    Returns:
      Nats a masked token by direction and share of visible tokens, a figure, and the claim that
      cutting masked-to-visible costs most by far.

    Raises:
      InputError: a disentangled network.
    """
    model, params = _uniform(network)
    count = min(config.probes.num_images, len(tokens))
    ids, labels = jnp.asarray(tokens.ids[:count]), jnp.asarray(tokens.labels[:count])
    rng = np.random.default_rng(config.seed)
    found: dict[str, list[float]] = {name: [] for name in ("nothing cut", *DIRECTIONS)}
    for share in _VISIBLE_SHARES:
        order = rng.permuted(np.tile(np.arange(model.num_tokens), (count, 1)), axis=1)
        masked = order >= round(model.num_tokens * share)
        indices = enat.indices_of(masked)
        for name in found:
            if name == "nothing cut":
                cut = jnp.ones((count, model.num_tokens, model.num_tokens), bool)
            else:
                cut = cut_mask(jnp.asarray(masked), *DIRECTIONS[name])
            found[name].append(float(jnp.mean(_nats(model, params, ids, labels, indices, cut))))
    rise = {n: float(np.mean(found[n]) - np.mean(found["nothing cut"])) for n in DIRECTIONS}
    others = max(value for name, value in rise.items() if name != "masked to visible")
    ratio = rise["masked to visible"] / max(others, 1e-9)
    claim = results.at_least(
        "cutting masked-to-visible attention costs most: its rise of the loss over the largest of "
        "the other three",
        ratio,
        2.0,
    )
    figure = {
        "title": "Held-out loss with a direction of attention cut",
        "x_label": "share of visible tokens",
        "y_label": "nats a masked token",
        "series": [{"label": n, "x": list(_VISIBLE_SHARES), "y": v} for n, v in found.items()],
    }
    return {"visible": list(_VISIBLE_SHARES), "nats": found, "rise": rise}, figure, [claim]


@functools.partial(jax.jit, static_argnums=0)
def _features(config: ENATConfig, params: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
    """Last-layer features [B, N, d] of images as they stood before a step."""
    empty = jnp.zeros((len(ids), 0), jnp.int32)
    return enat.apply(config, params, ids, labels, Indices(empty, empty, empty)).features


def similarity(network: Network, tokens: TokenImages, config: ConfigDict) -> Found:
    """Cosine similarity of each token's features in consecutive steps, by what became of it.

    Args:
      network: uniform.
      tokens: not read; the steps are those of images drawn with `config.decode.sampler`.
      config: `config.probes.num_images` and `config.seed`.

    Returns:
      Mean similarity by step of tokens newly decoded between the two, their neighbours (4
      around, not new themselves), other visible and other masked ones; a figure; and the claim
      that it is lowest for the new ones.

    Raises:
      InputError: a disentangled network.
    """
    model, params = _uniform(network)
    count = config.probes.num_images
    sampler = SamplerConfig(**config.decode.sampler.to_dict())
    rows = jnp.arange(count)
    labels = rows % model.num_classes
    keys = randomness.row_keys(config.seed, rows)
    drawn = mask_predict.sample(model, sampler, params, keys, labels)
    before = jnp.full_like(drawn.trace[:1], model.mask_id)
    inputs = np.asarray(jnp.concatenate([before, drawn.trace])[:-1])
    features = [np.asarray(_features(model, params, ids, labels), np.float64) for ids in inputs]
    groups = ("newly decoded", "next to these", "other visible", "other masked")
    found: dict[str, list[float]] = {name: [] for name in groups}
    for step in range(len(inputs) - 1):
        was, now = (ids == model.mask_id for ids in inputs[step : step + 2])
        new = was & ~now
        near = _neighbours(new) & ~new
        members = (new, near, ~now & ~new & ~near, now & ~near)
        cosine = _cosine(*features[step : step + 2])
        for name, chosen in zip(groups, members, strict=True):
            found[name].append(float(cosine[chosen].mean()) if chosen.any() else float("nan"))
    means = {name: float(np.nanmean(values)) for name, values in found.items()}
    others = min(means[name] for name in groups[1:])
    claim = results.at_least(
        "features of newly decoded tokens change most: the least similarity of other tokens minus "
        "theirs",
        others - means["newly decoded"],
        0.0,
    )
    steps = list(range(1, len(inputs)))
    series = []
    for name, values in found.items():
        kept = [(x, y) for x, y in zip(steps, values, strict=True) if np.isfinite(y)]
        series.append({"label": name, "x": [x for x, _ in kept], "y": [y for _, y in kept]})
    figure = {
        "title": "Similarity of features in consecutive steps",
        "x_label": "step",
        "y_label": "cosine similarity",
        "series": series,
    }
    return {"means": means}, figure, [claim]


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[B, N] of [B, N, d] twice."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.sum(first * second, -1) / lengths


def _neighbours(chosen: np.ndarray) -> np.ndarray:
    """bool [B, N]: tokens above, below, left or right of the chosen ones on the square grid."""
    side = round(chosen.shape[1] ** 0.5)
    grid = np.pad(chosen.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)))
    near = grid[:, :-2, 1:-1] | grid[:, 2:, 1:-1] | grid[:, 1:-1, :-2] | grid[:, 1:-1, 2:]
    return near.reshape(chosen.shape)


def _uniform(network: Network) -> Network:
    if network[0].disentangled:
        raise InputError("config.baseline: the probes need a uniform network")
    return network


PROBES: dict[str, Callable[[Network, TokenImages, ConfigDict], Found]] = {
    "attention": attention,
    "similarity": similarity,
}
