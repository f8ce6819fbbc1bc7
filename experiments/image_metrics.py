"""How good generated images are, as pure functions of features, labels and token ids.

Features are those of a classifier trained here (`models.image_classifier`), so the Fréchet distance
below has the formula of FID (Heusel et al., arXiv 1706.08500, section 2) and another space: call
it a Fréchet distance in classifier features, not FID.
"""

from typing import Any

import jax
import numpy as np

from models import image_classifier
from models.errors import InputError
from models.image_classifier import ClassifierConfig

_ROWS = 256


def classify(
    config: ClassifierConfig, params: Any, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 [n, F] and logits float64 [n, classes] of images [n, H, W, C]."""
    apply = jax.jit(image_classifier.apply, static_argnums=0)
    parts = []
    for first in range(0, len(images), _ROWS):
        rows = np.asarray(images[first : first + _ROWS])
        fill = np.zeros((_ROWS - len(rows), *rows.shape[1:]), rows.dtype)  # one shape to compile
        found = jax.device_get(apply(config, params, np.concatenate([rows, fill])))
        parts.append([np.asarray(x[: len(rows)], np.float64) for x in found])
    features, logits = zip(*parts)
    return np.concatenate(features), np.concatenate(logits)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to features [n, F] and [m, F].

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). The trace of the root is the sum of the
    roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric.

    Raises:
      InputError: fewer than two rows, or different widths.
    """
    _check_pair(first, second, 2)
    means = first.mean(0), second.mean(0)
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    trace = sum(np.trace(c) for c in covariances) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(max(0.0, np.sum((means[0] - means[1]) ** 2) + trace))


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images [n, classes] that the classifier takes for the class they were asked for."""
    return float(np.mean(np.argmax(logits, -1) == labels))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2).

    Precision is the share of generated features [m, F] inside the real manifold, the union of
    balls around real features [n, F] that reach to the k-th nearest other one; recall the share
    of real features inside the generated manifold.

    Raises:
      InputError: not more than k rows, or different widths.
    """
    _check_pair(real, generated, k + 1)
    between = _squared_distances(real, generated)
    precision = np.mean((between <= _radii(real, k)[:, None]).any(0))
    recall = np.mean((_radii(generated, k)[:, None] >= between.T).any(0))
    return float(precision), float(recall)


def bigram_divergence(real: np.ndarray, generated: np.ndarray, num_codes: int) -> float:
    """Divergence of neighbouring codes in generated grids from those in real ones, in nats.

    The mean of the two directions (right and down) of KL(generated || real) over pairs of codes,
    real counts smoothed by a half.

    Args:
      real, generated: int [n, h, w] and [m, h, w].
      num_codes: K.
    """
    total = 0.0
    for axis in (1, 2):
        p = _pairs(generated, axis, num_codes)
        q = _pairs(real, axis, num_codes) + 0.5
        p, q = p / p.sum(), q / q.sum()
        seen = p > 0
        total += float(np.sum(p[seen] * np.log(p[seen] / q[seen]))) / 2
    return total


def _pairs(ids: np.ndarray, axis: int, num_codes: int) -> np.ndarray:
    """Counts float64 [K * K] of (code, next code along `axis`)."""
    count = ids.shape[axis]
    first = np.take(ids, range(count - 1), axis).astype(np.int64)
    second = np.take(ids, range(1, count), axis)
    flat = (first * num_codes + second).ravel()
    return np.bincount(flat, minlength=num_codes**2).astype(np.float64)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, m] between rows of [n, F] and [m, F]."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each of [n, F] to its k-th nearest other one."""
    distances = _squared_distances(points, points)
    np.fill_diagonal(distances, -1)  # itself first, whatever rounding says
    return np.partition(distances, k, axis=1)[:, k]


def _check_pair(first: np.ndarray, second: np.ndarray, least: int) -> None:
    if min(len(first), len(second)) < least:
        raise InputError(
            f"features: {len(first)} and {len(second)} rows; at least {least} are needed of each"
        )
    if first.shape[1:] != second.shape[1:]:
        raise InputError(f"features: widths {first.shape[1:]} and {second.shape[1:]} differ")
