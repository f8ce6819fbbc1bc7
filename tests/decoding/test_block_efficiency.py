"""Tokens per target call: more and longer drafts are never worse, on tiny models that disagree."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop, stopping
from decoding.sampling import SamplingConfig
from decoding.speculative import transport
from tests.decoding import tiny
from tests.decoding.exact_laws import MODELS, PROMPTS, small

COPIES, STEPS = 400, 12
ROOM = 64  # slots and text for every method here


@functools.cache
def tokens_per_call(name: str, **options) -> tuple[float, float]:
    """Tokens per target call over all rows, and its standard error."""
    method = small(name, SamplingConfig(1.0), **options)
    rows = [prompt for prompt in PROMPTS for _ in range(COPIES)]
    state = tiny.start(method, MODELS, rows, slots=ROOM, buffer=32)
    stop = stopping.StopConfig(STEPS, ())
    state = loop.advance(MODELS, state, jnp.int32(99), method=method, stop=stop, slots=ROOM)
    calls = np.asarray(state.stats.target_calls, float)
    ratio = STEPS * len(rows) / calls.sum()
    return ratio, ratio * calls.std() / calls.mean() / len(rows) ** 0.5


def never_falls(options: list[dict], name: str) -> None:
    found = [tokens_per_call(name, **chosen) for chosen in options]
    for (a, error_a), (b, error_b) in itertools.pairwise(found):
        assert b > a - 3 * (error_a**2 + error_b**2) ** 0.5
    assert found[-1][0] > found[0][0] + 0.1


def test_spectr_over_sequences_and_their_length():
    never_falls([{"num_sequences": k, "length": 2} for k in (1, 2, 4)], "spectr")
    never_falls([{"num_sequences": 2, "length": n} for n in (1, 2)], "spectr")


def test_rsd_s_over_width():
    never_falls([{"width": w, "depth": 2} for w in (1, 3)], "rsd_s")


@pytest.mark.parametrize("vocab", [3, 50])
def test_k_seqs_acceptance_never_falls_with_k(vocab):
    rng = np.random.default_rng(vocab)
    q, p = (jnp.asarray(rng.dirichlet(np.full(vocab, 0.4), 200), jnp.float32) for _ in "qp")
    found = np.stack([transport.k_seq_acceptance(q, p, jnp.full(200, k)) for k in (1, 2, 3, 5, 8)])
    assert (np.diff(found, axis=0) > -1e-4).all() and (found[-1] > found[0]).mean() > 0.9
