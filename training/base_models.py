"""Small base models that many experiments share: trained once, kept by a hash of their recipe.

`ensure('code_target')` returns a directory in Hugging Face's format, training the model if no run
on this machine has done so. The hash covers everything that determines the weights: all fields of
the recipe, the data's own content hash, the tokeniser's training and `CODE_VERSION`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from absl import logging

from models import files, hf_checkpoint
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.tokenizer import Tokenizer
from training import (
    alignment,
    artifacts,
    batches,
    checkpoints,
    language_model,
    loop,
    metric_writers,
)
from training import tokenizers as tokenizer_training
from training.datasets import registry
from training.language_model import Distillation, Target, TrainConfig
from training.optimizers import OptimizerConfig

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1

SUMMARY_FILE = "training_summary.json"


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The recipe of a named model.

    Attributes:
      dataset: a name of `training.datasets.registry.BUILDERS`, with `train` and `validation`.
      vocab_size: ids that the tokeniser's training may use; the model has those that it did.
      train: the run; `train.model.vocab_size` and the end-of-text id are filled in from the
        tokeniser.
      dataset_options: of the dataset's builder.
      eval_batches: batches of the validation split that an evaluation reads, evenly spaced.
      distilled_from: the named model that `train.distillation` learns from. Its tokeniser is the
        same because dataset and `vocab_size` are.
    """

    dataset: str
    vocab_size: int
    train: TrainConfig
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_batches: int = 8
    distilled_from: str | None = None

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, registry.BUILDERS)
        if self.eval_batches < 1:
            raise InputError(f"eval_batches: {self.eval_batches} must be at least 1")

    @property
    def parents(self) -> dict[str, str]:
        """Named models that it is made from, by role."""
        return {"target": self.distilled_from} if self.distilled_from else {}


@dataclasses.dataclass(frozen=True)
class AlignedModel(BaseModel):
    """The recipe of a draft that is fine-tuned on its target's answers; see `training.alignment`.

    The dataset has a field `question`; the architecture is the draft's, not `train.model`.

    Attributes:
      draft: the named model that training starts from.
      target: the named model that answers.
      num_prompts: training prompts that it answers.
      max_new_tokens: of an answer.
    """

    draft: str = ""
    target: str = ""
    num_prompts: int = 1000
    max_new_tokens: int = 64

    @property
    def parents(self) -> dict[str, str]:
        return {"draft": self.draft, "target": self.target}


def _llama(layers: int, width: int, vocab_size: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        mlp_dim=width * 43 // 16,  # about 8/3, as Llama; a multiple of 16
        max_position=1024,
        tie_embeddings=True,
    )


