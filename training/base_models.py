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

from decoding import methods
from decoding.sampling import SamplingConfig
from models import files, hf_checkpoint
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import (
    alignment,
    artifacts,
    batches,
    canvas_batches,
    checkpoints,
    diffusion_rl,
    language_model,
    loop,
    masked_diffusion,
    metric_writers,
    rollouts,
)
from training import tokenizers as tokenizer_training
from training.datasets import arithmetic, registry
from training.language_model import Target, TrainConfig
from training.recipes import (
    RECIPES,
    AlignedModel,
    AnsweringModel,
    BaseModel,
    MaskedDiffusionModel,
    ReinforcedModel,
    recipe,
)

__all__ = ["CODE_VERSION", "RECIPES", "SUMMARY_FILE", "ensure", "recipe", "role_overrides"]

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1

SUMMARY_FILE = "training_summary.json"


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
      overrides: see `recipe`. Those prefixed with a role ('target.', 'start.') are for the model
        that it is made from: a draft must be made with the same ones as the target that it drafts
        for.

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
        "special_tokens": chosen.special_tokens,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        logging.info("training a tokeniser of %d ids on %s", chosen.vocab_size, chosen.dataset)
        texts = (example["text"] for example in _examples(chosen, cache, "train"))
        trained = tokenizer_training.train_bpe(texts, chosen.vocab_size, chosen.special_tokens)
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
    if isinstance(chosen, MaskedDiffusionModel):
        model = model.replace(mask_token_id=backend.token_to_id(tokenizer_training.MASK))
    if "draft" in parents:
        model = hf_checkpoint.load_config(parents["draft"])
    config = dataclasses.replace(chosen.train, model=model)
    tokenizer = Tokenizer.from_directory(tokenizer_directory, model)
    run = {"workdir": work / "run", "identity": identity, "description": name}
    if isinstance(chosen, AlignedModel):
        trained = _align(chosen, config, cache, tokenizer, parents, run)
    elif isinstance(chosen, ReinforcedModel):
        trained = _reinforce(chosen, config, cache, tokenizer, parents, run)
    elif isinstance(chosen, MaskedDiffusionModel):
        trained = _diffuse(chosen, config, cache, tokenizer, parents, run)
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
    train_batches, eval_batches = _packed(chosen, config, cache, tokenizer)
    return language_model.train(
        config,
        train_batches=train_batches,
        eval_batches=eval_batches,
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


def _diffuse(
    chosen: MaskedDiffusionModel,
    config: TrainConfig,
    cache: pathlib.Path,
    tokenizer: Tokenizer,
    parents: Mapping[str, pathlib.Path],
    run: Mapping[str, Any],
) -> loop.Result:
    """Trains a masked diffusion model on canvases, or on packed text."""
    data = _canvases if chosen.loss_on == "response" else _packed
    train_batches, eval_batches = data(chosen, config, cache, tokenizer)
    return masked_diffusion.train(
        config,
        chosen.objective,
        train_batches=train_batches,
        eval_batches=eval_batches,
        initial_params=hf_checkpoint.load(parents["start"])[1] if parents else None,
        **run,
    )


def _reinforce(
    chosen: ReinforcedModel,
    config: TrainConfig,
    cache: pathlib.Path,
    tokenizer: Tokenizer,
    parents: Mapping[str, pathlib.Path],
    run: Mapping[str, Any],
) -> loop.Result:
    """Rewards right answers of the model's own."""
    model = config.model
    prompts = dataclasses.replace(config, batch_size=config.batch_size // chosen.policy.group_size)
    train_batches, eval_batches = _canvases(chosen, prompts, cache, tokenizer)
    sampling = SamplingConfig(temperature=chosen.temperature)
    method = methods.build(chosen.method, {"target": model}, sampling, chosen.method_options)
    return diffusion_rl.train(
        config,
        chosen.policy,
        rollout=rollouts.completer(method, model),
        reward=diffusion_rl.text_reward(tokenizer.decode, model.eos_token_ids, _same_answer),
        initial_params=hf_checkpoint.load(parents["start"])[1],
        train_batches=train_batches,
        eval_batches=eval_batches,
        **run,
    )


def _same_answer(text: str, reference: str) -> bool:
    answer = arithmetic.extract_answer(reference)
    return answer is not None and arithmetic.check_answer(text, answer)


def _packed(
    chosen: BaseModel, config: TrainConfig, cache: pathlib.Path, tokenizer: Tokenizer
) -> tuple[loop.Batches, list[batches.Batch]]:
    """Batches to train on and held-out ones, documents packed into rows."""
    documents = _documents(chosen, cache, tokenizer)
    rows, tokens = config.batch_size, config.sequence_length
    held_out = batches.eval_batches(documents["validation"], batch_size=rows, seq_len=tokens)
    train_batches = batches.train_batches(
        documents["train"], batch_size=rows, seq_len=tokens, seed=config.seed
    )
    return train_batches, _spread(list(held_out), chosen.eval_batches)


def _canvases(
    chosen: BaseModel, config: TrainConfig, cache: pathlib.Path, tokenizer: Tokenizer
) -> tuple[loop.Batches, list[batches.Batch]]:
    """Batches to train on and held-out ones, a prompt and its answer in each row."""
    documents = _documents(chosen, cache, tokenizer)
    sizes = {
        "batch_size": config.batch_size,
        "canvas": config.sequence_length,
        "pad_id": config.model.eos_token_ids[0],
    }
    held_out = canvas_batches.eval_batches(documents["validation"], **sizes)
    train_batches = canvas_batches.train_batches(documents["train"], seed=config.seed, **sizes)
    return train_batches, _spread(list(held_out), chosen.eval_batches)


def _documents(
    chosen: BaseModel, cache: pathlib.Path, tokenizer: Tokenizer
) -> dict[str, batches.TokenizedDocuments]:
    loss_on = chosen.loss_on if isinstance(chosen, AnsweringModel) else "all"
    return {
        split: batches.TokenizedDocuments(
            _examples(chosen, cache, split), tokenizer, loss_on=loss_on
        )
        for split in ("train", "validation")
    }


def _spread(held_out: list[batches.Batch], count: int) -> list[batches.Batch]:
    """`count` batches from all over the split, which is in the order of its documents."""
    return held_out[:: max(1, len(held_out) // count)][:count]
