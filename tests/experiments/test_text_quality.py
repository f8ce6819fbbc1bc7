"""Figures of written text against naive ones."""

import functools
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from decoding.generation import Row
from experiments import text_quality
from experiments.config_parts import method
from tests.decoding import tiny

CONFIG, PARAMS = tiny.TARGET, tiny.params()


def lcs(a, b):
    @functools.cache
    def longest(i, j):
        if not i or not j:
            return 0
        if a[i - 1] == b[j - 1]:
            return longest(i - 1, j - 1) + 1
        return max(longest(i - 1, j), longest(i, j - 1))

    return longest(len(a), len(b))


def test_rouge_is_the_f_score_of_the_longest_common_subsequence():
    words = ["a", "b", "c"]
    for mine, theirs in itertools.product(itertools.product(words, repeat=3), repeat=2):
        common = lcs(mine, theirs)
        wanted = 2 * (common / 3) * (common / 3) / (2 * common / 3) if common else 0
        assert text_quality.rouge_l(" ".join(mine), " ".join(theirs)) == pytest.approx(wanted)
    assert text_quality.rouge_l("a b", "a b c d") == pytest.approx(2 / 3)
    assert text_quality.rouge_l("", "a") == 0 and text_quality.rouge_l("", "") == 1


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def test_choices_and_losses_are_those_of_the_models():
    plain = [list(text[:6]) for text in tiny.plain_greedy()[:3]]
    other = [list(text) for text in plain]
    other[1][2] = (other[1][2] + 1) % 64  # one token that the target would not have written
    rows = [
        Row(prompt, text, "length", {"target_calls": calls})
        for prompt, text, calls in zip(tiny.PROMPTS, other, (6, 4, 6), strict=False)
    ]
    found = text_quality.measure(
        ConfigDict({"own_choices": True, "judge": "draft"}), tiny.CONFIGS, PARAMS, Words(),
        method("units", "lud"), rows, [Words().decode(text) for text in plain],
    )  # fmt: skip
    wrong, nats = 0, []
    for prompt, text in zip(tiny.PROMPTS, other, strict=False):
        for i, token in enumerate(text):
            before = [*prompt, *text[:i]]
            wrong += token != tiny.last_logits(CONFIG, PARAMS["target"], [before])[0].argmax()
            logits = tiny.last_logits(tiny.DRAFT, PARAMS["draft"], [before])[0].astype(float)
            nats.append(np.log(np.exp(logits).sum()) - logits[token])
    assert wrong >= 1
    assert found["own_choices"] == pytest.approx(1 - wrong / 18)
    assert found["span_choices"] == pytest.approx(1 - wrong / 2)
    assert found["judged_loss"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert found["rouge_l"] == pytest.approx((1 + 5 / 6 + 1) / 3)
