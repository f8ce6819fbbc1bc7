"""Inverted lists over the rows of a large vocabulary, made with faiss.

k-means gives the centroids. `decoding.dynamic_vocabulary.inverted_lists` searches them in JAX; what
faiss makes is kept as plain arrays, so that decoding needs no faiss.
"""

import faiss
import numpy as np

from decoding.dynamic_vocabulary.inverted_lists import Index, IndexConfig
from models.errors import InputError, check_choice

_ITERATIONS = 10
_MAX_DEPTH = 8


def build(
    rows: np.ndarray,
    token_bytes: np.ndarray,
    *,
    lists: int,
    metric: str = "cosine",
    balance: float | None = 2.0,
    seed: int = 0,
) -> tuple[IndexConfig, Index]:
    """An index over output rows.

    Lists are padded to the longest, so one that is longer than `balance` times the mean is cut in
    parts by k-means of its own; there are then more lists than asked for.

    Args:
      rows: float32 [V, D].
      token_bytes: int [V], see `Index.bytes`.
      lists: C; faiss advises about sqrt(V) to 4 sqrt(V).
      metric: see `IndexConfig.metric`.
      balance: None to leave lists as k-means makes them.
      seed: of k-means.

    Raises:
      InputError: more lists than rows, an unknown metric, or a balance of less than 1.
    """
    check_choice("metric", metric, ("cosine", "inner"))
    V, D = rows.shape
    if not 1 <= lists <= V:
        raise InputError(f"lists: {lists} must be between 1 and the {V} rows")
    if balance is not None and balance < 1:
        raise InputError(f"balance: {balance} must be at least 1, or None")
    table = np.ascontiguousarray(rows, np.float32)
    if metric == "cosine":
        table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    centroids, nearest = _k_means(table, lists, metric, seed)
    width = V if balance is None else max(1, int(np.ceil(balance * V / lists)))
    parts = [
        part
        for c in range(len(centroids))
        for part in _split(table, np.flatnonzero(nearest == c), centroids[c], width, metric, seed)
    ]
    W = max(len(members) for _, members in parts)
    packed, ids = np.zeros((len(parts), W, D), np.float32), np.full((len(parts), W), -1, np.int32)
    for c, (_, members) in enumerate(parts):
        packed[c, : len(members)], ids[c, : len(members)] = table[members], members
    config = IndexConfig(V, D, len(parts), W, metric)
    middles = np.stack([centroid for centroid, _ in parts]).astype(np.float32)
    return config, Index(middles, packed, ids, np.asarray(token_bytes, np.int32))


def _k_means(
    table: np.ndarray, lists: int, metric: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids [C, D], and the one that each row belongs to."""
    how = faiss.Kmeans(
        table.shape[1],
        lists,
        niter=_ITERATIONS,
        seed=seed,
        spherical=metric == "cosine",
        min_points_per_centroid=1,
        max_points_per_centroid=64,
    )
    how.train(table)
    assert how.centroids is not None
    return how.centroids, how.index.search(table, 1)[1][:, 0]


def _split(
    table: np.ndarray,
    members: np.ndarray,
    centroid: np.ndarray,
    width: int,
    metric: str,
    seed: int,
    depth: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A list as lists of at most `width` members, each with its centroid."""
    if not len(members):
        return []
    if len(members) <= width:
        return [(centroid, members)]
    mine = table[members]
    if depth == _MAX_DEPTH or np.ptp(mine, axis=0).max() < 1e-6:  # rows that are all alike
        return [
            (centroid, members[start : start + width]) for start in range(0, len(members), width)
        ]
    centroids, nearest = _k_means(mine, -(-len(members) // width), metric, seed)
    return [
        part
        for c in range(len(centroids))
        for part in _split(
            table, members[nearest == c], centroids[c], width, metric, seed, depth + 1
        )
    ]
