"""Slots and sentences: everything that was meant is said, splits share nothing."""

import itertools

import pytest

from models.errors import InputError
from training.datasets import registry, slot_sentences
from training.datasets.slot_sentences import SLOTS

SPLITS = ("train", "validation", "test")
SAID = {
    "price": {"cheap": "cheap", "moderate": "moderately priced", "high": "expensive"},
    "rating": {"low": "rated it low", "average": "is average", "excellent": "an excellent rating"},
    "area": {"city centre": "in the city centre", "riverside": "by the river"},
    "family": {"yes": "are welcome", "no": "not a place for children"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    load = {s: registry.load("slot_sentences", s, data_dir=folder, size=600) for s in SPLITS}
    return {split: list(examples) for split, examples in load.items()}


def meaning(question):
    pairs = question.removesuffix(" =").removesuffix("]").split("], ")
    return dict(pair.split("[") for pair in pairs)


def test_sentences_say_all_that_is_meant_and_nothing_else(data):
    for example in itertools.chain(*data.values()):
        assert example["text"] == example["question"] + example["solution"]
        slots, said = meaning(example["question"]), example["solution"]
        assert list(slots) == [slot for slot in SLOTS if slot in slots]
        for slot in ("name", "type", "food", "near"):
            if slot in slots:
                assert slots[slot] in said
        assert ("near " in said) == ("near" in slots)
        for slot, words in SAID.items():
            found = [value for value, word in words.items() if word in said]
            assert found == ([slots[slot]] if slot in slots else [])


def test_an_example():
    slots = {"name": "Zizzi", "type": "pub", "food": "French", "price": "high", "rating": "low",
             "area": "riverside", "family": "no", "near": "Clare Hall"}  # fmt: skip
    assert slot_sentences.verbalise(slots) == (
        "There is an expensive pub called Zizzi by the river near Clare Hall, which serves French "
        "food. It is not a place for children. Customers were not happy and rated it low."
    )


def test_splits_share_no_meaning_and_a_seed_gives_others(data, tmp_path):
    asked = {split: {e["question"] for e in data[split]} for split in SPLITS}
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 600
    assert 500 < len(asked["train"]) < 580
    other = registry.load("slot_sentences", "all", data_dir=tmp_path, size=600, seed=1)
    assert {e["question"] for e in other} != set.union(*asked.values())
    with pytest.raises(InputError, match="size: 0 must be between 1 and 100000"):
        registry.load("slot_sentences", "train", data_dir=tmp_path, size=0)
