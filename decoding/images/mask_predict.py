"""Images from masked models of their tokens: predict all masks, keep the surest, in a few steps.

MaskGIT's sampler (arXiv 2202.04200) as ENAT runs it (arXiv 2411.06959): a cosine schedule of masks,
annealed sampling and choice temperatures, guidance that grows from zero, and, for the
disentangled network, features that are reused from step to step. The schedule fixes how many
tokens are masked at each step, so the loop is unrolled and every list of positions has a static
length: work that is skipped is not computed.

Letters: B rows, N tokens, K codes, T steps.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding import randomness, stats
from decoding.stats import Stats
from models import enat
from models.enat import ENATConfig, Indices
from models.errors import InputError

_COLDEST = 1e-3


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How an image is drawn. The defaults are ENAT's for 256 x 256 pixels.

    Attributes:
      steps: T.
      guidance: scale that classifier-free guidance grows to; step s of T has s / T of it, so the
        first has none. 0 for no guidance and half the work.
      mask_temperature: of the Gumbel noise on confidences, annealed linearly to 0.
      sampling_temperature: of the tokens.
      anneal_sampling: linearly towards 0 (ENAT); False to keep it (MaskGIT).
      reuse: whether the disentangled network reuses features; False encodes all visible tokens
        anew at every step.
      project_once: True projects the features that a token was encoded with, at every step anew.
        False, as the official code, projects what the step before has projected, again and again,
        though training does so only once.
    """

    steps: int = 8
    guidance: float = 2.5
    mask_temperature: float = 1.5
    sampling_temperature: float = 6.0
    anneal_sampling: bool = True
    reuse: bool = True
    project_once: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"sampler.steps: {self.steps} must be at least 1")
        if self.guidance < 0:
            raise InputError(f"sampler.guidance: {self.guidance} must be at least 0")
        if self.mask_temperature < 0:
            raise InputError(
                f"sampler.mask_temperature: {self.mask_temperature} must be at least 0"
            )
        if self.sampling_temperature <= 0:
            raise InputError(
                f"sampler.sampling_temperature: {self.sampling_temperature} must be positive"
            )

    def temperature(self, step: int) -> float:
        """Sampling temperature of step 0 .. T - 1."""
        rest = 1 - (step + 1) / self.steps if self.anneal_sampling else 1
        return max(self.sampling_temperature * rest, _COLDEST)

    def scale(self, step: int) -> float:
        """Guidance scale of step 0 .. T - 1."""
        return self.guidance * step / self.steps


# MaskGIT's own settings.
MASKGIT = SamplerConfig(
    guidance=0.0, mask_temperature=4.5, sampling_temperature=1.0, anneal_sampling=False
)


class Sampled(NamedTuple):
    """What was drawn.

    Attributes:
      ids: int32 [B, N].
      trace: int32 [T, B, N], after each step, with the mask id where still masked.
      stats: `target_calls` are network calls, guidance's included; `target_positions` the
        tokens that went through encoder or decoder. Its `extra` are encoder_tokens,
        decoder_tokens and reused_tokens of one guidance branch.
    """

    ids: jax.Array
    trace: jax.Array
    stats: Stats


def masks_before(num_tokens: int, steps: int) -> list[int]:
    """Masked tokens before each step, and 0: floor(N cos(pi rho / 2)), [T + 1].

    Raises:
      InputError: so many steps that nothing is left for the last.
    """
    counts = [
        math.floor(num_tokens * math.cos(math.pi / 2 * step / steps)) for step in range(steps)
    ]
    if counts[-1] < 1:
        raise InputError(f"sampler.steps: {steps} are too many for {num_tokens} tokens")
    return [*counts, 0]


def work(config: ENATConfig, sampler: SamplerConfig) -> list[tuple[int, int, int]]:
    """(old, new, masked) tokens of each step's call: what is reused, encoded and decoded."""
    counts = masks_before(config.num_tokens, sampler.steps)
    reuse = sampler.reuse and config.disentangled
    total = config.num_tokens
    before = [total, *counts] if reuse else [total] * (sampler.steps + 1)
    return [(total - b, b - now, now) for b, now in zip(before, counts[:-1])]


