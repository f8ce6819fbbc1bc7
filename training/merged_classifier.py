"""Adapters and a head that classify merged text: trained at one granularity, or at any.

Feher et al., arXiv 2411.18553, section 2.3 of the sheet. The language model is frozen; a batch is
merged on the host, its embeddings are made on the fly, and low-rank adapters learn to read it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from decoding.dynamic_vocabulary import merged_input, merging
from decoding.dynamic_vocabulary.boundaries import Valid
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from decoding.dynamic_vocabulary.merged_input import Rows
from models import lora, sharding
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.lora import LoraConfig
from training import fitting, granularity, loop
from training.fitting import TrainConfig
from training.granularity import Granularity
from training.passages import Passage

POOLING = ("mean", "first", "last")
Encode = Callable[[str], list[str]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, beside the run's `TrainConfig`.

    Attributes:
      classes: of the passages.
      lora: the adapters.
      granularity: how batches are merged in training.
      pooling: what of the last layer the head reads: 'first' (encoders as published), 'last'
        (decoders) or the 'mean'.
      side: where rows are padded.
      capacity: of the cache of embeddings (published: 10,000).
    """

    classes: int
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    granularity: Granularity = dataclasses.field(default_factory=Granularity)
    pooling: str = "mean"
    side: str = "right"
    capacity: int = 10_000

    def __post_init__(self) -> None:
        check_choice("task.pooling", self.pooling, POOLING)
        check_choice("task.side", self.side, merged_input.SIDES)
        if self.classes < 2:
            raise InputError(f"task.classes: {self.classes} must be at least 2")


class Reader:
    """Passages as the model takes them: tokenised, merged, embedded.

    Attributes:
      cache: where embeddings come from.
    """

    def __init__(
        self, encode: Encode, valid: Valid, cache: EmbeddingCache, *, length: int, side: str
    ):
        """Takes the parts.

        Args:
          encode: text -> token strings.
          valid: see `merging.merge`.
          cache: where embeddings come from.
          length: tokens of a row; longer ones are cut before they are merged.
          side: where rows are padded.
        """
        self.cache = cache
        self._encode, self._valid = functools.cache(lambda text: tuple(encode(text))), valid
        self._length, self._side = length, side

    def tokens(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """Token strings before merging."""
        return [self._encode(text)[: self._length] for text in texts]

    def __call__(self, texts: Sequence[str], merges: int) -> tuple[jnp.ndarray, Rows, int]:
        """Embeddings [B, T, D] of a batch after so many merges, its rows, and its tokens in all."""
        merged = merging.merge(self.tokens(texts), merges, self._valid)
        slots = self.cache.slots(merged.tokens)
        rows = merged_input.pad(slots, side=self._side, multiple=self._length)
        return self.cache.table[rows.slots], rows, merged.lengths[-1]


def init(task: Task, model: TransformerConfig, base: Any, key: jax.Array) -> dict[str, Any]:
    """What is trained: adapters that change nothing and a head of zeros."""
    head = {
        "kernel": jnp.zeros((model.embed_dim, task.classes)),
        "bias": jnp.zeros((task.classes,)),
    }
    return {"adapters": lora.init(task.lora, base, key), "head": head}


def logits(
    task: Task,
    model: TransformerConfig,
    base: Any,
    trained: Any,
    embeddings: jnp.ndarray,
    rows: Rows,
    key: jax.Array | None = None,
) -> jnp.ndarray:
    """Of the classes, float32 [B, classes]; `key` is of the adapters' dropout."""
    params = lora.merge(task.lora, base, trained["adapters"], key)
    hidden = merged_input.run(model, params, embeddings, rows, logits=False).hidden
    hidden, valid = hidden.astype(jnp.float32), rows.valid[..., None]
    if task.pooling == "mean":
        pooled = jnp.where(valid, hidden, 0).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)
    else:
        place = rows.last if task.pooling == "last" else rows.valid.argmax(axis=1)
        pooled = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return pooled @ trained["head"]["kernel"] + trained["head"]["bias"]


_predict = jax.jit(logits, static_argnums=(0, 1))


