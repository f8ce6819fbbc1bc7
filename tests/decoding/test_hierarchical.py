"""Decoding word by word against the teacher-forced model, run anew for every unit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decoding import generation, methods, stopping
from decoding.autoregressive import pending_tokens
from decoding.hierarchical import call, draft, units_written
from decoding.sampling import SamplingConfig
from decoding.speculative.tree import chain
from models import hierarchical, sharding, utf8
from models.errors import InputError
from models.hierarchical import DOCUMENT_END, WORD_END
from models.word_tokenizer import WordTokenizer
from tests.models.tiny_hierarchical import HAT, POOLED, params, without_ends

NEW = 24
STOP = stopping.StopConfig(NEW, (DOCUMENT_END,))
TEXTS = ("the cat sat", "a", "on the mat and then on the mat a", "überlänge ist für alle", "the ")
TOKENIZER = WordTokenizer(HAT)
PROMPTS = [TOKENIZER.encode(text) for text in TEXTS]
WORDS = 40  # of the teacher-forced model


@functools.cache
def _teacher(config):
    return jax.jit(functools.partial(hierarchical.apply, config))


def split_ids(config, ids):
    """The complete words of a stream, and the units of the one that is not."""
    found = [[]]
    for unit in ids:
        if unit == config.word_end:
            found.append([])
        else:
            found[-1].append(unit)
    return found[:-1], found[-1]


def teacher_forced(config, rows, model=None):
    """Logits float32 [B, WORDS, C, V] of each row's words and of the unit after its last."""
    B, C = len(rows), config.max_word
    target = np.zeros((B, WORDS, C), np.int32)
    lengths = np.zeros((B, WORDS), np.int32)
    for row, ids in enumerate(rows):
        done, last = split_ids(config, ids)
        for n, word in enumerate([*done, last]):
            target[row, n, : len(word)], lengths[row, n] = word, len(word)
    source = np.pad(target[:, :-1], ((0, 0), (1, 0), (0, 0)))
    source_lengths = np.pad(lengths[:, :-1], ((0, 0), (1, 0)))
    positions = np.broadcast_to(np.maximum(np.arange(WORDS) - 1, 0), lengths.shape)
    return np.asarray(
        _teacher(config)(
            params(config) if model is None else model, source, source_lengths, target,
            segment_ids=np.ones_like(lengths), positions=positions,
        )
    )  # fmt: skip


def next_logits(config, rows, model=None):
    """Logits [B, V] after each stream; certainty of its end where a word is full."""
    found = teacher_forced(config, rows, model)
    values = []
    for row, ids in enumerate(rows):
        done, last = split_ids(config, ids)
        if len(last) == config.max_word:
            values.append(np.where(np.arange(config.vocab_size) == config.word_end, 0.0, -1e9))
        else:
            values.append(found[row, len(done), len(last)])
    return np.stack(values)


def greedy(config, rows, steps):
    rows = [list(row) for row in rows]
    starts = list(map(len, rows))
    for _ in range(steps):
        for row, values in zip(rows, next_logits(config, rows), strict=True):
            if row[-1] == config.document_end:
                continue
            second, best = np.sort(values)[-2:]
            assert best - second > 1e-4, "near-tie: choose another seed"
            row.append(int(values.argmax()))
    return [row[start:] for row, start in zip(rows, starts, strict=True)]


def build(temperature=0.0, config=HAT, **options):
    return methods.build("hat", {"target": config}, SamplingConfig(temperature), options)


def decode(method, rows=PROMPTS, config=HAT, stop=STOP, **more):
    return generation.generate({"target": params(config)}, rows, method, stop, **more)


@functools.cache
def plain(temperature=0.0):
    """All prompts in one batch, with whatever bytes the model likes best."""
    return decode(build(temperature, valid_utf8=False))


def ids_of(rows):
    return [row.token_ids for row in rows]


