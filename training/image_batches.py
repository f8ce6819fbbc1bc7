"""Labelled images as batches: crop, scale, shuffle, shard, resume.

Any tfds dataset with an image and a label will do: the digits made here, or imagenet2012 prepared
as array_record. Captioned images (`image_captions`) need no label.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import PIL.Image

from models.errors import InputError, nearest
from training.datasets import registry
from training.datasets.registry import Examples

Batch = dict[str, np.ndarray]


class LabelledImages(Sequence):
    """A random-access source of {images: float32 [H, W, C] in [0, 1], labels: int32 []}.

    Args:
      examples: with an image uint8 [H, W, C] and an integer label.
      size: pixels a side that images are brought to: the largest centred square, scaled (area
        averages down, bicubic up). None where all images have one size already.
      image_field, label_field: names of the features. A label of several numbers counts by its
        first; without a label field every label is -1.

    Raises:
      InputError: no examples, or a field that is missing.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        size: int | None = None,
        image_field: str = "image",
        label_field: str | None = "label",
    ):
        if not len(examples):
            raise InputError("examples: the data source has no examples")
        for name, field in (("image_field", image_field), ("label_field", label_field)):
            if field is not None and field not in (first := examples[0]):
                raise InputError(
                    f"{name}: {field!r} is not among the fields{nearest(field, first)}; allowed: "
                    f"{', '.join(sorted(first))}"
                )
        # What the images are, by content.
        self.identity = examples.full_name + (f" cropped to {size}" if size else "")
        self._examples, self._size = examples, size
        self._image, self._label = image_field, label_field

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        example = self._examples[index]
        image = example[self._image]
        if self._size is not None and image.shape[:2] != (self._size, self._size):
            image = centre_crop(image, self._size)
        label = -1 if self._label is None else np.asarray(example[self._label]).reshape(-1)[0]
        return {"images": image.astype(np.float32) / 255, "labels": np.int32(label)}


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square of uint8 [H, W, C], scaled to uint8 [size, size, C]."""
    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    picture = PIL.Image.fromarray(square[..., 0] if channels == 1 else square)
    method = PIL.Image.Resampling.BOX if size < side else PIL.Image.Resampling.BICUBIC
    return np.asarray(picture.resize((size, size), method)).reshape(size, size, channels)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Where images come from.

    Attributes:
      dataset: a name that `training.datasets.registry.load` knows, such as 'digit_scenes' or
        'imagenet2012'.
      options: of the dataset's builder, without `size`.
      sizes: pixels a side; each is a source of its own.
      train_split, eval_split: in tfds' notation.
      data_dir: where a public dataset is prepared; None for tfds' default. (Our own are kept in
        the cache.)
      image_field, label_field: names of the features; `label_field` None where there is none.
    """

    dataset: str = "digit_scenes"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = (32,)
    train_split: str = "train"
    eval_split: str = "validation"
    data_dir: str | None = None
    image_field: str = "image"
    label_field: str | None = "label"

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"data.sizes: {self.sizes} must be positive numbers of pixels")


def load_examples(data: ImageData, split: str, size: int, cache: pathlib.Path) -> Examples:
    """One split as it is stored; of our own datasets, at one size."""
    options, folder = dict(data.options), data.data_dir
    if data.dataset in registry.BUILDERS:
        options["size"], folder = size, str(cache / "datasets")
    return registry.load(data.dataset, split, data_dir=folder, **options)


def load_images(data: ImageData, split: str, size: int, cache: pathlib.Path) -> LabelledImages:
    """One split at one size; our own datasets are drawn at that size, others cropped to it."""
    return LabelledImages(
        load_examples(data, split, size, cache),
        size=None if data.dataset in registry.BUILDERS else size,
        image_field=data.image_field,
        label_field=data.label_field,
    )


def data_identity(data: ImageData, cache: pathlib.Path) -> list[str]:
    """What the images are, by content: a name for each size."""
    return [load_images(data, data.train_split, size, cache).identity for size in data.sizes]


def train_batches(
    sources: Sequence[tuple[Sequence[Any], int]],
    *,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of shuffled batches, whose position can be saved and restored.

    Args:
      sources: (source of dicts of arrays, rows of this process's batches of it). Their batches
        come in turn, each source in a new random order every epoch.
      seed: of the order.
      process_index, process_count: this process reads every `process_count`-th example.

    Raises:
      InputError: no sources, a batch size below 1, or fewer examples than a batch.
    """
    if not sources:
        raise InputError("sources: there are none")
    mixed = []
    for source, rows in sources:
        if not 1 <= rows <= len(source) // process_count:
            raise InputError(
                f"batch_size: {rows} must be between 1 and {len(source) // process_count}, the "
                "examples that a process has"
            )
        # grain shuffles epoch e with seed + e; hashed, so that seeds do not share epochs.
        order = int(np.random.SeedSequence(seed).generate_state(1)[0])
        dataset = grain.MapDataset.source(source)[process_index::process_count]
        mixed.append(dataset.shuffle(seed=order).repeat().batch(rows))
    # Examples are small and mostly in memory: reader threads would only add overhead.
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.mix(mixed).to_iter_dataset(read))


def in_order(source: Sequence[Any], rows: int, limit: int | None = None) -> Iterator[Batch]:
    """One pass in order, batches of `rows`; the last one may be smaller. At most `limit` rows."""
    total = len(source) if limit is None else min(limit, len(source))
    for first in range(0, total, rows):
        examples = [source[i] for i in range(first, min(first + rows, total))]
        yield {name: np.stack([e[name] for e in examples]) for name in examples[0]}
