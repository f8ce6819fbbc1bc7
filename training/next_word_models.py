"""Models of the next word, pooled or flat, over any units: trained by recipe, kept by content hash.

    directory = ensure(Recipe(Text("stdlib_docstrings"), "byte", sizes=Sizes(num_prefix=4)))

Models of one text are measured on the same words: a row of a pooled model holds so many words, one
of a flat model as many units as these words have on average.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models import files, hierarchical, parameter_files, transformer, word_pooling, word_units
from models.config import RopeConfig, TransformerConfig
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from models.word_pooling import Sizes
from models.word_units import NormalForm, WordUnits
from training import (
    artifacts,
    batches,
    checkpoints,
    language_model,
    loop,
    metric_writers,
    unit_vocabularies,
    word_batches,
    word_language_model,
)
from training.datasets import registry
from training.fitting import TrainConfig
from training.optimizers import OptimizerConfig

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
SUMMARY_FILE = "training_summary.json"
FLAT_KIND = "flat_words"

# A schedule is set up in the authors' code, but its body is commented out.
_PUBLISHED_OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, final_fraction=1.0)


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents to train and to measure on; splits hold different documents.

    Attributes:
      dataset: a name that `registry.load` knows.
      options: of its builder.
      train_split, eval_split: in tfds' notation.
      text_field: the feature with the text.
      data_dir: where a public dataset is prepared; None for tfds' default.
      form: how it becomes words.
    """

    dataset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "validation"
    text_field: str = "text"
    data_dir: str | None = None
    form: NormalForm = dataclasses.field(default_factory=NormalForm)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines a model; sizes and training are the published ones by default.

    Attributes:
      text: what it learns from.
      units: of `models.word_units.KINDS`.
      vocab_size: units at most, see `unit_vocabularies.train`.
      sizes: see `word_pooling.Sizes`; `num_prefix` 0 makes a flat model.
      context_words: N, words of a row.
      context_units: units of a flat model's row; None for what N words have on average.
      num_steps, batch_size, eval_rows: of rows.
      optimizer: see `OptimizerConfig`.
      eval_every: steps between evaluations, and between checkpoints.
      compute_dtype, mesh, seed: see `fitting.TrainConfig`.
    """

    text: Text
    units: str = "byte"
    vocab_size: int = 50_257
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    context_words: int = 192
    context_units: int | None = None
    num_steps: int = 100_000
    batch_size: int = 2
    eval_rows: int = 256
    optimizer: OptimizerConfig = _PUBLISHED_OPTIMIZER
    eval_every: int = 1000
    compute_dtype: str = "float32"
    mesh: tuple[int, int] = (1, 1)
    seed: int = 0


def documents(text: Text, split: str, cache: pathlib.Path) -> Sequence[Mapping[str, str]]:
    """The documents of 'train' or 'eval' in normal form, a space after each word: dicts of `text`.

    Raises:
      InputError: as `registry.load`; no words at all.
    """
    examples = _load(text, split, cache)
    found = [text.form.split(example["text"]) for example in examples]
    spaced = [{"text": " ".join(words) + " "} for words in found if words]
    if not spaced:
        raise InputError(f"text: the {split} split of {text.dataset!r} has no words")
    return spaced


def ensure(chosen: Recipe, *, cache_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The directory of a model, which is trained first if it is not there yet.

    Returns:
      A directory with config.json, model.safetensors, word_units.json and training_summary.json.
      `experiments.generate` decodes the pooled ones.

    Raises:
      InputError: as `registry.load`, `word_pooling.pooled`, and the pipelines.
      SystemExit: `training.loop.TERMINATED`, after SIGTERM.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    identity = {
        "recipe": dataclasses.asdict(chosen),
        "optimizer": type(chosen.optimizer).__name__,
        "data": _load(chosen.text, "train", cache).full_name,
        "code_version": CODE_VERSION,
    }
    kind = f"p{chosen.sizes.num_prefix}" if chosen.sizes.num_prefix else "flat"
    final = cache / "next_word_models" / f"{chosen.units}-{kind}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        texts = {split: documents(chosen.text, split, cache) for split in ("train", "eval")}
        run = {"workdir": work / "run", "identity": identity, "description": final.name}
        config, units, trained = train(chosen, texts, **run)
        save(result, config, trained.state.params, units)
        lines = metric_writers.read_metrics(work / "run" / metric_writers.METRICS_FILE)
        summary = {
            **identity,
            **trained.metrics,
            "num_params": config.num_params(),
            "seconds": trained.seconds,
            "curve": [line for line in lines if "loss" in line],
            "evaluations": [line for line in lines if "eval_loss" in line],
        }
        with checkpoints.disk_errors("cannot write the summary", result):
            checkpoints.write_json(result / SUMMARY_FILE, summary)

    return artifacts.cached(final, make)


Texts = Mapping[str, Sequence[Mapping[str, str]]]


def train(
    chosen: Recipe, texts: Texts, **run: Any
) -> tuple[HierarchicalConfig | TransformerConfig, WordUnits, loop.Result]:
    """Makes the units of a recipe and trains its model.

    Args:
      chosen: see `Recipe`; its text is given apart.
      texts: documents in normal form to learn from ('train') and to measure on ('eval').
      **run: `workdir`, `identity` and `description` of the pipelines.

    Returns:
      The architecture, the units, and the final state in `Result.state`.
    """
    form = chosen.text.form
    training = (document["text"] for document in texts["train"])
    units = unit_vocabularies.train(chosen.units, training, form, chosen.vocab_size)
    fit = _train_pooled if chosen.sizes.num_prefix else _train_flat
    config, trained = fit(chosen, units, texts, run)
    return config, units, trained


def save(
    directory: pathlib.Path,
    config: HierarchicalConfig | TransformerConfig,
    params: Any,
    units: WordUnits,
) -> None:
    """Writes a model of either kind, and its units beside it."""
    if isinstance(config, HierarchicalConfig):
        hierarchical.save(directory, config, params)
    else:
        parameter_files.save(directory, FLAT_KIND, config, params)
    units.save(directory)


def load(directory: pathlib.Path) -> tuple[HierarchicalConfig | TransformerConfig, Any, WordUnits]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    units = word_units.load(directory)
    if parameter_files.kind_of(directory) == hierarchical.KIND:
        return *hierarchical.load(directory), units
    config, params = parameter_files.load(
        directory, FLAT_KIND, _flat_config, transformer.param_shapes
    )
    return config, params, units


def summary(directory: pathlib.Path) -> dict[str, Any]:
    """What a directory records of its training."""
    found: dict[str, Any] = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    return found


def mean_units(units: WordUnits, texts: Sequence[Mapping[str, str]]) -> float:
    """Units of a word, its end included."""
    words = [word for document in texts for word in document["text"].split()]
    return sum(len(units.closed(word)) for word in words) / len(words)


def row_units(chosen: Recipe, units: WordUnits, texts: Sequence[Mapping[str, str]]) -> int:
    """Units of a flat model's row: a multiple of 8, or as many as words where a word is a unit."""
    if chosen.context_units is not None:
        return chosen.context_units
    exact = chosen.context_words * mean_units(units, texts)
    return chosen.context_words if chosen.units == "word" else -(-int(exact) // 8) * 8


def _train_pooled(
    chosen: Recipe, units: WordUnits, texts: Texts, run: Mapping[str, Any]
) -> tuple[HierarchicalConfig, loop.Result]:
    config = word_pooling.pooled(
        chosen.sizes,
        units,
        max_word=chosen.text.form.max_bytes,  # no unit has less than a byte
        max_words=chosen.context_words,
    )
    split = {
        name: word_batches.WordDocuments(
            examples,
            config,
            split=lambda text: list(map(units.units, text.split())),
            count_bytes=lambda ids: len(units.decode(ids).encode()) + 1,
        )
        for name, examples in texts.items()
    }
    rows = {"batch_size": chosen.batch_size, "num_words": chosen.context_words}
    trained = word_language_model.train(
        config,
        _train_config(chosen, config.backbone, chosen.context_words),
        train_batches=word_batches.train_batches(split["train"], seed=chosen.seed, **rows),
        eval_batches=_spread(list(word_batches.eval_batches(split["eval"], **rows)), chosen),
        **run,
    )
    return config, trained


def _train_flat(
    chosen: Recipe, units: WordUnits, texts: Texts, run: Mapping[str, Any]
) -> tuple[TransformerConfig, loop.Result]:
    length = row_units(chosen, units, texts["train"])
    config = word_pooling.flat(chosen.sizes, units, max_units=length)
    tokenizer: Any = units  # frozen, which the protocol does not ask for
    split = {
        name: batches.TokenizedDocuments(examples, tokenizer) for name, examples in texts.items()
    }
    rows: dict[str, Any] = {"batch_size": chosen.batch_size, "seq_len": length}
    trained = language_model.train(
        _train_config(chosen, config, length),
        train_batches=batches.train_batches(split["train"], seed=chosen.seed, **rows),
        eval_batches=_spread(list(batches.eval_batches(split["eval"], **rows)), chosen),
        **run,
    )
    return config, trained


def _train_config(chosen: Recipe, model: TransformerConfig, length: int) -> TrainConfig:
    return TrainConfig(
        model=model,
        optimizer=chosen.optimizer,
        num_steps=chosen.num_steps,
        batch_size=chosen.batch_size,
        sequence_length=length,
        compute_dtype=chosen.compute_dtype,
        mesh=chosen.mesh,
        log_every=min(50, chosen.num_steps),
        eval_every=chosen.eval_every,
        checkpoint_every=chosen.eval_every,
        keep_checkpoints=1,
        seed=chosen.seed,
    )


def _spread(held_out: list[Any], chosen: Recipe) -> list[Any]:
    """About `eval_rows` rows from all over the documents."""
    count = max(1, chosen.eval_rows // chosen.batch_size)
    return held_out[:: max(1, len(held_out) // count)][:count]


def _load(text: Text, split: str, cache: pathlib.Path) -> registry.Examples:
    own = text.dataset in registry.BUILDERS
    return registry.load(
        text.dataset,
        text.train_split if split == "train" else text.eval_split,
        data_dir=cache / "datasets" if own else text.data_dir,
        text_field=None if text.text_field == "text" else text.text_field,
        **dict(text.options),
    )


def _flat_config(**fields: Any) -> TransformerConfig:
    """The config of JSON's dicts and lists."""
    for name in ("rope", "local_rope"):
        if fields.get(name) is not None:
            fields[name] = RopeConfig(**fields[name])
    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
    }
    return TransformerConfig(**values)
