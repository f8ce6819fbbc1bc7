"""How each kind of tokeniser is read and rebuilt over byte characters; see `models.byte_level`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import models

from models.byte_characters import (
    BYTE_CHARACTERS,
    WHITESPACE,
    is_byte_level,
    to_bytes,
    to_characters,
)
from models.errors import InputError

_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNLIKELY = 10.0  # nats below a Unigram's least likely piece


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A stored model's tokens in byte characters, by id, with what its kind has beside.

    Attributes:
      tokens: byte characters; second spellings and special tokens as they are written.
      scores: of a Unigram model; else empty.
      merges: of a BPE model, in byte characters; else empty.
      byte_level: whether the tokeniser was in byte characters already.
      ignore_merges: of a BPE model: a piece that is a token is not taken apart.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[tuple[str, str], ...] = ()
    byte_level: bool = False
    ignore_merges: bool = False

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Vocabulary":
        """Reads tokenizer.json."""
        model = stored["model"]
        kind = model["type"]
        scores: tuple[float, ...] = ()
        if kind == "Unigram":
            raw = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
            scores = tuple(float(score) for _, score in model["vocab"])
        else:
            raw = dict(model["vocab"])
        specials = special_ids(stored)
        plain = {
            entry["content"]: entry["id"]
            for entry in stored["added_tokens"]
            if not entry["special"] and entry["content"] not in raw
        }
        size = 1 + max([*raw.values(), *plain.values(), *specials.values()])
        byte_level = _is_byte_level_tokenizer(stored)
        prefix = model.get("continuing_subword_prefix") or ""

        def spell(piece: str) -> str:
            return piece if byte_level else _convert(piece, kind, prefix)

        names = [_unused(i) for i in range(size)]
        taken = set(specials)
        spelled = [(i, spell(piece), piece) for piece, i in raw.items() if piece not in specials]
        spelled += [(i, to_characters(text), text) for text, i in plain.items()]
        # '<0x41>' gives way to 'A' where a vocabulary has both.
        spelled.sort(key=lambda e: (_BYTE_FALLBACK.fullmatch(e[2]) is not None, e[0]))
        for i, token, _ in spelled:
            if token and token not in taken:
                names[i] = token
                taken.add(token)
        for token, i in specials.items():
            names[i] = token
        if scores:
            scores += (min(scores),) * (size - len(scores))
        merges: tuple[tuple[str, str], ...] = ()
        if kind == "BPE":
            pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
            merges = tuple((spell(left), spell(right)) for left, right in pairs)
        ignore = bool(model.get("ignore_merges"))
        return cls(tuple(names), scores, merges, byte_level, ignore)

    def with_specials(self, specials: Mapping[str, int], removed: set[str]) -> "Vocabulary":
        """The same with other special tokens, at ids of their own; the rest closes up in order."""
        at = {i: token for token, i in specials.items()}
        if len(at) < len(specials):
            raise InputError(f"specials: {dict(specials)} must have different ids")
        kept = [i for i, token in enumerate(self.tokens) if token not in removed | set(specials)]
        tokens: list[str] = []
        scores: list[float] = []
        rest = iter(kept)
        left = len(kept)
        while left or any(i >= len(tokens) for i in at):
            place = len(tokens)
            if place in at:
                tokens.append(at[place])
                scores.append(0.0)
            elif left:
                i = next(rest)
                left -= 1
                tokens.append(self.tokens[i])
                scores.append(self.scores[i] if self.scores else 0.0)
            else:
                tokens.append(_unused(place))
                scores.append(0.0)
        chosen = tuple(scores) if self.scores else ()
        return dataclasses.replace(self, tokens=tuple(tokens), scores=chosen)


def _unused(place: int) -> str:
    """A name that no text comes to, since white space within pieces has other characters."""
    return f"<unused {place}>"


def special_ids(stored: Mapping[str, Any]) -> dict[str, int]:
    return {entry["content"]: entry["id"] for entry in stored["added_tokens"] if entry["special"]}


def _is_byte_level_tokenizer(stored: Mapping[str, Any]) -> bool:
    splitter = stored.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers", [splitter])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _convert(piece: str, kind: str, prefix: str) -> str:
    """A piece of a tokeniser over characters, in byte characters."""
    if match := _BYTE_FALLBACK.fullmatch(piece):
        return BYTE_CHARACTERS[int(match[1], 16)]
    if kind == "WordPiece":
        # A piece that begins a word stands after a space.
        inner = piece.removeprefix(prefix)
        return to_characters(inner if inner != piece or not _starts_word(piece) else f" {piece}")
    return to_characters(piece.replace(_SENTENCEPIECE_SPACE, " "))


def _starts_word(piece: str) -> bool:
    return piece[:1].isalnum()


def other_runs(tokens: Iterable[str], runs: Sequence[str]) -> set[str]:
    """Tokens of several white-space characters, and nothing else, that are not `runs`."""
    allowed = set(runs)
    return {
        token
        for token in tokens
        if len(token) > 1 and set(token) <= set(WHITESPACE) and token not in allowed
    }


def _bpe(
    vocabulary: Vocabulary,
    tokens: Sequence[str],
    specials: frozenset[str],
    runs: Sequence[str],
    disabled: set[str],
) -> Any:
    """Byte-pair encoding; characters of several bytes are merged before anything else."""
    del specials
    ids = {token: i for i, token in enumerate(tokens)}
    merges: dict[tuple[str, str], None] = {}
    if not vocabulary.byte_level:
        for token in filter(_is_character, tokens):
            merges |= {(token[:end], token[end]): None for end in range(1, len(token))}
    merges |= dict.fromkeys(vocabulary.merges)
    # Runs grow from their left end.
    merges |= {(run[:-1], run[-1]): None for run in sorted(runs, key=len)}
    usable = [
        pair
        for pair in merges
        if all(part in ids and part not in disabled for part in (*pair, "".join(pair)))
    ]
    return models.BPE(ids, usable, ignore_merges=vocabulary.ignore_merges)


def beginnings(tokens: Iterable[str]) -> list[str]:
    """What characters of three or four bytes are merged from, in byte characters."""
    characters = filter(_is_character, tokens)
    return [token[:end] for token in characters for end in range(2, len(token))]


def _is_character(token: str) -> bool:
    """Whether a token is one character of several bytes."""
    if not 2 <= len(token) <= 4 or not is_byte_level(token):
        return False
    try:
        return len(to_bytes(token).decode()) == 1
    except UnicodeDecodeError:
        return False


def _unigram(
    vocabulary: Vocabulary,
    tokens: Sequence[str],
    specials: frozenset[str],
    runs: Sequence[str],
    disabled: set[str],
) -> Any:
    """Unigram; what was added is less likely than any piece, runs of white space certain."""
    never = -1e6
    ordinary = [
        score
        for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True)
        if token not in specials
    ]
    least = min(ordinary, default=0.0) - _UNLIKELY
    certain = set(runs)
    pieces = []
    for i, token in enumerate(tokens):
        if token in certain or token in specials:
            score = 0.0
        elif token in disabled:
            score = never
        else:
            score = vocabulary.scores[i] if i < len(vocabulary.scores) else least
        pieces.append((token, score))
    return models.Unigram(pieces)


def _word_piece(
    vocabulary: Vocabulary,
    tokens: Sequence[str],
    specials: frozenset[str],
    runs: Sequence[str],
    disabled: set[str],
) -> Any:
    """Longest prefix first, without a mark on continuations; every byte is a token."""
    del vocabulary, runs
    ids = {f"<unused {i}>" if token in disabled else token: i for i, token in enumerate(tokens)}
    del specials
    return models.WordPiece(
        ids, unk_token=tokens[0], max_input_chars_per_word=2**31 - 1, continuing_subword_prefix=""
    )


MODELS = {"BPE": _bpe, "Unigram": _unigram, "WordPiece": _word_piece}
