"""A model with a far larger vocabulary than it was trained with: strings, tables, files.

Feher et al., arXiv 2411.18553, section 2.5 of the sheet. The vocabulary is that of byte-pair
encoding trained on, with all tokens of the model pinned to their ids; texts are encoded by the
longest prefix, since the whole has no consistent order of merges; the tables are predicted.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

from decoding.dynamic_vocabulary import providers
from decoding.dynamic_vocabulary.providers import Provider
from models import byte_characters, hf_checkpoint, token_tables
from models.byte_level import ByteLevel
from models.config import TransformerConfig
from models.errors import InputError
from training import tokenizers as tokenizer_files


def extend(source: ByteLevel, texts: Iterable[str], size: int) -> tuple[str, ...]:
    """The tokens of `source` and further ones up to `size`, by id.

    Byte-pair encoding of the texts, in the pieces of the source's pre-tokeniser, whose tokens that
    the source has already keep their ids.

    Args:
      source: the model's tokeniser.
      texts: read once.
      size: tokens in all; fewer come out when nothing is left to merge.

    Raises:
      InputError: `size` is smaller than the source's vocabulary.
    """
    if size < source.vocab_size:
        raise InputError(f"size: {size} must be at least the {source.vocab_size} of the model")
    backend = tokenizers.Tokenizer(token_models.BPE())
    backend.pre_tokenizer = source.backend.pre_tokenizer or pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(source.tokens),
        show_progress=False,
        max_token_length=64,
    )
    backend.train_from_iterator(texts, trainer)
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = tuple(sorted(ids, key=lambda token: ids[token]))
    assert tokens[: source.vocab_size] == source.tokens, "a pinned token has moved"
    return tokens


def longest_prefix(source: ByteLevel, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """A tokeniser that takes the longest token that a piece begins with, again and again.

    Args:
      source: gives the pre-tokeniser and the special tokens.
      tokens: by id, those of the source first (every byte is among them).
    """
    backend = tokenizers.Tokenizer(
        token_models.WordPiece(
            {token: i for i, token in enumerate(tokens)},
            unk_token=tokens[0],  # never met: every byte is a token
            max_input_chars_per_word=2**31 - 1,
            continuing_subword_prefix="",
        )
    )
    backend.pre_tokenizer = source.backend.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    in_order = sorted(source.specials, key=lambda token: source.specials[token])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in in_order])
    return backend


def token_bytes(source: ByteLevel, tokens: Sequence[str]) -> list[int]:
    """Bytes of text that each token stands for; 0 for special ones."""
    return [
        len(token) if token not in source.specials and byte_characters.is_byte_level(token) else 0
        for token in tokens
    ]


def export(
    directory: str | os.PathLike[str],
    config: TransformerConfig,
    params: Any,
    source: ByteLevel,
    tokens: Sequence[str],
    provider: Provider,
    *,
    chunk: int = 5000,
) -> tuple[TransformerConfig, Any]:
    """Writes a model with the large vocabulary as a directory in Hugging Face's format.

    Args:
      directory: new or of an older export.
      config, params: the model.
      source: its tokeniser.
      tokens: see `extend`.
      provider: predicts the tables; special tokens keep the model's rows.
      chunk: tokens a call of the provider.

    Returns:
      The new config and parameters.
    """
    own = providers.model_rows(config, params)
    made = providers.copying(provider, own, source.specials)
    tables = providers.in_chunks(made, tokens, chunk)
    large = (
        token_tables.retokenized_config(config, len(tokens)),
        token_tables.with_tables(params, tables),
    )
    folder = Path(directory)
    backend = longest_prefix(source, tokens)
    with_tokenizer = folder.parent / f"{folder.name}-tokenizer"
    tokenizer_files.save(backend, with_tokenizer)
    hf_checkpoint.save(folder, *large, tokenizer_from=with_tokenizer)
    return large