def macs(config: ENATConfig, sampler: SamplerConfig) -> int:
    """Multiply-accumulates of one image, with guidance's branch where it is run."""
    total = 0
    for step, counts in enumerate(work(config, sampler)):
        branches = 2 if sampler.scale(step) > 0 else 1
        total += branches * enat.macs(config, *counts)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample(
    config: ENATConfig,
    sampler: SamplerConfig,
    params: Any,
    keys: jax.Array,
    condition: jax.Array,
) -> Sampled:
    """Draws an image's tokens for each row, compiled once for each pair of configs and each B.

    Args:
      config: either network.
      sampler: see `SamplerConfig`.
      params: of the network; for quality, the averaged ones.
      keys: one a row, [B]; `randomness.row_keys`. A row's image depends on its key and condition
        only.
      condition: classes int [B], or text vectors [B, E]; see `enat.apply`.
    """
    B, N = condition.shape[0], config.num_tokens
    lists = work(config, sampler)
    counts = masks_before(N, sampler.steps)
    ids = jnp.full((B, N), config.mask_id, jnp.int32)
    masked = before = jnp.ones((B, N), bool)
    # The two branches of guidance are rows of one call, each with its own reused features.
    features = jnp.zeros((2 * B, N, config.embed_dim))
    trace, calls = [], 0
    for step, (old, new, now) in enumerate(lists):
        branches = 2 if sampler.scale(step) > 0 else 1
        indices = Indices(
            positions(~before, old), positions(before & ~masked, new), positions(masked, now)
        )
        both = [condition, enat.null_condition(config, B)][:branches]
        twice = lambda x: jnp.tile(x, (branches, 1))  # noqa: B023, E731
        output = enat.apply(
            config,
            params,
            twice(ids),
            jnp.concatenate(both),
            jax.tree.map(twice, indices),
            reused=features[: branches * B] if old else None,
        )
        # Nothing is visible in the first step, so that its features are never reused.
        found = output.features if branches == 2 else jnp.tile(output.features, (2, 1, 1))
        if sampler.project_once:
            found = jnp.where(jnp.tile(before, (2, 1))[..., None], found, features)
        features = found
        logits = guided(output.logits, sampler.scale(step))
        tokens, confidence = draw(logits, keys, step, indices.masked, sampler, N)
        before = masked if sampler.reuse else before
        ids = enat.scatter(ids, indices.masked, tokens)
        # The least sure stay masked.
        order = jnp.argsort(confidence, axis=1)[:, : counts[step + 1]]
        again = jnp.take_along_axis(indices.masked, order, axis=1)
        masked = enat.scatter(jnp.zeros((B, N), bool), again, jnp.ones_like(again, bool))
        ids = jnp.where(masked, config.mask_id, ids)
        trace.append(ids)
        calls += branches
    return Sampled(ids, jnp.stack(trace), _stats(B, config, sampler, calls))


def guided(logits: jax.Array, scale: float) -> jax.Array:
    """Log-probabilities [B, m, K] of l_c + scale (l_c - l_u), l_c and l_u stacked [2 B, m, K].

    With scale 0 the logits are l_c alone, [B, m, K].
    """
    if scale > 0:
        conditional, null = jnp.split(logits, 2)
        logits = conditional + scale * (conditional - null)
    return jax.nn.log_softmax(logits)


def draw(
    log_probs: jax.Array,
    keys: jax.Array,
    step: int,
    masked: jax.Array,
    sampler: SamplerConfig,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B, m] drawn at masked positions, and their confidences float32 [B, m].

    Tokens are sampled with the step's temperature; the confidence is the log-probability without
    it, plus Gumbel noise that is annealed to nothing. Noise belongs to a row's key, the step and
    the position.
    """
    B, _, K = log_probs.shape
    steps = jnp.full((B,), step)
    noise = randomness.gumbel(
        randomness.at(keys, steps, randomness.SAMPLE), num_tokens * K
    ).reshape(B, num_tokens, K)
    tempered = log_probs / sampler.temperature(step) + enat.gather(noise, masked)
    tokens = jnp.argmax(tempered, -1).astype(jnp.int32)
    confidence = jnp.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    order = randomness.gumbel(randomness.at(keys, steps, randomness.ORDER), num_tokens)
    rest = 1 - (step + 1) / sampler.steps
    jitter = jnp.take_along_axis(order, masked, axis=1) * (sampler.mask_temperature * rest)
    return tokens, confidence + jitter


def positions(chosen: jax.Array, count: int) -> jax.Array:
    """Where bool [B, N] holds, `count` places in every row, ascending: int32 [B, count]."""
    return jnp.argsort(~chosen, axis=1, stable=True)[:, :count].astype(jnp.int32)


def _stats(rows: int, config: ENATConfig, sampler: SamplerConfig, calls: int) -> Stats:
    old, new, masked = (sum(parts) for parts in zip(*work(config, sampler)))
    encoded, decoded = (new, masked) if config.disentangled else (new + masked, 0)
    full = lambda count: jnp.full((rows,), count, jnp.int32)  # noqa: E731
    done = stats.round_work(
        rows,
        0,
        extra={
            "encoder_tokens": full(encoded),
            "decoder_tokens": full(decoded),
            "reused_tokens": full(old),
        },
    )
    return done.replace(
        target_calls=full(calls),
        target_positions=full(encoded + decoded),
        tokens_emitted=full(config.num_tokens),
    )
