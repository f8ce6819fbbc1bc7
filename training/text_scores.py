"""One set of measures for models of words and models of tokens: same texts, same bytes, same words.

Bits a byte are a text's whole surprise over its UTF-8 bytes. A word is right when every unit and
its end are the most likely ones; for a model of tokens, when all tokens that cover it are. Byte
accuracy counts the bytes of units, or of tokens, that are right. HAT, arXiv 2501.10322, section 3.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from models import hierarchical, transformer, words
from models.config import TransformerConfig
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from training import losses


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text to score, after a context that is read alone. Both begin and end between words."""

    text: str
    context: str = ""


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Sums over the scored texts.

    Attributes:
      nats: surprise of the texts.
      bytes: of UTF-8.
      right_bytes: bytes of units (or tokens) that were the most likely ones.
      words, right_words: words of the splitting rule.
      positions: of the backbone (or of the token model) that the texts take.
    """

    nats: float
    bytes: int
    right_bytes: int
    words: int
    right_words: int
    positions: int

    def report(self) -> dict[str, float]:
        """The measures, by name."""
        return {
            "bits_per_byte": losses.bits_per_byte(self.nats, self.bytes),
            "word_accuracy": self.right_words / self.words,
            "byte_accuracy": self.right_bytes / self.bytes,
            "bytes_per_position": self.bytes / self.positions,
        }


def total(parts: Sequence[TextScores]) -> TextScores:
    """The sums of several."""
    names = [field.name for field in dataclasses.fields(TextScores)]
    return TextScores(**{name: sum(getattr(part, name) for part in parts) for name in names})


@functools.partial(jax.jit, static_argnums=0)
def _word_scores(
    config: HierarchicalConfig, params: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    logits = hierarchical.apply(
        config,
        params,
        batch["source"],
        batch["source_lengths"],
        batch["target"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    k, lengths = jnp.arange(config.max_word), batch["target_lengths"][..., None]
    targets = jnp.where(k == lengths, config.word_end, batch["target"])
    nats = losses.cross_entropy(logits, targets)
    return jnp.where(k <= lengths, nats, 0.0), logits.argmax(axis=-1) == targets


def score_words(
    config: HierarchicalConfig,
    params: Any,
    passages: Sequence[Passage],
    *,
    num_words: int,
    batch_size: int,
    counted_by: tuple[str, int] | None = None,
) -> TextScores:
    """What a hierarchical model of bytes makes of passages, each read from its own start.

    Args:
      config, params: the model.
      passages: with texts of at least a word.
      num_words: N, words of a passage at most; longer ones are an InputError.
      batch_size: passages scored together.
      counted_by: rule and longest word by which words are counted where these are not the model's
        own: one is then right when all its bytes are.
    """
    split = functools.partial(words.split, rule=config.rule, max_bytes=config.max_word)
    parts = []
    for first in range(0, len(passages), batch_size):
        group = passages[first : first + batch_size]
        batch, scored = _word_batch(
            config, [(split(p.context), split(p.text)) for p in group], num_words, batch_size
        )
        nats, hits = (np.asarray(x) for x in _word_scores(config, params, batch))
        k, lengths = np.arange(config.max_word), batch["target_lengths"][..., None]
        is_unit = (k < lengths) & scored[..., None]
        count = int(scored.sum())
        right = int(((hits | (k > lengths)).all(axis=-1) & scored).sum())
        if counted_by is not None:
            sizes = [[len(word) for word in words.split(p.text, *counted_by)] for p in group]
            by_byte = [hits[row][is_unit[row]] for row in range(len(group))]
            one = [np.ones(len(row), int) for row in by_byte]
            right = sum(map(covered_words, sizes, one, by_byte))
        parts.append(
            TextScores(
                nats=float(nats.sum(axis=-1, dtype=np.float64)[scored].sum()),
                bytes=int(lengths[..., 0][scored].sum()),
                right_bytes=int((hits & is_unit).sum()),
                words=count if counted_by is None else sum(map(len, sizes)),
                right_words=right,
                positions=count * config.num_prefix,
            )
        )
    return total(parts)


def _word_batch(
    config: HierarchicalConfig,
    passages: Sequence[tuple[list[bytes], list[bytes]]],
    num_words: int,
    batch_size: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A passage a row, and which words are scored, bool [B, N]."""
    target = np.zeros((batch_size, num_words, config.max_word), np.int32)
    lengths = np.zeros((batch_size, num_words), np.int32)
    scored = np.zeros((batch_size, num_words), bool)
    for row, (context, text) in enumerate(passages):
        n = len(context) + len(text)
        if n > num_words or not text:
            raise InputError(f"passage: {n} words, {len(text)} to score; allowed: 1 to {num_words}")
        target[row, :n], lengths[row, :n] = words.pack([*context, *text], config.max_word)
        scored[row, len(context) : n] = True
    positions = np.broadcast_to(np.maximum(np.arange(num_words) - 1, 0), lengths.shape)
    batch = {
        "source": np.pad(target, ((0, 0), (1, 0), (0, 0)))[:, :-1],
        "source_lengths": np.pad(lengths, ((0, 0), (1, 0)))[:, :-1],
        "target": target,
        "target_lengths": lengths,
        "positions": positions.astype(np.int32),
        "segment_ids": np.ones_like(lengths),
    }
    return batch, scored


