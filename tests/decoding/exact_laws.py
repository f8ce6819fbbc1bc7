"""Exact distributions of whole texts, and the chi-square that compares samples with them.

The law is enumerated: every continuation of three tokens over a vocabulary of five, its
probability being the product of NumPy softmaxes of the target's logits on the whole text.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from scipy import special, stats

from decoding import loop, methods, stopping
from decoding.sampling import SamplingConfig
from tests.decoding import tiny
from tests.models import random_models

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


def exact_law(
    prompt: list[int], sampling: SamplingConfig, eos: tuple[int, ...], config=TARGET, model=None
) -> np.ndarray:
    """Probability of each of TEXTS; a text is cut after its EOS and filled with EOS."""
    model = MODELS["target"] if model is None else model
    prefixes = [p for n in range(STEPS) for p in itertools.product(range(V), repeat=n)]
    logits = tiny.last_logits(config, model, [prompt + list(p) for p in prefixes], width=16)
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


def sampled(
    method: loop.Method, eos: tuple[int, ...] = (), seed: int = 0, models=MODELS
) -> np.ndarray:
    """How often each of TEXTS followed each prompt: int [prompts, 125]."""
    rows = [prompt for prompt in PROMPTS for _ in range(COPIES)]
    slots = 12 + method.lookahead
    state = tiny.start(method, models, rows, slots=slots, buffer=16, seed=seed)
    stop = stopping.StopConfig(STEPS, eos)
    state = loop.advance(models, state, jnp.int32(99), method=method, stop=stop, slots=slots)
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


def laws(
    sampling: SamplingConfig, eos: tuple[int, ...] = (), config=TARGET, model=None
) -> np.ndarray:
    return np.stack([exact_law(prompt, sampling, eos, config, model) for prompt in PROMPTS])


def small(name: str, sampling: SamplingConfig, **options) -> loop.Method:
    return methods.build(name, CONFIGS, sampling, options)
