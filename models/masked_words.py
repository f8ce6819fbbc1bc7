"""Two ways to read a row of words and to predict some of them, behind one interface.

`word_reader` is Byte2Word: words from their bytes, a backbone over words, sub-words of a word from
its hidden state. `subword_reader` is BERT (or, causal, GPT) over sub-words, the baseline: a table
of them at the input, every sub-word predicted at its own place. Rows are those of
`training.word_rows`; the words that are hidden and asked for are the same for both.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models import cross_attention_words as caw
from models import parameter_files, spaced_words, subword_heads, transformer, word_pieces
from models.config import RopeConfig, TransformerConfig
from models.cross_attention_words import WordEncoderConfig, WordModelConfig
from models.errors import InputError, check_choice
from models.layers import Dense, Norm
from models.subword_heads import HeadConfig

KIND = "word_reader"
READS = ("words", "subwords")
Batch = Mapping[str, jax.Array]


class Corruption(struct.PyTreeNode):
    """What a row's words are replaced by.

    Attributes:
      masked: bool [B, N], words that are [MASK].
      replaced: bool [B, N], words that are others of the batch.
      source: int32 [B, N], which word of the flattened batch stands there.
      noise: int32 [B, T], random sub-words, for models of these.
    """

    masked: jax.Array
    replaced: jax.Array
    source: jax.Array
    noise: jax.Array


class Scores(struct.PyTreeNode):
    """Predictions of K words a row.

    Attributes:
      log_probs: float32 [B, K, J], of each piece (and a word's end, where the model predicts it).
      counted: bool [B, K, J], where there is one.
      right: bool [B, K, J], the likeliest, or not counted.
    """

    log_probs: jax.Array
    counted: jax.Array
    right: jax.Array


class Reader(NamedTuple):
    """A model of rows as pure functions.

    Attributes:
      init: key -> parameters: 'head' is needed to predict, the others to read.
      predict: (params, batch, Corruption or None, places int [B, K]) -> Scores of the words that
        stand at `places` of the uncorrupted row; a causal model sees the words before only.
      summary: (params, batch) -> [B, D], the state of [CLS].
    """

    init: Callable[[jax.Array], Any]
    predict: Callable[[Any, Batch, Corruption | None, jax.Array], Scores]
    summary: Callable[[Any, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """A reader as data, for files and recipes.

    On a mesh readers lie on the data axis alone: tables of five and of V + 1 rows do not divide.

    Attributes:
      reads: 'words' (Byte2Word) or 'subwords' (the baseline).
      backbone: over these.
      encoder: of words; not used for sub-words.
      head: gives V and J for both.
      num_classes: 0 for a pre-trained model with its head; else a classifier without one.
    """

    reads: str
    backbone: TransformerConfig
    encoder: WordEncoderConfig
    head: HeadConfig
    num_classes: int = 0

    def __post_init__(self) -> None:
        check_choice("reads", self.reads, READS)
        size = len(caw.SPECIALS) + (self.head.vocab_size if self.reads == "subwords" else 0)
        if self.backbone.vocab_size != size:
            raise InputError(f"backbone.vocab_size: {self.backbone.vocab_size} must be {size}")

    @property
    def model(self) -> WordModelConfig:
        """Encoder and backbone of a model of words."""
        return WordModelConfig(self.backbone, self.encoder)

    # What decoding asks of any architecture; tokens are the bytes of `models.spaced_words`.

    @property
    def family(self) -> str:
        return KIND

    @property
    def causal(self) -> bool:
        return self.backbone.causal

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (spaced_words.END_OF_TEXT,)

    @property
    def max_position(self) -> int:
        """Bytes that surely fit: a word has at least one, its flag, and [CLS] has a place too."""
        return self.backbone.max_position - 1

    def replace(self, **changes: Any) -> "ReaderConfig":
        """A copy with `changes`; `dtype` is the backbone's."""
        if "dtype" in changes:
            changes["backbone"] = self.backbone.replace(dtype=changes.pop("dtype"))
        return dataclasses.replace(self, **changes)


def config_of(**fields: Any) -> ReaderConfig:
    """A `ReaderConfig` from what JSON holds of one."""
    backbone = dict(fields.pop("backbone"))
    backbone["rope"] = RopeConfig(**backbone["rope"])
    for name in ("local_layers", "eos_token_ids"):
        backbone[name] = tuple(backbone[name])
    return ReaderConfig(
        backbone=TransformerConfig(**backbone),
        encoder=WordEncoderConfig(**fields.pop("encoder")),
        head=HeadConfig(**fields.pop("head")),
        **fields,
    )


def reader(config: ReaderConfig) -> "Reader":
    """The functions of a reader."""
    if config.reads == "words":
        return word_reader(config.model, config.head)
    return subword_reader(config.backbone, config.head.num_slots)


def param_shapes(config: ReaderConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of a reader's parameters."""
    shapes = jax.eval_shape(reader(config).init, jax.random.key(0))
    if config.num_classes:
        del shapes["head"]
        C = config.num_classes
        shapes["classifier"] = {
            "kernel": jax.ShapeDtypeStruct((config.backbone.embed_dim, C), jnp.float32),
            "bias": jax.ShapeDtypeStruct((C,), jnp.float32),
        }
    return shapes


def num_input_params(config: ReaderConfig, params: Any) -> int:
    """Parameters between text and backbone: of the word encoder, or the table of sub-words."""
    if config.reads == "words":
        return caw.num_input_params(params)
    return int(params["backbone"]["embedder"]["embedding"].size)


def save(directory: Any, config: ReaderConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: Any) -> tuple[ReaderConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, config_of, param_shapes)


def load_config(directory: Any) -> ReaderConfig:
    """The config alone; errors as `parameter_files.load`."""
    return parameter_files.load_config(directory, KIND, config_of)


def load_writer(directory: Any) -> tuple[ReaderConfig, Any]:
    """As `load`, with what the directory's sub-words are written with among the parameters.

    They are `pieces`, of `WordPieces.writing`, and `decoding.word_subwords` reads them.

    Raises:
      InputError: a model whose head has another number of sub-words; as `load`.
    """
    config, params = load(directory)
    pieces = word_pieces.load(directory)
    if pieces.vocab_size != config.head.vocab_size:
        raise InputError(
            f"{directory}: {pieces.vocab_size} sub-words; head.vocab_size is "
            f"{config.head.vocab_size}"
        )
    return config, {**params, "pieces": jax.tree.map(jnp.asarray, pieces.writing())}


def word_reader(model: WordModelConfig, head: HeadConfig) -> Reader:
    """Byte2Word: a place a word."""
    if head.embed_dim != model.backbone.embed_dim:
        raise InputError(f"head.embed_dim: {head.embed_dim} must be {model.backbone.embed_dim}")

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return {**caw.init(model, first), "head": subword_heads.init(head, second)}

    def read(params: Any, batch: Batch, corruption: Corruption | None) -> jax.Array:
        symbols, lengths, special = batch["symbols"], batch["lengths"], batch["special"]
        if corruption is not None:
            flat = symbols.reshape(-1, symbols.shape[-1])
            replaced = corruption.replaced
            symbols = jnp.where(replaced[..., None], flat[corruption.source], symbols)
            lengths = jnp.where(replaced, lengths.reshape(-1)[corruption.source], lengths)
            special = jnp.where(corruption.masked, caw.MASK, special)
        return caw.apply(model, params, symbols, lengths, special)[0]

    def predict(
        params: Any, batch: Batch, corruption: Corruption | None, places: jax.Array
    ) -> Scores:
        hidden = read(params, batch, corruption)
        # Words that are asked for are gathered first: the head never sees the others.
        mine = _gather(hidden, places - model.backbone.causal)
        pieces, counts = _gather(batch["pieces"], places), _gather(batch["counts"], places)
        B, K, J = pieces.shape
        flat = (mine.reshape(B * K, -1), pieces.reshape(B * K, J), counts.reshape(-1))
        log_probs, right = subword_heads.score(head, params["head"], *flat)
        counted = subword_heads.slot_mask(head, pieces, counts)
        return Scores(log_probs.reshape(B, K, J), counted, right.reshape(B, K, J))

    return Reader(init, predict, lambda params, batch: read(params, batch, None)[:, 0])


def subword_reader(model: TransformerConfig, num_slots: int) -> Reader:
    """The baseline: a place a sub-word; ids V + s are the special words of `caw.SPECIALS`.

    As in BERT, predictions go through a transformed state and the input's table.
    """
    mask_id = model.vocab_size - len(caw.SPECIALS) + caw.MASK

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        hidden = jnp.zeros((1, model.embed_dim))
        head = _TiedHead(model).init(second, hidden)["params"]
        return {"backbone": transformer.init(model, first), "head": head}

    def read(params: Any, batch: Batch, corruption: Corruption | None) -> jax.Array:
        tokens, words = batch["tokens"], batch["words"]
        if corruption is not None:
            masked, replaced = (
                jnp.take_along_axis(jnp.pad(which, ((0, 0), (0, 1))), words, axis=1)
                for which in (corruption.masked, corruption.replaced)
            )
            tokens = jnp.where(masked, mask_id, tokens)
            tokens = jnp.where(replaced, corruption.noise, tokens)
        mask = None
        if not model.causal:
            seen = words < batch["special"].shape[1]
            mask = jnp.broadcast_to(seen[:, None], (*seen.shape, seen.shape[1]))
        return transformer.apply(
            model, params["backbone"], tokens, mask=mask, with_logits=False
        ).hidden

    def predict(
        params: Any, batch: Batch, corruption: Corruption | None, places: jax.Array
    ) -> Scores:
        hidden = read(params, batch, corruption)
        pieces, counts = _gather(batch["pieces"], places), _gather(batch["counts"], places)
        B, K, J = pieces.shape
        at = _gather(batch["first"], places)[..., None] + jnp.arange(J)
        at = jnp.clip(at - model.causal, 0, hidden.shape[1] - 1)
        mine = _gather(hidden, at.reshape(B, K * J)).reshape(B, K, J, -1)
        transformed: Any = _TiedHead(model).apply({"params": params["head"]}, mine)
        found = transformer.unembed(model, params["backbone"], transformed)
        found = found + params["head"]["bias"]
        chosen = jnp.arange(model.vocab_size) == pieces[..., None]
        picked = jnp.sum(jnp.where(chosen, found, 0.0), axis=-1)
        counted = jnp.arange(num_slots) < counts[..., None]
        log_probs = jnp.where(counted, picked - jax.nn.logsumexp(found, axis=-1), 0.0)
        return Scores(log_probs, counted, (found.argmax(axis=-1) == pieces) | ~counted)

    return Reader(init, predict, lambda params, batch: read(params, batch, None)[:, 0])


class _TiedHead(nn.Module):
    """BERT's transform of a state before the product with the table, and the logits' bias."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))
        x = jax.nn.gelu(Dense((self.config.embed_dim,), 1, True, name="transform")(x))
        return Norm(self.config, name="norm")(x)


def _gather(values: jax.Array, places: jax.Array) -> jax.Array:
    """values [B, N, ...] at places [B, K]: [B, K, ...]."""
    return jax.vmap(lambda row, at: row[at])(values, places)
