"""Text into words by fixed rules, and words into arrays of bytes.

The split is the only step of a hierarchical model that is not trained. A word is a piece of the
text's UTF-8: joined, the words are the text. Both rules are causal: the words of a prefix of a
text are the text's own words at the same places, the last one perhaps not complete yet; so the
words of a growing text never change once the next one has begun.
"""

from collections.abc import Callable, Sequence

import numpy as np
import regex

from models.errors import InputError, check_choice

# Rule A. A word is what stands before whitespace, and the whitespace.
_WHITESPACE_WORD = regex.compile(r"\S*\s+|\S+")

# Rule B: cut at the word boundaries of Unicode Standard Annex #29, around punctuation,
# and between a small letter and a capital. U+2044 FRACTION SLASH is the one character that joins
# digits and is not punctuation: if it did, '1/2' would have other words than its prefix '1/'.
_CUT = regex.compile(
    r"\b|(?<=[\p{P}\u2044])|(?=[\p{P}\u2044])|(?<=\p{Ll})(?=\p{Lu})", regex.WORD | regex.V1
)
_PUNCTUATION = regex.compile(r"\p{P}")
# (last of the group, next piece): the pairs that stay in one word.
_JOINED = {("space", "word"), ("space", "mark"), ("word", "mark"), ("mark", "mark")}


def split_whitespace(text: str, max_bytes: int) -> list[bytes]:
    """Rule A: cut after Unicode whitespace, which stays at the end of the word before it.

    A run of whitespace stays with that word; at the start of a text it is a word of its own.

    Args:
      text: any.
      max_bytes: longest word; longer ones are cut, between characters where that is possible.

    Returns:
      Words as UTF-8, none of them empty; joined, they are the text.

    Raises:
      InputError: `max_bytes` below 1, or a text that has no UTF-8 (a lone surrogate).
    """
    return _capped(_WHITESPACE_WORD.findall(text), max_bytes)


def split_unicode(text: str, max_bytes: int) -> list[bytes]:
    """Rule B: a word is an optional space, a piece of text and the punctuation that follows it.

    Cut at the word boundaries of Unicode Standard Annex #29, around punctuation, and between a
    small letter and a capital; runs of U+0020 are one piece; pieces are then grouped. The rule of
    hat-splitter (appendix C of arXiv 2501.10322), but for U+2044, which is cut off here so that
    the rule is causal. Arguments, result and errors as `split_whitespace`.
    """
    groups: list[str] = []
    last = ""
    for piece in _pieces(text):
        kind = _kind(piece)
        if (last, kind) in _JOINED:
            groups[-1] += piece
        else:
            groups.append(piece)
        last = kind
    return _capped(groups, max_bytes)


def split_fixed(text: str, max_bytes: int) -> list[bytes]:
    """Chunks of `max_bytes` bytes whatever they hold: the control without words."""
    return _capped([text] if text else [], max_bytes)


SPLITTERS: dict[str, Callable[[str, int], list[bytes]]] = {
    "whitespace": split_whitespace,
    "unicode": split_unicode,
    "fixed": split_fixed,
}


def split(text: str, rule: str, max_bytes: int) -> list[bytes]:
    """The words of a text by the rule of that name; raises InputError for another name."""
    check_choice("rule", rule, SPLITTERS)
    return SPLITTERS[rule](text, max_bytes)


def pack(words: Sequence[bytes], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Words as rows of an array.

    Args:
      words: N of them.
      width: C, bytes of a row.

    Returns:
      int32 [N, C], zeros beyond each word, and the words' lengths int32 [N].

    Raises:
      InputError: a word longer than `width`.
    """
    lengths = np.array([len(word) for word in words], np.int32)
    if lengths.size and lengths.max() > width:
        raise InputError(f"words: one has {lengths.max()} bytes; the width is {width}")
    padded = b"".join(word.ljust(width, b"\0") for word in words)
    return np.frombuffer(padded, np.uint8).reshape(-1, width).astype(np.int32), lengths


def _pieces(text: str) -> list[str]:
    """Steps 1 to 4 of rule B: cut, then join what is U+0020 alone."""
    pieces: list[str] = []
    for piece in filter(None, _CUT.split(text)):
        if pieces and set(piece) | set(pieces[-1]) == {" "}:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def _kind(piece: str) -> str:
    """'space' is one U+0020, 'blank' any other whitespace, 'mark' punctuation, 'word' the rest."""
    if piece == " ":
        return "space"
    if piece.isspace():
        return "blank"
    return "mark" if _PUNCTUATION.fullmatch(piece) else "word"


def _capped(words: Sequence[str], max_bytes: int) -> list[bytes]:
    if max_bytes < 1:
        raise InputError(f"max_bytes: {max_bytes} must be at least 1")
    pieces = []
    for word in words:
        try:
            left = word.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text: {error.object[error.start]!r} has no UTF-8") from None
        while len(left) > max_bytes:
            end = max_bytes
            while end and left[end] & 0xC0 == 0x80:  # within a character
                end -= 1
            end = end or max_bytes
            pieces.append(left[:end])
            left = left[end:]
        pieces.append(left)
    return pieces
