"""Tiny readers of words, their pieces and rows, that tests share."""

import functools
from typing import Any

import jax

from models import cross_attention_words as caw
from models import masked_words, spaced_words, word_pieces
from models.cross_attention_words import WordEncoderConfig
from models.masked_words import Reader, ReaderConfig
from models.subword_heads import HeadConfig
from models.word_pieces import WordPieces
from training import word_rows
from training.word_rows import RowShape

SHAPE = RowShape(num_words=12, width=9, num_slots=3, num_tokens=40, end_of_text=True)
TEXTS = (
    "the cat sat on the mat, the cat  sat\nand the naïve dog sat on the mat: a mat for the cat ",
    "a dog",
    "",
    "東京 internationalisation of cats (and dogs) on the mat",
)


@functools.cache
def pieces() -> WordPieces:
    split = (spaced_words.split(text, SHAPE.width - 1) for text in TEXTS)
    return word_pieces.train(split, 300)


def config(reads: str, causal: bool = False, head: str = "parallel") -> ReaderConfig:
    V, width = pieces().vocab_size, 16
    words = reads == "words"
    length = SHAPE.num_words if words else SHAPE.num_tokens
    backbone = caw.bert_backbone(
        layers=1,
        width=width,
        heads=2,
        max_words=128 if causal else length,
        vocab_size=len(caw.SPECIALS) + (0 if words else V),
        positions="rope" if causal else "learned",
        causal=causal,
    )
    made = HeadConfig(V, width, kind=head, num_slots=SHAPE.num_slots, num_heads=2)
    return ReaderConfig(reads, backbone, WordEncoderConfig(SHAPE.width, 2), made)


@functools.cache
def model(reads: str, causal: bool = False) -> tuple[Reader, Any]:
    reader = masked_words.reader(config(reads, causal))
    return reader, jax.jit(reader.init)(jax.random.key(0))


@functools.cache
def rows() -> tuple[word_rows.Batch, ...]:
    return tuple(
        row
        for text in TEXTS
        for row in word_rows.rows_of(word_rows.words_of(text, pieces(), SHAPE), pieces(), SHAPE)
    )


@functools.cache
def batch() -> word_rows.Batch:
    """Six rows: full ones, short ones and one without words."""
    return word_rows.stack(rows()[:6])
