"""Readers of words pre-trained and fine-tuned by recipe, kept by content hash.

    directory = ensure(Pretraining())
    classifier = ensure_classifier(directory, Task("section", ...), FineTuning())

The pieces (sub-words) of a recipe are trained on its own text; recipes of the same text share them.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from models import cross_attention_words as caw
from models import files, masked_words, spaced_words, word_pieces
from models.cross_attention_words import WordEncoderConfig
from models.errors import InputError
from models.masked_words import ReaderConfig
from models.subword_heads import HeadConfig
from models.word_pieces import WordPieces
from training import (
    artifacts,
    checkpoints,
    loop,
    metric_writers,
    text_classifier,
    word_masked_lm,
    word_rows,
)
from training.datasets import registry
from training.fitting import TrainConfig
from training.optimizers import OptimizerConfig
from training.word_masked_lm import Objective
from training.word_rows import RowShape

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
SUMMARY_FILE = "training_summary.json"
# Where positions are rotary.
_MAX_POSITION = 8192


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to pre-train on.

    Attributes:
      dataset: a name that `registry.load` knows.
      options: of its builder.
      train_split, eval_split: in tfds' notation.
      text_field: the feature with the text.
      data_dir: where a public dataset is prepared; None for tfds' default.
      group_by: a field whose examples of one value are joined, line by line, into documents of
        `group_size`; None for a document an example.
    """

    dataset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "validation"
    text_field: str = "text"
    data_dir: str | None = None
    group_by: str | None = None
    group_size: int = 16


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """How long a run is.

    Attributes:
      num_steps, batch_size: of rows.
      optimizer: see `OptimizerConfig`.
      eval_every, checkpoint_every: steps.
      compute_dtype, mesh, seed: see `fitting.TrainConfig`.
    """

    num_steps: int = 1_000_000
    batch_size: int = 256
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    eval_every: int = 1000
    checkpoint_every: int = 1000
    compute_dtype: str = "float32"
    mesh: tuple[int, int] = (1, 1)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Everything that determines a pre-trained reader; sizes are BERT-base's by default.

    Attributes:
      reads: 'words' (Byte2Word) or 'subwords' (BERT or GPT).
      corpora: text.
      vocab_size: V, of sub-words.
      layers, width, heads: of the backbone.
      positions: 'learned' as in BERT, or 'rope', with which causal models go beyond their rows.
      encoder: options of `WordEncoderConfig` beside the width of words; it has as many heads as the
        backbone unless others are given.
      head: 'parallel' or 'autoregressive', of Byte2Word.
      head_layers: of the latter.
      rows: see `RowShape`.
      objective: see `Objective`.
      run: see `RunSizes`.
      eval_rows: rows that are measured.
    """

    reads: str
    corpora: tuple[Corpus, ...]
    vocab_size: int = 30_522
    layers: int = 12
    width: int = 768
    heads: int = 12
    positions: Literal["rope", "learned"] = "learned"
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str = "parallel"
    head_layers: int = 1
    rows: RowShape = dataclasses.field(default_factory=RowShape)
    objective: Objective = dataclasses.field(default_factory=Objective)
    run: RunSizes = dataclasses.field(default_factory=RunSizes)
    eval_rows: int = 512


@dataclasses.dataclass(frozen=True)
class Task:
    """Labelled texts.

    Attributes:
      name: of the task.
      texts, labels: for each split.
      num_classes: labels are 0 .. num_classes - 1.
      rows: their shape.
    """

    name: str
    texts: Mapping[str, Sequence[str]]
    labels: Mapping[str, Sequence[int]]
    num_classes: int
    rows: RowShape


def ensure(chosen: Pretraining, *, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The directory of a pre-trained reader, which is trained first if it is not there yet.

    Returns:
      A directory with config.json, model.safetensors, word_pieces.json and training_summary.json.

    Raises:
      InputError: as `word_masked_lm.train` and `registry.load`.
      SystemExit: `training.loop.TERMINATED`, after SIGTERM.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    data = [_load(corpus, corpus.train_split, cache).full_name for corpus in chosen.corpora]
    identity = {
        "recipe": dataclasses.asdict(chosen),
        "data": data,
        "code_version": CODE_VERSION,
    }
    final = cache / "word_models" / f"{chosen.reads}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        pieces = ensure_pieces(chosen, cache)
        config = reader_config(chosen, pieces)
        documents = {
            split: word_rows.WordDocuments(_texts(chosen, split, cache), pieces, chosen.rows)
            for split in ("train", "eval")
        }
        trained = word_masked_lm.train(
            train_config(chosen.run, config, chosen.rows),
            chosen.objective,
            _reader(config, chosen.run),
            pieces.vocab_size,
            train_batches=word_rows.train_batches(
                documents["train"], batch_size=chosen.run.batch_size, seed=chosen.run.seed
            ),
            eval_batches=word_rows.eval_batches(
                documents["eval"], batch_size=chosen.run.batch_size, num_rows=chosen.eval_rows
            ),
            workdir=work / "run",
            identity=identity,
            description=f"{chosen.reads} ({chosen.objective.kind})",
        )
        masked_words.save(result, config, trained.state.params)
        pieces.save(result)
        _summarise(result, work / "run", trained, identity, counts=documents["eval"].counts())

    return artifacts.cached(final, make)


def ensure_classifier(
    pretrained: pathlib.Path,
    task: Task,
    run: RunSizes,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """The directory of a fine-tuned classifier; arguments, files and errors as `ensure`.

    Its parameters have no head that predicts sub-words: that is deleted before training begins.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    identity = {
        "pretrained": pretrained.name,
        "task": artifacts.digest(dataclasses.asdict(task)),  # its texts and labels
        "name": task.name,
        "run": dataclasses.asdict(run),
        "code_version": CODE_VERSION,
    }
    final = cache / "word_models" / f"{task.name}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        before, params = masked_words.load(pretrained)
        pieces = word_pieces.load(pretrained)
        config = dataclasses.replace(before, num_classes=task.num_classes)
        rows = {
            split: text_classifier.LabelledRows(
                task.texts[split], task.labels[split], pieces, task.rows
            )
            for split in ("train", "validation")
        }
        trained = text_classifier.train(
            train_config(run, config, task.rows),
            _reader(config, run),
            params,
            task.num_classes,
            train_batches=text_classifier.train_batches(
                rows["train"], batch_size=run.batch_size, seed=run.seed
            ),
            eval_batches=text_classifier.in_order(rows["validation"], run.batch_size),
            workdir=work / "run",
            identity=identity,
            description=f"{before.reads}: {task.name}",
        )
        masked_words.save(result, config, trained.state.params)
        pieces.save(result)
        _summarise(result, work / "run", trained, identity)

    return artifacts.cached(final, make)


