"""Batch-level merging against a naive implementation that recounts everything at each merge."""

import functools
import itertools
import time
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.dynamic_vocabulary import boundaries, merging
from models.errors import InputError
from training import tokenizers as bpe

SPECIALS = ("<s>", "</s>")
TEXTS = (
    "def merge(pairs):\n    return max(pairs, key=pairs.get)  # naïve\n",
    "for pair in pairs:\n\tcount[pair] += 1\n\n",
    "class Pair:\n    '''A pair of pairs — 🙂 🙃.'''\n",
    "well-known words, re-counted words; 12 123 \n",
    "die häufigsten Paare zählen: größte zuerst",
)


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    return bpe.train_bpe(TEXTS[:2] * 3, 300)


@functools.cache
def rule(boundary: str) -> boundaries.Valid:
    return boundaries.rule(boundary, SPECIALS, boundaries.count_pieces(tokenizer()))


def naive(sequences, budget, valid):
    """Algorithm 1 word by word: recount, take the first of the most frequent, replace."""
    rows, merges = [list(row) for row in sequences], []
    while budget is None or len(merges) < budget:
        counts = Counter()
        for row in rows:
            for pair in itertools.pairwise(row):
                if valid(*pair):
                    counts[pair] += 1
        if not counts:
            break
        top = max(counts.values())
        best = next(pair for pair, n in counts.items() if n == top)
        merges.append(best)
        for r, row in enumerate(rows):
            new, i = [], 0
            while i < len(row):
                if tuple(row[i : i + 2]) == best:
                    new.append(row[i] + row[i + 1])
                    i += 2
                else:
                    new.append(row[i])
                    i += 1
            rows[r] = new
    return rows, merges


SMALL = st.lists(st.lists(st.sampled_from("abĠ"), max_size=14), min_size=1, max_size=4)
TOKENS = st.sampled_from(
    ["a", "b", "Ġ", "Ġa", "ab", "Ċ", "-", ".", "ð", "Ł", "ĻĤ", "<s>", "</s>", "1", "ba", "ĠĠ"]
)
MIXED = st.lists(st.lists(TOKENS, max_size=16), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.one_of(SMALL, MIXED), st.integers(0, 12), st.sampled_from(boundaries.BOUNDARIES))
def test_equals_recounting_at_every_merge(batch, budget, boundary):
    valid = rule(boundary)
    for limit in (budget, None):
        found = merging.merge(batch, limit, valid)
        rows, merges = naive(batch, limit, valid)
        assert found.merges == merges
        assert found.tokens == rows
        assert found.lengths[-1] == sum(map(len, rows))


@settings(max_examples=60, deadline=None)
@given(MIXED, st.sampled_from(boundaries.BOUNDARIES))
def test_what_holds_at_every_number_of_merges(batch, boundary):
    valid = rule(boundary)
    full = merging.merge(batch, None, valid)
    assert all(a > b for a, b in itertools.pairwise(full.lengths))
    assert merging.merge(batch, 0, valid).tokens == [list(row) for row in batch]
    for m in (0, 1, 3, len(full.merges), len(full.merges) + 5):
        found = merging.merge(batch, m, valid)
        assert ["".join(row) for row in found.tokens] == ["".join(row) for row in batch]
        assert len(found.merges) == min(m, len(full.merges))  # early stop at word level
        assert found.lengths == full.lengths[: m + 1]
        for row, starts, new in zip(batch, found.starts, found.tokens, strict=True):
            ends = [*starts[1:], len(row)][: len(starts)]
            assert ["".join(row[a:b]) for a, b in zip(starts, ends, strict=True)] == new


def encode(texts) -> list[list[str]]:
    return [tokenizer().encode(text).tokens for text in texts]


@pytest.mark.parametrize("boundary", boundaries.BOUNDARIES)
def test_specials_are_never_merged(boundary):
    batch = [["<s>", *encode(TEXTS[:1])[0], "</s>", "</s>", "a", "a", "</s>"]] * 3
    found = merging.merge(batch, None, rule(boundary))
    for row in found.tokens:
        assert [t for t in row if "s>" in t] == ["<s>", "</s>", "</s>", "</s>"]
        assert "aa" in row


def test_no_merge_crosses_a_pretoken_and_word_level_is_reached():
    found = merging.merge(encode(TEXTS), None, rule("pretokens"))
    splitter = tokenizer().pre_tokenizer
    originals = set(tokenizer().get_vocab())
    for text, row in zip(TEXTS, found.tokens, strict=True):
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)]
        ends = {0}
        for piece in pieces:
            ends.add(max(ends) + len(piece))
        place, crossed = 0, []
        for token in row:
            if any(place < end < place + len(token) for end in ends):
                crossed.append(token)
            place += len(token)
        # What this pre-tokeniser splits after a line end alone, it does not split by itself.
        assert crossed == (["\u0109count"] if "\tcount" in text else [])
        for token in set(row) - originals:
            assert len(splitter.pre_tokenize_str(boundaries.text_of(token))) == 1
    # A word that has letters alone is one token.
    assert "return" in found.tokens[0]
    assert "Ġwords" in found.tokens[3]


