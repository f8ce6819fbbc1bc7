"""Models of words and models of tokens, trained on the same bytes of the same documents, and kept.

A recipe says what a row holds in bytes; how many words or tokens that is follows from the text, so
that models that cut it differently see as much of it in a step.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from absl import logging

from models import hf_checkpoint, hierarchical, words
from models.config import TransformerConfig
from models.hierarchical import HierarchicalConfig
from training import (
    artifacts,
    batches,
    checkpoints,
    language_model,
    loop,
    metric_writers,
    word_batches,
    word_language_model,
)
from training import tokenizers as tokenizer_training
from training.fitting import TrainConfig
from training.optimizers import OptimizerConfig
from training.word_batches import WordDocuments

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
SUMMARY_FILE = "training_summary.json"
# Text that compression is measured on.
_SAMPLE_BYTES = 400_000


@dataclasses.dataclass(frozen=True)
class TextModel:
    """What determines a model beside its text.

    Attributes:
      model: the architecture; of tokens, with the tokeniser's vocabulary and end of text.
      optimizer: see `OptimizerConfig`.
      num_steps: batches in all.
      batch_size: rows of a batch.
      row_bytes: bytes of text that a row has room for, on average.
      eval_every: steps.
      eval_batches: batches of held-out text that an evaluation reads, evenly spaced.
      seed: of parameters and order.
    """

    model: HierarchicalConfig | TransformerConfig
    optimizer: OptimizerConfig
    num_steps: int
    batch_size: int = 8
    row_bytes: int = 256
    eval_every: int = 100
    eval_batches: int = 4
    seed: int = 0


def end_of_text(backend: tokenizers.Tokenizer) -> int:
    """Id of a trained tokeniser's end of text."""
    found = backend.token_to_id(tokenizer_training.END_OF_TEXT)
    assert found is not None
    return found


class WithStart:
    """A tokeniser whose texts begin with its end-of-text token, so that a first token is scored."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.vocab_size = backend.get_vocab_size()
        self._end = end_of_text(backend)
        self.eos_ids: tuple[int, ...] = (self._end,)

    def encode(self, text: str) -> list[int]:
        return [self._end, *self._backend.encode(text).ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids))


def bytes_per_position(
    model: HierarchicalConfig | TransformerConfig,
    backend: tokenizers.Tokenizer | None,
    texts: Iterable[str],
) -> float:
    """Bytes of a word or a token, on average over the first few hundred kilobytes of texts."""
    size = count = 0
    for text in texts:
        size += len(text.encode())
        if isinstance(model, HierarchicalConfig):
            count += len(words.split(text, model.rule, model.max_word))
        else:
            assert backend is not None
            count += len(backend.encode(text).ids)
        if size > _SAMPLE_BYTES:
            break
    return size / count


def ensure_tokenizer(
    texts: Sequence[str], vocab_size: int, identity: str, cache: pathlib.Path
) -> pathlib.Path:
    """The directory of a byte-level BPE of these texts, which `identity` names."""
    described = {"data": identity, "vocab_size": vocab_size, "code_version": CODE_VERSION}

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        trained = tokenizer_training.train_bpe(texts, vocab_size)
        with checkpoints.disk_errors("cannot write the tokeniser", result):
            tokenizer_training.save(trained, result)

    name = f"texts-{vocab_size}-{artifacts.digest(described)}"
    return artifacts.cached(cache / "tokenizers" / name, make)


def ensure(
    name: str,
    chosen: TextModel,
    texts: Sequence[str],
    held_out: Sequence[str],
    *,
    identity: str,
    cache: pathlib.Path,
    tokenizer: pathlib.Path | None = None,
    start: pathlib.Path | None = None,
) -> pathlib.Path:
    """The directory of a model, which is trained first if it is not there yet.

    Args:
      name: begins the directory's name.
      chosen: the recipe.
      texts, held_out: documents.
      identity: what names the documents, part of the hash.
      cache: where models are kept.
      tokenizer: directory of the tokeniser, for a model of tokens.
      start: directory of a model of the same architecture that training starts from.

    Returns:
      A directory that `load` reads, with training_summary.json: loss curve, evaluations, seconds.
    """
    described = {
        "recipe": dataclasses.asdict(chosen),
        "data": identity,
        "tokenizer": tokenizer.name if tokenizer else None,
        "start": start.name if start else None,
        "code_version": CODE_VERSION,
    }
    is_words = isinstance(chosen.model, HierarchicalConfig)
    backend = tokenizer_of(tokenizer) if tokenizer else None

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        per_position = bytes_per_position(chosen.model, backend, texts)
        length = max(1, round(chosen.row_bytes / per_position))
        logging.info("training %s: %d positions a row", name, length)
        run: dict[str, Any] = {"workdir": work / "run", "identity": described, "description": name}
        first = load(start)[1] if start else None
        fit = _fit_words if is_words else _fit_tokens
        trained = fit(chosen, backend, texts, held_out, length, run | {"initial_params": first})
        params = trained.state.params
        if isinstance(chosen.model, HierarchicalConfig):
            hierarchical.save(result, chosen.model, params)
        else:
            hf_checkpoint.save(result, chosen.model, params, tokenizer_from=tokenizer)
        lines = metric_writers.read_metrics(work / "run" / metric_writers.METRICS_FILE)
        summary = {
            "name": name,
            "num_params": int(sum(leaf.size for leaf in jax.tree.leaves(params))),
            "bytes_per_position": per_position,
            "positions_a_row": length,
            "seconds": trained.seconds,
            **trained.metrics,
            "curve": [line for line in lines if "loss" in line],
            "evaluations": [line for line in lines if "eval_loss" in line],
        }
        with checkpoints.disk_errors("cannot write the summary", result):
            checkpoints.write_json(result / SUMMARY_FILE, summary)

    return artifacts.cached(cache / "models" / f"{name}-{artifacts.digest(described)}", make)


def load(directory: pathlib.Path) -> tuple[HierarchicalConfig | TransformerConfig, Any]:
    """The architecture and parameters of a directory of either kind."""
    if (directory / "tokenizer.json").exists():
        return hf_checkpoint.load(directory)
    return hierarchical.load(directory)


def tokenizer_of(directory: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokeniser of a directory."""
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def _fields(chosen: TextModel, length: int) -> dict[str, Any]:
    return {
        "optimizer": chosen.optimizer,
        "num_steps": chosen.num_steps,
        "batch_size": chosen.batch_size,
        "sequence_length": length,
        "eval_every": chosen.eval_every,
        "checkpoint_every": chosen.eval_every,
        "seed": chosen.seed,
    }


