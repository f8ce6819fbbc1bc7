"""Vocabularies of units, made from the words of a training text."""

import collections
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from models.errors import InputError, check_choice
from models.word_units import KINDS, NormalForm, WordUnits


def train(kind: str, texts: Iterable[str], form: NormalForm, size: int) -> WordUnits:
    """The units of a training text.

    Args:
      kind: of `models.word_units.KINDS`.
      texts: the text.
      form: how it becomes words.
      size: ids of units at most: sub-words, the most frequent words, or the most frequent
        characters, where there are more; bytes are always 256.

    Raises:
      InputError: an unknown kind, or a size that leaves no room for what is needed.
    """
    check_choice("units", kind, KINDS)
    if kind == "byte":
        return WordUnits(kind, form)
    counts = collections.Counter(word for text in texts for word in form.split(text))
    if kind == "char":
        letters: collections.Counter[str] = collections.Counter()
        for word, count in counts.items():
            letters.update(dict.fromkeys(word, 0))
            for letter in word:
                letters[letter] += count
        counts = letters
    if kind in ("char", "word"):
        if size < 2:
            raise InputError(f"vocab_size: {size} must be at least 2, a symbol and the unknown")
        chosen = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[: size - 1]
        return WordUnits(kind, form, symbols=tuple(chosen))
    if size < 256:
        raise InputError(f"vocab_size: {size} must be at least 256, for the bytes")
    space = " " if kind == "joined_subword" else ""
    return WordUnits(kind, form, bpe=_bpe(counts, size, space).to_str())


def _bpe(counts: collections.Counter[str], size: int, space: str) -> tokenizers.Tokenizer:
    """Byte-pair encoding of words, no merge across the end of one (arXiv 1508.07909)."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (word + space for word, count in sorted(counts.items()) for _ in range(count))
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer
