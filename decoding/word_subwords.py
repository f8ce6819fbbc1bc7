"""Decoding with models of words that write sub-words: one backbone step a word (Byte2Word, causal).

The text is a stream of bytes in which a flag begins each word (`models.spaced_words`). One round
writes a word: the vector of the word before it takes a step of the backbone, a static scan over J
slots of the autoregressive head writes its pieces, a table turns them into bytes, and these are
the word that the next round begins with; nothing leaves the device. The backbone's cache has a slot
a word, and one for [CLS].

What is written is a word whatever the head says: its first piece begins with a flag and no other
holds one, it fits into the width of a word and its slots, and its bytes are whole characters.
Pieces with which that could not be are ruled out: the law is the head's, renormalised.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding import stats as work
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec
from decoding.sampling import SamplingConfig, draw
from models import cache as kv
from models import cross_attention_words as caw
from models import spaced_words, subword_heads, utf8
from models.errors import InputError
from models.masked_words import ReaderConfig

_IMPOSSIBLE = -1e9


class WordState(struct.PyTreeNode):
    """What a run keeps beside its text.

    Attributes:
      cache: of [CLS] and the words before the last one.
      symbols: int32 [B, C], the last word, which is in no cache yet.
      length: int32 [B], its bytes.
    """

    cache: kv.KVCache
    symbols: jnp.ndarray
    length: jnp.ndarray


@functools.cache
def word_by_word(config: ReaderConfig, sampling: SamplingConfig) -> Method:
    """A method for the loop; tokens are bytes, a round emits those of one word.

    Parameters of the target are the model's, and `pieces` (`word_pieces.WordPieces.writing`).

    Args:
      config: a causal model of words with an autoregressive head (a parallel one works, and draws
        slots without regard to each other).
      sampling: acts on the logits of sub-words, slot by slot.

    Raises:
      InputError: a model of sub-words, a classifier, or a repetition penalty, which would have to
        be on bytes.
    """
    if config.reads != "words" or config.num_classes:
        raise InputError("byte2word: the target must read words and have a head")
    if sampling.repetition_penalty != 1:
        raise InputError("repetition_penalty: words are not penalised; allowed: 1")
    C = config.encoder.width

    def init(batch: int, slots: int) -> WordState:
        cache = kv.create(config.backbone, batch, slots)
        return WordState(cache, jnp.zeros((batch, C), jnp.int32), jnp.zeros((batch,), jnp.int32))

    def needed(tokens: Any, lengths: Any) -> Any:
        """A slot a word that is there, and one for [CLS]."""
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        return 1 + ((tokens >= spaced_words.FIRST_FLAG) & inside).sum(axis=1)

    def read(
        params: ModelParams, inner: WordState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> WordState:
        # The loop leaves a prompt's last byte to the first round; here it is the last word.
        return prefill(config, params["target"], inner, tokens, lengths + 1)

    def step(params: ModelParams, state: DecodeState) -> tuple[WordState, Emission]:
        inner, model = state.inner, params["target"]
        hidden, cache = caw.apply(
            config.model,
            model,
            inner.symbols[:, None],
            inner.length[:, None],
            jnp.full((len(inner.length), 1), caw.WORD),
            cache=inner.cache,
        )
        assert cache is not None
        symbols, length, ended = write_word(
            config, model, hidden[:, 0], state.keys, inner.cache.lengths, sampling
        )
        cache = kv.truncate(cache, inner.cache.lengths + state.active)
        count = jnp.where(state.active, length, 0)
        spent = work.round_work(
            len(length), 0, extra={"words": 1 - ended, "head_steps": jnp.full_like(length, J)}
        )
        return WordState(cache, symbols, length), Emission(symbols, count, spent)

    J = config.head.num_slots
    return Method(
        "byte2word",
        ("target",),
        0,
        1,
        init,
        read,
        step,
        counters=("words", "head_steps"),
        needed=needed,
    )


def prefill(
    config: ReaderConfig, model: Any, inner: WordState, tokens: jnp.ndarray, lengths: jnp.ndarray
) -> WordState:
    """Reads prompts: [CLS] and all words but the last enter the cache, the last is pending.

    Args:
      config, model: architecture and parameters.
      inner: with an empty cache of as many slots as any row has words, and one.
      tokens: int32 [B, P], streams of bytes that begin with a flag.
      lengths: int32 [B], at least 1.
    """
    B, P = tokens.shape
    C = config.encoder.width
    W = min(P, inner.cache.slots)  # a word has at least its flag
    index = jnp.arange(P)
    inside = index < lengths[:, None]
    begins = (tokens >= spaced_words.FIRST_FLAG) & inside
    word = jnp.cumsum(begins, axis=1)  # from 1: [CLS] is word 0
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    place = jnp.where(inside, index - start, C)

    def fill(row: jnp.ndarray, at: jnp.ndarray, within: jnp.ndarray) -> jnp.ndarray:
        return jnp.zeros((W + 1, C), jnp.int32).at[at, within].set(row, mode="drop")

    symbols = jax.vmap(fill)(tokens, word, place)
    sizes = jax.vmap(lambda at, within: jnp.zeros(W + 1, jnp.int32).at[at].max(within + 1))(
        word, jnp.where(inside, place, -1)
    )
    count = begins.sum(axis=1)
    special = jnp.broadcast_to(jnp.where(jnp.arange(W) == 0, caw.CLS, caw.WORD), (B, W))
    _, cache = caw.apply(
        config.model, model, symbols[:, :W], sizes[:, :W], special, cache=inner.cache
    )
    assert cache is not None
    last = count[:, None]
    return WordState(
        kv.truncate(cache, count.astype(jnp.int32)),
        jnp.take_along_axis(symbols, last[..., None], axis=1)[:, 0],
        jnp.take_along_axis(sizes, last, axis=1)[:, 0],
    )


def write_word(
    config: ReaderConfig,
    model: Any,
    hidden: jnp.ndarray,
    keys: jax.Array,
    number: jnp.ndarray,
    sampling: SamplingConfig,
) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """The next word of each row: its pieces slot by slot, as bytes.

    Args:
      config, model: architecture and parameters.
      hidden: [B, D], states of the words before.
      keys: row keys [B].
      number: int32 [B], which word of its row it is; noise of slot j is that of position
        number * J + j.
      sampling: of the pieces.

    Returns:
      The word int32 [B, C], zeros beyond its bytes; how many they are, int32 [B]; and 1 where it is
      the end of the text, which is the single byte `spaced_words.END_OF_TEXT`, int32 [B].
    """
    head, params, pieces = config.head, model["head"], model["pieces"]
    B, J, C = len(hidden), head.num_slots, config.encoder.width
    table, sizes = pieces["bytes"], pieces["lengths"]
    # `end` has no bytes and is the last id; `subword_heads` knows where it may stand.
    size_of = jnp.append(sizes, 0)

    def possible(slot: jnp.ndarray, length: jnp.ndarray, character: jnp.ndarray) -> jnp.ndarray:
        """bool [B, V + 1]: pieces with which the word can still become one."""
        after = pieces["after"][character]
        lacking = jnp.asarray(utf8.TO_COME)[jnp.maximum(after, 0)]
        room = (length[:, None] + sizes + lacking <= C) & (lacking < J - slot)
        here = jnp.where(slot == 0, pieces["begins"], ~pieces["begins"] & (sizes > 0))
        fine = (after >= 0) & room & here
        fine = fine | ((slot == 0) & (jnp.arange(head.vocab_size) == head.eos_id))
        ends = (slot > 0) & (character == utf8.BETWEEN)
        return jnp.append(fine, ends[:, None], axis=1)

    def one(carry: tuple, slot: jnp.ndarray) -> tuple[tuple, None]:
        inside, piece, done, symbols, length, character = carry
        logits, inside = subword_heads.step(head, params, inside, hidden, piece, slot)
        allowed = possible(slot, length, character)
        logits = jnp.where(allowed, logits, _IMPOSSIBLE)
        piece = draw(logits, keys, number * J + slot, sampling)
        done = done | (piece == head.end)
        new = jnp.where(done, 0, size_of[piece])
        known = jnp.minimum(piece, head.vocab_size - 1)
        offset = jnp.arange(C) - length[:, None]
        spelled = jnp.take_along_axis(
            table[known],
            jnp.clip(offset, 0, table.shape[1] - 1),
            axis=1,
        )
        symbols = jnp.where((offset >= 0) & (offset < new[:, None]), spelled, symbols)
        character = jnp.where(done, character, pieces["after"][character, known])
        done = done | (piece == head.eos_id)
        return (inside, piece, done, symbols, length + new, jnp.maximum(character, 0)), None

    zeros = jnp.zeros((B,), jnp.int32)
    begin = (
        subword_heads.start(head, params, hidden),
        zeros,
        jnp.zeros((B,), bool),
        jnp.zeros((B, C), jnp.int32),
        zeros,
        jnp.full((B,), utf8.BETWEEN),
    )
    (_, _, _, symbols, length, _), _ = jax.lax.scan(one, begin, jnp.arange(J))
    ended = length == 0
    only_end = jnp.where(jnp.arange(C) == 0, spaced_words.END_OF_TEXT, 0)
    symbols = jnp.where(ended[:, None], only_end, symbols)
    return symbols, jnp.maximum(length, 1), ended.astype(jnp.int32)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    del options
    config: Any = configs["target"]
    return word_by_word(config, sampling)


SPEC = MethodSpec(
    "models that read words from bytes and write their sub-words: one backbone step a word",
    ("target",),
    {},
    _build,
    architecture=ReaderConfig,
)
