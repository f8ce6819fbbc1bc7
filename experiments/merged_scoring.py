"""What merging a context costs: bits per byte of what follows it, and the right of several endings.

The context is merged and embedded by a provider; what follows is in the model's own tokens and
rows, so that all settings are scored on the same bytes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding.dynamic_vocabulary import merged_input, merged_prompts, merging, row_writer
from decoding.dynamic_vocabulary.boundaries import Valid
from decoding.dynamic_vocabulary.embedding_cache import EmbeddingCache
from models import transformer
from models.byte_level import ByteLevel
from models.config import TransformerConfig
from training import losses


class Windows(NamedTuple):
    """Stretches of held-out text.

    Attributes:
      contexts: token strings, to be merged.
      endings: int32 [n, N], the ids that follow.
      sizes: int [n], bytes of text that these stand for.
    """

    contexts: list[list[str]]
    endings: np.ndarray
    sizes: np.ndarray


class Point(NamedTuple):
    """Scores at one number of merges a batch.

    Attributes:
      merges: budget.
      length: mean tokens of a context.
      bits_per_byte: of the endings.
      accuracy: share of contexts whose own ending gains most from the context, in log probability,
        among those offered.
    """

    merges: int
    length: float
    bits_per_byte: float
    accuracy: float


def windows(
    texts: Sequence[str], source: ByteLevel, *, context: int, ending: int, count: int, seed: int
) -> Windows:
    """Random stretches of `context` + `ending` tokens, documents drawn by their length."""
    rng = np.random.default_rng(seed)
    ids = [source.encode(text) for text in texts]
    room = np.array([max(len(row) - context - ending, 0) for row in ids], float)
    chosen = [
        (row, int(rng.integers(room[row] + 1)))
        for row in rng.choice(len(ids), count, p=room / room.sum())
    ]
    cut = [ids[row][at : at + context + ending] for row, at in chosen]
    endings = np.array([row[context:] for row in cut], np.int32)
    tokens = [[source.tokens[i] for i in row[:context]] for row in cut]
    return Windows(tokens, endings, source.token_bytes[endings].sum(axis=1))


@functools.partial(jax.jit, static_argnames="config")
def ending_nats(
    config: TransformerConfig,
    params: Any,
    table: jnp.ndarray,
    ids: jnp.ndarray,
    starts: jnp.ndarray,
    endings: jnp.ndarray,
) -> jnp.ndarray:
    """-log p of each row's ending after its context, nats [B].

    Args:
      config, params: the model.
      table: [C, D], rows of ids from V on.
      ids: int [B, T], context and ending, then anything.
      starts: int [B], where endings begin.
      endings: int [B, N].
    """
    V, N = config.vocab_size, endings.shape[1]
    own = row_writer.own_rows(config, {"target": params}, ids)
    made = table[jnp.maximum(ids - V, 0)].astype(own.dtype)
    inputs = jnp.where((ids < V)[..., None], own, made)
    hidden = transformer.apply(config, params, inputs, with_logits=False).hidden
    places = starts[:, None] - 1 + jnp.arange(N)
    before = jnp.take_along_axis(hidden, places[..., None], axis=1)
    nats = losses.cross_entropy(transformer.unembed(config, params, before), endings)
    return nats.sum(axis=1)


def alone(config: TransformerConfig, params: Any, held_out: Windows, batch_size: int) -> np.ndarray:
    """Nats of each ending after nothing but the beginning of a text: [n]."""
    n = len(held_out.endings)
    first = np.full((n, 1), config.eos_token_ids[0], np.int32)
    ids = np.concatenate([first, held_out.endings], axis=1)
    no_rows = jnp.zeros((1, config.embed_dim))
    starts = np.ones(batch_size, np.int32)
    parts = [
        ending_nats(
            config, params, no_rows, ids[at : at + batch_size], starts,
            held_out.endings[at : at + batch_size],
        )
        for at in range(0, n - batch_size + 1, batch_size)
    ]  # fmt: skip
    return np.concatenate([np.asarray(part) for part in parts])


def score(
    config: TransformerConfig,
    params: Any,
    make_cache: Callable[[], EmbeddingCache],
    valid: Valid,
    held_out: Windows,
    merges: Sequence[int],
    prior: np.ndarray,
    *,
    batch_size: int,
    choices: int = 4,
) -> tuple[list[Point], EmbeddingCache]:
    """A curve over budgets; every batch is merged by itself, the cache begins empty at each.

    Args:
      config, params: the model.
      make_cache: of the provider that embeds contexts.
      valid: see `merging.merge`.
      held_out: see `windows`; those beyond a whole number of batches are left out.
      merges: budgets.
      prior: nats of endings without their context, see `alone`.
      batch_size: contexts that are merged together.
      choices: endings that each context has to choose among, its own and those of its neighbours.

    Returns:
      The points, and the cache of the last.
    """
    width = max(map(len, held_out.contexts)) + held_out.endings.shape[1]
    points, cache = [], make_cache()
    for budget in merges:
        cache, tokens, right, count = make_cache(), 0, 0, 0
        nats = size = 0.0
        for first in range(0, len(held_out.contexts) - batch_size + 1, batch_size):
            rows = slice(first, first + batch_size)
            merged = merging.merge(held_out.contexts[rows], budget, valid)
            prompts = merged_prompts.prompt_ids(cache, merged.tokens, config.vocab_size)
            starts = np.array([len(prompt) for prompt in prompts], np.int32)
            found, gained = [], []
            for shift in range(choices):
                theirs = np.roll(held_out.endings[rows], shift, axis=0)
                whole = [[*p, *e] for p, e in zip(prompts, theirs.tolist(), strict=True)]
                ids = merged_input.pad(whole, multiple=1, width=width).slots
                each = ending_nats(config, params, cache.table, ids, starts, theirs)
                found.append(np.asarray(each, np.float64))
                gained.append(np.roll(prior[rows], shift) - found[-1])
            right += int((np.argmax(gained, axis=0) == 0).sum())
            nats, size = nats + float(found[0].sum()), size + float(held_out.sizes[rows].sum())
            tokens, count = tokens + merged.lengths[-1], count + len(prompts)
        points.append(
            Point(budget, tokens / count, losses.bits_per_byte(nats, size), right / count)
        )
    return points, cache


def text_bits_per_byte(
    config: TransformerConfig,
    params: Any,
    rows: Sequence[Sequence[int]],
    token_bytes: np.ndarray,
    *,
    width: int,
) -> float:
    """Bits per byte of whole texts in a model's own tokens, each after its first token.

    Args:
      config, params: the model.
      rows: ids of each text; what exceeds `width` is cut.
      token_bytes: int [V].
      width: T.
    """
    ids = np.zeros((len(rows), width), np.int32)
    counted = np.zeros(ids.shape, bool)
    for r, row in enumerate(rows):
        ids[r, : min(len(row), width)] = row[:width]
        counted[r, 1 : min(len(row), width)] = True
    nats = np.asarray(_token_nats(config, params, ids), np.float64)
    sizes = token_bytes[ids][:, 1:][counted[:, 1:]].sum()
    return losses.bits_per_byte(float(nats[counted[:, 1:]].sum()), float(sizes))


@functools.partial(jax.jit, static_argnames="config")
def _token_nats(config: TransformerConfig, params: Any, ids: jnp.ndarray) -> jnp.ndarray:
    """[n, T - 1], one row at a time: logits of a large vocabulary fill memory."""

    def one(row: jnp.ndarray) -> jnp.ndarray:
        logits = transformer.apply(config, params, row[None, :-1]).logits
        assert logits is not None
        return losses.cross_entropy(logits, row[None, 1:])[0]

    return jax.lax.map(one, ids)
