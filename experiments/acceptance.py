"""How often one of k drafts is kept, rule by rule, on pairs of distributions from real decoding."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.loop import ModelParams
from decoding.sampling import SamplingConfig, log_probs
from decoding.speculative import transport
from experiments import results
from models import transformer
from models.config import TransformerConfig

# Rules by what a figure calls them.
ONE = "one draft"
WITH_REPLACEMENT = "multi-round, with replacement"
K_SEQ = "K-SEQ"
WITHOUT_REPLACEMENT = "recursive rejection, without replacement"
OPTIMUM = "optimum for independent drafts"
RULES = (ONE, WITH_REPLACEMENT, K_SEQ, WITHOUT_REPLACEMENT, OPTIMUM)
MAX_DRAFTS = 8
_PAIRS = 256
_DRAWS = 64  # Monte Carlo draws a pair, for the one rule without a closed form


def multi_round(q: jnp.ndarray, p: jnp.ndarray, most: int) -> jnp.ndarray:
    """Acceptance of recursive rejection with replacement for 1 .. `most` drafts: [most, ...].

    What is left after a rejection does not depend on the token that was rejected, so the
    probability is a product. q and p are float32 [..., V].
    """

    def step(carry: tuple, _: Any) -> tuple[tuple, jnp.ndarray]:
        left, reject = carry
        reject = reject * (1 - jnp.minimum(left, q).sum(axis=-1))
        after = jnp.maximum(left - q, 0.0)
        mass = after.sum(axis=-1, keepdims=True)
        left = jnp.where(mass > 1e-12, after / jnp.maximum(mass, 1e-12), left)
        return (left, reject), 1 - reject

    return jax.lax.scan(step, (p, jnp.ones(p.shape[:-1])), None, length=most)[1]


def without_replacement(
    q: jnp.ndarray, p: jnp.ndarray, key: jax.Array, most: int, draws: int
) -> jnp.ndarray:
    """Acceptance of recursive rejection over 1 .. `most` distinct drafts: [most, ...].

    A mean over `draws` Gumbel top-k samples; given the drafts the probability is exact.
    """

    def one(key: jax.Array) -> jnp.ndarray:
        noise = jax.random.gumbel(key, q.shape)
        drafts = jax.lax.top_k(jnp.log(q) + noise, most)[1]

        def step(carry: tuple, k: jnp.ndarray) -> tuple[tuple, jnp.ndarray]:
            left_p, left_q, reject = carry
            token = jax.lax.dynamic_index_in_dim(drafts, k, axis=-1)
            at = lambda x: jnp.take_along_axis(x, token, axis=-1)[..., 0]  # noqa: E731
            ratio = jnp.where(at(left_q) > 0, at(left_p) / jnp.maximum(at(left_q), 1e-30), 0.0)
            reject = reject * (1 - jnp.minimum(ratio, 1.0))
            after = jnp.maximum(left_p - left_q, 0.0)
            mass = after.sum(axis=-1, keepdims=True)
            left_p = jnp.where(mass > 1e-12, after / jnp.maximum(mass, 1e-12), left_p)
            left_q = jnp.where(jnp.arange(q.shape[-1]) == token, 0.0, left_q)
            left_q /= jnp.maximum(left_q.sum(axis=-1, keepdims=True), 1e-30)
            return (left_p, left_q, reject), 1 - reject

        return jax.lax.scan(step, (p, q, jnp.ones(p.shape[:-1])), jnp.arange(most))[1]

    return jax.lax.map(one, jax.random.split(key, draws)).mean(axis=0)


@functools.partial(jax.jit, static_argnames=("most", "draws"))
def by_rule(
    q: jnp.ndarray, p: jnp.ndarray, key: jax.Array, *, most: int, draws: int
) -> dict[str, jnp.ndarray]:
    """Probability that one of k = 1 .. `most` drafts is kept, by rule: [most, ...] each.

    Args:
      q: float32 [..., V], the drafter's distributions.
      p: float32 [..., V], the target's.
      key: for the drafts of the rule that is sampled.
      most: largest k.
      draws: samples of drafts.
    """
    ks = [jnp.full(p.shape[:-1], k) for k in range(1, most + 1)]
    return {
        ONE: jnp.stack([jnp.minimum(q, p).sum(axis=-1)] * most),
        WITH_REPLACEMENT: multi_round(q, p, most),
        K_SEQ: jnp.stack([transport.k_seq_acceptance(q, p, k) for k in ks]),
        WITHOUT_REPLACEMENT: without_replacement(q, p, key, most, draws),
        OPTIMUM: jnp.stack([transport.optimal_acceptance(q, p, k) for k in ks]),
    }


def pairs(
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    new_tokens: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Distributions (q, p) float32 [n, V] of both models at tokens that the target sampled."""
    method = methods.build("autoregressive", {"target": configs["target"]}, sampling)
    stop = generation.stop_config(configs["target"], new_tokens, ())
    rows = generation.generate(params, prompts, method, stop, seed=seed)
    start, end = len(prompts[0]), len(prompts[0]) + new_tokens
    texts = jnp.asarray([[*row.prompt_ids, *row.token_ids] for row in rows])

    def probabilities(role: str) -> np.ndarray:
        logits = jax.jit(lambda p, t: transformer.apply(configs[role], p, t).logits)(
            params[role], texts
        )
        chosen = logits[:, start - 1 : end - 1].reshape(-1, logits.shape[-1])
        return np.asarray(jnp.exp(log_probs(chosen, sampling)))

    q, p = probabilities("draft"), probabilities("target")
    index = np.random.default_rng(seed).permutation(len(p))[:_PAIRS]
    return q[index], p[index]


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Mean acceptance over k on stored pairs, as a figure, and the order that theory expects."""
    temperature = max(config.decode.temperatures) or 1.0
    sampling = SamplingConfig(
        temperature=temperature, top_k=config.decode.top_k, top_p=config.decode.top_p
    )
    new = min(config.decode.max_new_tokens, 64)
    q, p = pairs(configs, params, prompts, sampling, new, config.seed)
    found = by_rule(q, p, jax.random.key(config.seed), most=MAX_DRAFTS, draws=_DRAWS)
    means = {name: np.asarray(found[name].mean(axis=1), float) for name in RULES}
    k = list(range(1, MAX_DRAFTS + 1))
    figure = {
        "title": f"One of k drafts is kept ({len(p)} pairs, temperature {temperature:g})",
        "x_label": "drafts k",
        "y_label": "probability",
        "series": [{"label": name, "x": k, "y": y.tolist()} for name, y in means.items()],
    }
    order = ((WITH_REPLACEMENT, ONE), (K_SEQ, WITH_REPLACEMENT), (OPTIMUM, K_SEQ))
    claims = [
        results.at_least(
            f"acceptance at k = 4, {better} over {worse}", means[better][3] / means[worse][3], 1.0
        )
        for better, worse in (*order, (WITHOUT_REPLACEMENT, K_SEQ))
    ]
    return figure, claims
