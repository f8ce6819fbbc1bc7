"""From logits to the distribution that tokens are drawn from, and the draw itself.

Every method takes its target distribution from `log_probs`, so that 'lossless' means the same
thing everywhere. Filters act in the order of Hugging Face's warpers: repetition penalty,
temperature, top-k, top-p, min-p.
"""

import dataclasses

import jax
import jax.numpy as jnp

from decoding import randomness
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen.

    Attributes:
      temperature: 0 for the arg-max (ties to the smaller id), else logits are divided by it.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
      min_p: drop tokens less likely than min_p times the most likely one.
      repetition_penalty: divides positive and multiplies negative logits of tokens that occur
        in the row so far (Keskar et al., arXiv 1909.05858); 1 for none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature: {self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise InputError(f"top_k: {self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p: {self.min_p} must be between 0 and 1")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty: {self.repetition_penalty} must be above 0")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def top_k(values: jnp.ndarray, k: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    """`jax.lax.top_k` of [..., V]: the k largest, descending, and their indices, int32.

    XLA's CPU backend copies an operand that has more than two axes.
    """
    before, V = values.shape[:-1], values.shape[-1]
    best, index = jax.lax.top_k(values.reshape(-1, V), k)
    return best.reshape(*before, k), index.reshape(*before, k)


def seen_tokens(tokens: jnp.ndarray, lengths: jnp.ndarray, vocab_size: int) -> jnp.ndarray:
    """Which tokens occur among the first `lengths` [B] of tokens [B, M]: bool [B, V]."""
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = jnp.zeros((tokens.shape[0], vocab_size), bool)
    return seen.at[rows, tokens].max(inside)


def penalise(logits: jnp.ndarray, seen: jnp.ndarray, config: SamplingConfig) -> jnp.ndarray:
    """Applies the repetition penalty to logits [..., V] where `seen` bool [..., V]."""
    penalty = config.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def log_probs(logits: jnp.ndarray, config: SamplingConfig) -> jnp.ndarray:
    """The distribution that `config` draws from, normalised.

    Args:
      logits: float32 [..., V], already penalised where a penalty is used.
      config: temperature and filters.

    Returns:
      float32 [..., V]; -inf for tokens that are ruled out. At temperature 0 the arg-max has
      log-probability 0.
    """
    if config.greedy:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, 0.0, -jnp.inf)
    logits = logits / config.temperature
    V = logits.shape[-1]
    if 0 < config.top_k < V:
        kth = top_k(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        logits = _top_p(logits, config.top_p)
    if config.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


def _top_p(logits: jnp.ndarray, top_p: float) -> jnp.ndarray:
    """Nucleus sampling (Holtzman et al., arXiv 1904.09751); equal logits share a fate."""
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The smallest kept logit: the last one whose predecessors have not reached top_p.
    kept = jnp.where(before < top_p, descending, jnp.inf)
    return jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)


def draw(
    logits: jnp.ndarray,
    keys: jax.Array,
    positions: jnp.ndarray,
    config: SamplingConfig,
    purpose: int = randomness.SAMPLE,
) -> jnp.ndarray:
    """One token a row, by the Gumbel-max trick on `log_probs`.

    Args:
      logits: float32 [B, V].
      keys: row keys [B].
      positions: int [B], the position that the token will stand at.
      config: how to choose.
      purpose: which stream of `decoding.randomness` to draw from.

    Returns:
      int32 [B].
    """
    if config.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    noise = randomness.gumbel(randomness.at(keys, positions, purpose), logits.shape[-1])
    return jnp.argmax(log_probs(logits, config) + noise, axis=-1).astype(jnp.int32)