def test_greedy_text_is_that_of_the_teacher_forced_model():
    assert ids_of(plain()) == greedy(HAT, PROMPTS, NEW)
    assert sum(WORD_END in row.token_ids for row in plain()) >= 4


def test_several_vectors_a_word_and_ids_of_other_units():
    rng = np.random.default_rng(0)
    units = without_ends(POOLED)
    end = POOLED.word_end
    rows = [rng.choice(units, 3).tolist(), [*rng.choice(units, 2), end, 1, end], [4]]
    method = build(config=POOLED)
    found = decode(method, rows, POOLED, stopping.StopConfig(12, (POOLED.document_end,)))
    assert ids_of(found) == greedy(POOLED, rows, 12)
    for row in found:
        assert row.stats["target_positions"] == 3 * row.stats["target_calls"]


def test_a_row_does_not_depend_on_its_neighbours():
    for temperature in (0.0, 1.0):
        together = plain(temperature)
        for number in (1, 2):
            method = build(temperature, valid_utf8=False)
            alone = decode(method, [PROMPTS[number]], row_ids=[number])
            assert alone[0].token_ids == together[number].token_ids
            assert alone[0].stats == together[number].stats


def test_work_is_one_backbone_step_a_word_and_one_decoder_call_a_unit():
    for row, prompt in zip(plain(), PROMPTS, strict=True):
        # The pending end of a word that closes the row is not read any more.
        consumed = [prompt[-1], *row.token_ids[:-1]]
        assert row.stats["target_calls"] == consumed.count(WORD_END)
        assert row.stats["decoder_calls"] == len(row.token_ids) == row.stats["tokens_emitted"]
        words = row.token_ids.count(WORD_END)
        assert row.stats["decoder_calls"] == words + (len(row.token_ids) - words)
        assert row.stats["target_positions"] == row.stats["target_calls"]


def test_teacher_forced_probability_is_that_of_the_cached_path():
    """Step by step, the loop's own sampling law is asked for the units of a given text."""
    text = [*TOKENIZER.encode("the mat on a catalogue x"), WORD_END, DOCUMENT_END]
    log_p = jax.nn.log_softmax(teacher_forced(HAT, [text]))[0]
    expected, (done, last) = 0.0, split_ids(HAT, text)
    for n, word in enumerate([*done, last]):
        ended = [*word, WORD_END] if n < len(done) and len(word) < HAT.max_word else word
        expected += sum(float(log_p[n, k, unit]) for k, unit in enumerate(ended))
    assert any(len(word) == HAT.max_word for word in done)  # its end costs nothing

    @jax.jit
    def law(model, state):
        """The method's own call, without drafts, and log-probabilities [V] of what follows."""
        nothing = jnp.zeros((1, 0), jnp.int32)
        drafts = chain(pending_tokens(state), nothing, nothing.astype(bool))
        inner, logits = call(HAT, model, state, drafts)
        logits = hierarchical.possible(HAT, logits[:, 0], units_written(HAT, state))
        return state.replace(inner=inner), jax.nn.log_softmax(logits)[0]

    method = build(valid_utf8=False)
    state, _ = generation.begin({"target": params()}, [text[:1]], method, STOP, buffer=64)
    tokens = jnp.zeros((1, 64), jnp.int32).at[0, : len(text)].set(jnp.asarray(text))
    total = float(log_p[0, 0, text[0]])
    for length in range(1, len(text)):
        state = state.replace(tokens=tokens, lengths=jnp.asarray([length], jnp.int32))
        state, values = law(params(), state)
        total += float(values[text[length]])
    assert total == pytest.approx(expected, abs=1e-4)
    assert int(state.inner.backbone.lengths[0]) == len(done)


def test_a_prompt_goes_on_inside_its_word():
    """Section 6, item 7: the prefix is kept and the word is continued, not begun anew."""
    model = params()
    for text, row in zip(TEXTS, plain(), strict=True):
        prompt = TOKENIZER.encode(text)
        assert prompt[-1] != WORD_END and row.prompt_ids == prompt
        assert TOKENIZER.decode(prompt) == text
        # What comes first is read off the decoder inside the open word.
        expected = next_logits(HAT, [prompt], model)[0].argmax()
        assert row.token_ids[0] == expected
    # 'sat' has three bytes of at most six, so that the word is closed after at most three more.
    first = plain()[0].token_ids
    assert WORD_END in first[:4]