@functools.partial(jax.jit, static_argnums=0)
def _token_scores(
    config: TransformerConfig, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = transformer.apply(config, params, tokens[:, :-1]).logits
    assert logits is not None
    return losses.cross_entropy(logits, tokens[:, 1:]), logits.argmax(axis=-1) == tokens[:, 1:]


def token_bytes(backend: tokenizers.Tokenizer) -> np.ndarray:
    """Bytes that each token of a byte-level tokeniser stands for; 0 for special ones: int [V]."""
    special = backend.get_added_tokens_decoder()
    size = backend.get_vocab_size()
    # A byte is one character of the tokens' own alphabet.
    return np.array([0 if i in special else len(str(backend.id_to_token(i))) for i in range(size)])


def score_tokens(
    config: TransformerConfig,
    params: Any,
    backend: tokenizers.Tokenizer,
    passages: Sequence[Passage],
    *,
    rule: str,
    max_word: int,
    num_tokens: int,
    batch_size: int,
) -> TextScores:
    """What a model of byte-level tokens makes of passages, each begun by its end-of-text token.

    Context and text are tokenised apart, so that no token stands in both.

    Args:
      config, params: the model; its first EOS id begins every passage.
      backend: its tokeniser.
      passages: as for `score_words`.
      rule, max_word: how the texts' words are counted.
      num_tokens: T, tokens of a passage at most; longer ones are an InputError.
      batch_size: passages scored together.
    """
    size_of = token_bytes(backend)
    parts = []
    for first in range(0, len(passages), batch_size):
        group = passages[first : first + batch_size]
        tokens = np.full((batch_size, num_tokens + 1), config.eos_token_ids[0], np.int32)
        spans = []
        for row, passage in enumerate(group):
            read, scored = (backend.encode(x).ids for x in (passage.context, passage.text))
            n = len(read) + len(scored)
            if n > num_tokens:
                raise InputError(f"passage: {n} tokens; allowed: {num_tokens}")
            tokens[row, 1 : n + 1] = [*read, *scored]
            spans.append((len(read), n))
        nats, hits = (np.asarray(x) for x in _token_scores(config, params, tokens))
        for row, (passage, (start, end)) in enumerate(zip(group, spans, strict=True)):
            sizes = size_of[tokens[row, start + 1 : end + 1]]
            hit = hits[row, start:end]
            found = words.split(passage.text, rule, max_word)
            parts.append(
                TextScores(
                    nats=float(nats[row, start:end].sum(dtype=np.float64)),
                    bytes=len(passage.text.encode()),
                    right_bytes=int(sizes[hit].sum()),
                    words=len(found),
                    right_words=covered_words([len(word) for word in found], sizes, hit),
                    positions=end - start,
                )
            )
    return total(parts)


def covered_words(lengths: Sequence[int], sizes: np.ndarray, hit: np.ndarray) -> int:
    """Words all of whose tokens are right.

    Args:
      lengths: bytes of each word.
      sizes: int [n], bytes of each token; words and tokens cover the same bytes.
      hit: bool [n], tokens that are right.

    Raises:
      InputError: they do not cover the same bytes.
    """
    if sum(lengths) != sizes.sum():
        raise InputError(f"tokens: {sizes.sum()} bytes; the words have {sum(lengths)}")
    right_byte = np.repeat(hit, sizes)
    starts = np.cumsum([0, *lengths[:-1]])
    return int(np.logical_and.reduceat(right_byte, starts).sum())


def passages_of(
    texts: Sequence[str], *, rule: str, max_word: int, num_words: int, limit: int, context: int = 0
) -> list[Passage]:
    """Passages of `num_words` words from all over the texts.

    Args:
      texts: documents.
      rule, max_word: how they are split. A passage holds whole characters.
      num_words: of a passage; what is left of a document is dropped.
      limit: passages at most, evenly spaced.
      context: how many of the words are context.
    """
    found = []
    for text in texts:
        pieces = words.split(text, rule, max_word)
        for start in range(0, len(pieces) - num_words + 1, num_words):
            window = pieces[start : start + num_words]
            try:
                read, scored = (b"".join(x).decode() for x in (window[:context], window[context:]))
            except UnicodeDecodeError:  # a cut within a character
                continue
            found.append(Passage(scored, read))
    return found[:: max(1, len(found) // limit)][:limit]