def _recipe(
    dataset: str, vocab_size: int, layers: int, width: int, steps: int, **more: Any
) -> BaseModel:
    distilled_from = more.pop("distilled_from", None)
    train = TrainConfig(
        model=_llama(layers, width, vocab_size),
        optimizer=OptimizerConfig(
            learning_rate=more.pop("learning_rate"), warmup_steps=min(20, steps // 10)
        ),
        num_steps=steps,
        batch_size=more.pop("batch_size", 8),
        sequence_length=256,
        eval_every=40,
        checkpoint_every=50,
        distillation=Distillation(weight=0.5) if distilled_from else None,
    )
    return BaseModel(dataset, vocab_size, train, distilled_from=distilled_from, **more)


def _aligned(
    draft: str, target: str, steps: int, *, learning_rate: float, **more: Any
) -> AlignedModel:
    start = RECIPES[draft]
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_steps=min(20, steps // 10))
    train = dataclasses.replace(start.train, num_steps=steps, optimizer=optimizer)
    return AlignedModel(start.dataset, start.vocab_size, train, draft=draft, target=target, **more)


RECIPES: dict[str, BaseModel] = {
    # The target's weights are larger than a CPU's cache, as those of any real target are: only then
    # does a call on several tokens cost little more than a call on one.
    "code_target": _recipe("stdlib_code", 1024, 4, 512, 140, learning_rate=8e-4, batch_size=4),
    "code_draft": _recipe(
        "stdlib_code",
        1024,
        1,
        128,
        170,
        learning_rate=4e-3,
        batch_size=4,
        distilled_from="code_target",
    ),
    # For smoke runs: seconds of training, no claim to quality.
    "tiny_target": _recipe("stdlib_code", 512, 4, 128, 8, learning_rate=4e-3),
    "tiny_draft": _recipe(
        "stdlib_code", 512, 1, 64, 8, learning_rate=4e-3, distilled_from="tiny_target"
    ),
    "arithmetic_target": _recipe("arithmetic", 384, 4, 256, 200, learning_rate=2e-3),
    "arithmetic_draft": _recipe(
        "arithmetic", 384, 1, 64, 200, learning_rate=4e-3, distilled_from="arithmetic_target"
    ),
    "numbers_target": _recipe("spelled_numbers", 384, 4, 256, 250, learning_rate=2e-3),
    "numbers_draft": _recipe("spelled_numbers", 384, 2, 64, 600, learning_rate=6e-3),
}
RECIPES["numbers_draft_aligned"] = _aligned(
    "numbers_draft", "numbers_target", 200, learning_rate=2e-3, num_prompts=3000, max_new_tokens=48
)


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> BaseModel:
    """The recipe called `name`, with fields replaced.

    Args:
      name: a key of `RECIPES`.
      overrides: dotted field to value, such as `{'train.num_steps': 20}`; fields of a model that
        it is made from are prefixed with that one's role ('target.') and not read here.

    Raises:
      InputError: an unknown name or field, naming the nearest.
    """
    check_choice("base model", name, RECIPES)
    prefixes = tuple(f"{role}." for role in RECIPES[name].parents)
    own = {
        path: value for path, value in (overrides or {}).items() if not path.startswith(prefixes)
    }
    return artifacts.replace_fields(RECIPES[name], own)


def ensure(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """The directory of a named model, which is trained first if it is not there yet.

    The directory appears whole or not at all. A caller that comes while another process trains
    the same model waits for it; training that was killed goes on from its last checkpoint.

    Args:
      name: a key of `RECIPES`.
      cache_dir: where models, tokenisers and data are kept; None for
        `files.cache_root()`.
      overrides: see `recipe`. Those prefixed 'target.' are for the model that a draft learns
        from: a draft must be made with the same ones as the target that it drafts for.

    Returns:
      A directory with config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
      training_summary.json (recipe, loss curve, evaluations, seconds).

    Raises:
      InputError: an unknown name or field; the disk is full; the loss is not finite.
      SystemExit: `training.loop.TERMINATED`, after SIGTERM.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    chosen = recipe(name, overrides)
    parents = {
        role: ensure(parent, cache_dir=cache, overrides=role_overrides(role, overrides))
        for role, parent in chosen.parents.items()
    }
    identity = {
        "recipe": dataclasses.asdict(chosen),
        "data": _data_identity(chosen, cache),
        "target": None,
        **{role: directory.name for role, directory in parents.items()},
        "code_version": CODE_VERSION,
    }
    final = cache / "models" / f"{name}-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        tokenizer = _ensure_tokenizer(chosen, cache)
        _train(name, chosen, identity, cache, tokenizer, parents, work, result)

    return artifacts.cached(final, make)


def role_overrides(role: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those overrides that are for the model of `role`, without their prefix."""
    prefix = f"{role}."
    return {
        path[len(prefix) :]: value
        for path, value in (overrides or {}).items()
        if path.startswith(prefix)
    }


def _data_identity(chosen: BaseModel, cache: pathlib.Path) -> str:
    """Name, content hash and version of the prepared dataset."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # tfds remarks on every custom configuration
    try:
        builder = registry.BUILDERS[chosen.dataset](
            data_dir=str(cache / "datasets"), **dict(chosen.dataset_options)
        )
    except TypeError as error:
        raise InputError(f"dataset_options: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
    return builder.info.full_name


def _examples(chosen: BaseModel, cache: pathlib.Path, split: str) -> registry.Examples:
    options = dict(chosen.dataset_options)
    return registry.load(chosen.dataset, split, data_dir=cache / "datasets", **options)


def _ensure_tokenizer(chosen: BaseModel, cache: pathlib.Path) -> pathlib.Path:
    """The directory of the tokeniser trained on the dataset's training split."""
    identity = {
        "data": _data_identity(chosen, cache),
        "vocab_size": chosen.vocab_size,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        logging.info("training a tokeniser of %d ids on %s", chosen.vocab_size, chosen.dataset)
        texts = (example["text"] for example in _examples(chosen, cache, "train"))
        trained = tokenizer_training.train_bpe(texts, chosen.vocab_size)
        with checkpoints.disk_errors("cannot write the tokeniser", result):
            tokenizer_training.save(trained, result)

    name = f"{chosen.dataset}-{chosen.vocab_size}-{artifacts.digest(identity)}"
    return artifacts.cached(cache / "tokenizers" / name, make)


def _train(
    name: str,
    chosen: BaseModel,
    identity: Mapping[str, Any],
    cache: pathlib.Path,
    tokenizer_directory: pathlib.Path,
    parents: Mapping[str, pathlib.Path],
    work: pathlib.Path,
    result: pathlib.Path,
) -> None:
    """Trains under `work`, then writes the checkpoint `result`."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_directory / "tokenizer.json"))
    model = chosen.train.model.replace(
        vocab_size=backend.get_vocab_size(),
        eos_token_ids=(backend.token_to_id(tokenizer_training.END_OF_TEXT),),
    )
    if "draft" in parents:
        model = hf_checkpoint.load_config(parents["draft"])
    config = dataclasses.replace(chosen.train, model=model)
    tokenizer = Tokenizer.from_directory(tokenizer_directory, model)
    run = {"workdir": work / "run", "identity": identity, "description": name}
    if isinstance(chosen, AlignedModel):
        trained = _align(chosen, config, cache, tokenizer, parents, run)
    else:
        trained = _fit(chosen, config, cache, tokenizer, parents, run)
    hf_checkpoint.save(result, model, trained.state.params, tokenizer_from=tokenizer_directory)
    lines = metric_writers.read_metrics(work / "run" / metric_writers.METRICS_FILE)
    summary = {
        "name": name,
        **identity,
        "num_params": model.num_params(),
        "tokens": config.num_steps * config.batch_size * config.sequence_length,
        "seconds": trained.seconds,
        **trained.metrics,
        "curve": [line for line in lines if "loss" in line],
        "evaluations": [line for line in lines if "eval_loss" in line],
    }
    with checkpoints.disk_errors("cannot write the summary", result):
        checkpoints.write_json(result / SUMMARY_FILE, summary)


def _fit(
    chosen: BaseModel,
    config: TrainConfig,
    cache: pathlib.Path,
    tokenizer: Tokenizer,
    parents: Mapping[str, pathlib.Path],
    run: Mapping[str, Any],
) -> loop.Result:
    """Trains on the dataset; distils from the target if there is one."""
    documents = {
        split: batches.TokenizedDocuments(_examples(chosen, cache, split), tokenizer)
        for split in ("train", "validation")
    }
    rows, tokens = config.batch_size, config.sequence_length
    held_out = list(batches.eval_batches(documents["validation"], batch_size=rows, seq_len=tokens))
    # Spread over the split, which is in the order of its documents.
    stride = max(1, len(held_out) // chosen.eval_batches)
    return language_model.train(
        config,
        train_batches=batches.train_batches(
            documents["train"], batch_size=rows, seq_len=tokens, seed=config.seed
        ),
        eval_batches=held_out[::stride][: chosen.eval_batches],
        target=Target(*hf_checkpoint.load(parents["target"])) if parents else None,
        **run,
    )


def _align(
    chosen: AlignedModel,
    config: TrainConfig,
    cache: pathlib.Path,
    tokenizer: Tokenizer,
    parents: Mapping[str, pathlib.Path],
    run: Mapping[str, Any],
) -> loop.Result:
    """Fine-tunes the draft on the target's answers."""
    questions = {
        split: [example["question"] for example in _examples(chosen, cache, split)[:count]]
        for split, count in (("train", chosen.num_prompts), ("validation", 100))
    }
    return alignment.align(
        config,
        hf_checkpoint.load(parents["draft"])[1],
        Target(*hf_checkpoint.load(parents["target"])),
        tokenizer,
        questions,
        max_new_tokens=chosen.max_new_tokens,
        **run,
    )
