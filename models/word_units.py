"""Words written in units: bytes, characters, sub-words or whole words, each with its end.

Text is brought into a normal form in which words are what stands between single spaces. A
`WordUnits` then spells a text as a stream of ids in which every word is closed, whatever the units:
by an id of its own, by its last piece, or because it is one id. So models of any units are asked
for the same thing, the next word and its end. (Learn Your Tokens, arXiv 2310.11628.)
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regex
import tokenizers

from models import byte_characters, files, safetensors_io, words
from models.errors import InputError, check_choice

FILE = "word_units.json"
KINDS = ("byte", "char", "subword", "joined_subword", "word")
_SPACE = byte_characters.SPACE
UNKNOWN = "\ufffd"  # stands for characters that the vocabulary has not
# What the authors' code puts spaces around.
PUNCTUATION = "-{}:,;.!'?"
_DROPPED = regex.compile(r"\n|<unk>|=|@-@")
_ANY_MARK = regex.compile(r"[\p{P}\p{S}]")


@dataclasses.dataclass(frozen=True)
class NormalForm:
    """How text becomes words (the authors' preparation, without deleting words in Latin script).

    Attributes:
      lower_case: whether text is lower-cased first.
      punctuation: the characters that are words of their own; None for all of Unicode's
        punctuation and symbols.
      max_bytes: of a word; longer ones become several.
    """

    lower_case: bool = False
    punctuation: str | None = PUNCTUATION
    max_bytes: int = 20

    def __post_init__(self) -> None:
        if self.max_bytes < 4:
            raise InputError(f"max_bytes: {self.max_bytes} must be at least 4, a character's bytes")

    def split(self, text: str) -> list[str]:
        """The words of a text.

        Line ends, '=', '@-@' and '<unk>' become spaces, punctuation is spaced out, and words are
        what is left between white space. Of a text's words joined by spaces these are the words.

        Raises:
          InputError: a text that has no UTF-8 (a lone surrogate).
        """
        text = _DROPPED.sub(" ", text.lower() if self.lower_case else text)
        found = []
        for word in self._marks.sub(r" \g<0> ", text).split():
            if len(word) * 4 <= self.max_bytes:
                found.append(word)
            else:
                found += [piece.decode() for piece in words.split_fixed(word, self.max_bytes)]
        return found

    def count_overlong(self, text: str) -> int:
        """Words that `split` had to cut."""
        longer = dataclasses.replace(self, max_bytes=2**30)
        return sum(len(word.encode()) > self.max_bytes for word in longer.split(text))

    @property
    def _marks(self) -> regex.Pattern[str]:
        if self.punctuation is None:
            return _ANY_MARK
        return regex.compile(f"[{regex.escape(self.punctuation, special_only=False)}]")


@dataclasses.dataclass(frozen=True)
class WordUnits:
    """A vocabulary of units, used as `models.tokenizer.Tokenizer` is.

    Attributes:
      kind: 'byte', 'char' or 'subword', after which an id of its own closes a word;
        'joined_subword', byte-pair encoding of words with the space behind them; 'word', a closed
        vocabulary.
      form: how text becomes words.
      symbols: characters, or words, by id.
      bpe: `tokenizer.json` of the sub-words as text.
    """

    kind: str
    form: NormalForm = NormalForm()
    symbols: tuple[str, ...] = ()
    bpe: str = ""

    def __post_init__(self) -> None:
        check_choice("units", self.kind, KINDS)
        if bool(self.symbols) != (self.kind in ("char", "word")):
            raise InputError(
                f"symbols: {len(self.symbols)} of them do not suit {self.kind!r} units"
            )
        if bool(self.bpe) != ("subword" in self.kind):
            raise InputError(f"bpe: {self.bpe[:20]!r} does not suit {self.kind!r} units")

    @functools.cached_property
    def num_units(self) -> int:
        """Ids that are not an end: those from 0 on."""
        if self.kind == "byte":
            return 256
        return len(self.symbols) + 1 if self.symbols else self._backend.get_vocab_size()

    @property
    def word_end(self) -> int:
        """The id that closes a word, where words are not closed by their last unit."""
        return self.num_units

    @property
    def document_end(self) -> int:
        return self.num_units + 1

    @property
    def vocab_size(self) -> int:
        return self.num_units + 2

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.document_end,)

    @property
    def bos_id(self) -> None:
        return None

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The ids that close a word."""
        if self.kind == "word":
            return frozenset(range(self.num_units))
        if self.kind == "joined_subword":
            vocabulary = self._backend.get_vocab()
            return frozenset(vocabulary[token] for token in vocabulary if token[-1] == _SPACE)
        return frozenset({self.word_end})

    def units(self, word: str) -> list[int]:
        """What a word is written with; its end is not among them, unless it has none of its own."""
        if self.kind == "byte":
            return list(word.encode())
        if self.kind == "char":
            return [self._places.get(letter, len(self.symbols)) for letter in word]
        if self.kind == "word":
            return [self._places.get(word, len(self.symbols))]
        return list(self._spell(word))

    def closed(self, word: str) -> list[int]:
        """What a word is written with, and its end."""
        if self.kind == "joined_subword":
            return list(self._spell(f"{word} "))
        return self.units(word) + [self.word_end] * (self.kind != "word")

    def word(self, ids: Sequence[int]) -> str | None:
        """The word that `ids` are, when they are one word and its end; None else.

        The rule of what is a right prediction, for models of all units: a longer word with the
        right beginning is another word. An unknown word is none.
        """
        if not ids or ids[-1] not in self.ends or any(i in self.ends for i in ids[:-1]):
            return None
        if self.kind == "word":
            return self.symbols[ids[0]] if ids[0] < len(self.symbols) else None
        try:
            text = self._raw(ids).decode()
        except UnicodeDecodeError:
            return None
        word = text.removesuffix(" ")
        return word if word and UNKNOWN not in word else None

    def first_word(self, ids: Sequence[int]) -> str | None:
        """As `word`, of the ids up to the first end."""
        last = next((place for place, i in enumerate(ids) if i in self.ends), -1)
        return self.word(ids[: last + 1])

    def split(self, text: str) -> list[str]:
        """As `NormalForm.split`."""
        return self.form.split(text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The stream of a text's words, all of them closed if white space follows the last one."""
        del add_special_tokens
        *done, last = self.split(text) or [""]
        ids = [i for word in done for i in self.closed(word)]
        if not last:
            return ids
        return ids + (self.closed(last) if text[-1].isspace() else self.units(last))

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Words with a space after each one that is closed; broken bytes become U+FFFD."""
        del skip_special_tokens
        return self._raw(ids).decode("utf-8", errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Always an InputError: these models have no templates."""
        raise InputError("chat template: the checkpoint has none; pass a plain prompt")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `FILE`; raises InputError when the disk refuses."""
        path = Path(directory) / FILE
        try:
            files.write_text(path, json.dumps(dataclasses.asdict(self)) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def _raw(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._bytes_of, ids))

    def _bytes_of(self, unit: int) -> bytes:
        if unit in self.ends and self.kind in ("byte", "char", "subword"):
            return b" "
        if unit >= self.num_units:
            return b""
        if self.kind == "byte":
            return bytes([unit])
        if self.symbols:
            text = self.symbols[unit] if unit < len(self.symbols) else UNKNOWN
            return (text + " " * (self.kind == "word")).encode()
        return self._pieces[unit]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {symbol: place for place, symbol in enumerate(self.symbols)}

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.bpe)

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each sub-word."""
        pieces = [b""] * self.num_units
        for token, i in self._backend.get_vocab().items():
            pieces[i] = byte_characters.to_bytes(token)
        return pieces

    @functools.cached_property
    def _spell(self) -> Any:
        return functools.lru_cache(2**17)(
            lambda text: tuple(self._backend.encode(text, add_special_tokens=False).ids)
        )


def load(directory: str | os.PathLike[str]) -> WordUnits:
    """Reads what `WordUnits.save` wrote; raises InputError for anything else."""
    path = Path(directory) / FILE
    fields = safetensors_io.read_json(path)
    try:
        form = NormalForm(**fields.pop("form"))
        return WordUnits(form=form, symbols=tuple(fields.pop("symbols")), **fields)
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: {safetensors_io.one_line(error)}") from None
