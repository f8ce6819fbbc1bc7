"""Counting a corpus' tri-grams, and stores on disk."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from decoding.speculative import trigram
from models.errors import InputError
from training import trigrams

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 6, length).tolist() for length in (40, 2, 0, 3, 1, 200, 17)]
LARGE = 2**21 - 1


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
def test_counts_are_those_of_a_dict_however_they_are_merged(monkeypatch, chunk):
    monkeypatch.setattr(trigrams, "_CHUNK", chunk)
    documents = [*DOCUMENTS, [LARGE, 0, LARGE, 0, LARGE]]
    expected = Counter(t for d in documents for t in zip(d, d[1:], d[2:]))
    found = trigrams.count(documents)
    assert dict(zip(map(tuple, found.trigrams.tolist()), found.counts.tolist())) == expected
    assert len(found.counts) == len(expected) and found.counts.sum() == 38 + 1 + 198 + 15 + 3


def test_no_text_no_counts():
    found = trigrams.count([[], [1, 2]])
    assert found.trigrams.shape == (0, 3) and found.counts.shape == (0,)
    store = trigrams.build([[1, 2]], slots=8)
    assert (store.keys == trigram.EMPTY).all()


def test_build_counts_then_cuts():
    store = trigrams.build([[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 5]], slots=64, top=2, width=4)
    slot = store.keys.tolist().index([1, 2])
    assert store.successors[slot].tolist() == [3, 4, -1, -1]
    np.testing.assert_allclose(store.weights[slot], [0.5, 0.25, 0, 0])


@pytest.mark.parametrize("bad", [-1, 2**21])
def test_ids_out_of_range_are_named(bad):
    with pytest.raises(InputError, match=f"^document 1: token id {bad}; allowed: 0 to 2097151$"):
        trigrams.count([[1, 2, 3], [1, bad, 3]])


@pytest.mark.parametrize(
    "sizes,message",
    [
        ({"slots": 4}, "slots: 4 must be at least 8"),
        ({"top": 17}, "top: 17 must be between 1 and width, 16"),
        ({"top": 0}, "top: 0 must be between 1 and width, 16"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        trigrams.build(DOCUMENTS, **sizes)


def test_a_store_comes_back_as_it_was(tmp_path):
    store = trigrams.build(DOCUMENTS, slots=128)
    path = tmp_path / "code.trigrams.safetensors"
    trigrams.save(path, store)
    loaded = trigrams.load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, store)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(loaded))
    # Over an older one; what a run has learned, on the device, as well.
    learned = trigram.update(loaded, np.asarray([[9, 9, 9]]), np.ones(1, bool), 0.04, 3.0)
    trigrams.save(path, learned)
    again = trigrams.load(path)
    jax.tree.map(np.testing.assert_array_equal, again, learned)
    assert (np.asarray(again.keys) == 9).any()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    trigrams.save(path, trigrams.build(DOCUMENTS, slots=64))
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot write the store in .*No space left"):
        trigrams.save(path, trigrams.build([[1, 2, 3]], slots=64))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_that_hold_no_store_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^store: .*missing' cannot be read"):
        trigrams.load(tmp_path / "missing")
    (tmp_path / "corrupt").write_bytes(b"not a store")
    with pytest.raises(InputError, match=r"^store: .*corrupt' cannot be read"):
        trigrams.load(tmp_path / "corrupt")
    safetensors.numpy.save_file({"weights": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(InputError, match=r"holds weights; allowed: keys, successors, weights$"):
        trigrams.load(tmp_path / "other")