def test_words_are_never_longer_than_allowed():
    for temperature in (0.0, 1.0):
        for row in plain(temperature):
            done, last = split_ids(HAT, row.prompt_ids + row.token_ids)
            assert all(1 <= len(word) <= HAT.max_word for word in [*done, last or [0]])
    assert max(len(word) for row in plain(1.0) for word in split_ids(HAT, row.token_ids)[0]) == 6


def test_no_character_is_ever_broken():
    stop = stopping.StopConfig(60, (DOCUMENT_END,))
    rows = decode(build(1.5), PROMPTS * 4, stop=stop)
    whole = 0
    for row in rows:
        ids = [*row.prompt_ids, *row.token_ids]
        text = bytes(i for i in ids if i not in (WORD_END, DOCUMENT_END))
        for cut in range(4):  # the last character may not be complete yet
            try:
                decoded = text[: len(text) - cut].decode()
                break
            except UnicodeDecodeError:
                assert cut < 3
        whole += len(decoded) < len(decoded.encode())
        # No word ends within a character either.
        for word in split_ids(HAT, ids)[0]:
            bytes(word).decode()
    assert whole > 10
    broken = decode(build(1.5, valid_utf8=False), PROMPTS, stop=stop)
    assert any("\ufffd" in TOKENIZER.decode(row.token_ids) for row in broken)


def test_the_table_of_utf8_is_pythons():
    rng = np.random.default_rng(0)
    for _ in range(4000):
        size = int(rng.integers(1, 5))
        text = bytes(rng.choice([*range(0x78, 0x100)], size).tolist())
        state = utf8.BETWEEN
        for byte in text:
            state = int(utf8.NEXT[state, byte]) if state >= 0 else state
        try:
            text.decode()
            valid = True
        except UnicodeDecodeError:
            valid = False
        assert valid == (state == utf8.BETWEEN)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_inside_words_change_no_text(temperature):
    """The extension: drafts of the rest of a word, in the shared tree, verified by one call."""
    drafted = decode(build(temperature, valid_utf8=False, draft="ngram", num_draft=3))
    assert ids_of(drafted) == ids_of(plain(temperature))
    total, one_by_one = generation.total_stats(drafted), generation.total_stats(plain(temperature))
    assert total["target_calls"] == one_by_one["target_calls"]
    assert sum(total["proposed"]) > 0
    if temperature == 0:
        assert total["decoder_calls"] < one_by_one["decoder_calls"]
        assert sum(total["accepted"]) > 0


