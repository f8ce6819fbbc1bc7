"""Parts of tokeniser-transfer experiments: target tokenisers, held-out text, bits per byte."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from ml_collections import ConfigDict
from tokenizers import models, trainers

from models import byte_level, token_tables, transformer
from models.byte_characters import BYTE_CHARACTERS
from models.byte_level import ByteLevel
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.hypernetwork import HypernetworkConfig
from training import hypernetwork_losses, losses, tokenizer_transfer
from training import tokenizers as tokenizer_training
from training.datasets import registry
from training.hypernetwork import HypernetworkTraining
from training.hypernetwork_losses import BaseModel
from training.hypernetwork_recipes import HypernetworkRecipe
from training.tokenizer_sampling import SamplerConfig

# Arms beside the heuristics; the second copies the rows of tokens that both vocabularies have.
HYPERNETWORK = "hypernetwork"
COPIES = "hypernetwork, copies"
KINDS = ("directory", "bpe", "unigram", "bytes")
_TARGET_DOCUMENTS = 80  # what small tokenisers are trained on
_STEP = 64  # lengths of rows are multiples


def documents(dataset: str, split: str, options: Mapping[str, Any]) -> Sequence[Any]:
    """Examples of a split; see `registry.load`."""
    return registry.load(dataset, split, **dict(options))


def some_texts(dataset: str, split: str, options: Mapping[str, Any], count: int) -> list[str]:
    """Texts of documents from all over a split; of all of them where there are fewer."""
    found = documents(dataset, split, options)
    return [found[i]["text"] for i in range(0, len(found), max(1, len(found) // count))]


def windows(
    dataset: str,
    split: str,
    options: Mapping[str, Any],
    *,
    count: int,
    characters: int,
    seed: int,
) -> list[str]:
    """Random windows of held-out documents, one of a document at a time.

    Raises:
      InputError: documents are too short.
    """
    found = documents(dataset, split, options)
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    order = rng.permutation(len(found))
    for index in np.resize(order, 4 * max(count, len(order))):
        if len(texts) == count:
            break
        text = found[int(index)]["text"]
        if len(text) >= characters:
            first = int(rng.integers(len(text) - characters + 1))
            texts.append(text[first : first + characters])
    if len(texts) < count:
        raise InputError(
            f"data.characters: no {count} windows of {characters} in {dataset}/{split}"
        )
    return texts


def target_tokenizer(entry: ConfigDict) -> tokenizers.Tokenizer:
    """A tokeniser of `config.targets`; trained on the spot unless it is a directory."""
    check_choice("targets.kind", entry.kind, KINDS)
    if entry.kind == "directory":
        return byte_level.read(entry.source)
    if entry.kind == "bytes":
        vocabulary = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = byte_level.pre_tokenizer()
        return tokenizer
    options = entry.dataset_options.to_dict()
    if entry.source == "cldr":  # names are short: all of them
        texts = [example["text"] for example in documents(entry.source, "train", options)]
    else:
        texts = some_texts(entry.source, "train", options, _TARGET_DOCUMENTS)
    if entry.kind == "bpe":
        return tokenizer_training.train_bpe(texts, entry.vocab_size)
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = byte_level.pre_tokenizer()
    trainer = trainers.UnigramTrainer(
        vocab_size=entry.vocab_size, initial_alphabet=list(BYTE_CHARACTERS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def hypernetwork_recipe(config: ConfigDict) -> HypernetworkRecipe:
    """The recipe that `config` describes; InputError for an unknown field."""
    chosen = config.hypernetwork.recipe.to_dict()
    try:
        return HypernetworkRecipe(
            config.base,
            chosen["dataset"],
            chosen["dataset_options"],
            pre_tokenization=config.pre_tokenization,
            network=chosen["network"],
            sampler=SamplerConfig(**chosen["sampler"]),
            training=HypernetworkTraining(**{"seed": config.seed, **chosen["training"]}),
        )
    except TypeError as error:
        raise InputError(f"config.hypernetwork.recipe: {error}") from None


class Measured(NamedTuple):
    """A model on held-out text.

    Attributes:
      bits_per_byte: of all of the text (left to right), or of the tokens that were hidden.
      tokens_per_byte: its length in the model's tokens.
    """

    bits_per_byte: float
    tokens_per_byte: float


def measure(model: BaseModel, texts: Sequence[str], batch_size: int) -> Measured:
    """Bits per byte of texts: the same bytes, whatever the tokeniser.

    Left to right, every token is predicted, the first after the end-of-text token. A bidirectional
    model says hidden tokens (15%, the same places of a row for the same tokeniser).
    """
    ids = [model.form.encode(text) for text in texts]
    length = max(map(len, ids)) + 1
    length = -(-length // _STEP) * _STEP
    if length > model.config.max_position:
        raise InputError(
            f"data.characters: {length} tokens exceed the model's {model.config.max_position}"
        )
    nats = size = 0.0
    sizes = model.form.token_bytes
    causal = model.config.causal
    for first in range(0, len(ids), batch_size):
        shape = (batch_size, length)
        tokens, real = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        targets = np.zeros(shape, np.int32)
        for row, mine in enumerate(ids[first : first + batch_size]):
            shown = [model.config.eos_token_ids[0], *mine[:-1]] if causal else mine
            tokens[row, : len(mine)], targets[row, : len(mine)] = shown, mine
            real[row, : len(mine)] = 1
        batch = {
            "tokens": tokens, "targets": targets, "loss_mask": real,
            "vocab_size": np.array(model.config.vocab_size, np.int32),
        }  # fmt: skip
        found, weights = jax.device_get(
            _nats(model.config, model.params, model.bias, batch, jax.random.key(first))
        )
        nats += float((found * weights).sum())
        size += float((sizes[targets] * weights).sum())
    total = sum(len(text.encode()) for text in texts)
    return Measured(
        losses.bits_per_byte(nats, total if causal else size), sum(map(len, ids)) / total
    )


@functools.partial(jax.jit, static_argnums=0)
def _nats(
    config: TransformerConfig, params: Any, bias: Any, batch: Any, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not config.causal:
        tables = token_tables.tables(config, params, bias)
        return hypernetwork_losses.token_nats(config, params, tables, batch, key)
    logits = transformer.apply(config, params, jnp.asarray(batch["tokens"])).logits
    assert logits is not None
    if bias is not None:
        logits = logits + bias
    return losses.cross_entropy(logits, batch["targets"]), batch["loss_mask"]


class Setting(NamedTuple):
    """What the measurements share.

    Attributes:
      config: the experiment's.
      workdir: of runs of training.
      base: the language model.
      hypernetwork: config and parameters.
      identity: a name for these.
      forms: target tokenisers by label.
      texts: held-out windows.
      auxiliary: texts that company is counted on.
    """

    config: ConfigDict
    workdir: Path
    base: BaseModel
    hypernetwork: tuple[HypernetworkConfig, Any]
    identity: str
    forms: dict[str, ByteLevel]
    texts: list[str]
    auxiliary: list[str]

    def swap(self, form: ByteLevel, arm: str, base: BaseModel | None = None) -> BaseModel:
        """A model with another tokeniser, by the hypernetwork or a heuristic."""
        base = base or self.base
        if arm in (HYPERNETWORK, COPIES):
            swapped = tokenizer_transfer.with_hypernetwork(base, form, *self.hypernetwork)
            return tokenizer_transfer.with_copies(base, swapped) if arm == COPIES else swapped
        rank = self.config.data.auxiliary_rank
        return tokenizer_transfer.with_heuristic(
            base, form, arm, texts=self.auxiliary, rank=rank, seed=self.config.seed
        )

    def measure(self, model: BaseModel, texts: list[str] | None = None) -> Measured:
        return measure(model, texts or self.texts, self.config.data.batch_size)

    def form(self, label: str) -> ByteLevel:
        check_choice("target", label, self.forms)
        return self.forms[label]
