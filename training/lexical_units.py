"""Training for Lexical Unit Decoding (LUD, arXiv 2405.15208): units, and predicting them at once.

A *unit* is a run of tokens that the model as it was is sure of, one after another, in the data's
own text. The model goes on learning the text as before and, besides, to say a unit's tokens from
placeholders behind the token before it. Placeholders also stand behind random places, so that the
model knows when it is not sure. The paper's code is not public; what it does not say is an option
here.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models import masks, sharding, transformer
from models.errors import InputError
from training import branches, fitting, language_model, loop, losses
from training.fine_tuned import Tuning
from training.fitting import Batch, DeviceBatch, TrainConfig


@dataclasses.dataclass(frozen=True)
class Units:
    """What units are and how they are learned.

    Attributes:
      window: k, tokens of the longest unit, and tokens predicted a call.
      confidence: alpha; a token of a unit had at least this probability.
      pad_id: the placeholder.
      branches: places a row that placeholders are put behind, drawn anew at every step.
      at_units: share of them that stand before a unit; the others are anywhere.
      weight: of what placeholders say, beside the text's own loss.
      likeliest: a token of a unit was also the likeliest one.
      headed: a unit begins with the token before the run, sure or not: a call always takes its
        first token.
    """

    window: int = 5
    confidence: float = 0.9
    pad_id: int = 0
    branches: int = 16
    at_units: float = 0.5
    weight: float = 1.0
    likeliest: bool = False
    headed: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InputError(f"units.window: {self.window} must be at least 2")
        if self.branches < 1:
            raise InputError(f"units.branches: {self.branches} must be at least 1")
        if not 0 < self.confidence <= 1:
            raise InputError(f"units.confidence: {self.confidence} must be above 0, at most 1")
        if not 0 <= self.at_units <= 1:
            raise InputError(f"units.at_units: {self.at_units} must be between 0 and 1")
        if self.weight < 0:
            raise InputError(f"units.weight: {self.weight} must be at least 0")


def train(
    config: TrainConfig,
    units: Units,
    *,
    initial_params: Any,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "lexical units",
) -> loop.Result:
    """Goes on training a model, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`.
      units: see `Units`.
      initial_params: M0, the model to go on from; units are those of its confidence throughout.
      train_batches, eval_batches, workdir, identity, description: as `language_model.train`.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss`, and of its two
      parts `eval_text_loss` and `eval_branch_loss`, nats a token.

    Raises:
      InputError, SystemExit: as `language_model.train`.
    """
    if not config.model.causal:
        raise InputError("model.causal: False is not for this pipeline, which is left to right")
    if not 0 <= units.pad_id < config.model.vocab_size:
        raise InputError(
            f"units.pad_id: {units.pad_id} is out of range; allowed: 0 to "
            f"{config.model.vocab_size - 1}"
        )
    mesh = sharding.make_mesh(*config.mesh)
    frozen = jax.device_put(initial_params, sharding.param_shardings(config.model, mesh))
    loss = functools.partial(loss_fn, config, units)
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss),
        prepare=lambda _, batch: language_model.put(batch, config, mesh),
        train_batches=train_batches,
        evaluate=language_model.mean_evaluator(config, loss, eval_batches, mesh, frozen)
        if eval_batches is not None
        else None,
        workdir=workdir,
        recorded={"units": dataclasses.asdict(units), "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        frozen=frozen,
        description=description,
    )


def confident_tokens(
    logits: jnp.ndarray, batch: DeviceBatch, confidence: float, likeliest: bool = False
) -> jnp.ndarray:
    """Tokens that a model was sure of: bool [B, T].

    Args:
      logits: [B, T, V], of the model on the batch.
      batch: see `language_model.train`; tokens of its `loss_mask` alone can be sure.
      confidence: least p(x_t | x_<t).
      likeliest: x_t must also be the likeliest token.
    """
    segments, targets = batch["segment_ids"], batch["targets"]
    # p(x_t | x_<t) stands with token t - 1, whose target it is.
    sure = jnp.exp(-losses.cross_entropy(logits, targets)) >= confidence
    if likeliest:
        sure &= logits.argmax(axis=-1) == targets
    sure &= batch["loss_mask"] > 0
    confident = jnp.roll(sure, 1, axis=1).at[:, 0].set(False)
    return confident & (segments == jnp.roll(segments, 1, axis=1))


def unit_lengths(confident: jnp.ndarray, window: int, headed: bool = False) -> jnp.ndarray:
    """For each token the length of the unit that begins with it, 0 where none does.

    Args:
      confident: bool [B, T].
      window: longest unit; longer runs are cut into pieces of so many.
      headed: see `Units`.

    Returns:
      int32 [B, T]; units of one token are no units.
    """
    if headed:
        return _headed_lengths(confident, window)
    T = confident.shape[1]
    index = jnp.arange(T)
    # Where the run that a token is in begins: behind the last token that is not confident.
    broken = jax.lax.cummax(jnp.where(confident, -1, index), axis=1)
    number = index - broken - 1  # place in its run
    later = jnp.where(confident, T, index)
    end = jax.lax.cummin(later, axis=1, reverse=True)  # first token after the run
    length = jnp.minimum(end - index, window)
    begins = confident & (number % window == 0) & (length >= 2)
    return jnp.where(begins, length, 0).astype(jnp.int32)


def _headed_lengths(confident: jnp.ndarray, window: int) -> jnp.ndarray:
    """Each run counted from the token before it, which is not sure itself."""
    T = confident.shape[1]
    index = jnp.arange(T)
    head = jax.lax.cummax(jnp.where(confident, -1, index), axis=1)  # itself, where not sure
    number = index - head
    later = jnp.where(confident, T, index)
    # First token after the run: of a head, the first unsure one behind it.
    after = jnp.concatenate([later[:, 1:], jnp.full_like(later[:, :1], T)], axis=1)
    end = jax.lax.cummin(after, axis=1, reverse=True)
    length = jnp.minimum(end - index, window)
    begins = (number % window == 0) & (head >= 0) & (length >= 2)
    return jnp.where(begins, length, 0).astype(jnp.int32)


def places(
    lengths: jnp.ndarray, usable: jnp.ndarray, units: Units, key: jax.Array
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Where branches stand, and how many of their placeholders count.

    Args:
      lengths: int [B, T], of `unit_lengths`.
      usable: bool [B, T], tokens that a branch may stand behind.
      units: see `Units`.
      key: of the draw.

    Returns:
      int32 [B, C], the token before each branch; and int32 [B, C], placeholders that count: those
      of its unit, or all of them at a random place. Where there are too few units, or too few
      places, none count.
    """
    B, T = lengths.shape
    before = (jnp.roll(lengths, -1, axis=1) > 0).at[:, -1].set(False) & usable
    at_units = round(units.branches * units.at_units)
    unit_key, other_key = jax.random.split(key)

    def choose(key: jax.Array, among: jnp.ndarray, count: int) -> tuple[jnp.ndarray, jnp.ndarray]:
        score = jnp.where(among, jax.random.uniform(key, (B, T)), -1.0)
        best, chosen = jax.lax.top_k(score, min(count, T))
        return chosen, best >= 0

    cut, there = choose(unit_key, before, at_units)
    other, possible = choose(other_key, usable, units.branches - at_units)
    unit = jnp.take_along_axis(lengths, jnp.minimum(cut + 1, T - 1), axis=1)
    counts = jnp.concatenate(
        [jnp.where(there, unit - 1, 0), jnp.where(possible, units.window - 1, 0)], axis=1
    )
    return jnp.concatenate([cut, other], axis=1), counts