def test_drafts_end_before_their_word_does():
    """What follows an end of a word is not in the word decoder's sight, so it is not drafted."""
    end = POOLED.word_end
    rows = [[0, 1, end, 0, 1, end, 0], [0, 1, 2, end, 3, 0], [2, end, 0, end, 2]]
    method = build(config=POOLED, draft="ngram", num_draft=3)
    state, _ = generation.begin({"target": params(POOLED)}, rows, method, STOP, buffer=32)
    tree = draft(POOLED, state, units_written(POOLED, state), 3, 4)
    assert tree.tokens[:, 0].tolist() == [0, 0, 2]
    assert tree.tokens[:2, 1:].tolist() == [[1, end, 0], [1, 2, end]]
    # The second row's word has two units of at most three: one more fits.
    assert tree.valid.tolist() == [
        [True, True, False, False], [True, True, False, False], [True, False, False, False]
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_drafts_change_no_text_that_repeats_its_words(temperature):
    """Texts that run in circles: drafts are right, and words end within their reach."""
    units, end = without_ends(POOLED), POOLED.word_end
    rows = [[*units[:2], end] * 3 + [units[0]], [*units[1:3], end, units[1], end] * 2 + [units[1]]]
    stop = stopping.StopConfig(40)
    found = [
        decode(build(temperature, POOLED, **options), rows, POOLED, stop)
        for options in ({}, {"draft": "ngram", "num_draft": 2})
    ]
    assert ids_of(found[0]) == ids_of(found[1])
    assert all(row.token_ids.count(end) > 8 for row in found[0])
    total = generation.total_stats(found[1])
    assert total["accepted"][0] > 5
    assert total["target_calls"] == generation.total_stats(found[0])["target_calls"]


def test_sampled_text_with_drafts_has_the_models_law():
    """Chi-square of two units after a prompt that drafts are found for, over 1024 rows."""
    units, end = without_ends(POOLED), POOLED.word_end
    prompt = [0, 1, end, 0]
    method = build(1.0, POOLED, draft="ngram", num_draft=2)
    stop = stopping.StopConfig(2, (POOLED.document_end,))
    counts, proposed = {}, 0
    for first in range(0, 1024, 256):
        ids = list(range(first, first + 256))
        for row in decode(method, [prompt] * 256, POOLED, stop, row_ids=ids):
            pair = tuple(row.token_ids)
            counts[pair] = counts.get(pair, 0) + 1
            proposed += row.stats["proposed"][0]
    assert proposed >= 1024
    one = np.exp(jax.nn.log_softmax(next_logits(POOLED, [prompt])[0]))
    rows = [[*prompt, unit] for unit in [*units, end]]
    two = np.exp(jax.nn.log_softmax(next_logits(POOLED, rows), axis=-1))
    law = {
        (row[-1], unit): float(one[row[-1]]) * float(two[number, unit])
        for number, row in enumerate(rows)
        for unit in range(POOLED.vocab_size)
    }
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    assert all(law[pair] > 1e-8 for pair in counts)
    common = [pair for pair, p in law.items() if 1024 * p >= 5]
    seen = [*(counts.get(pair, 0) for pair in common)]
    expected = [*(1024 * law[pair] for pair in common)]
    seen.append(1024 - sum(seen))
    expected.append(1024 - sum(expected))
    assert len(common) > 8
    assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3


def test_drafts_keep_characters_whole():
    found = decode(build(1.0, draft="ngram", num_draft=3))
    assert ids_of(found) == ids_of(decode(build(1.0)))


def test_streaming_growth_and_sharding_change_nothing(monkeypatch):
    method = build(valid_utf8=False)
    events = generation.stream({"target": params()}, PROMPTS, method, STOP, every=5)
    streamed = [[] for _ in PROMPTS]
    for event in events:
        streamed[event.row] += event.token_ids
    assert streamed == ids_of(plain())
    # A cache that begins with two slots grows on the way; the word decoder's stays as it is.
    monkeypatch.setattr(generation, "cache_slots", lambda needed: max(2, needed))
    assert ids_of(decode(method, PROMPTS[:2])) == ids_of(plain()[:2])


def test_a_mesh_changes_nothing():
    mesh = sharding.make_mesh(2, 2)
    model = jax.device_put(params(), sharding.tree_shardings(params(), mesh))
    method = build(valid_utf8=False)
    found = generation.generate({"target": model}, PROMPTS[:4], method, STOP, mesh=mesh)
    assert ids_of(found) == ids_of(plain()[:4])


def test_the_right_kind_of_model_is_asked_for():
    with pytest.raises(InputError, match="allowed: models of tokens"):
        methods.build("autoregressive", {"target": HAT}, SamplingConfig())
    with pytest.raises(InputError, match="allowed: models of words"):
        methods.build("hat", {"target": HAT.backbone}, SamplingConfig())
    with pytest.raises(InputError, match="units are 'ids'"):
        WordTokenizer(POOLED)


def test_text_comes_back_whatever_the_cap_cuts():
    for text in ("für alle 日本語 und überlängen", "a", "\n\n x", "𐍈𐍈𐍈"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
