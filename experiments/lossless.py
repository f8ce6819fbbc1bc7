"""Checks on the spot that a method's samples follow the target's distribution."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from decoding import generation
from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig, log_probs
from decoding.stopping import StopConfig
from models import transformer
from models.config import TransformerConfig

_MIN_EXPECTED = 8
# First tokens whose continuations are enumerated; all others are one cell.
_FIRST_TOKENS = 64


def pair_distribution(
    config: TransformerConfig,
    params: transformer.Params,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    first_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact probabilities of the next two tokens, by running the model on each first token.

    Returns:
      The `first_tokens` likeliest first tokens [n], and the joint probability float64 [n, V] of
      each followed by any second token.
    """

    def next_probs(tokens: np.ndarray) -> np.ndarray:
        logits = transformer.apply(config, params, jnp.asarray(tokens)).logits
        assert logits is not None
        return np.exp(np.asarray(log_probs(logits[:, -1], sampling), np.float64))

    first = next_probs(np.asarray([prompt]))[0]
    likeliest = np.argsort(-first, kind="stable")[:first_tokens]
    texts = np.concatenate([np.tile(prompt, (first_tokens, 1)), likeliest[:, None]], axis=1)
    return likeliest, first[likeliest, None] * next_probs(texts)


def pool(counts: np.ndarray, expected: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray]:
    """Joins cells, likeliest first, into bins with an expected count of at least 8.

    Args:
      counts: observed, float [n].
      expected: float [n]; together at most `total`, the rest being one more cell.
      total: number of samples.

    Returns:
      Observed and expected counts of the bins.
    """
    order = np.argsort(-expected, kind="stable")
    bins: list[list[float]] = [[0.0, 0.0]]
    for seen, wanted in zip(counts[order], expected[order], strict=True):
        if bins[-1][1] >= _MIN_EXPECTED:
            bins.append([0.0, 0.0])
        bins[-1][0] += seen
        bins[-1][1] += wanted
    rest = [total - counts.sum(), total - expected.sum()]
    if bins[-1][1] < _MIN_EXPECTED:
        last = bins.pop()
        rest = [rest[0] + last[0], rest[1] + last[1]]
    if rest[1] >= _MIN_EXPECTED or not bins:
        bins.append(rest)
    else:
        bins[-1] = [bins[-1][0] + rest[0], bins[-1][1] + rest[1]]
    observed, wanted = np.asarray(bins).T
    return observed, wanted


def chi_square(
    method: Method,
    params: ModelParams,
    config: TransformerConfig,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    samples: int,
    batch_size: int,
    seed: int,
) -> Mapping[str, Any]:
    """Compares sampled two-token continuations with their exact distribution.

    Cells are pooled into bins of at least 8 expected samples, see `pool`.

    Returns:
      statistic, degrees of freedom, p_value and the number of samples.
    """
    likeliest, joint = pair_distribution(config, params["target"], prompt, sampling, _FIRST_TOKENS)
    rank = {int(token): i for i, token in enumerate(likeliest)}
    counts = np.zeros_like(joint)
    stop = StopConfig(max_new_tokens=2, max_position=config.max_position)
    for first in range(0, samples, batch_size):
        ids = range(first, min(first + batch_size, samples))
        rows = generation.generate(
            params, [prompt] * len(ids), method, stop, seed=seed, row_ids=ids
        )
        for row in rows:
            one, two = row.token_ids
            if one in rank:
                counts[rank[one], two] += 1
    observed, wanted = pool(counts.ravel(), joint.ravel() * samples, samples)
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    return {
        "statistic": statistic,
        "degrees_of_freedom": freedom,
        "p_value": float(stats.chi2.sf(statistic, freedom)),
        "samples": samples,
    }
