"""Which neighbouring tokens of a batch may be merged (Feher et al., arXiv 2411.18553).

Tokens are strings of byte characters (`models.byte_characters`): a space is 'Ġ', a line end 'Ċ', a
tab 'ĉ'.
"""

import functools
import unicodedata
from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import pre_tokenizers

from models import byte_characters
from models.errors import check_choice

# What a merged token may not cross: a piece of the pre-tokeniser (published), white space, white
# space and all punctuation but hyphens, or nothing.
BOUNDARIES = ("pretokens", "word", "word_hyphen", "sentence")
SPACES = frozenset(byte_characters.WHITESPACE)

# (left, right) -> whether they may become one token.
Valid = Callable[[str, str], bool]


def text_of(token: str) -> str | None:
    """The text of a string of byte characters; None where it is part of a character."""
    try:
        return byte_characters.to_bytes(token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def count_pieces(backend: tokenizers.Tokenizer) -> Callable[[str], int]:
    """How many pieces a tokeniser's pre-tokeniser makes of a text; one of all where it has none."""
    splitter = backend.pre_tokenizer
    if splitter is None:
        splitter = pre_tokenizers.Sequence([])
    return lambda text: len(splitter.pre_tokenize_str(text))


def rule(
    boundary: str, specials: Iterable[str] = (), pieces: Callable[[str], int] | None = None
) -> Valid:
    """Whether two neighbours may be merged (section 2.1 of the sheet: 'validity').

    Except in 'sentence', no space, line end or tab may come inside or at the end of what is merged,
    unless it is white space all through (and not two line ends). What is not valid UTF-8 may be
    merged, so that characters can be built of bytes.

    Args:
      boundary: of `BOUNDARIES`.
      specials: tokens that are never merged, whatever the boundary.
      pieces: number of pieces that the pre-tokeniser makes of a text; needed for 'pretokens'.

    Raises:
      InputError: an unknown boundary.
    """
    check_choice("boundary", boundary, BOUNDARIES)
    if boundary == "pretokens" and pieces is None:
        raise ValueError("pieces: the boundary 'pretokens' needs a pre-tokeniser")
    barred = frozenset(specials)

    @functools.cache
    def fits(merged: str) -> bool:
        if boundary == "sentence":
            return True
        if not SPACES.isdisjoint(merged[1:]) and (not SPACES.issuperset(merged) or merged == "ĊĊ"):
            return False
        if (text := text_of(merged)) is None:
            return True
        if boundary == "pretokens":
            assert pieces is not None
            return pieces(text) == 1
        return len(text.split()) == 1 and (boundary == "word" or _hyphens_only(text))

    return lambda left, right: left not in barred and right not in barred and fits(left + right)


def _hyphens_only(text: str) -> bool:
    """False where letters stand together with punctuation that is not a hyphen."""
    marks = {char for char in text if unicodedata.category(char)[0] in "PS"}
    letters = any(char.isalnum() for char in text)
    return not (letters and marks - {"-"})
