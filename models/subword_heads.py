"""The sub-words of a word from one vector: two heads behind one interface (Byte2Word).

Predicting a word from a word-level hidden state needs no softmax over words: its pieces under a
small sub-word vocabulary are predicted instead (arXiv 2211.12677, abstract). How is not known; the
two heads here are this project's choices.

- 'parallel': J slots at once, each from the vector and a learned slot embedding. Slots do not see
  each other, so that it can mix the pieces of two words.
- 'autoregressive': a small causal Transformer over [vector, emb(s_1), ...]; a proper joint
  distribution.

Ids are those of the vocabulary, and one more, `end`, after a word's last piece; a word of J or more
pieces has its first J and no end. Impossible ids have no probability in any of them: a word is not
empty, and only the first slot may hold the end of the text. A head is computed for the words that
are asked for, [n, D] rows gathered by the caller: nothing here has an axis of all positions.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import transformer
from models.cache import KVCache
from models.cache import create as create_cache
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.layers import Dense, Norm

KINDS = ("parallel", "autoregressive")
_IMPOSSIBLE = -1e9


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head.

    Attributes:
      vocab_size: sub-words [V]; V itself is the id of `end`.
      embed_dim: D, of the vectors.
      kind: 'parallel' or 'autoregressive'.
      num_slots: J, pieces of a word at most.
      num_layers, num_heads: of the autoregressive decoder.
      eos_id: the sub-word that ends a text; a word of its own.
    """

    vocab_size: int
    embed_dim: int
    kind: str = "parallel"
    num_slots: int = 6
    num_layers: int = 1
    num_heads: int = 4
    eos_id: int = 0

    def __post_init__(self) -> None:
        check_choice("head.kind", self.kind, KINDS)
        for field in ("vocab_size", "embed_dim", "num_slots", "num_layers", "num_heads"):
            if (value := getattr(self, field)) < 1:
                raise InputError(f"head.{field}: {value} must be at least 1")
        if not 0 <= self.eos_id < self.vocab_size:
            raise InputError(f"head.eos_id: {self.eos_id} must be below {self.vocab_size}")

    @property
    def end(self) -> int:
        """The id after a word's last piece."""
        return self.vocab_size

    @property
    def decoder(self) -> TransformerConfig:
        """Of the autoregressive kind: over J positions, input and output tables tied."""
        return TransformerConfig(
            vocab_size=self.vocab_size + 1,
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            mlp_dim=4 * self.embed_dim,
            max_position=self.num_slots,
            norm="layernorm",
            activation="gelu",
            gated_mlp=False,
            positions="learned",
            tie_embeddings=True,
        )


class _Parallel(nn.Module):
    config: HeadConfig

    @nn.compact
    def __call__(self, hidden: jnp.ndarray) -> jnp.ndarray:
        config, D = self.config, self.config.embed_dim
        slots = self.param("positions", nn.initializers.normal(1.0), (config.num_slots, D))
        x = hidden[:, None] + slots.astype(hidden.dtype)
        x = jax.nn.gelu(Dense((D,), 1, True, name="transform")(x))
        x = Norm(config.decoder, name="norm")(x)
        logits = Dense((config.vocab_size + 1,), 1, True, result_dtype=jnp.float32, name="logits")
        return logits(x)


@functools.partial(jax.jit, static_argnames="config")
def init(config: HeadConfig, key: jax.Array) -> Any:
    """Random float32 parameters."""
    if config.kind == "autoregressive":
        return transformer.init(config.decoder, key)
    return _Parallel(config).init(key, jnp.zeros((1, config.embed_dim)))["params"]


def possible(config: HeadConfig, slots: jnp.ndarray) -> jnp.ndarray:
    """Which ids may stand at slots int [...]: bool [..., V + 1]."""
    first = (slots == 0)[..., None]
    ids = jnp.arange(config.vocab_size + 1)
    return jnp.where(first, ids != config.end, ids != config.eos_id)


def logits(config: HeadConfig, params: Any, hidden: jnp.ndarray, pieces: Any) -> jnp.ndarray:
    """Of every slot, given the pieces before it where the head looks at them.

    Args:
      config, params: the head.
      hidden: [n, D], a vector a word.
      pieces: int [n, J]; not read by the parallel head.

    Returns:
      float32 [n, J, V + 1], very low where an id is impossible.
    """
    if config.kind == "parallel":
        found: Any = _Parallel(config).apply({"params": params}, hidden)
    else:
        table = params["embedder"]["embedding"].astype(hidden.dtype)
        inputs = jnp.concatenate([hidden[:, None], table[pieces[:, :-1]]], axis=1)
        found = transformer.apply(config.decoder, params, inputs).logits
    return jnp.where(possible(config, jnp.arange(config.num_slots)), found, _IMPOSSIBLE)