def loss_fn(
    config: TrainConfig,
    units: Units,
    params: Any,
    batch: DeviceBatch,
    step: jax.Array,
    frozen: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """The text's own loss, and that of placeholders: both means over what counts, in nats."""
    model = fitting.compute_config(config)
    segments, targets, mask = batch["segment_ids"], batch["targets"], batch["loss_mask"]
    T, n = segments.shape[1], units.window - 1
    old = transformer.apply(
        model,
        jax.lax.stop_gradient(frozen),
        batch["tokens"],
        positions=batch["positions"],
        mask=masks.packed_causal(segments),
    ).logits
    assert old is not None
    confident = confident_tokens(old, batch, units.confidence, units.likeliest)
    cut, counts = places(
        unit_lengths(confident, units.window, units.headed),
        mask > 0,
        units,
        fitting.step_key(config, step),
    )

    pad = transformer.token_embeddings(model, params, jnp.array([units.pad_id]))
    text, branch = branches.hidden(
        model, params, batch, cut, jnp.broadcast_to(pad, (n, pad.shape[-1]))
    )
    by_text = losses.masked_mean(
        losses.cross_entropy(transformer.unembed(model, params, text), targets), mask
    )
    # Placeholder j of n stands at cut + j and says the target of that place.
    at = cut[..., None] + jnp.arange(1, n + 1)
    inside = at < T
    at = jnp.minimum(at, T - 1)

    def there(table: jnp.ndarray) -> jnp.ndarray:
        return jax.vmap(lambda row, where: row[where])(table, at)

    same = there(segments) == jnp.take_along_axis(segments, cut, axis=1)[..., None]
    counted = there(mask) * inside * same * (jnp.arange(n) < counts[..., None])
    nats = losses.cross_entropy(transformer.unembed(model, params, branch), there(targets))
    by_branch = losses.masked_mean(nats, counted)
    metrics = {"text_loss": by_text, "branch_loss": by_branch}
    return by_text + units.weight * by_branch, metrics


def tuning(units: Units) -> Tuning:
    """For `fine_tuned.ensure`."""
    return Tuning(
        "lexical_units",
        dataclasses.asdict(units),
        lambda config, **run: train(config, units, **run),
    )
