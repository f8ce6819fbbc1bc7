"""Byte-level BPE tokenisers trained on a text, and characters; saved as Hugging Face files."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from models import files
from models.errors import InputError

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"  # of masked diffusion models

# What a merge may never cross, in order: a line's indentation; a word with the character
# before it (a space, an underscore, a dot); one digit, so that numbers line up; punctuation
# with the line ends after it; blank lines; other white space, whose last space is left to the
# next word. Every character matches some branch, so nothing is lost.
_PIECES = (
    r"(?<=\n)[ \t]+(?=[^\s])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_NUM_BYTES = 256

# What most text and code is made of once it is in lower case: 64 symbols.
LOWER_CASE_64 = "\n abcdefghijklmnopqrstuvwxyz0123456789!\"#%'()*+,-./:;<=>?@[\\]_{}"
ASCII = "".join(map(chr, range(128)))


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> tokenizers.Tokenizer:
    """Trains byte-pair encoding over UTF-8 bytes; decoding what it encodes gives the text back.

    Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2. The same texts in the same order
    give the same tokeniser. Special tokens have the first ids.

    Args:
      texts: the training text, read once.
      vocab_size: ids in all [V]; fewer come out when the texts have no more pairs to merge.
      special_tokens: must hold '<|endoftext|>'.

    Raises:
      InputError: `vocab_size` leaves no room for the bytes, or special tokens are wrong.
    """
    least = _NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        raise InputError(f"vocab_size: {vocab_size} must be at least {least} (bytes and specials)")
    if END_OF_TEXT not in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise InputError(
            f"special_tokens: {list(special_tokens)} must be different and hold {END_OF_TEXT!r}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def characters(symbols: str, *, lower_case: bool = False, other: str = "?") -> tokenizers.Tokenizer:
    """A tokeniser whose tokens are the characters of `symbols`, in that order, and end of text.

    Args:
      symbols: different characters; ids are their places, and end of text has the id after them.
      lower_case: read text in lower case.
      other: the symbol that stands for all characters that are not among them.

    Raises:
      InputError: a symbol that is there twice, or `other` not among them.
    """
    if len(set(symbols)) < len(symbols):
        raise InputError(f"symbols: {symbols!r} must be different")
    if len(other) != 1 or other not in symbols:
        raise InputError(f"other: {other!r} must be one of the symbols")
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=other))
    tokenizer.add_special_tokens([END_OF_TEXT])
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `transformers` opens.

    Raises:
      InputError: the tokeniser has no '<|endoftext|>', which is written as BOS, EOS and padding.
    """
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"tokenizer: has no token {END_OF_TEXT!r}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.token_to_id(MASK) is not None:
        config["mask_token"] = MASK
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    files.write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