def slot_mask(config: HeadConfig, pieces: jnp.ndarray, counts: jnp.ndarray) -> jnp.ndarray:
    """Slots that count: those of a word's pieces and of its end, if there is room for that.

    The end of the text is a word of one slot.

    Args:
      config: the head.
      pieces: int [..., J].
      counts: int [...], pieces of words, which may be more than J; 0 for no word.

    Returns:
      bool [..., J].
    """
    slots = jnp.arange(config.num_slots)
    last = jnp.where(pieces[..., 0] == config.eos_id, 0, counts)[..., None]
    return (slots <= last) & (counts[..., None] > 0)


def with_end(config: HeadConfig, pieces: jnp.ndarray, counts: jnp.ndarray) -> jnp.ndarray:
    """Targets of the slots: pieces int [..., J] with `end` from `counts` on."""
    return jnp.where(jnp.arange(config.num_slots) < counts[..., None], pieces, config.end)


def score(
    config: HeadConfig, params: Any, hidden: jnp.ndarray, pieces: jnp.ndarray, counts: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """How likely words' pieces are, slot by slot, and whether they are the likeliest.

    A word's log-probability is the sum over its slots. A greedy reading of the head writes the word
    exactly if all of its slots are the likeliest given the right ones before.

    Args:
      config, params: the head.
      hidden: [n, D].
      pieces: int [n, J].
      counts: int [n], pieces of each word.

    Returns:
      Log-probabilities float32 [n, J], 0 at slots that do not count, and bool [n, J], True there.
    """
    targets = with_end(config, pieces, counts)
    found = logits(config, params, hidden, targets)
    # By comparison, as in `training.losses`: its gradient is no scatter.
    chosen = jnp.arange(config.vocab_size + 1) == targets[..., None]
    picked = jnp.sum(jnp.where(chosen, found, 0.0), axis=-1)
    counted = slot_mask(config, pieces, counts)
    log_probs = picked - jax.nn.logsumexp(found, axis=-1)
    right = found.argmax(axis=-1) == targets
    return jnp.where(counted, log_probs, 0.0), right | ~counted


def log_prob(
    config: HeadConfig, params: Any, hidden: jnp.ndarray, pieces: jnp.ndarray, counts: jnp.ndarray
) -> jnp.ndarray:
    """Log-probabilities of words float32 [n]; arguments as `score`."""
    return score(config, params, hidden, pieces, counts)[0].sum(axis=-1)


def start(config: HeadConfig, params: Any, hidden: jnp.ndarray) -> Any:
    """What `step` carries from slot to slot: all logits, or an empty cache."""
    if config.kind == "parallel":
        nothing = jnp.zeros((len(hidden), config.num_slots), jnp.int32)
        return logits(config, params, hidden, nothing)
    return create_cache(
        config.decoder.replace(dtype=str(hidden.dtype)), len(hidden), config.num_slots
    )


def step(
    config: HeadConfig,
    params: Any,
    carry: Any,
    hidden: jnp.ndarray,
    piece: jnp.ndarray,
    slot: jnp.ndarray,
) -> tuple[jnp.ndarray, Any]:
    """Logits float32 [n, V + 1] of one slot, given the piece before it.

    Args:
      config, params: the head.
      carry: from `start` or the step before.
      hidden: [n, D].
      piece: int [n], of the slot before; not read at slot 0.
      slot: int [], 0 .. J - 1, in turn.
    """
    if config.kind == "parallel":
        return jax.lax.dynamic_index_in_dim(carry, slot, axis=1, keepdims=False), carry
    cache: KVCache = carry
    table = params["embedder"]["embedding"].astype(hidden.dtype)
    inputs = jnp.where(slot == 0, hidden, table[piece])[:, None]
    output = transformer.apply(config.decoder, params, inputs, cache=cache)
    assert output.logits is not None and output.cache is not None
    scores = jnp.where(possible(config, slot), output.logits[:, 0], _IMPOSSIBLE)
    return scores, output.cache.replace(lengths=cache.lengths + 1)
