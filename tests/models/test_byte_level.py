"""Byte-level normal forms of every kind of tokeniser, and surface forms, against plain loops."""

import functools
import itertools
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models import byte_characters, byte_level
from models.byte_characters import NEWLINE, SPACE, TAB, to_bytes, to_characters
from models.errors import InputError
from training import tokenizers as tokenizer_training

TEXTS = (
    "def quick(brown, fox):\n    return brown + fox  # jumps over\n",
    "The quick brown fox's den: 1234 foxes, don't jump!\n\n\tEnd of it.",
    "Größe, naïve café, Straße; größer und größer. Größe!",
    "日本語の文字と日本の文字。日本語",
    "🦊🦊 Привет мир, привет! \r\n \t  x",
)
END = tokenizer_training.END_OF_TEXT


@functools.cache
def bpe() -> tokenizers.Tokenizer:
    return tokenizer_training.train_bpe(TEXTS * 3, 330)


@functools.cache
def sentencepiece(kind: str) -> tokenizers.Tokenizer:
    """As Llama's (BPE) and T5's or XLM-R's (Unigram) tokenisers are stored."""
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<unk>", "<s>", *fallback], show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if kind == "bpe":  # byte fallbacks are ordinary pieces in real files
        stored = json.loads(tokenizer.to_str())
        stored["added_tokens"] = stored["added_tokens"][:2]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    return tokenizer


