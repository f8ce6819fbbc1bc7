"""Pre-training on rows of words: hidden words from their context, or the next word (Byte2Word).

Masked: BERT's objective (arXiv 1810.04805, section 3.1) on whole words, next sentences left out.
Causal: every word from those before. Both go for any `models.masked_words.Reader`: a model of words
and, as the baseline, one of sub-words, on the same rows and the same hidden words.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models import cross_attention_words as caw
from models import sharding
from models.errors import InputError, check_choice
from models.masked_words import Batch, Corruption, Reader, Scores
from training import data_parallel, fitting, loop, losses
from training.fitting import TrainConfig

KINDS = ("masked", "causal")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is predicted.

    Attributes:
      kind: 'masked' or 'causal'.
      mask_rate: share of a row's words that are chosen; at least one.
      mask_share, random_share: of the chosen words, those that become [MASK] and another word of
        the batch; the rest stays.
    """

    kind: str = "masked"
    mask_rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1

    def __post_init__(self) -> None:
        check_choice("objective.kind", self.kind, KINDS)
        for name in ("mask_rate", "mask_share", "random_share"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise InputError(f"objective.{name}: {value} must be between 0 and 1")
        if self.mask_share + self.random_share > 1:
            raise InputError("objective.mask_share, random_share: their sum must be at most 1")


def corrupt(
    objective: Objective, key: jax.Array, batch: Batch, vocab_size: int
) -> tuple[jax.Array, jax.Array, Corruption]:
    """Chooses words and what they become.

    Args:
      objective: of the kind 'masked'.
      key: of this batch.
      batch: rows of `training.word_rows`.
      vocab_size: V, of sub-words.

    Returns:
      Places int32 [B, K], K of them whatever the rows' lengths; bool [B, K], which are chosen; and
      the corruption.
    """
    real = batch["special"] == caw.WORD
    B, N = real.shape
    K = max(1, round(objective.mask_rate * N))
    choice, fate, order, noise = jax.random.split(key, 4)
    wanted = jnp.maximum(jnp.round(objective.mask_rate * real.sum(axis=1)), 1).astype(jnp.int32)
    rank, places = jax.lax.top_k(jnp.where(real, jax.random.uniform(choice, (B, N)), -1.0), K)
    chosen = (jnp.arange(K) < wanted[:, None]) & (rank >= 0)
    draw = jax.random.uniform(fate, (B, K))
    masked = chosen & (draw < objective.mask_share)
    replaced = chosen & ~masked & (draw < objective.mask_share + objective.random_share)
    # Words of the batch in random order, the real ones first.
    mixed = jnp.argsort(jnp.where(real.reshape(-1), jax.random.uniform(order, (B * N,)), 2.0))
    taken = mixed[jnp.arange(B * K) % jnp.maximum(real.sum(), 1)].reshape(B, K)

    def at_words(values: jax.Array) -> jax.Array:
        empty = jnp.zeros((B, N), values.dtype)
        return jax.vmap(lambda row, at, new: row.at[at].set(new))(empty, places, values)

    random_pieces = jax.random.randint(noise, batch["tokens"].shape, 1, vocab_size)
    corruption = Corruption(at_words(masked), at_words(replaced), at_words(taken), random_pieces)
    return places, chosen, corruption


def scores(
    objective: Objective,
    reader: Reader,
    params: Any,
    batch: Batch,
    key: jax.Array,
    vocab_size: int,
) -> tuple[Scores, jax.Array, jax.Array]:
    """Predictions of an objective's words: `Scores`, their places [B, K], which count [B, K]."""
    if objective.kind == "masked":
        places, chosen, corruption = corrupt(objective, key, batch, vocab_size)
        return reader.predict(params, batch, corruption, places), places, chosen
    B, N = batch["special"].shape
    places = jnp.broadcast_to(jnp.arange(1, N), (B, N - 1))
    chosen = batch["counts"][:, 1:] > 0
    return reader.predict(params, batch, None, places), places, chosen


def train(
    config: TrainConfig,
    objective: Objective,
    reader: Reader,
    vocab_size: int,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Mapping[str, np.ndarray]] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "words",
) -> loop.Result:
    """Pre-trains a reader, or goes on where `workdir` left off.

    Args:
      config: of the run; `model` is the reader's backbone.
      objective: see `Objective`.
      reader: of `models.masked_words`.
      vocab_size: V, of sub-words.
      train_batches: from `word_rows.train_batches`.
      eval_batches: from `word_rows.eval_batches`; the same words are hidden at each evaluation.
      workdir, identity, description: as in `language_model.train`.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` as `evaluator`.

    Raises:
      InputError, SystemExit: as `fitting.fit`; a backbone that is not causal for the causal
        objective, or is for the other.
    """
    if config.model.causal != (objective.kind == "causal"):
        raise InputError(
            f"model.causal: {config.model.causal} is not for the {objective.kind} objective"
        )
    mesh = sharding.make_mesh(*config.mesh)
    return fitting.fit(
        config,
        functools.partial(
            fitting.update,
            config,
            functools.partial(loss_fn, config, objective, reader, vocab_size),
        ),
        prepare=lambda _, batch: data_parallel.put(batch, mesh),
        train_batches=train_batches,
        evaluate=(
            evaluator(objective, reader, vocab_size, eval_batches, mesh)
            if eval_batches is not None
            else None
        ),
        workdir=workdir,
        recorded={"objective": dataclasses.asdict(objective), "identity": identity},
        mesh=mesh,
        initial_params=jax.jit(reader.init)(jax.random.key(config.seed)),
        description=description,
    )


