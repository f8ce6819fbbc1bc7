"""Approximate search among the rows of a huge vocabulary, inside the jitted loop.

An inverted file (IVF): rows lie in lists around centroids, and a query is compared with the rows of
the `probes` lists whose centroids are closest. The lists are padded arrays of one width, so a
search is two products and a gather. `training.ann_index` makes them with faiss.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.sampling import top_k
from models import parameter_files
from models.errors import InputError, check_choice

METRICS = ("cosine", "inner")
ROLE = "index"
_KIND = "ann_index"
_LISTS_AT_ONCE = 8
_MOST = 2**24  # ids up to here are kept as float32, the dtype of parameter files


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """The shape of an index.

    Attributes:
      vocab_size: rows in all [V].
      dim: D.
      lists: C.
      width: W, rows that a list has room for.
      metric: 'cosine' (published: rows have length 1, so those of large norm may be missed when
        logits decide), or 'inner' (rows as they are).
    """

    vocab_size: int
    dim: int
    lists: int
    width: int
    metric: str = "cosine"

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        for field in ("vocab_size", "dim", "lists", "width"):
            if getattr(self, field) < 1:
                raise InputError(f"{field}: {getattr(self, field)} must be at least 1")
        if self.vocab_size > _MOST:
            raise InputError(f"vocab_size: {self.vocab_size} must be at most {_MOST}")


class Index(struct.PyTreeNode):
    """The arrays of an index.

    Attributes:
      centroids: float32 [C, D].
      rows: [C, W, D], the rows of each list; zeros beyond its end.
      ids: int32 [C, W], which token each is; -1 beyond a list's end.
      bytes: int32 [V], bytes of text that each token stands for.
    """

    centroids: Any
    rows: Any
    ids: Any
    bytes: Any


def search(
    index: Index, queries: jnp.ndarray, k: int, probes: int
) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """The k best tokens of the lists that each query is closest to.

    Args:
      index: see `Index`.
      queries: [B, D], of any length: it does not change the order.
      k: tokens.
      probes: lists; all when there are fewer.

    Returns:
      Ids int32 [B, k], best first, -1 where the lists held fewer; their products with the queries,
      float32 [B, k], -inf there; and how many rows each query was compared with, int32 [B].
    """
    B, C = len(queries), len(index.centroids)
    queries = queries.astype(index.centroids.dtype)
    _, lists = top_k(queries @ index.centroids.T, min(probes, C))
    ids = index.ids[lists]
    # Few lists at a time: what is gathered of them stays in a processor's cache.
    part = next(
        n for n in range(min(_LISTS_AT_ONCE, lists.shape[1]), 0, -1) if not lists.shape[1] % n
    )
    parts = lists.reshape(B, -1, part).swapaxes(0, 1)

    def compare(mine: jnp.ndarray) -> jnp.ndarray:
        rows = index.rows[mine]
        return jnp.einsum("bpwd,bd->bpw", rows, queries.astype(rows.dtype))

    scores = jax.lax.map(compare, parts).swapaxes(0, 1).reshape(ids.shape).astype(jnp.float32)
    held = ids >= 0
    scores = jnp.where(held, scores, -jnp.inf).reshape(B, -1)
    best, place = top_k(scores, min(k, scores.shape[1]))
    found = jnp.take_along_axis(ids.reshape(scores.shape), place, axis=1)
    if (lacking := k - best.shape[1]) > 0:
        found = jnp.pad(found, ((0, 0), (0, lacking)), constant_values=-1)
        best = jnp.pad(best, ((0, 0), (0, lacking)), constant_values=-jnp.inf)
    return found, best, held.sum(axis=(1, 2), dtype=jnp.int32)


def exhaustive(logits: jnp.ndarray, k: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    """The oracle: ids int32 [B, k] and logits of the k most likely tokens of logits [B, V]."""
    best, ids = top_k(logits, min(k, logits.shape[1]))
    return ids, best


def shapes(config: IndexConfig) -> Index:
    """An index as `jax.ShapeDtypeStruct`s."""
    C, W, D = config.lists, config.width, config.dim
    return Index(
        jax.ShapeDtypeStruct((C, D), jnp.float32),
        jax.ShapeDtypeStruct((C, W, D), jnp.float32),
        jax.ShapeDtypeStruct((C, W), jnp.int32),
        jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32),
    )


def save(directory: str | os.PathLike[str], config: IndexConfig, index: Index) -> None:
    """Writes config.json and model.safetensors; errors as `models.parameter_files.save`."""
    ids, sizes = (np.asarray(part, np.float32) for part in (index.ids, index.bytes))
    parameter_files.save(directory, _KIND, config, index.replace(ids=ids, bytes=sizes))


def load(directory: str | os.PathLike[str]) -> tuple[IndexConfig, Index]:
    """Reads what `save` wrote; errors as `models.parameter_files.load`."""
    return parameter_files.load(directory, _KIND, IndexConfig, shapes)
