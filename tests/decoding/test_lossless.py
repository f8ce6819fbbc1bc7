"""Nothing but the target speaks: equality at temperature 0, chi-square on exact laws above."""

import numpy as np
import pytest
from scipy import special

from decoding.sampling import SamplingConfig
from decoding.speculative import verification
from decoding.speculative.draft_model import model_drafter
from decoding.speculative.method import speculative
from tests.decoding import tiny
from tests.decoding.exact_laws import (
    CONFIGS,
    DRAFT,
    EOS,
    MODELS,
    PROMPTS,
    TARGET,
    V,
    laws,
    p_value,
    sampled,
    small,
)

GREEDY = [
    ("autoregressive", {}),
    ("prompt_lookup", {}),
    ("prompt_lookup", {"num_draft": 8, "max_ngram": 2, "min_ngram": 2}),
    ("speculative_sampling", {"num_draft": 1}),
    ("speculative_sampling", {}),
    ("speculative_sampling", {"num_draft": 8, "draft_temperature": 0.7}),
]


@pytest.mark.parametrize("name,options", GREEDY, ids=str)
def test_at_temperature_zero_every_method_is_plain_greedy(name, options):
    rows = tiny.decode(tiny.build(name, **options))
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    if name != "autoregressive":  # drafts were really accepted, and really rejected
        accepted, proposed = (
            sum(sum(row.stats[field]) for row in rows) for field in ("accepted", "proposed")
        )
        assert 0 < accepted < proposed


@pytest.mark.parametrize(
    "name,options",
    [
        ("prompt_lookup", {}),
        ("speculative_sampling", {"rule": "exact_match", "draft_temperature": 0.7}),
    ],
    ids=str,
)
def test_exact_match_gives_the_tokens_of_plain_decoding_at_any_temperature(name, options):
    plain = tiny.decode(tiny.build("autoregressive", 1.0))
    rows = tiny.decode(tiny.build(name, 1.0, **options))
    assert tiny.texts(rows) == tiny.texts(plain)
    assert sum(sum(row.stats["accepted"]) for row in rows) > 0
    assert tiny.texts(plain) != [list(row) for row in tiny.plain_greedy()]


# --- Exact laws --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,sampling,options,eos",
    [
        ("autoregressive", SamplingConfig(1.0), {}, ()),
        ("prompt_lookup", SamplingConfig(1.3), {"num_draft": 2}, ()),
        ("speculative_sampling", SamplingConfig(1.0), {"num_draft": 2}, ()),
        ("speculative_sampling", SamplingConfig(1.0), {"num_draft": 1}, (EOS,)),
        (
            "speculative_sampling",
            SamplingConfig(1.3),
            {"num_draft": 1, "draft_temperature": 0.5},
            (),
        ),
        ("speculative_sampling", SamplingConfig(1.2, top_p=0.8), {"num_draft": 2}, ()),
        (
            "speculative_sampling",
            SamplingConfig(1.0),
            {"num_draft": 1, "rule": "exact_match", "draft_temperature": 2.0},
            (),
        ),
    ],
    ids=str,
)
def test_whole_continuations_follow_the_exact_law(name, sampling, options, eos):
    counts = sampled(small(name, sampling, **options), eos)
    assert p_value(counts, laws(sampling, eos)) > 1e-3


def wrong_rule(log_p, log_q):
    """After a rejection: the target's whole distribution instead of the residual."""
    return log_p


def test_the_chi_square_rejects_a_rule_without_the_residual(monkeypatch):
    sampling = SamplingConfig(1.0)
    drafter = model_drafter(DRAFT, 2, sampling, 1)
    assert drafter.law == verification.CHAIN
    monkeypatch.setattr(verification, "residual", wrong_rule)
    method = speculative("without_residual", TARGET, drafter, "speculative_sampling", sampling)
    assert p_value(sampled(method), laws(sampling)) < 1e-9


def test_the_chi_square_rejects_the_law_of_another_temperature():
    """The test has the power to see a small difference."""
    counts = sampled(small("autoregressive", SamplingConfig(1.0)))
    assert p_value(counts, laws(SamplingConfig(1.1))) < 1e-6


def test_the_draft_speaks_differently_than_the_target():
    """Else rejection would hardly be tried."""
    rows = [[*prompt, token] for prompt in PROMPTS for token in range(V)]
    p, q = (
        special.softmax(tiny.last_logits(config, MODELS[role], rows, width=16), axis=-1)
        for role, config in CONFIGS.items()
    )
    distance = 0.5 * np.abs(p - q).sum(axis=-1)
    assert 0.05 < distance.mean() < 0.6