def loss_fn(
    config: TrainConfig,
    objective: Objective,
    reader: Reader,
    vocab_size: int,
    params: Any,
    batch: Batch,
    step: jax.Array,
    _: Any,
) -> tuple[jax.Array, loop.Metrics]:
    """Mean nats over the slots of the chosen words."""
    key = fitting.step_key(config, step)
    found, _, chosen = scores(objective, reader, params, batch, key, vocab_size)
    counted = found.counted & chosen[..., None]
    return losses.masked_mean(-found.log_probs, counted), {}


def evaluator(
    objective: Objective,
    reader: Reader,
    vocab_size: int,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> Callable[[fitting.TrainState], dict[str, float]]:
    """A function of the state, on the words that fit their slots whole.

    Metrics: `eval_loss`, nats a word; `eval_bits_per_byte`, over the words' bytes with their flags;
    `eval_exact_match`, words that greedy reading gets whole, and `eval_exact_match_several`, those
    of several pieces among them; `eval_several`, the share of these.
    """
    held = [data_parallel.put(batch, mesh) for batch in batches]
    if not held:
        raise InputError("eval_batches: there are none")

    @jax.jit
    def sums(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        found, places, chosen = scores(objective, reader, params, batch, key, vocab_size)
        counts, lengths = (
            jnp.take_along_axis(batch[name], places, axis=1) for name in ("counts", "lengths")
        )
        whole = chosen & (counts <= found.counted.shape[-1])
        right = found.right.all(axis=-1) & whole
        several = whole & (counts > 1)
        nats = jnp.where(whole[..., None], -found.log_probs, 0.0)
        totals = (
            nats, whole, jnp.where(whole, lengths, 0), right, several, right & several,
        )  # fmt: skip
        return jnp.stack([jnp.sum(total).astype(jnp.float32) for total in totals])

    def evaluate(state: fitting.TrainState) -> dict[str, float]:
        parts = [
            sums(state.params, batch, jax.random.key(number)) for number, batch in enumerate(held)
        ]
        totals = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
        nats, words, size, right, several, right_several = totals
        if not words or not size:
            raise InputError("eval_batches: no word of theirs counts")
        return {
            "eval_loss": float(nats / words),
            "eval_bits_per_byte": losses.bits_per_byte(float(nats), float(size)),
            "eval_exact_match": float(right / words),
            "eval_exact_match_several": float(right_several / max(several, 1)),
            "eval_several": float(several / words),
        }

    return evaluate