def batches(
    passages: Sequence[Passage], budgets: Sequence[Sequence[int]], task: Task, config: TrainConfig
) -> loop.Batches:
    """Endless batches of texts and labels, each with the number of its merges.

    The order and the draws depend on `config.seed` and the batch's number alone, so that a run
    that was killed goes on with the same.
    """

    def with_merges(number: int, batch: Sequence[Passage]) -> dict[str, Any]:
        rng = np.random.default_rng((config.seed, 1, number))
        return {
            "texts": [passage.text for passage in batch],
            "labels": np.array([passage.label for passage in batch], np.int32),
            "merges": granularity.draw(budgets, task.granularity, rng),
        }

    rows = grain.MapDataset.source(list(passages)).shuffle(seed=config.seed).repeat()
    dataset = rows.batch(config.batch_size, batch_fn=list).map_with_index(with_merges)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def train(
    config: TrainConfig,
    task: Task,
    base: Any,
    reader: Reader,
    passages: Sequence[Passage],
    budgets: Sequence[Sequence[int]],
    *,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "adapters",
) -> loop.Result:
    """Trains adapters and head, or goes on where `workdir` left off.

    Args:
      config: `model` is the frozen language model's; `sequence_length` is the reader's.
      task: see `Task`.
      base: the language model's parameters.
      reader: merges and embeds.
      passages: to learn from.
      budgets: see `granularity.bins_of`; not read where the granularity is fixed.
      workdir: see `fitting.fit`.
      identity: what identifies data, model and provider, as JSON can hold it.
      description: in front of the progress bar.

    Raises:
      InputError: as `fitting.fit`; fewer passages than rows of a batch.
    """
    if len(passages) < config.batch_size:
        raise InputError(
            f"passages: {len(passages)} are fewer than the {config.batch_size} rows of a batch"
        )
    mesh = sharding.make_mesh(*config.mesh)

    def prepare(_: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        embeddings, rows, _ = reader(batch["texts"], batch["merges"])
        placed = {"embeddings": embeddings, "rows": rows, "labels": batch["labels"]}
        return jax.device_put(placed, sharding.batch_sharding(mesh))

    def loss_fn(
        trained: Any, batch: Any, step: jax.Array, frozen: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        key = fitting.step_key(config, step)
        model = fitting.compute_config(config)
        found = logits(task, model, frozen, trained, batch["embeddings"], batch["rows"], key)
        nats = optax.softmax_cross_entropy_with_integer_labels(found, batch["labels"])
        right = (found.argmax(axis=-1) == batch["labels"]).mean()
        return nats.mean(), {"accuracy": right}

    recorded = {"task": dataclasses.asdict(task), "identity": identity}
    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss_fn),
        prepare=prepare,
        train_batches=batches(passages, budgets, task, config),
        evaluate=None,
        workdir=workdir,
        recorded=recorded,
        mesh=mesh,
        initial_params=init(task, config.model, base, jax.random.key(config.seed)),
        frozen=base,
        description=description,
    )


@dataclasses.dataclass(frozen=True)
class Score:
    """One point of a curve.

    Attributes:
      merges: of each batch.
      length: mean tokens a row.
      accuracy: share of passages whose class is right.
      nats: mean cross-entropy.
    """

    merges: int
    length: float
    accuracy: float
    nats: float


def evaluate(
    config: TrainConfig,
    task: Task,
    base: Any,
    trained: Any,
    make_reader: Callable[[], Reader],
    passages: Sequence[Passage],
    merges: Sequence[int],
) -> list[Score]:
    """Accuracy over granularity; the cache begins empty at each (section 2.3).

    Passages beyond a whole number of batches are left out.
    """

    # The same program whatever the adapters were trained at.
    plain = dataclasses.replace(task, granularity=Granularity())
    model = fitting.compute_config(config)
    B, scores = config.batch_size, []
    for budget in merges:
        reader, tokens, right, nats, count = make_reader(), 0, 0, 0.0, 0
        for start in range(0, len(passages) - B + 1, B):
            part = passages[start : start + B]
            embeddings, rows, total = reader([passage.text for passage in part], budget)
            found = np.asarray(_predict(plain, model, base, trained, embeddings, rows), np.float64)
            labels = np.array([passage.label for passage in part])
            log_p = found - np.log(np.exp(found).sum(axis=1, keepdims=True))
            nats -= log_p[np.arange(B), labels].sum()
            right += int((found.argmax(axis=1) == labels).sum())
            tokens, count = tokens + total, count + B
        scores.append(Score(budget, tokens / count, right / count, float(nats / count)))
    return scores
