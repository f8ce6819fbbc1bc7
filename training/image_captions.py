"""Captions of images as vectors: what a frozen language model makes of them, kept by content hash.

The text variant of ENAT (arXiv 2411.06959, MS-COCO) is not public; this is the simplest form of
one. A caption's vector is the mean of a language model's final hidden states over the caption's
tokens, computed once, as the images' own tokens are.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from models import hf_checkpoint, masks, transformer
from models.config import TransformerConfig
from models.enat import TextENATConfig
from models.errors import InputError, check_choice, nearest
from models.tokenizer import Tokenizer
from training import artifacts, checkpoints, image_batches
from training.datasets.registry import Examples
from training.image_batches import ImageData
from training.image_tokens import TokenImages
from training.masked_image import MaskedImageModel

CHOICES = ("first", "every")
_VECTORS, _TEXTS = "vectors.safetensors", "texts.json"
_ROWS, _ROUND = 64, 16  # texts of a call; lengths are multiples, for few shapes to compile


@dataclasses.dataclass(frozen=True)
class Captions:
    """Where captions come from and what makes vectors of them.

    Attributes:
      text_model: a language model, by its name in `base_models.RECIPES` or as a directory in
        Hugging Face's format.
      field: the feature that holds an image's caption or captions; 'captions.text' for the
        field `text` of the captions of tfds' coco_captions.
      choice: 'first' for the first caption of each image, 'every' for all of them, each an
        example: over an epoch an image is seen with each of its captions, in a random order.
      max_tokens: captions are cut there.
    """

    text_model: str = "code_target"
    field: str = "caption"
    choice: str = "first"
    max_tokens: int = 128

    def __post_init__(self) -> None:
        check_choice("captions.choice", self.choice, CHOICES)
        if self.max_tokens < 1:
            raise InputError(f"captions.max_tokens: {self.max_tokens} must be at least 1")


@dataclasses.dataclass(frozen=True)
class CaptionedImageModel(MaskedImageModel):
    """The recipe of a masked model of image tokens that is conditioned on captions.

    Attributes:
      captions: see `Captions`; `train.model` is a `TextENATConfig` of the text model's width.
    """

    captions: Captions = dataclasses.field(default_factory=Captions)

    def __post_init__(self) -> None:
        if not isinstance(self.train.model, TextENATConfig):
            raise InputError("train.model: an image model with captions needs a TextENATConfig")
        if self.flip:
            raise InputError("flip: True, but captions may speak of left and right")

    @property
    def parents(self) -> dict[str, str]:
        return {**super().parents, "text_model": self.captions.text_model}


class TextVectors(NamedTuple):
    """The captions of a dataset's images.

    Attributes:
      vectors: float32 [t, E], of different texts.
      texts: these, [t].
      text_of: int32 [n], the text of each (image, caption) pair.
      image_of: int32 [n], its image, ascending.
    """

    vectors: np.ndarray
    texts: list[str]
    text_of: np.ndarray
    image_of: np.ndarray


def statistics(captions: TextVectors) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation float32 [E] of the vectors of all pairs.

    The deviation of a feature is not below a hundredth of the mean one: what hardly varied in
    training is not blown up later.
    """
    vectors = captions.vectors[captions.text_of]
    deviation = vectors.std(0)
    return vectors.mean(0), np.maximum(deviation, max(0.01 * deviation.mean(), 1e-6))


class CaptionedTokens(Sequence):
    """A random-access source of {ids: int32 [N], labels: int32 [], text: float32 [E]}.

    Args:
      tokens: of the images, not mirrored.
      captions: of the same images; each pair is an example.

    Attributes:
      captions: as given.
    """

    def __init__(self, tokens: TokenImages, captions: TextVectors):
        self._tokens, self.captions = tokens, captions

    def __len__(self) -> int:
        return len(self.captions.image_of)

    def __getitem__(self, index: Any) -> Any:
        found = self.captions
        example = self._tokens[found.image_of[index]]
        return {**example, "text": found.vectors[found.text_of[index]]}


def captions_of(example: Mapping[str, Any], field: str) -> list[str]:
    """The captions of an example, in order: one text, or a sequence of texts.

    Raises:
      InputError: a field that is not there, or without text.
    """
    value: Any = example
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = sorted(value) if isinstance(value, Mapping) else []
            raise InputError(
                f"captions.field: {field!r} is not a field{nearest(part, known)}; allowed: "
                f"{', '.join(known)}"
            )
        value = value[part]
    if isinstance(value, str | bytes):
        value = [value]
    values = value if isinstance(value, list | np.ndarray) else ()
    texts = [text.decode() if isinstance(text, bytes) else text for text in values]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"captions.field: {field!r} holds {value!r}, which is not text")
    return texts


