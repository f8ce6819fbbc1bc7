"""Words written by their sub-words: against a loop without caches, rows alone, counts, streams."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, methods, randomness, stopping, word_subwords
from decoding.sampling import SamplingConfig, draw
from models import cross_attention_words as caw
from models import masked_words, sharding, spaced_words, subword_heads, word_pieces, words
from models.cross_attention_words import WordEncoderConfig
from models.errors import InputError
from models.masked_words import ReaderConfig
from models.subword_heads import HeadConfig

C, J, D = 9, 4, 16
PROMPTS = ("the cat  sat", "a", "(naïve) 東京\nis", "the mat, the cat sat on the mat  ")
TRAILS = (0x80, 0x90, 0xA0)  # any character that can be completed can be with some of these
STOP = stopping.StopConfig(30, (spaced_words.END_OF_TEXT,))
SAMPLING = {"greedy": SamplingConfig(), "sampled": SamplingConfig(temperature=1.0, top_p=0.9)}


@functools.cache
def pieces() -> word_pieces.WordPieces:
    texts = (spaced_words.split(text, C - 1) for text in PROMPTS)
    return word_pieces.train(texts, 290)


@functools.cache
def model() -> tuple[ReaderConfig, Any]:
    """Random weights; logits are spread so that draws are not all alike."""
    backbone = caw.bert_backbone(
        layers=1, width=D, heads=2, max_words=256, positions="rope", causal=True
    )
    head = HeadConfig(pieces().vocab_size, D, kind="autoregressive", num_slots=J, num_heads=2)
    config = ReaderConfig("words", backbone, WordEncoderConfig(C, 2), head)
    params = masked_words.reader(config).init(jax.random.key(0))
    table = params["head"]["embedder"]["embedding"]
    params["head"]["embedder"]["embedding"] = 3 * table
    return config, {**params, "pieces": jax.tree.map(jnp.asarray, pieces().writing())}


def streams(texts: Any = PROMPTS) -> list[list[int]]:
    return [list(b"".join(spaced_words.split(text, C - 1))) for text in texts]


@functools.cache
def decoded(name: str) -> list[generation.Row]:
    config, params = model()
    method = methods.build("byte2word", {"target": config}, SAMPLING[name])
    return generation.generate({"target": params}, streams(), method, STOP, seed=3)


def naive(prompt: list[int], sampling: SamplingConfig, row: int) -> tuple[list[int], int]:
    """One word at a time; the backbone reads all words anew, the head all pieces anew."""
    config, _ = model()
    head, (table, lengths) = config.head, pieces().table
    key = randomness.row_keys(3, jnp.array([row]))
    text, rounds = list(prompt), 0
    while len(text) < len(prompt) + STOP.max_new_tokens:
        found = spaced_words.words_of(text)
        symbols, sizes = words.pack([b"", *found], C)
        special = np.array([caw.CLS] + [caw.WORD] * len(found))
        padding = 48 - len(special)
        hidden, _ = apply(
            np.pad(symbols, ((0, padding), (0, 0)))[None], np.pad(sizes, (0, padding))[None],
            np.pad(special, (0, padding))[None],
        )  # fmt: skip
        state = hidden[:, len(found)]
        ids: list[int] = []
        word = b""
        for slot in range(J):
            given = jnp.array([ids + [0] * (J - len(ids))])
            logits = np.array(head_logits(state, given))[0, slot]
            for i in range(head.vocab_size):
                piece = bytes(table[i, : lengths[i]].astype(np.uint8))
                if not (i == head.eos_id and slot == 0) and not possible(word, piece, J - 1 - slot):
                    logits[i] = -1e9
            if slot == 0 or lacking(word[1:]):
                logits[head.end] = -1e9
            position = jnp.array([(1 + len(found) - 1) * J + slot])
            chosen = int(draw(jnp.asarray(logits[None]), key, position, sampling)[0])
            if chosen == head.end:
                break
            ids.append(chosen)
            word += bytes(table[chosen, : lengths[chosen]].astype(np.uint8))
            if chosen == head.eos_id:
                break
        rounds += 1
        text += list(word) or [spaced_words.END_OF_TEXT]
        if not word:
            break
    return text[len(prompt) : len(prompt) + STOP.max_new_tokens], rounds


def lacking(text: bytes) -> int | None:
    """Bytes that a text needs to be UTF-8; None if it never will be."""
    for more in itertools.chain([b""], *(itertools.product(TRAILS, repeat=n) for n in (1, 2, 3))):
        try:
            (text + bytes(more)).decode()
        except UnicodeDecodeError:
            continue
        return len(bytes(more))
    return None


def possible(word: bytes, piece: bytes, slots_left: int) -> bool:
    """Whether a word with this piece can become one of C bytes at most."""
    whole = word + piece
    if not piece or whole[0] < spaced_words.FIRST_FLAG:
        return False
    more = lacking(whole[1:])  # a flag inside is no UTF-8
    return more is not None and len(whole) + more <= C and more <= slots_left


@jax.jit
def apply(symbols: Any, sizes: Any, special: Any) -> Any:
    config, params = model()
    return caw.apply(config.model, params, symbols, sizes, special)


@jax.jit
def head_logits(state: Any, given: Any) -> Any:
    config, params = model()
    return subword_heads.logits(config.head, params["head"], state, given)


@pytest.mark.parametrize("name", SAMPLING)
def test_words_are_those_of_a_loop_without_caches(name: str) -> None:
    """And the backbone takes one step a word."""
    for number, (row, prompt) in enumerate(zip(decoded(name), streams(), strict=True)):
        expected, rounds = naive(prompt, SAMPLING[name], number)
        assert row.token_ids == expected
        assert row.stats["target_calls"] == row.stats["target_positions"] == rounds
        ended = row.finish_reason == "eos"
        assert row.stats["words"] == rounds - ended
        assert row.stats["head_steps"] == rounds * J
        assert ended == (spaced_words.END_OF_TEXT in row.token_ids)


def test_what_is_written_is_words() -> None:
    """The vector that the next round began with is that of the word as a reader cuts the stream."""
    for row in (*decoded("greedy"), *decoded("sampled")):
        found = spaced_words.words_of(row.token_ids)
        assert all(0 < len(word) <= C for word in found)
        for word in found if row.finish_reason == "eos" else found[:-1]:
            word[1:].decode()
        text = spaced_words.decode(row.prompt_ids + row.token_ids)
        assert text.startswith(spaced_words.decode(row.prompt_ids))
    assert len({tuple(row.token_ids) for row in decoded("sampled")}) == len(PROMPTS)


def test_a_row_alone_is_the_same() -> None:
    config, params = model()
    method = word_subwords.word_by_word(config, SAMPLING["sampled"])
    alone = generation.generate(
        {"target": params}, streams(PROMPTS[2:3]), method, STOP, seed=3, row_ids=[2]
    )
    assert alone[0].token_ids == decoded("sampled")[2].token_ids


def test_rows_over_devices_are_the_same() -> None:
    config, params = model()
    mesh = sharding.make_mesh(2)
    placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
    method = word_subwords.word_by_word(config, SAMPLING["sampled"])
    rows = generation.generate({"target": placed}, streams(), method, STOP, seed=3, mesh=mesh)
    assert [row.token_ids for row in rows] == [row.token_ids for row in decoded("sampled")]


def test_a_slot_a_word() -> None:
    config, _ = model()
    method = word_subwords.word_by_word(config, SAMPLING["greedy"])
    assert method.needed is not None
    prompts = streams()
    tokens = np.zeros((len(prompts), 64), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array(list(map(len, prompts)))
    expected = [1 + len(spaced_words.split(text, C - 1)) for text in PROMPTS]
    np.testing.assert_array_equal(method.needed(tokens, lengths), expected)


def test_bad_input() -> None:
    config, _ = model()
    with pytest.raises(InputError, match=r"repetition_penalty: words are not penalised"):
        word_subwords.word_by_word(config, SamplingConfig(repetition_penalty=2.0))
    with pytest.raises(InputError, match=r"method autoregressive: the target model .word_reader."):
        methods.build("autoregressive", {"target": config}, SamplingConfig())
    with pytest.raises(InputError, match=r"must read words and have a head"):
        word_subwords.word_by_word(config.replace(num_classes=2), SamplingConfig())
