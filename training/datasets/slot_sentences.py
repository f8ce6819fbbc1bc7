"""Meaning representations and the sentences that say them, in the manner of the E2E dataset.

A program can write the one right sentence: wording and order follow from the values. Names are few,
as in E2E (Novikova et al., arXiv 1706.09254), and combinations of a split are its own.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity

SLOTS: dict[str, tuple[str, ...]] = {
    "name": (
        "Alimentum", "Aromi", "Bibimbap House", "Blue Spice", "Clowns", "Cocum", "Cotto",
        "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne", "Midsummer House", "Strada",
        "Taste of Cambridge", "The Cricketers", "The Eagle", "The Golden Curry", "The Mill",
        "The Olive Grove", "The Phoenix", "The Plough", "The Punter", "The Rice Boat",
        "The Vaults", "The Waterman", "The Wrestlers", "Wildwood", "Zizzi",
    ),
    "type": ("pub", "restaurant", "coffee shop"),
    "food": ("Chinese", "English", "French", "Indian", "Italian", "Japanese"),
    "price": ("cheap", "moderate", "high"),
    "rating": ("low", "average", "excellent"),
    "area": ("city centre", "riverside"),
    "family": ("yes", "no"),
    "near": (
        "All Bar One", "Burger King", "Cafe Rouge", "Clare Hall", "Crowne Plaza Hotel",
        "Express by Holiday Inn", "Rainbow Vegetarian Cafe", "Raja Cuisine", "The Bakers",
        "The Portland Arms", "The Sorrento", "Yippee Noodle Bar",
    ),
}  # fmt: skip
# Slots that a representation may lack.
OPTIONAL = ("price", "rating", "area", "family", "near")
_PRICES = {"cheap": "cheap", "moderate": "moderately priced", "high": "expensive"}
_RATINGS = {
    "low": "Customers were not happy and rated it low.",
    "average": "Its rating by customers is average.",
    "excellent": "It has an excellent rating from customers.",
}
_FAMILY = {"yes": "Families with children are welcome.", "no": "It is not a place for children."}


def verbalise(meaning: Mapping[str, str]) -> str:
    """The sentences that say a meaning: values by slot, those of `OPTIONAL` perhaps missing."""
    name, kind, food = meaning["name"], meaning["type"], meaning["food"]
    price = f"{_PRICES[meaning['price']]} " if "price" in meaning else ""
    place = _place(meaning)
    if kind == "pub":
        first = f"There is {_a(price)}pub called {name}{place}, which serves {food} food."
    elif kind == "restaurant":
        first = f"{name} is {_a(price)}restaurant{place} with {food} dishes."
    else:
        first = f"For {food} food{place}, try the {price}coffee shop {name}."
    rest = [
        said[meaning[slot]]
        for slot, said in (("rating", _RATINGS), ("family", _FAMILY))
        if slot in meaning
    ]
    # By the river people speak of children first.
    return " ".join([first, *(rest[::-1] if meaning.get("area") == "riverside" else rest)])


def _a(price: str) -> str:
    return f"{'an' if price.startswith('e') else 'a'} {price}"


def _place(meaning: Mapping[str, str]) -> str:
    area = {"city centre": " in the city centre", "riverside": " by the river"}
    near = f" near {meaning['near']}" if "near" in meaning else ""
    return area.get(meaning.get("area", ""), "") + near


def make_example(meaning: Mapping[str, str]) -> dict[str, str]:
    """{question, solution, text}: `name[The Mill], type[pub], ... =` and what says it."""
    question = ", ".join(f"{slot}[{meaning[slot]}]" for slot in SLOTS if slot in meaning) + " ="
    solution = f" {verbalise(meaning)}\n"
    return {"question": question, "solution": solution, "text": question + solution}


def generate(size: int, seed: int) -> Iterator[dict[str, str]]:
    """`size` different meanings; each optional slot is there in seven of ten."""
    rng = random.Random(f"{seed}/slots")
    seen: set[tuple[tuple[str, str], ...]] = set()
    while len(seen) < size:
        meaning = {
            slot: rng.choice(values)
            for slot, values in SLOTS.items()
            if slot not in OPTIONAL or rng.random() < 0.7
        }
        key = tuple(meaning.items())
        if key not in seen:
            seen.add(key)
            yield meaning


class SlotSentences(tfds.core.GeneratorBasedBuilder):
    """Restaurants in slots and in sentences; splits 90/5/5 by a hash of the slots.

    Options:
      size: meanings over all splits.
      seed: of the generator.

    Examples: see `make_example`.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, size: int = 20_000, seed: int = 0, data_dir: str | None = None):
        if not 1 <= size <= 100_000:
            raise InputError(f"size: {size} must be between 1 and 100000")
        self._size, self._seed = size, seed
        options = {"size": size, "seed": seed}
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Meaning representations of restaurants and the sentences that say them.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in ("text", "question", "solution")}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        examples = map(make_example, generate(self._size, self._seed))
        groups = identity.group((identity.split_of(e["question"]), e) for e in examples)
        return {split: self._generate_examples(group) for split, group in groups.items()}

    def _generate_examples(self, examples: Any) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(examples)