def _fit_words(
    chosen: TextModel,
    backend: tokenizers.Tokenizer | None,
    texts: Sequence[str],
    held_out: Sequence[str],
    length: int,
    run: dict[str, Any],
) -> loop.Result:
    del backend
    config = chosen.model
    assert isinstance(config, HierarchicalConfig)
    sizes: dict[str, Any] = {"batch_size": chosen.batch_size, "num_words": length}
    documents, others = (
        WordDocuments([{"text": text} for text in group], config) for group in (texts, held_out)
    )
    return word_language_model.train(
        config,
        word_language_model.run_config(config, **_fields(chosen, length)),
        train_batches=word_batches.train_batches(documents, seed=chosen.seed, **sizes),
        eval_batches=_spread(word_batches.eval_batches(others, **sizes), chosen.eval_batches),
        **run,
    )


def _fit_tokens(
    chosen: TextModel,
    backend: tokenizers.Tokenizer | None,
    texts: Sequence[str],
    held_out: Sequence[str],
    length: int,
    run: dict[str, Any],
) -> loop.Result:
    assert backend is not None and isinstance(chosen.model, TransformerConfig)
    sizes: dict[str, Any] = {"batch_size": chosen.batch_size, "seq_len": length}
    documents, others = (
        batches.TokenizedDocuments([{"text": text} for text in group], WithStart(backend))
        for group in (texts, held_out)
    )
    return language_model.train(
        TrainConfig(model=chosen.model, **_fields(chosen, length)),
        train_batches=batches.train_batches(documents, seed=chosen.seed, **sizes),
        eval_batches=_spread(batches.eval_batches(others, **sizes), chosen.eval_batches),
        **run,
    )


def _spread(held_out: Iterable[Any], count: int) -> list[dict[str, np.ndarray]]:
    """`count` batches from all over."""
    found = list(held_out)
    return found[:: max(1, len(found) // count)][:count]
