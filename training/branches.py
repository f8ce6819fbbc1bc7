"""Placeholders behind many places of a text at once, each copy seeing its own prefix alone.

One pass over [text ; copies] trains what a decoder does that appends placeholders to a text: the
text does not see them, and a copy sees neither the others nor the text behind its place (PPD,
arXiv 2405.18628, section 3.2; Lexical Unit Decoding, arXiv 2405.15208).
"""

from typing import Any

import jax.numpy as jnp

from models import masks, transformer
from models.config import TransformerConfig
from training.fitting import DeviceBatch


def hidden(
    model: TransformerConfig,
    params: Any,
    batch: DeviceBatch,
    cut: jnp.ndarray,
    placeholders: jnp.ndarray,
    ensemble: int = 1,
    mask: str = "ensemble",
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """What the head reads at text and placeholders.

    Args:
      model, params: the language model.
      batch: packed rows: tokens, positions, segment_ids int [B, T].
      cut: int [B, C], a copy stands behind each of these places.
      placeholders: [n m, D], a copy's embeddings, those of one distance together: m of them for
        each of n distances; or [B, C, n m, D], where copies differ.
      ensemble: m.
      mask: which of a copy's own placeholders each one sees; see `models.prompt_tokens`.

    Returns:
      [B, T, D] of the text, as without copies; and [B, C, n m, D]. Placeholder k of n stands at
      position cut + k and says what follows there.
    """
    tokens, positions, segments = batch["tokens"], batch["positions"], batch["segment_ids"]
    B, T = tokens.shape
    C, m = cut.shape[1], ensemble
    n = placeholders.shape[-2] // m
    S = C * n * m
    soft = placeholders.astype(model.compute_dtype)
    copies = jnp.broadcast_to(soft, (B, C, *soft.shape[-2:])).reshape(B, S, -1)
    text = transformer.token_embeddings(model, params, tokens)
    distance = jnp.tile(jnp.repeat(jnp.arange(1, n + 1), m), C)
    member = jnp.tile(jnp.arange(m), C * n)
    copy = jnp.repeat(jnp.arange(C), n * m)
    behind = jnp.repeat(cut, n * m, axis=1)

    def of_text(table: jnp.ndarray) -> jnp.ndarray:
        return jnp.take_along_axis(table, behind, axis=1)

    sees_text = jnp.arange(T) <= behind[:, :, None]
    sees_text &= segments[:, None, :] == of_text(segments)[:, :, None]
    before = {
        "ensemble": (member[:, None] == member) & (distance <= distance[:, None]),
        "decoder": jnp.tri(S, dtype=bool),
        "independent": jnp.eye(S, dtype=bool),
    }[mask]
    sees_copies = jnp.broadcast_to(before & (copy[:, None] == copy), (B, S, S))
    above = jnp.concatenate([masks.packed_causal(segments), jnp.zeros((B, T, S), bool)], axis=2)
    below = jnp.concatenate([sees_text, sees_copies], axis=2)
    found = transformer.apply(
        model,
        params,
        jnp.concatenate([text, copies], axis=1),
        positions=jnp.concatenate([positions, of_text(positions) + distance], axis=1),
        mask=jnp.concatenate([above, below], axis=1),
        with_logits=False,
    ).hidden
    return found[:, :T], found[:, T:].reshape(B, C, n * m, -1)