@functools.cache
def word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[MASK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


ALL = {
    "bpe": bpe,
    "sentencepiece bpe": functools.partial(sentencepiece, "bpe"),
    "unigram": functools.partial(sentencepiece, "unigram"),
    "word piece": word_piece,
}


def test_byte_characters_are_gpt2s():
    expected = bytes_to_unicode()
    assert list(byte_characters.BYTE_CHARACTERS) == [expected[byte] for byte in range(256)]
    assert (SPACE, NEWLINE, TAB) == ("Ġ", "Ċ", "ĉ")
    every = bytes(range(256))
    assert to_bytes(to_characters(every)) == every


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("longest_run", [0, 15])
def test_every_text_comes_back_and_every_byte_is_a_token(name, longest_run):
    tokenizer = ALL[name]()
    form = byte_level.normalise(tokenizer, longest_run=longest_run)
    for text in (*TEXTS, "", "\x00\x7f weird \ud7ff\U0010ffff", " " * 40 + "\n" * 3):
        ids = form.encode(text)
        assert form.decode(ids) == text
        # Tokens are the text, byte for byte.
        assert b"".join(to_bytes(form.tokens[i]) for i in ids) == text.encode()
        assert form.token_bytes[ids].sum() == len(text.encode())
    assert set(byte_characters.BYTE_CHARACTERS) <= set(form.tokens)
    assert len(set(form.tokens)) == form.vocab_size == form.backend.get_vocab_size()
    assert form.num_original == tokenizer.get_vocab_size()
    for place, token in enumerate(form.tokens):
        assert form.backend.token_to_id(token) == place
    # What was appended are bytes, what characters are made of, or white space.
    for token in form.tokens[form.num_original :]:
        assert len(token) == 1 or longest_run or name == "sentencepiece bpe"


def test_a_byte_level_tokeniser_of_its_own_cut_is_unchanged():
    form = byte_level.normalise(bpe(), pre_tokenization="own")
    assert form.num_extra == 0 and form.specials == {END: 0}
    for text in TEXTS:
        assert form.encode(text) == bpe().encode(text).ids
    with pytest.raises(InputError, match="own"):
        byte_level.normalise(word_piece(), pre_tokenization="own")


def test_pieces_of_other_kinds_keep_their_ids():
    """White space before a word, byte fallback and continuation marks become byte characters."""
    form, raw = byte_level.normalise(sentencepiece("unigram")), sentencepiece("unigram")
    for piece, place in raw.get_vocab().items():
        if piece not in form.specials:
            assert form.tokens[place] == to_characters(piece.replace("▁", " "))
    # Segmentation of words is the tokeniser's own where its normaliser changes nothing.
    for word in ("quick", "brown", "Größe", "日本語"):
        mine = [form.tokens[i] for i in form.encode(" " + word)]
        assert mine == [to_characters(t.replace("▁", " ")) for t in raw.encode(word).tokens]

    llama = byte_level.normalise(sentencepiece("bpe"))
    place = sentencepiece("bpe").token_to_id("<0x00>")
    assert llama.tokens[place] == to_characters(b"\x00")
    second = sentencepiece("bpe").token_to_id("<0x61>")  # 'a' is a piece of its own
    assert llama.tokens[second].startswith("<unused")
    for word in ("quick", "Größe", "日本語"):
        mine = [llama.tokens[i] for i in llama.encode(" " + word)]
        theirs = sentencepiece("bpe").encode(word).tokens
        assert mine == [to_characters(t.replace("▁", " ")) for t in theirs]

    bert = byte_level.normalise(word_piece())
    ids = word_piece().get_vocab()
    assert bert.tokens[ids["the"]] == "Ġthe"
    assert bert.tokens[ids["##e"]] == "e"
    assert bert.tokens[ids["!"]] == "!"


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_are_forced_to_the_language_models_ids(name):
    specials = {END: 0, "<|pad|>": 7, "<|far|>": 600}
    form = byte_level.normalise(ALL[name](), specials=specials)
    assert form.specials == specials
    for token, place in specials.items():
        assert form.tokens[place] == token and form.backend.token_to_id(token) == place
        assert form.decompose(token) == [place]
    assert form.vocab_size > 600 and form.tokens[500].startswith(("<unused", "<un"))
    ids = form.encode(f"fox{END} brown")
    assert 0 in ids and form.decode(ids) == "fox brown"
    own = {"<s>", "<unk>", "[PAD]", "[UNK]", "[MASK]"}
    assert not own & set(form.tokens)
    # The others close up in order.
    before = [t for t in byte_level.normalise(ALL[name]()).tokens if t not in own | set(specials)]
    after = [t for t in form.tokens if t not in specials and not t.startswith("<unused")]
    kept = [t for t in before if not t.startswith("<unused")]
    assert after == kept
    with pytest.raises(InputError, match="different ids"):
        byte_level.normalise(ALL[name](), specials={"a": 1, "b": 1})


def test_runs_of_white_space_are_consistent():
    """Section 2.1: one character and 1 to 15 repeats of one are tokens, no other run is."""
    runs = byte_characters.whitespace_runs(15)
    assert len(runs) == len(set(runs)) == 3 * 3 * 15 and max(map(len, runs)) == 16
    many = tokenizer_training.train_bpe(["x" + " \t " * 3 + " \t \ty" + " " * 9] * 9, 290)
    plain = byte_level.normalise(many)
    mixed = [t for t in plain.tokens if set(t) == {SPACE, TAB} and len(t) > 2]
    assert any(t not in runs for t in mixed)
    for tokenizer in (many, sentencepiece("unigram"), word_piece()):
        form = byte_level.normalise(tokenizer, longest_run=15)
        assert set(runs) <= set(form.tokens)
        for text in ("x" + " \t " * 5 + "y", "a\n\n\n\n  b", "\t\t\t\tc    d"):
            used = {form.tokens[i] for i in form.encode(text)}
            several = {t for t in used if len(t) > 1 and set(t) <= {SPACE, TAB, NEWLINE}}
            assert several <= set(runs)
        first = form.tokens[form.encode("\n" + " " * 8 + "x")[0]]
        assert first == NEWLINE + SPACE * 7 or tokenizer is many  # BPE joins what it learned first


def test_pieces_are_cut_as_gpt2_does_with_marks():
    splitter = byte_level.pre_tokenizer()
    cut = [piece for piece, _ in splitter.pre_tokenize_str("It's 12  cafe\u0301s, ok?!\n\n x")]
    assert [to_bytes(p).decode() for p in cut] == [
        "It", "'s", " 12", " ", " cafe\u0301s", ",", " ok", "?!", "\n\n", " x",
    ]  # fmt: skip
    prefixed = byte_level.pre_tokenizer(prefix_space=True).pre_tokenize_str("ab")
    assert prefixed[0][0] == "Ġab"


def test_surfaces_are_the_model_part_applied_to_the_token_string():
    source = byte_level.normalise(tokenizer_training.train_bpe(TEXTS, 275))
    target = byte_level.normalise(sentencepiece("unigram"), specials=source.specials)
    pad = 0
    found = byte_level.surfaces(source, target.tokens, pad_id=pad, max_length=3)
    assert found.ids.shape == (target.vocab_size, 3) and found.ids.dtype == np.int32
    truncated = 0
    for row, token in enumerate(target.tokens):
        if token in source.specials:
            expected = [source.specials[token]]
        else:
            text = token if byte_characters.is_byte_level(token) else to_characters(token)
            expected = naive_bpe(source, text)
        truncated += len(expected) > 3
        padded = (expected + [pad] * 3)[:3]
        assert found.ids[row].tolist() == padded
        assert found.lengths[row] == len(expected)
    assert found.num_truncated == truncated > 0
    # No prefix and no pre-tokenisation: words with spaces inside are still cut by merges alone.
    assert source.decompose("ĠquickĠbrown") == naive_bpe(source, "ĠquickĠbrown")
    with pytest.raises(InputError, match="max_length"):
        byte_level.surfaces(source, target.tokens, pad_id=0, max_length=0)


def naive_bpe(form: byte_level.ByteLevel, text: str) -> list[int]:
    """Merges the best pair until none is left."""
    merges = json.loads(form.backend.to_str())["model"]["merges"]
    rank = {tuple(m if isinstance(m, list) else m.split(" ")): i for i, m in enumerate(merges)}
    parts = list(text)
    while True:
        ranked = [(rank.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(parts))]
        if not ranked or min(ranked)[0] == 10**9:
            return [form.tokens.index(part) for part in parts]
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_overlap_is_by_string():
    source = byte_level.normalise(bpe())
    target = byte_level.normalise(sentencepiece("unigram"), specials=source.specials)
    match = byte_level.overlap(source, target)
    for token, place in zip(target.tokens, match, strict=True):
        assert (place >= 0) == (token in source.tokens)
        if place >= 0:
            assert source.tokens[place] == token
    assert (match >= 0).sum() > 50


def test_end_of_word_suffixes_are_refused():
    tokenizer = tokenizers.Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(InputError, match="end_of_word_suffix"):
        byte_level.normalise(tokenizer)
    with pytest.raises(InputError, match="WordLevel"):
        byte_level.normalise(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
