"""Images as grids of token ids: encoded once by a tokeniser, kept by content hash.

As ENAT and MaskGIT train: the tokeniser is frozen, so every image and, where mirrored images are
of the same class, its mirror image is encoded once and models read ids only.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from models import vq
from models.errors import InputError
from models.vq import VQConfig
from training import artifacts, checkpoints, image_batches
from training.image_batches import ImageData, LabelledImages

_FILE = "tokens.safetensors"
_ROWS = 64


class TokenImages(Sequence):
    """A random-access source of {ids: int32 [N], labels: int32 []}, in raster order.

    Attributes:
      ids: int32 [n, N].
      labels: int32 [n].
      identity: what they are, by content.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, identity: str = ""):
        self.ids, self.labels, self.identity = ids, labels, identity

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return {"ids": self.ids[index], "labels": self.labels[index]}


def tokenise(
    config: VQConfig, params: Any, source: LabelledImages, *, flip: bool = False
) -> TokenImages:
    """Encodes every image of `source` (of one size), and its mirror image if `flip`."""
    encode = jax.jit(vq.encode, static_argnums=0)
    ids, labels = [], []
    for batch in image_batches.in_order(source, _ROWS):
        images, count = batch["images"], len(batch["labels"])
        for view in (images, images[:, :, ::-1]) if flip else (images,):
            fill = np.zeros((_ROWS - count, *view.shape[1:]), view.dtype)  # one shape to compile
            found = np.asarray(encode(config, params, np.concatenate([view, fill])))
            ids.append(found[:count].reshape(count, -1))
            labels.append(batch["labels"])
    return TokenImages(np.concatenate(ids), np.concatenate(labels))


def ensure(
    tokenizer: pathlib.Path,
    data: ImageData,
    split: str,
    cache: pathlib.Path,
    *,
    flip: bool = False,
) -> TokenImages:
    """The tokens of one split at `data.sizes[0]`, encoded first if no run has done so.

    Args:
      tokenizer: directory of a tokeniser.
      data: the images; of one size.
      split: in tfds' notation.
      cache: where tokens are kept.
      flip: also the mirror images.

    Raises:
      InputError: several sizes; files that cannot be read or written.
    """
    if len(data.sizes) != 1:
        raise InputError(f"data.sizes: {data.sizes} must be one size")
    source = image_batches.load_images(data, split, data.sizes[0], cache)
    identity = {
        "tokenizer": artifacts.content_hash(tokenizer),
        "data": source.identity,
        "split": split,
        "flip": flip,
    }
    name = f"{pathlib.Path(data.dataset).name}-{split}-{artifacts.digest(identity)}"
    final = cache / "image_tokens" / name

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        found = tokenise(*vq.load(tokenizer), source, flip=flip)
        arrays = {"ids": found.ids, "labels": found.labels}
        with checkpoints.disk_errors("cannot write tokens", result):
            result.mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(arrays, result / _FILE)

    path = artifacts.cached(final, make) / _FILE
    try:
        arrays = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    return TokenImages(arrays["ids"], arrays["labels"], final.name)
