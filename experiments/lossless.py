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

    Cells with an expected count under 5 are pooled into one.

    Returns:
      statistic, degrees of freedom, p_value and the number of samples.
    """
    likeliest, joint = pair_distribution(config, params["target"], prompt, sampling, 32)
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
    expected = joint * samples
    kept = expected >= 5
    observed = np.append(counts[kept], samples - counts[kept].sum())
    wanted = np.append(expected[kept], samples - expected[kept].sum())
    if wanted[-1] < 5:  # too small a rest: it joins the smallest cell
        smallest = int(np.argmin(wanted[:-1]))
        observed[smallest] += observed[-1]
        wanted[smallest] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    return {
        "statistic": statistic,
        "degrees_of_freedom": freedom,
        "p_value": float(stats.chi2.sf(statistic, freedom)),
        "samples": samples,
    }
