"""Approximate search over the rows of a large vocabulary against scoring them all."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding.dynamic_vocabulary import inverted_lists
from decoding.dynamic_vocabulary.inverted_lists import Index
from experiments import timing
from training import ann_index


def synthetic_rows(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` rows: the given ones, then others near means of two of them.

    A stand-in for a vocabulary that is larger than there is text to train one on.
    """
    rng = np.random.default_rng(seed)
    more = max(size - len(rows), 0)
    pairs = rng.integers(0, len(rows), (2, more))
    share = rng.random((more, 1), np.float32)
    noise = 0.3 * rng.standard_normal((more, rows.shape[1]), np.float32) * rows.std(axis=0)
    made = share * rows[pairs[0]] + (1 - share) * rows[pairs[1]] + noise
    return np.concatenate([rows[:size], made]).astype(np.float32)


def recall(
    index: Index, rows: np.ndarray, queries: np.ndarray, k: int, probes: Sequence[int]
) -> list[dict[str, Any]]:
    """How much of exhaustive scoring each number of probes finds.

    Args:
      index: over `rows`.
      rows: [V, D].
      queries: [Q, D], final hidden states.
      k: candidates.
      probes: lists searched.

    Returns:
      For each: `recall`, share of queries whose arg-max is among the candidates; `mass`, their
      candidates' probability over that of the k most likely tokens; `compared`, share of rows that
      were compared.
    """
    logits = np.asarray(jnp.asarray(queries) @ jnp.asarray(rows).T, np.float64)
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    best = np.sort(np.partition(probability, -k, axis=1)[:, -k:], axis=1)
    search = jax.jit(inverted_lists.search, static_argnames=("k", "probes"))
    found = []
    for count in probes:
        ids, _, compared = map(np.asarray, search(index, jnp.asarray(queries), k, count))
        mine = np.where(ids >= 0, np.take_along_axis(probability, np.maximum(ids, 0), axis=1), 0)
        found.append(
            {
                "probes": count,
                "recall": float((ids == logits.argmax(axis=1)[:, None]).any(axis=1).mean()),
                "mass": float((mine.sum(axis=1) / best.sum(axis=1)).mean()),
                "compared": float(compared.mean() / len(rows)),
            }
        )
    return found


def step_seconds(
    index: Index, rows: np.ndarray, queries: np.ndarray, k: int, probes: int, repeats: int
) -> dict[str, float]:
    """Seconds of choosing a token for each query at once: by the index, and from all logits."""
    table, hidden = jnp.asarray(rows), jnp.asarray(queries)

    @jax.jit
    def approximate(index: Index, table: jnp.ndarray, hidden: jnp.ndarray) -> jnp.ndarray:
        ids, _, _ = inverted_lists.search(index, hidden, k, probes)
        return jnp.einsum("bkd,bd->bk", table[jnp.maximum(ids, 0)], hidden)

    @jax.jit
    def exhaustive(table: jnp.ndarray, hidden: jnp.ndarray) -> jnp.ndarray:
        return inverted_lists.exhaustive(hidden @ table.T, k)[1]

    placed = jax.device_put(index)
    runs: dict[str, Callable[[], Any]] = {
        "index": lambda: approximate(placed, table, hidden),
        "exhaustive": lambda: exhaustive(table, hidden),
    }

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        def call() -> float:
            begin = time.perf_counter()
            jax.block_until_ready(run())
            return time.perf_counter() - begin

        return call

    return timing.best({name: timed(run) for name, run in runs.items()}, repeats)


def by_size(
    rows: np.ndarray,
    queries: np.ndarray,
    sizes: Sequence[int],
    *,
    k: int,
    probes: Sequence[int],
    timed_probes: int,
    batch: int,
    repeats: int,
    metric: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Recall and time for vocabularies of several sizes, with about 4 sqrt(V) lists each.

    Args:
      rows: predicted rows; larger sizes are filled up, see `synthetic_rows`.
      queries: final hidden states; the first `batch` are timed.
      sizes: V.
      k, probes, metric: see `inverted_lists`.
      timed_probes: lists searched where time is measured.
      batch: queries of a step.
      repeats: timed calls of each.
      seed: of synthetic rows and k-means.
    """
    found = []
    for size in sizes:
        table = synthetic_rows(rows, size, seed)
        begin = time.perf_counter()
        lists = min(int(4 * size**0.5), size // 4)
        config, index = ann_index.build(
            table, np.zeros(size), lists=lists, metric=metric, seed=seed
        )
        found.append(
            {
                "size": size,
                "predicted": min(size, len(rows)),
                "lists": config.lists,
                "width": config.width,
                "build_seconds": time.perf_counter() - begin,
                "recall": recall(index, table, queries, k, probes),
                "seconds": step_seconds(index, table, queries[:batch], k, timed_probes, repeats),
            }
        )
    return found
