"""Numbers in words: two languages spelled by hand-written rules, disjoint splits, errors."""

from pathlib import Path

import pytest

from models.errors import InputError
from training.datasets import registry, spelled_numbers

SPLITS = ("train", "validation", "test")


def words(text: str) -> list[str]:
    return text.split()


ENGLISH = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = words("- ten twenty thirty forty fifty sixty seventy eighty ninety")
GERMAN = words(
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
)
ZEHNER = words("- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")


def english(n: int) -> str:
    for size, word in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = f" {english(n % size)}" if n % size else ""
            return f"{english(n // size)} {word}{rest}"
    if n < 20:
        return ENGLISH[n]
    return TENS[n // 10] + (f"-{ENGLISH[n % 10]}" if n % 10 else "")


def below_a_million(n: int) -> str:
    """German with 'ein' for a final 1."""
    if n >= 1000:
        return f"{below_a_million(n // 1000)}tausend{below_a_million(n % 1000) if n % 1000 else ''}"
    if n >= 100:
        return f"{GERMAN[n // 100]}hundert{below_a_million(n % 100) if n % 100 else ''}"
    if n < 20:
        return GERMAN[n]
    return (f"{GERMAN[n % 10]}und" if n % 10 else "") + ZEHNER[n // 10]


def german(n: int) -> str:
    millions, n = divmod(n, 10**6)
    words = []
    if millions:
        one = "e" if millions % 100 == 1 else ""
        words.append(f"{below_a_million(millions)}{one} Million{'en' if millions > 1 else ''}")
    if n or not millions:
        words.append(below_a_million(n) + ("s" if n % 100 == 1 else ""))
    return " ".join(words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {s: list(registry.load("spelled_numbers", s, data_dir=folder, size=500)) for s in SPLITS}


def test_words_are_those_of_two_languages_written_out(data):
    spellers = {"en": english, "de": german}
    examples = [example for split in SPLITS for example in data[split]]
    assert len(examples) == 1000
    for example in examples:
        number, language = int(example["number"]), example["language"]
        digits = example["question"].removeprefix(f"{language} ").removesuffix(" =")
        groups = digits.split(" ")
        assert [len(group) for group in groups[1:]] == [3] * (len(groups) - 1)
        assert int("".join(groups)) == number
        assert example["solution"] == f" {spellers[language](number)}\n"
        assert example["text"] == example["question"] + example["solution"]


def test_an_example():
    assert spelled_numbers.make_example(4217, "en")["text"] == (
        "en 4 217 = four thousand two hundred seventeen\n"
    )
    assert spelled_numbers.spell(1_001_001, "de") == "eine Million eintausendeins"


def test_splits_share_no_number_and_every_number_is_said_in_all_languages(data):
    numbers = {split: {int(e["number"]) for e in data[split]} for split in SPLITS}
    assert len(set.union(*numbers.values())) == 500
    assert sum(map(len, numbers.values())) == 500
    assert 400 < len(numbers["train"]) < 480
    for split in SPLITS:
        for language in ("en", "de"):
            assert {int(e["number"]) for e in data[split] if e["language"] == language} == (
                numbers[split]
            )
    digits = [len(str(number)) for number in set.union(*numbers.values())]
    assert {count for count in range(3, 10) if 30 < digits.count(count) < 100} == set(range(3, 10))


def test_options_are_the_identity(tmp_path):
    def load(**options):
        return list(registry.load("spelled_numbers", "all", data_dir=tmp_path, **options))

    options = {"size": 40, "max_digits": 3, "seed": 1}
    first = load(**options)
    assert load(**options) == first
    changes = ({"seed": 2}, {"size": 41}, {"max_digits": 4}, {"languages": ["fr", "en", "de"]})
    for change in changes:
        assert load(**{**options, **change}) != first
    assert len({path.parent for path in Path(tmp_path).rglob("dataset_info.json")}) == 5


def test_every_language_can_be_spelled():
    languages = spelled_numbers.supported_languages()
    assert len(languages) > 50
    for language in languages:
        words = {spelled_numbers.spell(number, language) for number in (3, 21, 4217)}
        assert len(words) == 3
        assert all(words)


def test_check_answer():
    solution = " four thousand\n"
    for text in (" four thousand\n", "four thousand", " four  thousand \nen 7 = seven\n"):
        assert spelled_numbers.check_answer(text, solution)
    for text in ("", "\n four thousand\n", " four thousand one\n", " four", "fourthousand"):
        assert not spelled_numbers.check_answer(text, solution)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"size": 0}, "size: 0 must be between 1 and 500000000"),
        ({"size": 51, "max_digits": 2}, "size: 51 must be between 1 and 50"),
        ({"max_digits": 13}, "max_digits: 13 must be between 1 and 12"),
        ({"languages": ["en", "dee"]}, "languages: 'dee' is not known .*allowed: af, ak"),
        ({"languages": "en"}, "languages: 'en' must be different codes"),
        ({"languages": []}, r"languages: \[\] must be different codes"),
        ({"languages": ["en", "en"]}, "languages: .* must be different codes"),
    ],
    ids=str,
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        registry.load("spelled_numbers", "train", data_dir=tmp_path, **options)
    assert not list(tmp_path.rglob("dataset_info.json"))
