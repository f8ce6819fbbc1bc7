"""What generated images are asked for, and how good they are.

Networks of classes are asked for the classes in turn, networks of texts for the captions of
held-out images. A classifier that is smaller than the images looks at each of their cells: in a
scene of four digits at each digit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import image_metrics
from experiments.image_networks import Networks
from models import files
from models.errors import InputError
from training import image_captions, image_tokens
from training.image_batches import load_examples, load_images


class Asked(NamedTuple):
    """What images are asked for: image i for row i of n, or i - n, i - 2 n, ...

    Attributes:
      conditions: classes int [n], or text vectors float32 [n, E].
      labels: int [n, c], what the classifier should take each cell for; None where images have
        no labels.
      texts: [n]; empty for classes.
      unseen: bool [n], captions that no training image has; None for classes and without labels.
    """

    conditions: np.ndarray
    labels: np.ndarray | None
    texts: list[str]
    unseen: np.ndarray | None


def asked(networks: Networks) -> Asked:
    """Classes in turn, or the first caption of each held-out image, in order."""
    if networks.captions is None or networks.text_directory is None:
        classes = np.arange(networks.num_classes)
        return Asked(classes, classes[:, None], [], None)
    data, cache = networks.data, files.cache_root()
    given = (networks.text_directory, networks.captions, data)
    found = image_captions.ensure(*given, data.eval_split, cache)
    first = found.text_of[np.unique(found.image_of, return_index=True)[1]]
    texts = [found.texts[text] for text in first]
    if data.label_field is None:
        return Asked(found.vectors[first], None, texts, None)
    trained = set(image_captions.ensure(*given, data.train_split, cache).texts)
    unseen = np.array([text not in trained for text in texts])
    return Asked(found.vectors[first], _labels(networks, len(texts)), texts, unseen)


def _labels(networks: Networks, count: int) -> np.ndarray:
    """Labels int [n, c] of the first held-out images."""
    data = networks.data
    examples = load_examples(data, data.eval_split, data.sizes[0], files.cache_root())
    field = data.label_field or ""
    labels = np.stack([np.reshape(examples[i][field], -1) for i in range(count)])
    if labels.shape[1] != (side := _cells_a_side(networks)) ** 2:
        raise InputError(
            f"data.label_field: {data.label_field!r} has {labels.shape[1]} labels; an image has "
            f"{side * side} cells of the classifier's size"
        )
    return labels


def _cells_a_side(networks: Networks) -> int:
    size, own = networks.data.sizes[0], networks.classifier[0].size
    if size % own:
        raise InputError(f"models.classifier: its size {own} must divide data.size {size}")
    return size // own


def cells(images: np.ndarray, side: int) -> np.ndarray:
    """Cells [n * side**2, H / side, W / side, C] of images [n, H, W, C], in reading order."""
    n, height, width, channels = images.shape
    split = images.reshape(n, side, height // side, side, width // side, channels)
    moved = split.transpose(0, 1, 3, 2, 4, 5)
    return moved.reshape(-1, height // side, width // side, channels)


def judge(
    config: ConfigDict, networks: Networks, wanted: Asked, images_of: Callable
) -> Callable[[np.ndarray | None], dict[str, float]]:
    """A function from ids int [n, N] of what is `wanted`, or None for the tokeniser's own images
    of held-out ones, to quality by name.

    With captions `scenes` is the share of images with all cells right, `unseen` the accuracy on
    captions that training did not have, and `other_caption` the accuracy that the images would
    have for the caption of the next one, which is chance.
    """
    data, side = networks.data, _cells_a_side(networks)
    source = load_images(data, data.eval_split, data.sizes[0], files.cache_root())
    count = min(len(source), config.quality.num_real)
    images = np.stack([source[i]["images"] for i in range(count)])
    features, logits = image_metrics.classify(*networks.classifier, cells(images, side))
    labels = None if data.label_field is None else _labels(networks, count)
    tokens = image_tokens.ensure(
        networks.tokenizer_directory, data, data.eval_split, files.cache_root()
    )
    real = np.asarray(tokens.ids[:count])
    tokens_a_side, codes = networks.side, networks.tokenizer[0].codebook_size

    def measure(ids: np.ndarray | None) -> dict[str, float]:
        mine = real if ids is None else ids
        rows = np.arange(len(mine)) % len(wanted.conditions)
        found, found_logits = image_metrics.classify(
            *networks.classifier, cells(images_of(mine), side)
        )
        quality = {}
        truth = labels if ids is None else None if wanted.labels is None else wanted.labels[rows]
        if truth is not None:
            quality["accuracy"] = image_metrics.class_accuracy(found_logits, truth.reshape(-1))
            if wanted.unseen is not None:
                quality |= _caption_accuracy(found_logits, truth, wanted.unseen[rows])
        precision, recall = image_metrics.precision_recall(features, found)
        quality |= {
            "frechet": image_metrics.frechet_distance(features, found),
            "precision": precision,
            "recall": recall,
            "bigram_kl": image_metrics.bigram_divergence(
                real.reshape(-1, tokens_a_side, tokens_a_side),
                mine.reshape(-1, tokens_a_side, tokens_a_side),
                codes,
            ),
        }
        if ids is None and labels is not None:
            accuracy = image_metrics.class_accuracy(logits, labels.reshape(-1))
            quality["classifier_accuracy"] = accuracy
        return quality

    return measure


def _caption_accuracy(logits: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> dict:
    """See `judge`; logits [n * c, classes], labels int [n, c], unseen bool [n]."""
    taken = logits.argmax(-1).reshape(labels.shape)
    right = taken == labels
    return {
        "scenes": float(right.all(1).mean()),
        "unseen": float(right[unseen].mean()) if unseen.any() else float("nan"),
        "other_caption": float((taken == np.roll(labels, -1, axis=0)).mean()),
    }
