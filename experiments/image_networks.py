"""What an experiment on masked image models draws and measures with: its networks, loaded."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from models import enat, files, hf_checkpoint, image_classifier, transformer, vq
from models.enat import ENATConfig, TextENATConfig
from models.errors import InputError
from training import base_models, image_models
from training.image_batches import ImageData
from training.image_captions import CaptionedImageModel, Captions

# Roles of `config.models` that are no network to compare.
_OTHERS = ("tokenizer", "classifier", "text_model")
_SUMMARY = ("eval_loss", "seconds", "curve", "evaluations")


class Networks(NamedTuple):
    """What a run draws and measures with.

    Attributes:
      masked: networks by role, each a config and parameters; all conditioned on classes, or all on
        text.
      tokenizer, classifier: a config and parameters.
      data: of the images; of one size.
      tokenizer_directory: where the tokeniser lies.
      text_directory: where the text model lies; None for networks conditioned on classes.
      captions: which captions; None likewise.
      summaries: what a report shows.
    """

    masked: dict[str, tuple[ENATConfig, Any]]
    tokenizer: tuple[vq.VQConfig, Any]
    classifier: tuple[image_classifier.ClassifierConfig, Any]
    data: ImageData
    tokenizer_directory: Path
    text_directory: Path | None
    captions: Captions | None
    summaries: list[dict[str, Any]]

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return self.data.sizes[0] // self.tokenizer[0].factor

    @property
    def num_classes(self) -> int:
        return next(iter(self.masked.values()))[0].num_classes


def load_networks(config: ConfigDict) -> Networks:
    """Every role of `config.models`: a recipe of `image_models`, trained if need be, or a
    directory.

    Raises:
      InputError: networks of which some are conditioned on text and some are not, or not as the
        config says (`models.text_model`).
    """
    cache = files.cache_root()
    names = {role: config.models[role] for role in _OTHERS if config.models.get(role)}
    found = {role: image_models.resolve(source, cache) for role, source in names.items()}
    loaded = {"tokenizer": vq.load, "classifier": image_classifier.load}
    others: dict[str, Any] = {role: load(found[role]) for role, load in loaded.items()}
    text, captions = found.get("text_model"), None
    summaries = []
    for role, source in names.items():
        if role in others:
            count = sum(x.size for x in jax.tree.leaves(others[role][1]))
        else:
            shapes = transformer.param_shapes(hf_checkpoint.load_config(found[role]))
            count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        # Their losses are no nats a token.
        summaries.append(_summary(role, source, count, found[role], ("seconds",)))
    if text is not None:
        captions = Captions(config.models.text_model, **config.captions.to_dict())
    masked: dict[str, tuple[ENATConfig, Any]] = {}
    for role, source in config.models.items():
        if role in _OTHERS:
            continue
        directory = _network(source, config, text, cache)
        masked[role] = enat.load(directory)
        if isinstance(masked[role][0], TextENATConfig) != (text is not None):
            raise InputError(
                f"models.text_model: {config.models.get('text_model')!r} does not fit "
                f"models.{role}, which is{' not' if text else ''} conditioned on text"
            )
        count = sum(x.size for x in jax.tree.leaves(masked[role][1]))
        summaries.append(_summary(role, source, count, directory, _SUMMARY))
    data = ImageData(
        config.data.dataset,
        config.data.builder_options.to_dict(),
        (config.data.size,),
        train_split=config.data.train_split,
        eval_split=config.data.split,
        data_dir=config.data.data_dir or None,
        label_field=config.data.get("label_field", "label") or None,
    )
    return Networks(
        masked,
        others["tokenizer"],
        others["classifier"],
        data,
        found["tokenizer"],
        text,
        captions,
        summaries,
    )


def _network(source: str, config: ConfigDict, text: Path | None, cache: Path) -> Path:
    """The directory of a network, which learns from the config's dataset, through its tokeniser
    and its text model."""
    if source not in image_models.RECIPES:
        return Path(source)
    given = {
        "tokenizer": config.models.tokenizer,
        "data.dataset": config.data.dataset,
        "data.options": config.data.builder_options.to_dict(),
        "data.data_dir": config.data.data_dir or None,
    }
    if text is not None and isinstance(image_models.RECIPES[source], CaptionedImageModel):
        given |= {f"captions.{name}": value for name, value in config.captions.items()}
        given["captions.text_model"] = config.models.text_model
        given["train.model.text_dim"] = hf_checkpoint.load_config(text).embed_dim
    return image_models.ensure(source, cache_dir=cache, overrides=given)


def _summary(
    role: str, source: str, count: int, directory: Path, kept: tuple[str, ...]
) -> dict[str, Any]:
    summary = {"role": role, "source": source, "parameters": count}
    path = directory / base_models.SUMMARY_FILE
    if path.exists():
        trained = json.loads(path.read_text())
        summary |= {name: trained[name] for name in kept if name in trained}
    return summary


def decoder(networks: Networks) -> Callable[[Any], np.ndarray]:
    """A function from ids int [n, N] to images float [n, H, W, C]."""
    (config, params), side = networks.tokenizer, networks.side
    decode = jax.jit(functools.partial(vq.decode, config))
    return lambda ids: np.asarray(decode(params, jnp.asarray(ids).reshape(-1, side, side)))
