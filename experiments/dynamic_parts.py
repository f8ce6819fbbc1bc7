"""The model, its providers of embeddings, and the held-out text of dynamic tokenisation."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from decoding.dynamic_vocabulary import boundaries, providers
from decoding.dynamic_vocabulary.boundaries import Valid
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from decoding.dynamic_vocabulary.providers import Provider
from experiments import transfer_parts
from models import byte_level, files, hf_checkpoint
from models import hypernetwork as networks
from models.byte_level import ByteLevel
from models.config import TransformerConfig
from training import artifacts, base_models, hypernetwork_recipes
from training.datasets import registry

# What a report shows of a model's training.
_SUMMARY = ("eval_loss", "eval_bits_per_byte", "tokens", "seconds", "curve", "evaluations")


class Setting(NamedTuple):
    """What all measurements share.

    Attributes:
      model, params: the language model, frozen.
      source: its tokeniser in normal form.
      valid: which neighbours may be merged.
      providers: by name; special tokens have the model's rows in all.
      identities: what each provider's rows depend on, as JSON can hold it.
      splits: documents by split: text, path.
      summaries: of trained models, as reports show them.
    """

    model: TransformerConfig
    params: Any
    source: ByteLevel
    valid: Valid
    providers: dict[str, Provider]
    identities: dict[str, Any]
    splits: dict[str, list[Mapping[str, Any]]]
    summaries: list[dict[str, Any]]

    def cache(self, provider: str, capacity: int) -> Callable[[], EmbeddingCache]:
        """Makes empty caches of a provider."""
        scale = self.model.embedding_scale
        return lambda: EmbeddingCache(self.providers[provider], capacity, scale)

    def texts(self, split: str) -> list[str]:
        return [document["text"] for document in self.splits[split]]


def load(config: ConfigDict) -> Setting:
    """Reads or trains the model and the hypernetwork of `config`.

    Raises:
      InputError: as the loaders; a checkpoint without a tokenizer.json.
    """
    directory = hypernetwork_recipes.resolve(config.base, files.cache_root())
    model, params = hf_checkpoint.load(directory)
    tokenizer = byte_level.read(directory)
    source = byte_level.normalise(tokenizer, pre_tokenization=config.pre_tokenization)
    own = providers.model_rows(model, params)
    averages = providers.average(model, params, source.decompose)
    found = {"fvt": providers.copying(averages, own, source.specials)}
    made_of: dict[str, Any] = {"model": artifacts.content_hash(directory)}
    identities = {"fvt": made_of}
    summaries = [_summary("target", config.base, directory, model.num_params())]
    trained = hypernetwork_directory(config)
    if trained is not None:
        network, weights = networks.load(trained)
        made = providers.hypernetwork(
            network, weights, own, source, max_surface=config.hypernetwork.max_surface or None
        )
        found["hypernetwork"] = providers.copying(made, own, source.specials)
        found["own rows, hypernetwork"] = providers.copying(
            made, own, providers.vocabulary(source), name="own rows, hypernetwork"
        )
        made_of = {**made_of, "hypernetwork": artifacts.content_hash(trained)}
        identities |= {name: {**made_of, "name": name} for name in found if name != "fvt"}
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(weights))
        summaries.append(_summary("hypernetwork", "trained here", trained, size))
    names = tuple(dict.fromkeys((config.data.train_split, *config.data.splits)))
    splits = {name: _documents(config, name) for name in names}
    pieces = boundaries.count_pieces(source.backend)
    valid = boundaries.rule(config.boundary, source.specials, pieces)
    return Setting(model, params, source, valid, found, identities, splits, summaries)


def hypernetwork_directory(config: ConfigDict) -> Path | None:
    """Where the hypernetwork is; trained if `config` has a recipe, None without either."""
    if config.hypernetwork.directory:
        return Path(config.hypernetwork.directory)
    if not config.hypernetwork.recipe:
        return None
    return hypernetwork_recipes.ensure(transfer_parts.hypernetwork_recipe(config))


def _documents(config: ConfigDict, split: str) -> list[Mapping[str, Any]]:
    """Documents of a split, those below the folders `config.data.without` left out."""
    data = config.data
    own: dict[str, Any] = (
        {"data_dir": files.cache_root() / "datasets"} if data.dataset in registry.BUILDERS else {}
    )
    found = registry.load(data.dataset, split, **own, **data.builder_options)
    without = tuple(data.without)
    return [e for e in list(found) if not (without and e.get("path", "").startswith(without))]


def _summary(role: str, source: str, directory: Path, parameters: int) -> dict[str, Any]:
    summary: dict[str, Any] = {"role": role, "source": source, "parameters": parameters}
    path = directory / base_models.SUMMARY_FILE
    if path.exists():
        trained = json.loads(path.read_text())
        summary |= {name: trained[name] for name in _SUMMARY if name in trained}
    return summary
