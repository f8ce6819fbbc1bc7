"""Tiny image models of two grids, up- and down-samplers without parameters, shared by tests.

Grids of 4 x 4 and 8 x 8, twelve codes, three classes. Both models are random: no two positions
agree by chance, and a wrong token, slot or mask anywhere changes what is drawn behind it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import randomness
from decoding.images import image_tokens, multi_scale, neighbourhoods
from decoding.images.image_tokens import ImageSampler
from decoding.sampling import SamplingConfig
from models import transformer
from models.config import TransformerConfig
from tests.models import random_models

K, CLASSES = 12, 3
SIDE, LOW_SIDE = 8, 4
CONFIG = TransformerConfig(
    vocab_size=K + CLASSES + 1,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_position=SIDE * SIDE + 1,
    positions="learned",
)
# Keys within three tokens: two layers, so that a logit depends on five tokens at most.
LOCAL = CONFIG.replace(window=3, local_layers=(True, True))
LABELS = jnp.asarray([0, 2, 1, 2])
KEYS = randomness.row_keys(5, jnp.arange(len(LABELS)))


@functools.cache
def params() -> dict[str, Any]:
    """Models of both grids, a codebook, and the nearest codes of each (all of them)."""
    target = dict(random_models.params(CONFIG, 0))
    # Classes have logit 0, so that what draws from the whole vocabulary draws codes.
    kernel = target["lm_head"]["kernel"]
    target["lm_head"] = {"kernel": kernel.at[:, K:].set(0.0)}
    codebook = jnp.asarray(np.random.default_rng(3).normal(size=(K, 4)), jnp.float32)
    return {
        "target": target,
        "draft": random_models.params(CONFIG, 1),
        "codebook": codebook,
        "neighbours": neighbourhoods.nearest_codes(codebook, 3),
    }


def up(params: Any, low: jnp.ndarray, rows: jnp.ndarray) -> jnp.ndarray:
    """Each code four times, with a pattern so that the four differ."""
    high = jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2)
    odd = jnp.arange(SIDE) % 2
    return (high + odd[:, None] + 2 * odd[None, :]) % K


def down(params: Any, high: jnp.ndarray, rows: jnp.ndarray) -> jnp.ndarray:
    """The sum of each four codes."""
    four = high.reshape(-1, LOW_SIDE, 2, LOW_SIDE, 2)
    return four.sum(axis=(2, 4)) % K


def sampler(
    side: int = SIDE,
    temperature: float = 1.0,
    guidance: float = 1.0,
    config: TransformerConfig = CONFIG,
) -> ImageSampler:
    return ImageSampler(config, K, side, SamplingConfig(temperature=temperature), guidance)


def pair(temperature: float = 1.0, guidance: float = 1.0) -> multi_scale.Pair:
    return multi_scale.Pair(
        sampler(SIDE, temperature, guidance), sampler(LOW_SIDE, temperature, guidance), up, down
    )


@functools.cache
def forward(config: TransformerConfig = CONFIG) -> Any:
    return jax.jit(lambda p, tokens: transformer.apply(config, p, tokens).logits)


def codes_after(
    tokens: jnp.ndarray, guidance: float = 1.0, config: TransformerConfig = CONFIG
) -> np.ndarray:
    """Guided logits [B, 1 + N, K] of the target after each token, from one call without a cache."""
    run = forward(config)
    logits = run(params()["target"], tokens)
    null = run(params()["target"], tokens.at[:, 0].set(K + CLASSES))
    return np.asarray(null + guidance * (logits - null))[..., :K]


def naive(
    tokens: np.ndarray,
    order: list[int],
    temperature: float = 1.0,
    guidance: float = 1.0,
    config: TransformerConfig = CONFIG,
) -> np.ndarray:
    """Draws the codes of `order` one after the other, the whole image anew for each."""
    tokens = np.array(tokens)
    which = sampler(SIDE, temperature, guidance, config)
    V = CONFIG.vocab_size
    for code in order:
        logits = np.full((len(tokens), V), -np.inf, np.float32)
        logits[:, :K] = codes_after(jnp.asarray(tokens), guidance, config)[:, code]
        at = jnp.full((len(tokens),), code + 1)
        tokens[:, code + 1] = image_tokens.draw(which, jnp.asarray(logits), KEYS, at)
    return tokens
