"""Digit images: labels, splits by source digit, and sizes that show the same scene."""

import numpy as np
import pytest

from models.errors import InputError
from training.datasets import digit_scenes, registry

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def images_of(examples):
    return np.stack([example["image"] for example in examples])


def test_splits_are_by_source_digit():
    splits = [digit_scenes.split_of(source) for source in range(1797)]
    counts = {split: splits.count(split) for split in SPLITS}
    assert sum(counts.values()) == 1797
    assert 0.75 < counts["train"] / 1797 < 0.85
    assert min(counts.values()) > 140


def test_every_source_digit_of_the_split_is_drawn_with_its_label(folder):
    """Averaged back to 8x8, most drawn digits are nearest to digits of their own label."""
    examples = registry.load("digit_scenes", "test", data_dir=folder, size=32, variants=1)
    sources = [i for i in range(1797) if digit_scenes.split_of(i) == "test"]
    assert len(examples) == len(sources)
    digits, labels = digit_scenes.source_digits()
    assert [example["label"] for example in examples] == list(labels[sources])
    assert [example["labels"].tolist() for example in examples] == [[n] for n in labels[sources]]
    small = images_of(examples).reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(len(examples), 64)
    known = digits.reshape(1797, 64)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    nearest = (unit(small) @ unit(known).T).argmax(1)
    assert np.mean(labels[nearest] == labels[sources]) > 0.6  # shifts cost some; chance is 0.1


def test_a_centred_digit_is_cubic_interpolation_at_its_pixels():
    """At whole-pixel steps spline interpolation gives back the source's own pixels."""

    class Centred:
        def uniform(self, low, high, size=None):
            return np.zeros(size) if size else high

    digit = digit_scenes.source_digits()[0][0]
    np.testing.assert_allclose(digit_scenes.draw_digit(digit, 8, Centred()), digit, atol=1e-6)


def test_sizes_show_the_same_scene(folder):
    load = lambda size: registry.load(  # noqa: E731
        "digit_scenes", "validation", data_dir=folder, size=size, grid=2, variants=1
    )
    by_size = {size: images_of(load(size)).astype(np.float64) for size in (16, 32, 64)}
    for size in (32, 64):
        factor = size // 16
        coarse = by_size[size].reshape(-1, 16, factor, 16, factor, 1).mean((2, 4))
        assert np.abs(coarse - by_size[16]).max() <= 1.0  # rounded to whole grey levels
    scenes = load(16)
    assert all(example["labels"][0] == example["label"] for example in scenes)
    assert len({tuple(example["labels"]) for example in scenes}) > 100


def test_scenes_hold_only_digits_of_their_split(folder):
    """The first scene, drawn again from the digits of its split alone."""
    pool = [i for i in range(1797) if digit_scenes.split_of(i) == "validation"]
    rng = np.random.default_rng((0, 0, pool[0]))
    others = rng.choice(pool, size=3)
    scene = digit_scenes.at_size(digit_scenes.draw_scene([pool[0], *others], 2, rng), 32)
    first = registry.load(
        "digit_scenes", "validation", data_dir=folder, size=32, grid=2, variants=1
    )[0]
    np.testing.assert_array_equal(first["image"], scene)
    assert {digit_scenes.split_of(int(i)) for i in others} == {"validation"}


def test_variants_and_seed_change_images_not_labels(folder):
    load = lambda **o: registry.load("digit_scenes", "test", data_dir=folder, size=16, **o)  # noqa: E731
    two, other = load(variants=2), load(variants=1, seed=1)
    half = len(two) // 2
    assert [e["label"] for e in two[:half]] == [e["label"] for e in two[half:]]
    images = images_of(two)
    assert (images[:half] != images[half:]).any(axis=(1, 2, 3)).all()
    assert (images[:half] != images_of(other)).any(axis=(1, 2, 3)).all()


def test_captions_say_what_the_same_scenes_show(folder):
    load = lambda **o: registry.load(  # noqa: E731
        "digit_scenes", "test", data_dir=folder, size=16, grid=2, variants=1, **o
    )
    plain, captioned = load(), load(captions=True)
    assert len(plain) == len(captioned)
    for one, other in zip(plain[:20], captioned[:20], strict=True):
        assert "caption" not in one
        np.testing.assert_array_equal(one["image"], other["image"])
        words = other["caption"].replace(" and ", " ").replace(" above ", " ").split()
        assert [digit_scenes._WORDS.index(word) for word in words] == one["labels"].tolist()
    assert digit_scenes.caption([3, 7, 1, 0], 2) == "three and seven above one and zero"
    assert digit_scenes.caption([3], 1) == "three"
    # Models are kept by this name: it must not follow from an option that is not used.
    assert load(captions=False).full_name == plain.full_name
    assert captioned.full_name != plain.full_name


@pytest.mark.parametrize(
    "options,message",
    [
        ({"size": 48}, "size: 48 must be one of 16, 32, 64"),
        ({"grid": 3}, "grid: 3 must be one of 1, 2"),
        ({"variants": 0}, "variants: 0 must be at least 1"),
        ({"seed": -1}, "seed: -1 must be at least 0"),
    ],
    ids=str,
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        registry.load("digit_scenes", "train", data_dir=tmp_path, **options)