def test_white_space_comes_first_or_makes_up_the_whole():
    for boundary in ("pretokens", "word", "word_hyphen"):
        valid = rule(boundary)
        assert valid("Ġ", "a")
        assert not valid("a", "Ġ")
        assert not valid("a", "Ċ")
        assert not valid("aĉ", "b")
        assert not valid("Ċ", "Ċ")
    assert rule("pretokens")("Ġ", "Ġ")  # a piece of white space
    assert rule("sentence")("a", "Ġb")
    # Sentences are merged whole.
    assert merging.merge([["a", "Ġb", ".", "Ċ"]], None, rule("sentence")).tokens == [["aĠb.Ċ"]]


def test_words_and_hyphens():
    word, hyphen, pieces = rule("word"), rule("word_hyphen"), rule("pretokens")
    assert word("a", ".")
    assert word("a", "-")
    assert not hyphen("a", ".")
    assert hyphen("a", "-")
    assert hyphen("a-", "b")
    assert hyphen(".", ".")
    assert not pieces("a-", "b")


def test_a_character_split_over_tokens_can_be_merged():
    pieces = list("ðŁĻĤ")  # the four bytes of an emoji
    assert boundaries.text_of("".join(pieces)) == "🙂"
    assert all(boundaries.text_of(part) is None for part in pieces)
    for boundary in boundaries.BOUNDARIES:
        found = merging.merge([["Ġ", *pieces], pieces], None, rule(boundary))
        assert found.tokens[1] == ["ðŁĻĤ"]
        assert found.tokens[0] == ["ĠðŁĻĤ"]


def test_runs_merge_left_to_right_and_count_as_they_come():
    found = merging.merge([["ha"] * 5, ["ho", "ho"]], 1, rule("word"))
    assert found.tokens == [["haha", "haha", "ha"], ["ho", "ho"]]
    # Overlapping occurrences count: (a, a) four times in five letters beats (b, c) three times.
    found = merging.merge([["b", "c"] * 3, ["a"] * 5], 1, rule("word"))
    assert found.merges == [("a", "a")]


def test_ties_go_to_the_pair_met_first():
    assert merging.merge([["x", "y", "z", "x", "y"], ["z"]], 1, rule("word")).merges == [("x", "y")]
    one = merging.merge([["a", "b"], ["c", "d"]], 1, rule("word"))
    other = merging.merge([["c", "d"], ["a", "b"]], 1, rule("word"))
    assert one.merges == [("a", "b")]
    assert other.merges == [("c", "d")]  # the order of a batch matters


def test_batch_mates_change_how_a_text_is_cut():
    rare = merging.merge([list("abxyz"), list("xyz")], 2, rule("word"))
    assert "xyz" in rare.tokens[0]
    assert "xyz" not in merging.merge([list("abxyz")], 2, rule("word")).tokens[0]
    assert rare.tokens[1] == ["xyz"]


def test_both_measures_of_reduction():
    batch = encode(TEXTS)
    full = merging.merge(batch, None, rule("pretokens"))
    found = merging.reductions(full.lengths, full.lengths[-1])
    assert found[0] == (0, 0)
    assert found[-1].relative == 1
    assert 0 < found[-1].absolute < 1
    L0, Lm, Lw = full.lengths[0], full.lengths[4], full.lengths[-1]
    assert found[4] == ((L0 - Lm) / L0, (L0 - Lm) / (L0 - Lw))
    m = merging.merges_for(full.lengths, Lw, 0.5)
    assert found[m].relative >= 0.5 > found[m - 1].relative
    assert merging.reductions([5], 5) == [(0.0, 1.0)]
    assert merging.merges_for(full.lengths, Lw, 1.0) == len(full.merges)


def test_labels_of_words_follow_the_left_part():
    found = merging.merge([["New", "ĠYork", "er", "s"]], None, rule("word"))
    assert [[5, 6, 6, 7][start] for start in found.starts[0]] == [5, 6]


def test_keeping_counts_is_faster_than_recounting():
    batch = [row * 6 for row in encode(TEXTS)] * 2
    begin = time.perf_counter()
    fast = merging.merge(batch, None, rule("pretokens"))
    middle = time.perf_counter()
    slow = naive(batch, None, rule("pretokens"))
    assert (fast.tokens, fast.merges) == slow
    assert middle - begin < time.perf_counter() - middle


def test_mistakes_are_named():
    with pytest.raises(InputError, match="budget: -1 must be at least 0"):
        merging.merge([["a"]], -1, rule("word"))
    with pytest.raises(InputError, match="boundary: 'words' is not known"):
        boundaries.rule("words")
    assert merging.merge([], None, rule("word")).lengths == [0]
    assert merging.merge([[], ["a"]], None, rule("word")).tokens == [[], ["a"]]
