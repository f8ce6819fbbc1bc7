"""Image metrics against SciPy's matrix square root and naive loops."""

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from experiments import image_metrics
from models import image_classifier
from models.errors import InputError

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(60, 5)) @ RNG.normal(size=(5, 5))
FAKE = RNG.normal(size=(40, 5)) @ RNG.normal(size=(5, 5)) + 0.5


def test_frechet_distance_is_the_formula_with_scipys_root():
    c1, c2 = np.cov(REAL.T), np.cov(FAKE.T)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = np.sum((REAL.mean(0) - FAKE.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)
    assert image_metrics.frechet_distance(REAL, FAKE) == pytest.approx(expected, rel=1e-8)
    assert image_metrics.frechet_distance(FAKE, REAL) == pytest.approx(expected, rel=1e-8)
    assert image_metrics.frechet_distance(REAL, REAL) == pytest.approx(0, abs=1e-8)
    assert image_metrics.frechet_distance(REAL, REAL + 2) == pytest.approx(5 * 4)


def test_frechet_distance_of_degenerate_features():
    """Features that are always zero, as ReLU's may be, do no harm."""
    dead = [np.concatenate([x, np.zeros((len(x), 2))], axis=1) for x in (REAL, FAKE)]
    expected = image_metrics.frechet_distance(REAL, FAKE)
    assert image_metrics.frechet_distance(*dead) == pytest.approx(expected, rel=1e-6)


def inside(points, manifold, k):
    """Share of points within some manifold point's ball, by loops over the definition."""
    hits = 0
    for point in points:
        for centre in manifold:
            others = sorted(np.linalg.norm(centre - other) for other in manifold)
            if np.linalg.norm(point - centre) <= others[k]:  # others[0] is the centre itself
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_definition(k):
    precision, recall = image_metrics.precision_recall(REAL, FAKE, k)
    assert precision == pytest.approx(inside(FAKE, REAL, k))
    assert recall == pytest.approx(inside(REAL, FAKE, k))
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_of_extremes():
    assert image_metrics.precision_recall(REAL, REAL) == (1, 1)
    assert image_metrics.precision_recall(REAL, REAL + 1e3) == (0, 0)
    one_mode = REAL[:1] + 1e-3 * RNG.normal(size=(30, 5))
    precision, recall = image_metrics.precision_recall(REAL, one_mode)
    assert precision == 1
    assert recall < 0.1


def test_class_accuracy():
    logits = np.array([[0, 2, 1], [3, 2, 1], [0, 0, 1]])
    assert image_metrics.class_accuracy(logits, np.array([1, 0, 0])) == pytest.approx(2 / 3)


def test_bigram_divergence_is_scipys_entropy_of_counted_pairs():
    real, fake = RNG.integers(0, 3, size=(20, 4, 5)), RNG.integers(0, 2, size=(7, 4, 5))
    total = 0.0
    for dy, dx in ((1, 0), (0, 1)):
        p, q = np.zeros((3, 3)), np.full((3, 3), 0.5)
        for counts, grids in ((p, fake), (q, real)):
            for grid in grids:
                for y in range(4 - dy):
                    for x in range(5 - dx):
                        counts[grid[y, x], grid[y + dy, x + dx]] += 1
        total += scipy.stats.entropy(p.ravel(), q.ravel()) / 2
    assert image_metrics.bigram_divergence(real, fake, 3) == pytest.approx(total)
    assert image_metrics.bigram_divergence(real, real, 3) < 0.01 < total


def test_classify_is_the_classifier_row_by_row():
    config = image_classifier.ClassifierConfig(size=8, widths=(4, 4), num_features=6)
    params = image_classifier.init(config, jax.random.key(0))
    images = RNG.uniform(size=(5, 8, 8, 1)).astype(np.float32)
    features, logits = image_metrics.classify(config, params, images)
    assert features.shape == (5, 6)
    assert logits.shape == (5, 10)
    expected = image_classifier.apply(config, params, images[3:4])
    np.testing.assert_allclose(features[3:4], expected.features, atol=1e-5)
    head = params["logits"]
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], atol=1e-5)
    with pytest.raises(InputError, match="images: shape"):
        image_classifier.apply(config, params, images[:, :4])


def test_bad_features():
    with pytest.raises(InputError, match="at least 2 are needed"):
        image_metrics.frechet_distance(REAL[:1], FAKE)
    with pytest.raises(InputError, match="at least 4 are needed"):
        image_metrics.precision_recall(REAL, FAKE[:3])
    with pytest.raises(InputError, match="differ"):
        image_metrics.frechet_distance(REAL, FAKE[:, :4])
