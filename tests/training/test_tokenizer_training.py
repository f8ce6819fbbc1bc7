"""Byte-level BPE: lossless, deterministic, opened by transformers as it was saved."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import InputError
from training import tokenizers as tokenizer_training

CODE = '''def area(width, height):
    """Product of width and height."""
    if width < 0 or height < 0:
        raise ValueError(f"negative: {width} {height}")
    for index in range(100, 2048):
        total = self.total_width + width * index
    return width * height


class Shape:
    def __init__(self):
        self.width = 1234
'''
AWKWARD = [
    "", " ", "\n", "\r\n\r\n", "\t\tx\n\n  \n", "naïve café 東京 🙂👩‍👩‍👧 \u0301a", "a\x00b\x7f",
    "  leading and trailing  ", "12345 6.78e-9", "x=1\n\n\n\n    y", "don't WE'LL", "\u2028\u3000z",
    "\ufeff\ufffd", " " * 300 + "a", "<|endoftext|>", "<|endoftext", "ſß\u1e9e", "\n\t \n",
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_training.train_bpe([CODE] * 3, 350)


def _round_trip(bpe, text):
    return bpe.decode(bpe.encode(text).ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", [*AWKWARD, CODE])
def test_lossless(bpe, text):
    assert _round_trip(bpe, text) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_lossless_on_any_text(bpe, text):
    assert _round_trip(bpe, text) == text


def test_pieces_suit_code(bpe):
    def pieces(text):
        return [bpe.decode([token]) for token in bpe.encode(text).ids]

    assert "".join(pieces(CODE)) == CODE
    # An indentation is one token, and so is a word wherever it stands on its line.
    assert pieces("x\n    width")[-2:] == ["    ", "width"]
    assert pieces("x\n        width")[-2:] == ["        ", "width"]
    assert pieces(" 1234") == [" ", "1", "2", "3", "4"]  # numbers are digits
    # A prompt that ends in a blank line has the same tokens when it is continued.
    prompt = "Question: 1\n\n"
    assert bpe.encode(prompt + "Step").ids[: len(bpe.encode(prompt).ids)] == bpe.encode(prompt).ids


def test_vocabulary(bpe):
    assert bpe.get_vocab_size() == 350
    assert bpe.token_to_id("<|endoftext|>") == 0
    assert bpe.encode("a<|endoftext|>").ids[-1] == 0
    least = tokenizer_training.train_bpe([CODE], 257)
    assert len(least.encode(CODE).ids) == len(CODE.encode())  # bytes alone
    assert len(bpe.encode(CODE).ids) < 0.6 * len(CODE)
    chat = tokenizer_training.train_bpe([CODE], 300, ("<|endoftext|>", "<|user|>"))
    assert chat.encode("<|user|>").ids == [1]


TRAIN = """
import sys
from training import tokenizers
sys.stdout.write(tokenizers.train_bpe([sys.stdin.read()] * 3, 350).to_str())
"""


def test_training_is_deterministic(bpe):
    assert tokenizer_training.train_bpe(iter([CODE] * 3), 350).to_str() == bpe.to_str()
    command = [sys.executable, "-c", TRAIN]
    other = subprocess.run(command, input=CODE, capture_output=True, text=True, check=True)
    assert other.stdout == bpe.to_str()


def test_transformers_opens_what_is_saved(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_training.save(bpe, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    opened = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"),
    )
    for tokenizer in opened:
        for text in [*AWKWARD, CODE]:
            ids = bpe.encode(text).ids
            assert tokenizer(text)["input_ids"] == ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 0)
        assert len(tokenizer) == 350
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert again.to_str() == bpe.to_str()


def test_saving_is_atomic(bpe, tmp_path, monkeypatch):
    tokenizer_training.save(bpe, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tokenizer_training.train_bpe([CODE], 300)

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        tokenizer_training.save(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    tokenizer_training.save(other, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(other.to_str())


def test_errors(tmp_path):
    with pytest.raises(InputError, match="vocab_size: 256 must be at least 257"):
        tokenizer_training.train_bpe([CODE], 256)
    with pytest.raises(InputError, match=r"special_tokens: \['<s>'\] must"):
        tokenizer_training.train_bpe([CODE], 300, ["<s>"])
    with pytest.raises(InputError, match="has no token"):
        tokenizer_training.save(tokenizers.Tokenizer(tokenizers.models.BPE()), tmp_path / "no")
    assert not (tmp_path / "no").exists()
