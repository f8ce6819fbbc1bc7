"""Whole numbers and how languages say them: a translation task that a program can check."""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import unicode_rbnf

from models.errors import InputError, nearest
from training.datasets import identity

_RULES = "spellout-numbering"  # counting: 'eins', not 'ein' or 'eine'
_MAX_DIGITS = 12


def supported_languages() -> list[str]:
    """Languages that can be spelled: CLDR's codes, such as 'en' and 'de'."""
    return sorted(unicode_rbnf.RbnfEngine.get_supported_languages())


@functools.cache
def _engine(language: str) -> unicode_rbnf.RbnfEngine:
    return unicode_rbnf.RbnfEngine.for_language(language)


def spell(number: int, language: str) -> str:
    """`number` in words, by the rules of Unicode's CLDR for one of `supported_languages`."""
    return _engine(language).format_number(number, ruleset_names=[_RULES]).text


def make_example(number: int, language: str) -> dict[str, Any]:
    """One number in one language: {question, solution, text, number, language}.

    `text` is `question + solution`, such as 'en 4 217 = ' and 'four thousand two hundred
    seventeen' with a line end.
    """
    question = f"{language} {number:,} =".replace(",", " ")
    solution = f" {spell(number, language)}\n"
    return {
        "question": question,
        "solution": solution,
        "text": question + solution,
        "number": number,
        "language": language,
    }


def check_answer(text: str, solution: str) -> bool:
    """Whether the first line of `text`, what a model wrote after a question, is `solution`."""
    return text.split("\n", 1)[0].split() == solution.split()


def generate(size: int, max_digits: int, seed: int) -> Iterator[int]:
    """`size` different numbers; every number of digits is as likely as long as it has unseen ones.

    Deterministic in its arguments. `size` is at most half of the numbers of `max_digits` digits.
    """
    rng = random.Random(f"{seed}/{max_digits}")
    seen: set[int] = set()
    while len(seen) < size:
        digits = rng.randint(1, max_digits)
        number = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        if number not in seen:
            seen.add(number)
            yield number


class SpelledNumbers(tfds.core.GeneratorBasedBuilder):
    """Numbers in words; splits 90/5/5 by a hash of the number, so that they share none.

    Options:
      size: numbers over all splits; each is one example in every language.
      languages: CLDR codes, see `supported_languages`.
      max_digits: of the longest number, up to 12.
      seed: of the numbers.

    Examples: see `make_example`.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self,
        *,
        size: int = 10_000,
        languages: Sequence[str] = ("en", "de"),
        max_digits: int = 9,
        seed: int = 0,
        data_dir: str | None = None,
    ):
        if not 1 <= max_digits <= _MAX_DIGITS:
            raise InputError(f"max_digits: {max_digits} must be between 1 and {_MAX_DIGITS}")
        if not 1 <= size <= 10**max_digits // 2:
            raise InputError(
                f"size: {size} must be between 1 and {10**max_digits // 2}, half of the numbers "
                f"of {max_digits} digits"
            )
        self._size, self._max_digits, self._seed = size, max_digits, seed
        self._languages = _checked(languages)
        options = {
            "size": size,
            "languages": self._languages,
            "max_digits": max_digits,
            "seed": seed,
        }
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        fields = ("text", "question", "solution", "language")
        text = {name: tfds.features.Text() for name in fields}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Whole numbers in the words of several languages.",
            features=tfds.features.FeaturesDict({**text, "number": np.int64}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        numbers = generate(self._size, self._max_digits, self._seed)
        groups = identity.group((identity.split_of(str(number)), number) for number in numbers)
        return {split: self._generate_examples(group) for split, group in groups.items()}

    def _generate_examples(self, numbers: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        pairs = ((number, language) for number in numbers for language in self._languages)
        yield from enumerate(make_example(*pair) for pair in pairs)


def _checked(chosen: Sequence[str]) -> list[str]:
    known = supported_languages()
    if isinstance(chosen, str) or not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"languages: {chosen!r} must be different codes, such as ['en', 'de']")
    for language in chosen:
        if language not in known:
            raise InputError(
                f"languages: {language!r} is not known{nearest(language, known)}; allowed: "
                f"{', '.join(known)}"
            )
    return list(chosen)
