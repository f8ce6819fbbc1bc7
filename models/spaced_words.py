"""Words without their spaces, and exactly back: BERT's basic tokenisation made lossless.

A word is a piece of text between spaces, a punctuation character, a CJK character, or one other
whitespace character, as in BERT's basic tokenisation without lower-casing or accent stripping. As
bytes it begins with a flag, the number of U+0020 before it: 0xF5 for none, 0xF6 for the usual one,
up to 0xFF for ten. UTF-8 has no such bytes, so that flags also mark where words begin in a stream
of them, and a model of words needs no symbols beside the 256 bytes. Longer runs of spaces, and
spaces at the end of a text, are words of a flag alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import regex

from models.errors import InputError, check_choice

FIRST_FLAG, LAST_FLAG = 0xF5, 0xFF
MOST_SPACES = LAST_FLAG - FIRST_FLAG
END_OF_TEXT = 0xC0  # never in UTF-8 either: a stream's last byte
OVERLONG = ("cut", "truncate")

# Google's BERT counts all of ASCII that is no letter, digit or space as punctuation.
_MARK = r"\p{P}!-/:-@\[-`{-~"
_CJK = (
    r"\u4E00-\u9FFF\u3400-\u4DBF\U00020000-\U0002A6DF\U0002A700-\U0002B73F"
    r"\U0002B740-\U0002B81F\U0002B820-\U0002CEAF\uF900-\uFAFF\U0002F800-\U0002FA1F"
)
_WORD = regex.compile(
    rf"(?P<spaces>\x20*)(?P<word>[{_MARK}]|[{_CJK}]|[^\S\x20]|[^\s{_MARK}{_CJK}]+|\Z)"
)


def split(text: str, max_bytes: int, *, overlong: str = "cut") -> list[bytes]:
    """The words of a text, each with its flag.

    Args:
      text: any.
      max_bytes: of a word's text, without the flag.
      overlong: 'cut' a longer word into several, between characters where that is possible (the
        rest has the flag of no space); or 'truncate' it to its first characters, which is not
        lossless: see `count_overlong`.

    Raises:
      InputError: `max_bytes` below 4 (the longest character), an unknown `overlong`, or a text
        that has no UTF-8 (a lone surrogate).
    """
    if max_bytes < 4:
        raise InputError(f"max_bytes: {max_bytes} must be at least 4")
    check_choice("overlong", overlong, OVERLONG)
    words = []
    for match in _WORD.finditer(text):
        spaces, piece = len(match["spaces"]), match["word"]
        if not piece and not spaces:  # the end of a text without spaces there
            continue
        while spaces > MOST_SPACES:
            words.append(bytes([LAST_FLAG]))
            spaces -= MOST_SPACES
        try:
            pieces = _cut(piece.encode(), max_bytes)
        except UnicodeEncodeError as error:
            raise InputError(f"text: {error.object[error.start]!r} has no UTF-8") from None
        words.append(bytes([FIRST_FLAG + spaces]) + pieces[0])
        if overlong == "cut":
            words += [bytes([FIRST_FLAG]) + rest for rest in pieces[1:]]
    return words


def _cut(left: bytes, max_bytes: int) -> list[bytes]:
    """Pieces of at most `max_bytes`, none of which ends within a character; at least one."""
    pieces = []
    while len(left) > max_bytes:
        end = max_bytes
        while left[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(left[:end])
        left = left[end:]
    return [*pieces, left]


def join(words: Iterable[bytes]) -> str:
    """The text of words; bytes that are not UTF-8 become U+FFFD. Undoes `split` with 'cut'."""
    return decode(b"".join(words))


def decode(stream: Iterable[int]) -> str:
    """The text of a stream of flags and bytes, up to `END_OF_TEXT`."""
    text = bytearray()
    for byte in stream:
        if byte == END_OF_TEXT:
            break
        text += b" " * (byte - FIRST_FLAG) if byte >= FIRST_FLAG else bytes([byte])
    return text.decode("utf-8", errors="replace")


def words_of(stream: Sequence[int]) -> list[bytes]:
    """The words of a stream: cut before every flag and every `END_OF_TEXT`.

    Raises:
      InputError: a stream that does not begin with one of these, or an id that is no byte.
    """
    words: list[bytearray] = []
    for place, byte in enumerate(stream):
        if not 0 <= byte <= 255:
            raise InputError(f"stream: {byte} at {place} is not a byte; allowed: 0 to 255")
        if byte >= FIRST_FLAG or byte == END_OF_TEXT:
            words.append(bytearray())
        elif not words:
            raise InputError(f"stream: begins with {byte:#x}; a word begins with its flag")
        words[-1].append(byte)
    return [bytes(word) for word in words]


@dataclasses.dataclass(frozen=True)
class Overlong:
    """What truncation would do to texts.

    Attributes:
      words: in all.
      overlong: those longer than the cap.
      distinct: different words.
      collisions: different words that share their truncated form with another.
    """

    words: int
    overlong: int
    distinct: int
    collisions: int


def count_overlong(texts: Iterable[str], max_bytes: int) -> Overlong:
    """How many words a cap of `max_bytes` truncates, and how many it makes the same."""
    total = overlong = 0
    kept: dict[bytes, set[bytes]] = {}
    for text in texts:
        for match in _WORD.finditer(text):
            if word := match["word"].encode():
                first = _cut(word, max_bytes)[0]
                kept.setdefault(first, set()).add(word)
                total += 1
                overlong += len(word) > max_bytes
    return Overlong(
        total,
        overlong,
        sum(map(len, kept.values())),
        sum(len(same) for same in kept.values() if len(same) > 1),
    )


class SpacedWordTokenizer:
    """A text as its stream of flags and bytes; used as `models.tokenizer.Tokenizer` is.

    Attributes:
      vocab_size: 256.
      bos_id: None.
      eos_ids: `END_OF_TEXT`.

    Args:
      max_bytes: of a word's text.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self.vocab_size, self.bos_id, self.eos_ids = 256, None, (END_OF_TEXT,)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The words of a text, one after the other; the last one is taken as complete."""
        del add_special_tokens
        return list(b"".join(split(text, self._max_bytes)))

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text; see the function `decode`."""
        del skip_special_tokens
        return decode(ids)

    def apply_chat_template(self, messages: object, add_generation_prompt: bool = True) -> str:
        """Always an InputError: these models have no templates."""
        raise InputError("chat template: the checkpoint has none; pass a plain prompt")
