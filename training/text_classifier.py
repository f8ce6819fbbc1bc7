"""Fine-tuning on labelled texts: a pre-trained reader without its head, and a linear layer.

Devlin et al., BERT (arXiv 1810.04805, section 3.5): the state of [CLS] and one matrix; all
parameters learn. What predicted sub-words is deleted before, so that a model of words reads without
any vocabulary.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models import sharding
from models.errors import InputError
from models.masked_words import Batch, Reader
from models.word_pieces import WordPieces
from training import data_parallel, fitting, loop, losses, word_rows
from training.fitting import TrainConfig
from training.word_rows import RowShape


class LabelledRows(Sequence):
    """A random-access source of rows with `labels` int32 []: the first row of each text.

    Args:
      texts, labels: as many of one as of the other.
      pieces, shape: see `word_rows.rows_of`.
    """

    def __init__(
        self, texts: Sequence[str], labels: Sequence[int], pieces: WordPieces, shape: RowShape
    ):
        if len(texts) != len(labels) or not len(texts):
            raise InputError(f"labels: {len(labels)} for {len(texts)} texts")
        self._texts, self._labels = texts, labels
        self._pieces, self._shape = pieces, shape

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        text = word_rows.words_of(self._texts[index], self._pieces, self._shape)
        row = word_rows.rows_of(text, self._pieces, self._shape)[0]
        return {**row, "labels": np.int32(self._labels[index])}


def train_batches(rows: LabelledRows, *, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches, whose position can be saved and restored."""
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    source = grain.MapDataset.source(rows).shuffle(seed=seed).repeat(None)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(source.to_iter_dataset(read).batch(batch_size, drop_remainder=True))


def in_order(rows: LabelledRows, batch_size: int) -> list[word_rows.Batch]:
    """All rows once; the last batch is filled up with rows of label -1, which no one counts."""
    made = [rows[i] for i in range(len(rows))]
    filler = {**made[0], "labels": np.int32(-1)}
    made += [filler] * (-len(made) % batch_size)
    return word_rows.in_batches(made, batch_size)


def without_head(params: Mapping[str, Any]) -> dict[str, Any]:
    """Pre-trained parameters but for what predicts sub-words."""
    return {name: value for name, value in params.items() if name != "head"}


def logits(reader: Reader, params: Any, batch: Batch) -> jax.Array:
    """Float32 [B, classes] from `params` with a 'classifier'."""
    layer = params["classifier"]
    return reader.summary(params, batch).astype(jnp.float32) @ layer["kernel"] + layer["bias"]


def train(
    config: TrainConfig,
    reader: Reader,
    pretrained: Mapping[str, Any],
    num_classes: int,
    *,
    train_batches: loop.Batches,
    eval_batches: Iterable[Mapping[str, np.ndarray]] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "classifier",
) -> loop.Result:
    """Fine-tunes a classifier, or goes on where `workdir` left off.

    Args:
      config: of the run; `model` is the reader's backbone.
      reader: of the pre-trained model.
      pretrained: its parameters; a head is left out.
      num_classes: labels are 0 .. num_classes - 1.
      train_batches: from `train_batches`.
      eval_batches: from `in_order`; None for no evaluation.
      workdir, identity, description: as in `language_model.train`.

    Returns:
      The final `TrainState` in `Result.state`, its parameters with a 'classifier'; `Result.metrics`
      has `eval_loss` (nats a text) and `eval_accuracy`.

    Raises:
      InputError, SystemExit: as `fitting.fit`.
    """
    mesh = sharding.make_mesh(*config.mesh)
    width = config.model.embed_dim
    layer = {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}

    def loss_fn(params: Any, batch: Batch, *_: Any) -> tuple[jax.Array, loop.Metrics]:
        nats = losses.cross_entropy(logits(reader, params, batch), batch["labels"])
        return jnp.mean(nats), {}

    return fitting.fit(
        config,
        functools.partial(fitting.update, config, loss_fn),
        prepare=lambda _, batch: data_parallel.put(batch, mesh),
        train_batches=train_batches,
        evaluate=evaluator(reader, eval_batches, mesh) if eval_batches is not None else None,
        workdir=workdir,
        recorded={"num_classes": num_classes, "identity": identity},
        mesh=mesh,
        initial_params={**without_head(pretrained), "classifier": layer},
        description=description,
    )


def evaluator(
    reader: Reader, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Callable[[fitting.TrainState], dict[str, float]]:
    """A function of the state: `eval_loss` and `eval_accuracy`."""
    held = [data_parallel.put(batch, mesh) for batch in batches]
    if not held:
        raise InputError("eval_batches: there are none")

    @jax.jit
    def measure(params: Any, batch: Batch) -> jax.Array:
        found, labels = logits(reader, params, batch), batch["labels"]
        real = labels >= 0
        nats = jnp.where(real, losses.cross_entropy(found, labels), 0.0)
        right = (found.argmax(axis=-1) == labels) & real
        return jnp.stack(
            [nats.sum(), right.sum().astype(jnp.float32), real.sum().astype(jnp.float32)]
        )

    def evaluate(state: fitting.TrainState) -> dict[str, float]:
        parts = jax.device_get([measure(state.params, batch) for batch in held])
        nats, right, total = np.sum(np.array(parts, np.float64), axis=0)
        return {"eval_loss": float(nats / total), "eval_accuracy": float(right / total)}

    return evaluate