def text_vectors(
    directory: str | os.PathLike[str], texts: Sequence[str], max_tokens: int = 128
) -> np.ndarray:
    """Mean final hidden states, float32 [t, E]. A text's vector does not depend on the others.

    The text is read as the model was trained, with what the tokeniser puts around one, such as
    a beginning of sequence, but that is not in the mean. A text without tokens has the vector
    of zeros, which is the null condition.

    Args:
      directory: a language model in Hugging Face's format, with its tokeniser.
      texts: any number.
      max_tokens: of the model's; a text is cut there.

    Raises:
      InputError: as `hf_checkpoint.load` and `Tokenizer.from_directory`.
    """
    config, params = hf_checkpoint.load(directory)
    tokenizer = Tokenizer.from_directory(directory, config)
    tokens = [tokenizer.encode_prompt(text)[:max_tokens] for text in texts]
    rooms = [-(-max(1, len(ids)) // _ROUND) * _ROUND for ids in tokens]
    found = np.zeros((len(texts), config.embed_dim), np.float32)
    for room in sorted(set(rooms)):
        members = [i for i, mine in enumerate(rooms) if mine == room]
        for first in range(0, len(members), _ROWS):
            rows = members[first : first + _ROWS]
            ids, counted = np.zeros((_ROWS, room), np.int32), np.zeros((_ROWS, room), bool)
            lengths = np.zeros(_ROWS, np.int32)
            for row, i in enumerate(rows):
                lengths[row] = len(tokens[i])
                ids[row, : lengths[row]] = tokens[i]
                counted[row, _place(tokenizer.encode(texts[i]), tokens[i])] = True
            means = _means(config, params, ids, lengths, counted)
            found[rows] = np.asarray(means)[: len(rows)]
    return found


def _place(ids: Sequence[int], within: Sequence[int]) -> slice:
    """Where `ids` lie in a sequence that has them, or as many as there is room for."""
    for start in range(len(within)):
        if (part := within[start : start + len(ids)]) and part == ids[: len(part)]:
            return slice(start, start + len(part))
    return slice(0, 0)


@functools.partial(jax.jit, static_argnums=0)
def _means(
    config: TransformerConfig, params: Any, ids: jax.Array, lengths: jax.Array, counted: jax.Array
) -> jax.Array:
    """Means [B, D] over the `counted` tokens of ids [B, T], of which `lengths` [B] are real."""
    T = ids.shape[1]
    mask = None
    if not config.causal:
        mask = masks.full(jnp.arange(T) < jnp.maximum(lengths, 1)[:, None], T)
    hidden = transformer.apply(config, params, ids, mask=mask, with_logits=False).hidden
    total = jnp.where(counted[..., None], hidden.astype(jnp.float32), 0).sum(1)
    return total / jnp.maximum(counted.sum(1), 1)[:, None]


def fingerprint(directory: pathlib.Path) -> str:
    """A hash of what determines a text model's vectors: config, weights, tokeniser."""
    tokenizer = Tokenizer.from_directory(directory, hf_checkpoint.load_config(directory))
    return artifacts.digest(
        {"model": artifacts.content_hash(directory), "tokenizer": tokenizer.fingerprint}
    )


def read(examples: Examples, captions: Captions) -> list[tuple[int, str]]:
    """(image, caption) pairs of the chosen captions, in order; errors as `captions_of`."""
    pairs = []
    for image in range(len(examples)):
        texts = captions_of(examples[image], captions.field)
        pairs += [(image, text) for text in (texts[:1] if captions.choice == "first" else texts)]
    return pairs


def ensure(
    text_model: pathlib.Path,
    captions: Captions,
    data: ImageData,
    split: str,
    cache: pathlib.Path,
) -> TextVectors:
    """The captions of one split and their vectors, computed first if no run has done so.

    Args:
      text_model: directory of the language model.
      captions: which of an image's captions; `text_model` is not read.
      data, split, cache: as in `image_tokens.ensure`, and vectors are kept beside the tokens.

    Raises:
      InputError: as `captions_of` and `text_vectors`; files that cannot be read or written.
    """
    size = data.sizes[0]
    identity = {
        "text_model": fingerprint(text_model),
        "captions": {**dataclasses.asdict(captions), "text_model": None},
        "data": image_batches.load_images(data, split, size, cache).identity,
        "split": split,
    }
    name = f"{pathlib.Path(data.dataset).name}-{split}-captions-{artifacts.digest(identity)}"

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        pairs = read(image_batches.load_examples(data, split, size, cache), captions)
        texts = sorted({text for _, text in pairs})
        number = {text: i for i, text in enumerate(texts)}
        arrays = {
            "vectors": text_vectors(text_model, texts, captions.max_tokens),
            "text_of": np.array([number[text] for _, text in pairs], np.int32),
            "image_of": np.array([image for image, _ in pairs], np.int32),
        }
        with checkpoints.disk_errors("cannot write text vectors", result):
            result.mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(arrays, result / _VECTORS)
            checkpoints.write_json(result / _TEXTS, texts)

    final = artifacts.cached(cache / "image_tokens" / name, make)
    try:
        arrays = safetensors.numpy.load_file(final / _VECTORS)
        texts = json.loads((final / _TEXTS).read_text(encoding="utf-8"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{final}: cannot be read ({error})") from None
    return TextVectors(arrays["vectors"], texts, arrays["text_of"], arrays["image_of"])
