"""A language model with another tokeniser: tables from a hypernetwork or a heuristic, and export.

swapped = tokenizer_transfer.with_hypernetwork(base, form, config, params)
tokenizer_transfer.save(directory, swapped)   # AutoModelForCausalLM.from_pretrained opens it
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from models import byte_level, embedding_heuristics, files, hf_checkpoint, token_tables
from models import hypernetwork as network
from models.byte_level import ByteLevel
from models.errors import InputError
from models.hypernetwork import HypernetworkConfig
from models.token_tables import Tables
from training.hypernetwork_losses import BaseModel


def target_form(
    base: BaseModel, tokenizer: tokenizers.Tokenizer, *, pre_tokenization: str = "gpt2"
) -> ByteLevel:
    """A new tokeniser in normal form, the model's special tokens at their ids."""
    return byte_level.normalise(
        tokenizer, specials=base.form.specials, pre_tokenization=pre_tokenization
    )


def with_tables(base: BaseModel, form: ByteLevel, tables: Tables) -> BaseModel:
    """The model with new tables, its special tokens' own rows in them.

    Raises:
      InputError: a special token of the model is not one of the new tokeniser's.
    """
    for token in base.form.specials:
        if token not in form.specials:
            raise InputError(f"specials: the new tokeniser lacks {token!r}")
    places = jnp.array([form.specials[token] for token in base.form.specials], jnp.int32)
    ids = jnp.array(list(base.form.specials.values()), jnp.int32)
    new = token_tables.with_rows(tables, base.tables, places, ids)
    moved = {base.form.specials[token]: form.specials[token] for token in base.form.specials}
    config = token_tables.retokenized_config(base.config, form.vocab_size, moved)
    return BaseModel(config, token_tables.with_tables(base.params, new), form, new.bias)


def surfaces_of(
    base: BaseModel, form: ByteLevel, config: HypernetworkConfig
) -> byte_level.Surfaces:
    """What a hypernetwork reads of a new tokeniser."""
    return byte_level.surfaces(
        base.form, form.tokens, pad_id=config.pad_id, max_length=config.max_surface
    )


def with_hypernetwork(
    base: BaseModel, form: ByteLevel, config: HypernetworkConfig, params: Any
) -> BaseModel:
    """The model with the tables that a hypernetwork predicts, in one pass over the vocabulary."""
    surfaces = surfaces_of(base, form, config)
    tables = network.predict(config, params, base.source, surfaces.ids)
    return with_tables(base, form, tables)


def with_copies(base: BaseModel, swapped: BaseModel) -> BaseModel:
    """A swapped model with the base's own rows for tokens that both vocabularies have.

    What every heuristic does, and ZeTT does not: its hypernetwork predicts these rows too.
    """
    match = byte_level.overlap(base.form, swapped.form)
    places = np.flatnonzero(match >= 0)
    tables = token_tables.with_rows(
        swapped.tables, base.tables, jnp.asarray(places), jnp.asarray(match[places])
    )
    return with_tables(base, swapped.form, tables)


def with_heuristic(
    base: BaseModel,
    form: ByteLevel,
    name: str,
    *,
    texts: Sequence[str] = (),
    rank: int = 64,
    seed: int = 0,
) -> BaseModel:
    """The model with tables of `embedding_heuristics.transfer`; a bias is treated as a column."""
    source = np.asarray(base.source, np.float64)
    if base.bias is not None:
        source = np.concatenate([source, np.asarray(base.bias)[:, None]], axis=1)
    table = embedding_heuristics.transfer(
        name, source, base.form, form, texts=texts, rank=rank, seed=seed
    )
    bias = None
    if base.bias is not None:
        table, bias = table[:, :-1], jnp.asarray(table[:, -1])
    return with_tables(base, form, token_tables.split(base.config, jnp.asarray(table), bias))


def save(
    directory: str | os.PathLike[str],
    model: BaseModel,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes an ordinary Hugging Face directory, tokeniser included.

    `AutoTokenizer` and `AutoModelForCausalLM` open it.

    Args:
      directory: as `hf_checkpoint.save`.
      model: the model and its tokeniser.
      settings: of the old tokenizer_config.json; those that name special tokens and the chat
        template are kept.

    Raises:
      InputError: as `hf_checkpoint.save`; a model whose logits have a bias, which no family of
        checkpoints here has.
    """
    if model.bias is not None:
        raise InputError("bias: a model whose logits have one cannot be written as a checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        files.write_text(work / "tokenizer.json", model.form.backend.to_str(pretty=True))
        text = json.dumps(tokenizer_settings(model, settings or {}), indent=2)
        files.write_text(work / "tokenizer_config.json", text + "\n")
        hf_checkpoint.save(directory, model.config, model.params, tokenizer_from=work)


def tokenizer_settings(model: BaseModel, old: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says of a model's tokeniser in normal form."""
    kept = {
        name: _content(value)
        for name, value in old.items()
        if name.endswith("_token") and _content(value) in model.form.specials
    }
    if "chat_template" in old:
        kept["chat_template"] = old["chat_template"]
    by_id = {place: token for token, place in model.form.specials.items()}
    ends = [by_id[end] for end in model.config.eos_token_ids if end in by_id]
    if ends:
        kept.setdefault("eos_token", ends[0])
    if model.config.bos_token_id in by_id:
        kept.setdefault("bos_token", by_id[model.config.bos_token_id])
    if model.config.mask_token_id in by_id:
        kept.setdefault("mask_token", by_id[model.config.mask_token_id])
    return {
        **kept,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model.config.max_position,
    }


def _content(value: Any) -> Any:
    """A special token is written as a string, or as an object with the string in `content`."""
    return value.get("content") if isinstance(value, Mapping) else value
