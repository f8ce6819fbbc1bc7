"""The tokeniser sampler against algorithm 1 written out, and what section 6 asks of it."""

import collections
import functools
import itertools
import json
import math

import numpy as np
import pytest

from models import byte_level
from models.byte_characters import BYTE_CHARACTERS, whitespace_runs
from models.errors import InputError
from training import tokenizer_sampling
from training import tokenizers as tokenizer_training
from training.tokenizer_sampling import Layout, SampledBatches, SamplerConfig

END = tokenizer_training.END_OF_TEXT
CONFIG = SamplerConfig(
    batch_size=4, queue_batches=3, characters=160, vocab_mean=300, vocab_deviation=10,
    vocab_min=290, vocab_max=320, longest_run=2,
)  # fmt: skip


@functools.cache
def documents():
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma_ray", "deltas", "epsilon", "größer", "x1", "returning", "def"]
    texts = [" ".join(rng.choice(words, 60)) + "\n    end" for _ in range(12)]
    return [{"text": text} for text in texts]


@functools.cache
def layout(next_token: bool = True) -> Layout:
    texts = [d["text"] for d in documents()]
    source = byte_level.normalise(tokenizer_training.train_bpe(texts, 290))
    return Layout(source, 24, 0, 3, next_token, END)


def batches(config: SamplerConfig = CONFIG, **more) -> SampledBatches:
    return SampledBatches(documents(), config, layout(), seed=1, **more)


def test_substring_scores_are_those_of_a_plain_loop():
    words = {"Ġabcdefgh": 2, "Ġabcd": 3, "xy": 1}
    expected = collections.Counter()
    for word, frequency in words.items():
        for start in range(len(word)):
            for length in range(1, 7):
                part = word[start : start + length]
                if start % 4 == 0 and len(part) == length:
                    expected[part] += frequency * len(part.encode("utf-8"))
    assert tokenizer_sampling.count_substrings(words, 4, 6) == expected
    assert expected["Ġabc"] == (2 + 3) * 5  # Ġ is two bytes


