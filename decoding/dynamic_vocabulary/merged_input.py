"""Merged rows as a model takes them: ids of a table's rows, padded left or right."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from models import masks, transformer
from models.config import TransformerConfig
from models.errors import check_choice

SIDES = ("left", "right")


class Rows(struct.PyTreeNode):
    """A padded batch.

    Attributes:
      slots: int32 [B, T], rows of a table of embeddings; 0 on padding.
      valid: bool [B, T], False on padding.
      positions: int32 [B, T], from 0 at each row's first token.
    """

    slots: Any
    valid: Any
    positions: Any

    @property
    def last(self) -> jnp.ndarray:
        """Where each row's last token stands, int32 [B]; 0 for a row without any."""
        return jnp.max(jnp.where(self.valid, jnp.arange(self.valid.shape[1]), 0), axis=1)


def pad(
    rows: Sequence[Sequence[int]], *, side: str = "right", multiple: int = 16, width: int = 0
) -> Rows:
    """Rows of one length, a multiple of `multiple`, so that few lengths are compiled.

    Args:
      rows: of any lengths.
      side: where padding goes: 'right' for encoders, 'left' for decoders as published. Positions
        count from a row's first token, so a decoder gives the same either way.
      multiple: of the length.
      width: least length.
    """
    check_choice("side", side, SIDES)
    longest = max([1, width, *map(len, rows)])
    T = -(-longest // multiple) * multiple
    slots, valid = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    for r, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        slots[r, place], valid[r, place] = row, True
    positions = np.maximum(np.cumsum(valid, axis=1, dtype=np.int32) - 1, 0)
    return Rows(slots, valid, positions)


def apply(
    config: TransformerConfig, params: Any, table: jnp.ndarray, rows: Rows, *, logits: bool = True
) -> transformer.Output:
    """Runs a model on a padded batch of rows of a table [C, D], see `run`."""
    return run(config, params, table[rows.slots], rows, logits=logits)


def run(
    config: TransformerConfig,
    params: Any,
    embeddings: jnp.ndarray,
    rows: Rows,
    *,
    logits: bool = True,
) -> transformer.Output:
    """Runs a model on a padded batch; what it says on padding means nothing.

    Args:
      config: causal for a decoder, bidirectional for an encoder.
      params: its parameters.
      embeddings: float [B, T, D], those of `EmbeddingCache.table`.
      rows: what is padding, and positions.
      logits: whether they are needed.
    """
    T = embeddings.shape[1]
    positions = jnp.asarray(rows.positions)
    mask = masks.full(jnp.asarray(rows.valid), T)
    if config.causal:
        mask &= jnp.tri(T, dtype=bool)
    mask |= jnp.eye(T, dtype=bool)  # padding sees itself, so that no row of scores is empty
    return transformer.apply(
        config,
        params,
        embeddings,
        positions=positions,
        mask=mask,
        key_positions=positions,
        with_logits=logits,
    )
