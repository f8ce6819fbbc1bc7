"""Handwritten digits at several aligned resolutions: scikit-learn's 8x8 digits, alone or in a grid.

An image is drawn once at `MASTER` pixels and averaged down, so that example i of one size is
example i of every other size, seen coarser or finer.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity

MASTER = 64
SIZES = (16, 32, 64)
GRIDS = (1, 2)
NUM_CLASSES = 10
_SOURCE_SIDE = 8  # pixels of scikit-learn's images, whose values are 0 to 16
_SCALES = (0.8, 1.0)  # a digit's side as a share of its cell
_SHIFT = 0.08  # largest, either way, as a share of the cell
_INTENSITIES = (0.75, 1.0)
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@functools.cache
def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: float32 [1797, 8, 8] in [0, 1], and their labels int64 [1797]."""
    from sklearn import datasets  # a second to import

    images, labels = datasets.load_digits(return_X_y=True)
    return images.reshape(-1, _SOURCE_SIDE, _SOURCE_SIDE).astype(np.float32) / 16, labels


def split_of(source: int) -> str:
    """The split of a source digit: 'train' (8 in 10), 'validation' or 'test' (1 in 10 each)."""
    bucket = identity.rank(f"digit/{source}") % 10
    return identity.SPLITS[max(0, bucket - 7)]


def draw_digit(digit: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A digit float32 [8, 8] in a cell float32 [side, side], by cubic interpolation.

    Scale, shift and intensity are drawn from `rng`; their draws do not depend on `side`.
    """
    scale = rng.uniform(*_SCALES)
    shift = rng.uniform(-_SHIFT, _SHIFT, size=2)
    intensity = rng.uniform(*_INTENSITIES)
    step = _SOURCE_SIDE / (side * scale)  # source pixels a drawn pixel
    # Pixel centres: the cell's centre, shifted, lies over the digit's centre.
    centre = (side - 1) / 2 + shift * side
    offset = (_SOURCE_SIDE - 1) / 2 - step * centre
    drawn = scipy.ndimage.affine_transform(
        digit, np.full(2, step), offset, output_shape=(side, side), order=3, mode="constant"
    )
    return np.clip(drawn, 0, 1) * np.float32(intensity)


def draw_scene(sources: list[int], grid: int, rng: np.random.Generator) -> np.ndarray:
    """The digits `sources`, grid x grid of them in reading order: float32 [MASTER, MASTER]."""
    images, _ = source_digits()
    cells = [draw_digit(images[source], MASTER // grid, rng) for source in sources]
    return np.block([cells[row * grid : (row + 1) * grid] for row in range(grid)])


def at_size(image: np.ndarray, size: int) -> np.ndarray:
    """Averages [MASTER, MASTER] in [0, 1] down to uint8 [size, size, 1]."""
    factor = MASTER // size
    pooled = image.reshape(size, factor, size, factor).mean(axis=(1, 3))
    return np.rint(pooled * 255).astype(np.uint8)[..., None]


def caption(labels: Sequence[int], grid: int) -> str:
    """A scene in words: 'three', or 'three and seven above one and zero'."""
    words = [_WORDS[label] for label in labels]
    rows = [words[row * grid : (row + 1) * grid] for row in range(grid)]
    return " above ".join(" and ".join(row) for row in rows)


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Digits as images; splits by source digit, so that no test digit is in training.

    Options:
      size: pixels a side, one of `SIZES`. Example i is the same scene at every size.
      grid: 1 for one digit, 2 for a scene of 2x2.
      variants: images for each source digit, which is the first of its scene; the others are
        drawn from the same split.
      seed: of the transformations and scenes.
      captions: whether examples say in words what they show; the images are the same.

    Examples: {image: uint8 [size, size, 1], label: the first digit, labels: int64 [grid * grid]
    in reading order}, and caption: see `caption`, if asked for.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self,
        *,
        size: int = 32,
        grid: int = 1,
        variants: int = 4,
        seed: int = 0,
        captions: bool = False,
        data_dir: str | None = None,
    ):
        for name, value, allowed in (("size", size, SIZES), ("grid", grid, GRIDS)):
            if value not in allowed:
                raise InputError(f"{name}: {value} must be one of {', '.join(map(str, allowed))}")
        for name, value, least in (("variants", variants, 1), ("seed", seed, 0)):
            if value < least:
                raise InputError(f"{name}: {value} must be at least {least}")
        self._size, self._grid, self._variants, self._seed = size, grid, variants, seed
        self._captions = captions
        options = {"size": size, "grid": grid, "variants": variants, "seed": seed}
        if captions:  # without them examples, and so their folder, are as ever
            options["captions"] = True
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(self._size, self._size, 1), dtype=np.uint8)
        labels = tfds.features.Tensor(shape=(self._grid**2,), dtype=np.int64)
        words = {"caption": tfds.features.Text()} if self._captions else {}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits at several aligned resolutions.",
            features=tfds.features.FeaturesDict(
                {"image": image, "label": np.int64, "labels": labels, **words}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        sources = range(len(source_digits()[1]))
        groups = identity.group((split_of(source), source) for source in sources)
        return {split: self._generate_examples(group) for split, group in groups.items()}

    def _generate_examples(self, pool: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        _, digit_labels = source_digits()
        scenes = ((variant, source) for variant in range(self._variants) for source in pool)
        for index, (variant, source) in enumerate(scenes):
            rng = np.random.default_rng((self._seed, variant, source))
            others = rng.choice(pool, size=self._grid**2 - 1)
            sources = [source, *map(int, others)]
            image = at_size(draw_scene(sources, self._grid, rng), self._size)
            labels = digit_labels[sources]
            words = {"caption": caption(labels.tolist(), self._grid)} if self._captions else {}
            yield index, {"image": image, "label": labels[0], "labels": labels, **words}