def test_a_drawn_tokeniser_is_algorithm_1():
    scores = tokenizer_sampling.count_substrings({"Ġalphabet": 5, "Ġalps": 3, "Ġbeta": 2})
    specials = {END: 3}
    drawn = tokenizer_sampling.draw(CONFIG, scores, specials, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    size = int(np.clip(round(rng.normal(300, 10)), 290, 320))
    sigma = math.exp(rng.normal(math.log(1e-5), 4))
    words = sorted(scores)
    total = sum(scores.values())
    noisy = {w: scores[w] / total + n for w, n in zip(words, rng.normal(0, sigma, len(words)))}
    assert drawn.deviation == sigma
    runs = whitespace_runs(2)
    expected = {w: math.log(p) if p > 0 else -100_000 for w, p in noisy.items() if len(w) > 1}
    chosen = dict(sorted(expected.items(), key=lambda e: -e[1])[: size - 256 - len(runs) - 1])
    pieces = json.loads(drawn.form.backend.to_str())["model"]["vocab"]
    assert pieces[3] == [END, 0.0] and drawn.size == len(pieces) <= size
    found = dict(map(tuple, pieces))
    assert len(found) == len(pieces)
    for byte in BYTE_CHARACTERS:
        assert found.pop(byte) == pytest.approx(min(chosen.values()))
    for run in runs:
        assert found.pop(run) == 0
    del found[END]
    assert found == pytest.approx(chosen)
    # Viterbi segmentation: no other segmentation is likelier.
    scored = dict(map(tuple, pieces))
    word = "Ġalphabet"
    best = [drawn.form.tokens[i] for i in drawn.form.encode(" alphabet")]
    assert "".join(best) == word

    @functools.cache
    def most(start):
        if start == len(word):
            return 0.0
        return max(
            scored[word[start:end]] + most(end)
            for end in range(start + 1, len(word) + 1)
            if word[start:end] in scored
        )

    assert sum(scored[t] for t in best) == pytest.approx(most(0))


def test_every_batch_has_a_tokeniser_of_its_own():
    """Section 6.1: vocabularies and sizes differ; some tokenisers are nearly random."""
    stream = batches()
    drawn = [stream.draw()[1] for _ in range(30)]
    vocabularies = [set(d.form.tokens) for d in drawn]
    for one, other in itertools.pairwise(vocabularies):
        assert len(one & other) / len(one | other) < 1
    assert len({d.size for d in drawn}) > 5
    assert all(CONFIG.vocab_min - 20 <= d.size <= CONFIG.vocab_max for d in drawn)
    logs = np.log([d.deviation for d in drawn])
    assert abs(logs.mean() - math.log(1e-5)) < 3 and 2 < logs.std() < 6
    # The noise drowns the counts of some, and of none without noise.
    text = documents()[0]["text"]
    lengths = [len(d.form.encode(text)) for d in drawn]
    assert max(lengths) > 1.3 * min(lengths)
    plain = batches(SamplerConfig(**{**vars(CONFIG), "noise": False}))
    assert all(plain.draw()[1].deviation == 0 for _ in range(3))


def test_texts_count_towards_their_own_tokeniser_and_validation_does_not():
    """Section 6.2."""
    stream = batches()
    for number in range(6):
        _, _, texts = stream.draw()
        own = tokenizer_sampling.Queue(CONFIG)
        own.push(texts)
        recent = tokenizer_sampling.Queue(CONFIG)
        for back in range(max(0, number - 2), number + 1):
            recent.push(stream._texts(back))
        assert stream._queue.total == recent.total
        assert all(recent.total[part] >= score for part, score in own.total.items())
    odd = [{"text": "zzzyqqqj " * 40}]
    before = stream._queue.total.copy()
    held = stream.held_out(odd, 2)
    assert stream._queue.total == before and not any("zz" in part for part in before)
    assert (held[0]["loss_mask"] == 1).all()
    assert not np.array_equal(held[0]["surfaces"], held[1]["surfaces"])


@pytest.mark.parametrize("next_token", [True, False])
def test_a_batch_holds_the_texts_and_the_surfaces_of_all_tokens(next_token):
    stream = SampledBatches(documents(), CONFIG, layout(next_token), seed=1)
    batch, drawn, texts = stream.draw()
    source, form = layout().source, drawn.form
    for row, text in enumerate(texts):
        ids = form.encode(text)[: 24 + next_token]
        np.testing.assert_array_equal(batch["tokens"][row], ids[:24])
        targets = ids[1:] if next_token else ids
        np.testing.assert_array_equal(batch["targets"][row], targets)
        sizes = [len(byte_level.to_characters(form.decode([i]))) if i != 0 else 0 for i in targets]
        whole = [len(form.tokens[i]) if i != 0 else 0 for i in targets]
        assert batch["target_bytes"][row].tolist() == whole
        assert sum(sizes) >= sum(whole)
    assert batch["surfaces"].shape == (CONFIG.vocab_max, 3) and batch["vocab_size"] == drawn.size
    truncated = 0
    for row, token in enumerate(form.tokens):
        found = source.decompose(token)
        truncated += len(found) > 3
        assert batch["surfaces"][row].tolist() == (found + [0] * 3)[:3]
    assert batch["truncated"] == truncated > 0  # section 6.12
    assert (batch["surfaces"][drawn.size :] == 0).all()
    # Short texts are padded.
    short = tokenizer_sampling.encode(drawn, ["alpha"] * 4, layout(next_token), CONFIG)
    assert short["loss_mask"].sum(1).max() < 12 and short["tokens"].shape == (4, 24)


def test_a_position_is_saved_and_restored():
    whole = batches()
    expected = [next(whole) for _ in range(6)]
    first = batches()
    for _ in range(4):
        next(first)
    later = batches()
    later.set_state(first.get_state())
    for batch in expected[4:]:
        for name, value in next(later).items():
            np.testing.assert_array_equal(value, batch[name])
    # Processes share the tokeniser and the rows.
    parts = [next(batches(process_index=i, process_count=2)) for i in range(2)]
    joined = np.concatenate([part["tokens"] for part in parts])
    np.testing.assert_array_equal(joined, expected[0]["tokens"])
    np.testing.assert_array_equal(parts[0]["surfaces"], parts[1]["surfaces"])


def test_documents_are_joined_by_the_separator():
    config = SamplerConfig(**{**vars(CONFIG), "characters": 3000})
    texts = tokenizer_sampling.spans(documents(), config, np.random.default_rng(0), END)
    assert all(len(text) == 3000 and text.count(END) >= 4 for text in texts)
    assert all(part in " ".join(d["text"] for d in documents()) for part in texts[0].split(END))


def test_mistakes_are_named():
    with pytest.raises(InputError, match="vocab_min"):
        SamplerConfig(vocab_min=300)
    with pytest.raises(InputError, match="stride"):
        SamplerConfig(stride=0)
    with pytest.raises(InputError, match="separator"):
        Layout(layout().source, 24, 0, 3, True, "<s>")
    with pytest.raises(InputError, match="multiple of 3"):
        batches(process_count=3)