def ensure_pieces(chosen: Pretraining, cache: pathlib.Path) -> WordPieces:
    """The sub-words of a recipe's training text, trained once."""
    identity = {
        "corpora": [dataclasses.asdict(corpus) for corpus in chosen.corpora],
        "data": [_load(corpus, corpus.train_split, cache).full_name for corpus in chosen.corpora],
        "vocab_size": chosen.vocab_size,
        "width": chosen.rows.width,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        texts = _texts(chosen, "train", cache)
        split = (spaced_words.split(text["text"], chosen.rows.width - 1) for text in texts)
        with checkpoints.disk_errors("cannot write the pieces", result):
            result.mkdir(parents=True)
            word_pieces.train(split, chosen.vocab_size).save(result)

    final = cache / "tokenizers" / f"word_pieces-{artifacts.digest(identity)}"
    return word_pieces.load(artifacts.cached(final, make))


def reader_config(chosen: Pretraining, pieces: WordPieces) -> ReaderConfig:
    """The architecture of a recipe."""
    words = chosen.reads == "words"
    length = chosen.rows.num_words if words else chosen.rows.num_tokens
    backbone = caw.bert_backbone(
        layers=chosen.layers,
        width=chosen.width,
        heads=chosen.heads,
        max_words=_MAX_POSITION if chosen.positions == "rope" else length,
        positions=chosen.positions,
        vocab_size=len(caw.SPECIALS) + (0 if words else pieces.vocab_size),
        causal=chosen.objective.kind == "causal",
    )
    try:
        options = {"num_heads": chosen.heads, **chosen.encoder}
        encoder = WordEncoderConfig(chosen.rows.width, **options)
    except TypeError as error:
        raise InputError(f"encoder: {error}") from None
    head = HeadConfig(
        pieces.vocab_size,
        chosen.width,
        kind=chosen.head,
        num_slots=chosen.rows.num_slots,
        num_layers=chosen.head_layers,
        num_heads=chosen.heads,
        eos_id=word_pieces.EOS_ID,
    )
    return ReaderConfig(chosen.reads, backbone, encoder, head)


def _reader(config: ReaderConfig, run: RunSizes) -> masked_words.Reader:
    """In the run's compute dtype."""
    backbone = config.backbone.replace(dtype=run.compute_dtype)
    return masked_words.reader(dataclasses.replace(config, backbone=backbone))


def train_config(run: RunSizes, config: ReaderConfig, rows: RowShape) -> TrainConfig:
    """The run of a reader over such rows."""
    length = rows.num_words if config.reads == "words" else rows.num_tokens
    return TrainConfig(
        model=config.backbone,
        optimizer=run.optimizer,
        num_steps=run.num_steps,
        batch_size=run.batch_size,
        sequence_length=length,
        compute_dtype=run.compute_dtype,
        mesh=run.mesh,
        log_every=min(50, run.num_steps),
        eval_every=run.eval_every,
        checkpoint_every=run.checkpoint_every,
        keep_checkpoints=1,
        seed=run.seed,
    )


def _load(corpus: Corpus, split: str, cache: pathlib.Path) -> registry.Examples:
    own = corpus.dataset in registry.BUILDERS
    return registry.load(
        corpus.dataset,
        split,
        data_dir=cache / "datasets" if own else corpus.data_dir,
        text_field=None if corpus.text_field == "text" else corpus.text_field,
        **dict(corpus.options),
    )


class _Joined(Sequence):
    """The documents of several corpora, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self._parts = parts
        self._places = [(part, i) for part in range(len(parts)) for i in range(len(parts[part]))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        part, place = self._places[index]
        return self._parts[part][place]


def _texts(chosen: Pretraining, split: str, cache: pathlib.Path) -> Sequence[Any]:
    """Documents of all corpora: dicts with 'text'."""
    parts: list[Sequence[Any]] = []
    for corpus in chosen.corpora:
        name = corpus.train_split if split == "train" else corpus.eval_split
        examples = _load(corpus, name, cache)
        parts.append(list(_grouped(examples, corpus)) if corpus.group_by else examples)
    return parts[0] if len(parts) == 1 else _Joined(parts)


def _grouped(examples: registry.Examples, corpus: Corpus) -> Iterator[dict[str, str]]:
    assert corpus.group_by is not None
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(example[corpus.group_by], []).append(example["text"])
    for texts in groups.values():
        for first in range(0, len(texts), corpus.group_size):
            yield {
                "text": "".join(f"{text}\n" for text in texts[first : first + corpus.group_size])
            }


def _summarise(
    result: pathlib.Path,
    run: pathlib.Path,
    trained: loop.Result,
    identity: Mapping[str, Any],
    **more: Any,
) -> None:
    lines = metric_writers.read_metrics(run / metric_writers.METRICS_FILE)
    summary = {
        **identity,
        **trained.metrics,
        **more,
        "seconds": trained.seconds,
        "curve": [line for line in lines if "loss" in line],
        "evaluations": [line for line in lines if "eval_loss" in line],
    }
    with checkpoints.disk_errors("cannot write the summary", result):
        checkpoints.write_json(result / SUMMARY_FILE, summary)


def summary(directory: pathlib.Path) -> dict[str, Any]:
    """What a directory records of its training."""
    found: dict[str, Any] = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    return found
