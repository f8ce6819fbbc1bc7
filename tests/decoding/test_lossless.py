"""Nothing but the target speaks: equality at temperature 0, chi-square on exact laws above.

The law is enumerated: every continuation of three tokens over a vocabulary of five, its
probability being the product of NumPy softmaxes of the target's logits on the whole text.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from decoding import loop, methods, stopping
from decoding.sampling import SamplingConfig
from decoding.speculative import verification
from decoding.speculative.draft_model import model_drafter
from decoding.speculative.method import speculative
from tests.decoding import tiny
from tests.models import random_models

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

V, STEPS, EOS = 5, 3, 4
TEXTS = list(itertools.product(range(V), repeat=STEPS))
PROMPTS = [[0, 3, 1, 1, 0, 3, 1], [2], [4, 1, 4, 1]]
COPIES = 5000  # rows of each prompt, all in one batch
# One layer each, of different widths: little to compile, and two models that disagree.
TARGET = tiny.SMALL.replace(num_layers=1, local_layers=(True,))
DRAFT = TARGET.replace(embed_dim=8, window=2)
CONFIGS = {"target": TARGET, "draft": DRAFT}
MODELS = {"target": random_models.params(TARGET), "draft": random_models.params(DRAFT, 1)}


def naive_probabilities(logits: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """Probabilities [V] of one position: temperature, then the nucleus, token by token."""
    p = special.softmax(logits.astype(np.float64) / sampling.temperature)
    kept, total = np.zeros(V), 0.0
    for token in np.argsort(-p):
        if total < sampling.top_p:
            kept[token] = p[token]
        total += p[token]
    return kept / kept.sum()


def exact_law(prompt: list[int], sampling: SamplingConfig, eos: tuple[int, ...]) -> np.ndarray:
    """Probability of each of TEXTS; a text is cut after its EOS and filled with EOS."""
    prefixes = [p for n in range(STEPS) for p in itertools.product(range(V), repeat=n)]
    logits = tiny.last_logits(
        TARGET, MODELS["target"], [prompt + list(p) for p in prefixes], width=16
    )
    step = {
        prefix: naive_probabilities(row, sampling)
        for prefix, row in zip(prefixes, logits, strict=True)
    }
    law = np.ones(len(TEXTS))
    for i, text in enumerate(TEXTS):
        for at, token in enumerate(text):
            if at and text[at - 1] in eos:
                law[i] *= token == text[at - 1]
            else:
                law[i] *= step[text[:at]][token]
    np.testing.assert_allclose(law.sum(), 1)
    return law


def sampled(method: loop.Method, eos: tuple[int, ...] = (), seed: int = 0) -> np.ndarray:
    """How often each of TEXTS followed each prompt: int [prompts, 125]."""
    rows = [prompt for prompt in PROMPTS for _ in range(COPIES)]
    state = tiny.start(method, MODELS, rows, slots=16, buffer=16, seed=seed)
    stop = stopping.StopConfig(STEPS, eos)
    state = loop.advance(MODELS, state, jnp.int32(99), method=method, stop=stop, slots=16)
    counts = np.zeros((len(PROMPTS), len(TEXTS)), int)
    index = {text: i for i, text in enumerate(TEXTS)}
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    for row, prompt in enumerate(rows):
        text = tokens[row, len(prompt) : lengths[row]].tolist()
        text += text[-1:] * (STEPS - len(text))  # only an EOS ends a row early
        counts[row // COPIES, index[tuple(text)]] += 1
    assert len(np.unique(np.asarray(state.stats.target_calls))) > 1 or not method.depth
    return counts


def p_value(counts: np.ndarray, laws: np.ndarray) -> float:
    """Chi-square over all prompts; cells of a prompt with fewer than 5 expected are pooled."""
    statistic, freedom = 0.0, 0
    for observed, law in zip(counts, laws, strict=True):
        expected = law * observed.sum()
        if observed[law == 0].any():
            return 0.0
        rare = expected < 5
        cells = np.append(expected[~rare], expected[rare].sum())
        found = np.append(observed[~rare], observed[rare].sum())
        if cells[-1] < 5:  # the pool itself is rare: into the smallest cell
            cells[cells[:-1].argmin()] += cells[-1]
            found[cells[:-1].argmin()] += found[-1]
            cells, found = cells[:-1], found[:-1]
        statistic += ((found - cells) ** 2 / cells).sum()
        freedom += len(cells) - 1
    assert freedom > 20
    return float(stats.chi2.sf(statistic, freedom))


def laws(sampling: SamplingConfig, eos: tuple[int, ...] = ()) -> np.ndarray:
    return np.stack([exact_law(prompt, sampling, eos) for prompt in PROMPTS])


def small(name: str, sampling: SamplingConfig, **options) -> loop.Method:
    return methods.build(name, CONFIGS, sampling, options)


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
    assert drafter.samples
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
