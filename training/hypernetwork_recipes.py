"""Hypernetworks of named and other language models, trained once and kept by content hash.

directory = hypernetwork_recipes.ensure(HypernetworkRecipe("code_untied", "stdlib_code"))
python -m experiments.transfer_tokenizer --hypernetwork=DIRECTORY ...
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from models import byte_level, files, hf_checkpoint
from models import hypernetwork as network
from models.errors import InputError
from models.hypernetwork import HypernetworkConfig
from training import artifacts, base_models, checkpoints, metric_writers, tokenizer_sampling
from training.datasets import registry
from training.hypernetwork import HypernetworkTraining, train
from training.hypernetwork_losses import BaseModel
from training.tokenizer_sampling import Layout, SampledBatches, SamplerConfig

# Part of every hash. Raise it when a change of code changes what the same recipe trains.
CODE_VERSION = 1
SUMMARY_FILE = base_models.SUMMARY_FILE


@dataclasses.dataclass(frozen=True)
class HypernetworkRecipe:
    """Everything that determines a hypernetwork; the defaults of sizes are the published ones.

    Attributes:
      base: the language model: a named base model or a checkpoint directory.
      dataset: what tokenisers and texts are drawn from, with `train` and `validation`.
      dataset_options: as `registry.load` takes them.
      pre_tokenization: of the base's tokeniser, see `byte_level.normalise`.
      network: fields of `HypernetworkConfig` over those of `models.hypernetwork.for_model`.
      sampler, training: see there.
    """

    base: str
    dataset: str
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pre_tokenization: str = "gpt2"
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    training: HypernetworkTraining = dataclasses.field(default_factory=HypernetworkTraining)


def resolve(base: str, cache: pathlib.Path) -> pathlib.Path:
    """The directory of a named base model, trained if need be, or of a checkpoint."""
    if base in base_models.RECIPES:
        return base_models.ensure(base, cache_dir=cache)
    return pathlib.Path(base)


def load_base(directory: str | os.PathLike[str], pre_tokenization: str = "gpt2") -> BaseModel:
    """A checkpoint with its tokeniser in normal form; InputError without a tokenizer.json."""
    config, params = hf_checkpoint.load(directory)
    tokenizer = byte_level.read(directory)
    form = byte_level.normalise(tokenizer, pre_tokenization=pre_tokenization)
    return BaseModel(config, params, form)


def ensure(
    recipe: HypernetworkRecipe, *, cache_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """The directory of a hypernetwork, which is trained first if it is not there yet.

    Args:
      recipe: see `HypernetworkRecipe`.
      cache_dir: where models, data and hypernetworks are kept; None for `files.cache_root()`.

    Returns:
      A directory with config.json and model.safetensors, for `models.hypernetwork.load`, and
      training_summary.json.

    Raises:
      InputError: as `base_models.ensure` and `train`.
      SystemExit: as `train`.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    directory = resolve(recipe.base, cache)
    own: dict[str, Any] = (
        {"data_dir": cache / "datasets"} if recipe.dataset in registry.BUILDERS else {}
    )
    options = {**own, **recipe.dataset_options}
    documents = registry.load(recipe.dataset, "train", **options)
    identity = {
        "recipe": {**dataclasses.asdict(recipe), "base": artifacts.content_hash(directory)},
        "data": documents.full_name,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        base = load_base(directory, recipe.pre_tokenization)
        config = network.for_model(
            base.config, num_extra=base.form.num_extra, **dict(recipe.network)
        )
        layout = layout_of(config, base, recipe.training.sequence_length)
        batches = SampledBatches(
            _in_memory(documents),
            recipe.sampler,
            layout,
            seed=recipe.training.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        held = batches.held_out(
            registry.load(recipe.dataset, "validation", **options), recipe.training.eval_batches
        )
        trained = train(
            config, recipe.training, base, train_batches=batches, eval_batches=held,
            sampler=recipe.sampler, workdir=work, identity=identity,
        )  # fmt: skip
        network.save(result, config, jax.device_get(trained.state.params))
        lines = metric_writers.read_metrics(work / "main" / metric_writers.METRICS_FILE)
        summary = {
            "name": f"hypernetwork of {recipe.base}",
            **identity,
            **trained.metrics,
            "seconds": trained.seconds,
            "parameters": sum(x.size for x in jax.tree.leaves(trained.state.params)),
            "curve": [line for line in lines if "loss" in line],
            "evaluations": [line for line in lines if "eval_loss" in line],
            "identity_curve": _identity_curve(work),
        }
        with checkpoints.disk_errors("cannot write the summary", result):
            checkpoints.write_json(result / SUMMARY_FILE, summary)

    name = f"{pathlib.Path(recipe.base).name}-{artifacts.digest(identity)}"
    return artifacts.cached(cache / "hypernetworks" / name, make)


def _identity_curve(work: pathlib.Path) -> list[dict[str, Any]]:
    path = work / "identity" / metric_writers.METRICS_FILE
    return metric_writers.read_metrics(path) if path.exists() else []


def _in_memory(documents: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """A small corpus is read once; a large one stays where it is."""
    return list(documents) if len(documents) <= 10_000 else documents


def layout_of(config: HypernetworkConfig, base: BaseModel, sequence_length: int) -> Layout:
    """How sampled batches are laid out for a language model and its hypernetwork."""
    ids = {place: token for token, place in base.form.specials.items()}
    ends = [ids[end] for end in base.config.eos_token_ids if end in ids]
    if not ends:
        raise InputError(
            f"base: its end-of-text ids {base.config.eos_token_ids} are no special tokens of its "
            f"tokeniser, which has {dict(base.form.specials)}"
        )
    return tokenizer_sampling.Layout(
        base.form,
        sequence_length,
        config.pad_id,
        config.max_surface,
        next_token=base.config.causal,
        separator=ends[0],
    )
