import dataclasses
import random

import pytest

from models import word_units
from models.errors import InputError
from models.word_units import NormalForm, WordUnits
from training import unit_vocabularies

FORM = NormalForm(lower_case=True, punctuation=None, max_bytes=12)
TEXTS = [
    "The cat sat on the mat, and the cats sat too.",
    "Über den Wolken (naïve) sat a cat's mat.",
]
SIZES = {"byte": 0, "char": 40, "subword": 275, "joined_subword": 275, "word": 9}
UNITS = {kind: unit_vocabularies.train(kind, TEXTS, FORM, size) for kind, size in SIZES.items()}
kinds = pytest.mark.parametrize("kind", UNITS)


def test_published_preparation():
    """Section 2.1: what is dropped, what is spaced out, and that Latin words stay."""
    text = " = Valkyria = \n a <unk> well @-@ known game: don't {stop} -- really?"
    expected = "Valkyria a well known game : don ' t { stop } - - really ?"
    assert NormalForm().split(text) == expected.split()
    # Brackets are no words of their own in the authors' list; in Unicode's they are.
    assert NormalForm().split("f(x)") == ["f(x)"]
    assert FORM.split("F(x)=y") == ["f", "(", "x", ")", "y"]


def test_splitting_what_was_split_changes_nothing():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("ab üß漢😀\n=-'.(\u0301 ", k=60))
        for form in (FORM, NormalForm()):
            words = form.split(text)
            assert form.split(" ".join(words)) == words
            assert all(word and len(word.encode()) <= form.max_bytes for word in words)


def test_long_words_become_several_between_characters():
    assert FORM.split("internationalisation") == ["internationa", "lisation"]
    assert FORM.split("ü" * 7) == ["ü" * 6, "ü"]
    assert FORM.count_overlong("internationalisation of a " + "ü" * 7) == 2
    with pytest.raises(InputError, match="max_bytes: 3 must be at least 4"):
        NormalForm(max_bytes=3)


@kinds
def test_text_comes_back(kind):
    units = UNITS[kind]
    text = " ".join(FORM.split(TEXTS[0])) + " "
    if kind == "word":
        known = " ".join(word for word in text.split() if word in units.symbols) + " "
        assert units.decode(units.encode(known)) == known
        assert units.decode(units.encode("zebra ")) == "\ufffd "
    else:
        assert units.decode(units.encode(text)) == text
        assert units.decode(units.encode(text.strip())) == text.strip()  # the last word is open
    assert max(units.encode(text)) < units.vocab_size
    assert units.decode([*units.encode("the "), units.document_end]) == "the "


@kinds
def test_a_prediction_is_a_word_and_its_end(kind):
    """Section 6, item 6: the same rule for all units."""
    units = UNITS[kind]
    for word in ("cat", "mat", "sat"):
        ids = units.closed(word)
        assert units.word(ids) == word
        assert units.first_word([*ids, *units.closed("the")]) == word
        assert units.word([*ids, *ids]) is None
        assert units.word([]) is None
        if kind != "word":
            assert units.word(ids[:-1]) is None  # without its end
    # A longer word with the right beginning is another word.
    if kind != "word":
        longer = units.closed("cats")
        assert units.first_word(longer) == "cats" != "cat"
    assert units.first_word([units.document_end]) is None


def test_unknown_words_and_characters_are_never_right():
    word, char = UNITS["word"], UNITS["char"]
    assert word.word(word.closed("zebra")) is None
    assert char.word(char.closed("x€y")) is None
    assert UNITS["byte"].word([0xC3, 256]) is None  # half a character


def test_sub_words_are_those_of_the_library():
    """Against the `tokenizers` library's own decoder; no piece reaches over a word's end."""
    import tokenizers

    for kind, space in (("subword", ""), ("joined_subword", " ")):
        units = UNITS[kind]
        backend = tokenizers.Tokenizer.from_str(units.bpe)
        for word in FORM.split(" ".join(TEXTS)):
            ids = units.units(word) if kind == "subword" else units.closed(word)
            assert backend.decode(ids) == word + space
            assert sum(i in units.ends for i in ids) == len(space)
    # Frequent words have become one piece, in one kind of units with their end.
    assert len(UNITS["subword"].units("sat")) == 1 == len(UNITS["joined_subword"].closed("sat"))


def test_vocabularies_hold_what_is_frequent():
    assert UNITS["word"].symbols[:2] == ("sat", "the")
    assert len(UNITS["word"].symbols) == 8
    few = unit_vocabularies.train("char", ["aaab"], FORM, 2)
    assert few.symbols == ("a",) and few.units("ab") == [0, 1]
    with pytest.raises(InputError, match="vocab_size: 255 must be at least 256"):
        unit_vocabularies.train("subword", TEXTS, FORM, 255)
    with pytest.raises(InputError, match="units: 'bytes' is not known"):
        unit_vocabularies.train("bytes", TEXTS, FORM, 0)


@kinds
def test_what_is_saved_is_loaded(kind, tmp_path):
    UNITS[kind].save(tmp_path)
    assert word_units.load(tmp_path) == UNITS[kind]
    (tmp_path / word_units.FILE).write_text('{"kind": "byte"}')
    with pytest.raises(InputError, match="form"):
        word_units.load(tmp_path)


def test_vocabularies_that_do_not_suit_their_kind_are_refused():
    with pytest.raises(InputError, match="symbols: 1 of them do not suit 'byte' units"):
        WordUnits("byte", symbols=("a",))
    with pytest.raises(InputError, match="bpe: '' does not suit 'subword' units"):
        dataclasses.replace(UNITS["subword"], bpe="")
