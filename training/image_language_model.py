"""Autoregressive models of image codes: images in, a Transformer over [class, codes] rows out.

A thin layer over `training.language_model`: images are encoded once by a frozen tokeniser, every
row is the class token and the codes of one image in raster order, and now and then the class is
replaced by the null class, so that the model can be guided. See `decoding.images.image_tokens` for
the vocabulary.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from models import vq
from models.config import TransformerConfig
from models.errors import InputError
from training import image_batches, language_model, loop
from training.image_batches import ImageData, LabelledImages
from training.language_model import TrainConfig

Batch = dict[str, np.ndarray]
_ENCODE_ROWS = 64


@dataclasses.dataclass(frozen=True)
class ImageLanguageModel:
    """The recipe of an autoregressive image model.

    Attributes:
      data: labelled images of one size.
      train: the run. `sequence_length` is N, codes of an image; the model's vocabulary is the
        tokeniser's codes, `num_classes` and the null class.
      num_classes: labels are below this.
      tokenizer: a recipe of `training.image_models`, or the directory of a `models.vq` model.
      class_dropout: share of rows that are shown with the null class.
      eval_images: of the validation split, at most.
    """

    data: ImageData
    train: TrainConfig
    num_classes: int
    tokenizer: str
    class_dropout: float = 0.1
    eval_images: int = 512

    def __post_init__(self) -> None:
        if len(self.data.sizes) != 1:
            raise InputError(f"data.sizes: {self.data.sizes} must be one size")
        if not 0 <= self.class_dropout < 1:
            raise InputError(f"class_dropout: {self.class_dropout} must be at least 0 and below 1")

    @property
    def parents(self) -> dict[str, str]:
        """Models that it is made from, by role."""
        return {"tokenizer": self.tokenizer}


def architecture(
    *, side: int, num_codes: int, num_classes: int, layers: int, width: int, head_dim: int = 32
) -> TransformerConfig:
    """A pre-norm Transformer with learned positions, as OPT and Image GPT have them.

    Args:
      side: n; there are n * n codes and a class token.
      num_codes, num_classes: the vocabulary, with the null class.
      layers, width, head_dim: sizes.
    """
    return TransformerConfig(
        family="opt",
        vocab_size=num_codes + num_classes + 1,
        embed_dim=width,
        num_layers=layers,
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        mlp_dim=4 * width,
        max_position=side * side + 1,
        norm="layernorm",
        norm_eps=1e-5,
        activation="relu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        position_offset=2,
        tie_embeddings=True,
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: vq.VQConfig, params: Any, images: jax.Array) -> jax.Array:
    return vq.encode(config, params, images).reshape(len(images), -1)


class CodeRows:
    """A random-access source of {codes: int32 [N], labels: int32 []}, encoded once, in memory.

    Args:
      config, params: the tokeniser, from `models.vq`.
      images: what to encode.
      limit: images at most, the first ones.
    """

    def __init__(
        self, config: vq.VQConfig, params: Any, images: LabelledImages, limit: int | None = None
    ):
        codes, labels = [], []
        for batch in image_batches.in_order(images, _ENCODE_ROWS, limit):
            rows = len(batch["images"])
            # The last batch is filled up: one shape to compile.
            full = np.pad(batch["images"], ((0, _ENCODE_ROWS - rows), (0, 0), (0, 0), (0, 0)))
            codes.append(np.asarray(_encode(config, params, jnp.asarray(full)))[:rows])
            labels.append(batch["labels"])
        self.codes = np.concatenate(codes).astype(np.int32)
        self.labels = np.concatenate(labels).astype(np.int32)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Batch:
        return {"codes": self.codes[index], "labels": self.labels[index]}


class _DropClass(grain.transforms.RandomMap):
    """Replaces the label by the null class now and then."""

    def __init__(self, null: int, probability: float):
        self._null, self._probability = null, probability

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        if rng.random() < self._probability:
            return {**element, "labels": np.asarray(self._null, np.int32)}
        return element


def to_fields(batch: Mapping[str, np.ndarray], num_codes: int) -> Batch:
    """The fields that `language_model` reads, from codes [B, N] and labels [B].

    Tokens are the class and all codes but the last, targets the codes. `target_bytes` is 1, so that
    bits per byte are bits per code.
    """
    codes, labels = batch["codes"], batch["labels"]
    tokens = np.concatenate([num_codes + labels[:, None], codes[:, :-1]], axis=1)
    ones = np.ones_like(codes)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": codes,
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(codes.shape[1], dtype=np.int32), codes.shape),
        "loss_mask": ones.astype(np.float32),
        "target_bytes": ones,
    }


def train_batches(
    rows: CodeRows, chosen: ImageLanguageModel, num_codes: int
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of shuffled batches, whose position can be saved and restored."""
    size = chosen.train.batch_size // jax.process_count()
    if len(rows) < size:
        raise InputError(f"batch_size: {size} exceeds the {len(rows)} images that there are")
    order = int(np.random.SeedSequence(chosen.train.seed).generate_state(1)[0])
    dataset = grain.MapDataset.source(rows)[jax.process_index() :: jax.process_count()]
    dataset = dataset.seed(order).shuffle().repeat()
    dataset = dataset.random_map(_DropClass(chosen.num_classes, chosen.class_dropout))
    dataset = dataset.batch(size).map(functools.partial(to_fields, num_codes=num_codes))
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(read))


