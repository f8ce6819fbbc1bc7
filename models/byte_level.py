"""The byte-level normal form of a tokeniser, in which any two can be compared.

Minixhofer et al., 'Zero-shot tokenizer transfer' (arXiv 2405.07883): every vocabulary is written in
GPT-2's byte characters (256 printable stand-ins; a space is 'Ġ'), bytes that it lacks are appended
with ids from the vocabulary's size on, and the language model's special tokens keep their ids.
BPE, Unigram and WordPiece tokenisers of the `tokenizers` library have such a form; normalisers
(lower-casing, NFKC) are left out of it, so that every text is encoded and comes back as it was.

A token of one tokeniser is then a text for another's model: the ids that it decomposes into are
its surface form (`surfaces`), the hypernetwork's input.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from models import byte_level_conversion as conversion
from models.byte_characters import (
    BYTE_CHARACTERS,
    is_byte_level,
    to_characters,
    whitespace_runs,
)
from models.byte_level_conversion import Vocabulary
from models.errors import InputError, check_choice

# GPT-2's pieces: contractions, a word, a number, other signs, each with a space before it; white
# space, whose last character is left to the next word. Marks belong to words.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = ("gpt2", "own")
KINDS = ("BPE", "Unigram", "WordPiece")
MAX_SURFACE = 7  # published


def pre_tokenizer(pieces: str = PIECES, *, prefix_space: bool = False) -> Any:
    """Cuts a text by a regular expression and writes the parts in byte characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )


@dataclasses.dataclass(frozen=True)
class ByteLevel:
    """A tokeniser in byte-level normal form.

    Attributes:
      backend: the tokeniser itself; encodes any text without loss.
      tokens: by id, strings of byte characters; a special token as it is written. An id that
        nothing is ever encoded as (a second spelling of a byte, a hole before a special token's
        id) has a string that no text comes to.
      specials: string -> id of the special tokens.
      num_original: ids from here on are bytes (and white space) that the tokeniser lacked.
    """

    backend: tokenizers.Tokenizer
    tokens: tuple[str, ...]
    specials: Mapping[str, int]
    num_original: int

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def num_extra(self) -> int:
        """Tokens that were appended."""
        return len(self.tokens) - self.num_original

    @property
    def is_special(self) -> np.ndarray:
        """bool [V]."""
        found = np.zeros(self.vocab_size, bool)
        found[list(self.specials.values())] = True
        return found

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 [V], bytes of text that each token stands for; 0 for special tokens."""
        sizes = [len(token) if is_byte_level(token) else 0 for token in self.tokens]
        return np.where(self.is_special, 0, sizes).astype(np.int32)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens that are spelled out in the text are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decompose(self, token: str) -> list[int]:
        """Ids that the model part makes of a token's string: no pre-tokenisation, no prefix.

        A special token's string is its own id.
        """
        if token in self.specials:
            return [self.specials[token]]
        text = token if is_byte_level(token) else to_characters(token)
        return [piece.id for piece in self.backend.model.tokenize(text)]


def read(directory: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokeniser of a directory's tokenizer.json, padding and truncation switched off.

    Raises:
      InputError: the file is missing or corrupt.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{directory}: no tokenizer.json; a byte-level form needs one")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: corrupt tokenizer ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def normalise(
    tokenizer: tokenizers.Tokenizer,
    *,
    specials: Mapping[str, int] | None = None,
    pre_tokenization: str = "gpt2",
    prefix_space: bool = False,
    longest_run: int = 0,
) -> ByteLevel:
    """The byte-level normal form of a tokeniser (section 2.1).

    Args:
      tokenizer: a BPE (over bytes, or characters with or without byte fallback), Unigram or
        WordPiece tokeniser. It is not changed.
      specials: string -> id of the language model's special tokens, which are forced to these
        ids and replace the tokeniser's own. None keeps the tokeniser's own where they are.
      pre_tokenization: 'gpt2' cuts texts as GPT-2 does (published); 'own' keeps what a byte-level
        tokeniser has.
      prefix_space: put a space before a text that does not begin with one.
      longest_run: with a positive number, white space is made consistent: the tokens of
        `whitespace_runs` are added where they are missing, and other tokens of several
        white-space characters are never used. Published: 15 for targets of training.

    Raises:
      InputError: a tokeniser of another kind; two special tokens with one id; 'own' for a
        tokeniser that is not byte-level.
    """
    check_choice("pre_tokenization", pre_tokenization, PRE_TOKENIZERS)
    stored = json.loads(tokenizer.to_str())
    kind = stored["model"]["type"]
    check_choice("tokenizer.model", kind, KINDS)
    if stored["model"].get("end_of_word_suffix"):
        raise InputError("tokenizer.model: end_of_word_suffix is not supported; allowed: none")
    vocabulary = Vocabulary.of(stored)
    own = conversion.special_ids(stored)
    if specials is None:
        specials = own
    else:
        vocabulary = vocabulary.with_specials(specials, removed=set(own))
    tokens = vocabulary.tokens
    num_original = len(tokens)
    runs = whitespace_runs(longest_run) if longest_run else []
    beginnings = []
    if kind == "BPE" and not vocabulary.byte_level:
        beginnings = conversion.beginnings(tokens)
    extra = dict.fromkeys((*BYTE_CHARACTERS, *beginnings, *runs))
    for token in tokens:
        extra.pop(token, None)
    disabled = conversion.other_runs(tokens, runs) if longest_run else set()
    tokens = (*tokens, *extra)
    model = conversion.MODELS[kind](vocabulary, tokens, frozenset(specials), runs, disabled)
    if pre_tokenization == "own":
        if not vocabulary.byte_level or tokenizer.pre_tokenizer is None:
            raise InputError("pre_tokenization: 'own' needs a byte-level tokeniser; use 'gpt2'")
        splitter = tokenizers.Tokenizer.from_str(tokenizer.to_str()).pre_tokenizer
    else:
        splitter = pre_tokenizer(prefix_space=prefix_space)
    return assemble(model, tokens, specials, num_original, splitter)


def assemble(
    model: Any,
    tokens: Sequence[str],
    specials: Mapping[str, int],
    num_original: int,
    splitter: Any = None,
) -> ByteLevel:
    """A `ByteLevel` around a model of the `tokenizers` library over byte characters.

    Args:
      model: whose ids are the places in `tokens`.
      tokens: by id.
      specials: string -> id; the strings are among `tokens`.
      num_original: see `ByteLevel`.
      splitter: a pre-tokeniser that ends with byte characters; default `pre_tokenizer()`.
    """
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter or pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    in_order = sorted(specials, key=lambda token: specials[token])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in in_order])
    return ByteLevel(backend, tuple(tokens), dict(specials), num_original)


class Surfaces(NamedTuple):
    """Tokens as ids of another tokeniser.

    Attributes:
      ids: int32 [n, L], padded.
      lengths: int32 [n], before truncation.
    """

    ids: np.ndarray
    lengths: np.ndarray

    @property
    def num_truncated(self) -> int:
        """Tokens that lost their tail."""
        return int((self.lengths > self.ids.shape[1]).sum())


def surfaces(
    source: ByteLevel, tokens: Sequence[str], *, pad_id: int, max_length: int = MAX_SURFACE
) -> Surfaces:
    """The surface forms of tokens (section 2.2): what the source's model part makes of each.

    Args:
      source: the language model's own tokeniser.
      tokens: byte characters; special tokens of the source as they are written.
      pad_id: fills short rows; the language model's padding.
      max_length: L; longer ones lose their tail.

    Raises:
      InputError: `max_length` below 1.
    """
    if max_length < 1:
        raise InputError(f"max_length: {max_length} must be at least 1")
    ids = np.full((len(tokens), max_length), pad_id, np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, token in enumerate(tokens):
        found = source.decompose(token)
        lengths[row] = len(found)
        ids[row, : min(len(found), max_length)] = found[:max_length]
    return Surfaces(ids, lengths)


def overlap(source: ByteLevel, target: ByteLevel) -> np.ndarray:
    """For each target token the id of the same string in the source, -1 where there is none.

    int32 [V_target]; ids of appended bytes, which have no row in the source's table, are -1.
    """
    ids = {token: i for i, token in enumerate(source.tokens[: source.num_original])}
    return np.array([ids.get(token, -1) for token in target.tokens], np.int32)
