"""Sub-words of words as bytes: a BPE whose units are words with their flags.

It makes targets, and writes words again from what was predicted; no model reads it at its input. A
word's bytes, flag included (`models.spaced_words`), are the characters of the BPE, so that a word's
pieces joined are exactly the word.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as bpe_models

from models import files, spaced_words, utf8
from models.errors import InputError

END_OF_TEXT = "<|endoftext|>"
EOS_ID = 0
FILE = "word_pieces.json"


@functools.cache
def _letters() -> list[str]:
    """A visible character for each byte, as GPT-2's byte-level BPE has them."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    places = {byte: chr(byte) for byte in visible}
    places |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [places[byte] for byte in range(256)]


def _spelled(word: bytes) -> str:
    letters = _letters()
    return "".join(letters[byte] for byte in word)


class WordPieces:
    """A vocabulary of V pieces, the end of the text first.

    Attributes:
      vocab_size: V.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.vocab_size = backend.get_vocab_size()
        self._known: dict[bytes, tuple[int, ...]] = {}

    def encode(self, word: bytes) -> tuple[int, ...]:
        """Ids of a word's pieces. Words are encoded once and kept."""
        ids = self._known.get(word)
        if ids is None:
            ids = tuple(self._backend.encode(_spelled(word), add_special_tokens=False).ids)
            self._known[word] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of pieces; the end of the text has none."""
        table, lengths = self.table
        return b"".join(bytes(table[i, : lengths[i]].astype(np.uint8)) for i in ids)

    @functools.cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of every piece, int32 [V, longest], and how many they are, int32 [V]."""
        byte_of = {letter: byte for byte, letter in enumerate(_letters())}
        spelled = [str(self._backend.id_to_token(i)) for i in range(self.vocab_size)]
        pieces = [
            b"" if i == EOS_ID else bytes(byte_of[letter] for letter in token)
            for i, token in enumerate(spelled)
        ]
        lengths = np.array([len(piece) for piece in pieces], np.int32)
        table = np.zeros((len(pieces), max(lengths)), np.int32)
        for row, piece in enumerate(pieces):
            table[row, : len(piece)] = list(piece)
        return table, lengths

    def writing(self) -> dict[str, np.ndarray]:
        """What words are written with on a device, all of it by piece.

        Returns:
          bytes int32 [V, longest] and lengths int32 [V], as `table`; begins bool [V], pieces that
          begin with a flag; after int32 [8, V], the state of `models.utf8` after a piece's text
          from each state before it, or `utf8.REJECT` where that breaks a character.
        """
        table, lengths = self.table
        begins = (table[:, 0] >= spaced_words.FIRST_FLAG) & (lengths > 0)
        after = np.tile(np.arange(len(utf8.NEXT))[:, None], (1, len(table)))
        after[1:, begins] = utf8.REJECT  # a flag comes between characters
        for place in range(table.shape[1]):
            reads = (place < lengths) & ~(begins & (place == 0)) & (after >= 0)
            after = np.where(reads, utf8.NEXT[np.maximum(after, 0), table[:, place]], after)
        return {
            "bytes": table, "lengths": lengths, "begins": begins, "after": after.astype(np.int32)
        }  # fmt: skip

    def to_json(self) -> str:
        """What `from_json` reads; the same for the same vocabulary."""
        return str(self._backend.to_str())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `FILE` into a directory that is there."""
        files.write_text(Path(directory) / FILE, self.to_json())


def from_json(text: str) -> WordPieces:
    """Undoes `WordPieces.to_json`; InputError for anything else."""
    try:
        json.loads(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"word pieces: corrupt ({str(error).splitlines()[0]})") from None
    if backend.token_to_id(END_OF_TEXT) != EOS_ID:
        raise InputError(f"word pieces: {END_OF_TEXT!r} must have the id {EOS_ID}")
    return WordPieces(backend)


def load(directory: str | os.PathLike[str]) -> WordPieces:
    """Reads what `save` wrote."""
    path = Path(directory) / FILE
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory}: has no {FILE}") from None


def train(words: Iterable[Sequence[bytes]], vocab_size: int) -> WordPieces:
    """Byte-pair encoding (arXiv 1508.07909) on words; no merge crosses two.

    Args:
      words: of each text, read once.
      vocab_size: at least 257; fewer pieces come out when nothing more can be merged.

    Raises:
      InputError: a vocabulary too small for the bytes.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size: {vocab_size} must be at least 257 (bytes and end of text)")
    backend = tokenizers.Tokenizer(bpe_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_letters(),
        show_progress=False,
    )
    texts = (" ".join(map(_spelled, text)) for text in words)
    backend.train_from_iterator(texts, trainer)
    return WordPieces(backend)