def eval_batches(rows: CodeRows, batch_size: int, num_codes: int) -> Iterator[Batch]:
    """One pass in order over whole batches; the loss mask hides the filling of the last."""
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        short = batch_size - len(rows.labels[part])
        codes = np.pad(rows.codes[part], ((0, short), (0, 0)))
        batch = to_fields(
            {"codes": codes, "labels": np.pad(rows.labels[part], (0, short))}, num_codes
        )
        batch["loss_mask"][batch_size - short :] = 0
        yield batch


def check(chosen: ImageLanguageModel, tokenizer: vq.VQConfig) -> None:
    """Raises InputError where recipe, architecture and tokeniser do not fit together."""
    side = chosen.data.sizes[0] // tokenizer.factor
    if chosen.train.sequence_length != side * side:
        raise InputError(
            f"train.sequence_length: {chosen.train.sequence_length} must be {side * side}, the "
            f"codes of {chosen.data.sizes[0]} pixels at {tokenizer.factor} pixels a code"
        )
    needed = tokenizer.codebook_size + chosen.num_classes + 1
    if chosen.train.model.vocab_size != needed:
        raise InputError(
            f"train.model.vocab_size: {chosen.train.model.vocab_size} must be {needed}: codes, "
            "classes and the null class"
        )


def train(
    chosen: ImageLanguageModel,
    tokenizer: pathlib.Path,
    cache: pathlib.Path,
    **run: Any,
) -> loop.Result:
    """Trains an image model, or goes on where its work directory left off.

    Args:
      chosen: the recipe.
      tokenizer: directory of the tokeniser.
      cache: where our own datasets are kept.
      **run: workdir, identity and description of `language_model.train`.

    Returns:
      As `language_model.train`: `eval_loss` is nats a code, `eval_bits_per_byte` bits a code.

    Raises:
      InputError: as `check` and `language_model.train`.
    """
    config, params = vq.load(tokenizer)
    check(chosen, config)
    data, size = chosen.data, chosen.data.sizes[0]
    images = {
        split: image_batches.load_images(data, split, size, cache)
        for split in (data.train_split, data.eval_split)
    }
    rows = CodeRows(config, params, images[data.train_split])
    held_out = CodeRows(config, params, images[data.eval_split], chosen.eval_images)
    per_process = chosen.train.batch_size // jax.process_count()
    return language_model.train(
        chosen.train,
        train_batches=train_batches(rows, chosen, config.codebook_size),
        eval_batches=list(eval_batches(held_out, per_process, config.codebook_size)),
        **run,
    )
