"""One batched call on several candidates of each row: 'ETE-C'.

The selector proposes C tokens of the current block (`explore.Proposals`); the next call runs the
model on each row with each of them written, and the row goes on with the best and with its logits.
So looking ahead costs no round, but it does cost C times the positions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from decoding.loop import ModelParams
from decoding.unmasking.canvas import View
from decoding.unmasking.explore import Proposals
from decoding.unmasking.policies import Call, Policy, keep, no_prefill, shift, visible
from decoding.unmasking.prediction import Prediction, Reader
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError

TOKENS, NATS = "look_ahead_tokens", "look_ahead_nats"


@functools.cache
def look_ahead(
    config: TransformerConfig,
    candidates: int,
    threshold: float,
    weight: float,
    *,
    shifted: bool = False,
) -> Policy:
    """The model on the whole canvas, with each proposal where a row has some.

    The best candidate has the largest log q + weight * (masks of open blocks that it leaves with a
    probability of `threshold` or more), q being its own probability when it was proposed.

    Args:
      config: the architecture.
      candidates: C.
      threshold: tau.
      weight: lambda.
      shifted: as in `policies.whole_canvas`.

    Raises:
      InputError: fewer than two candidates.
    """
    if candidates < 2:
        raise InputError(f"candidates: {candidates} must be at least 2 to look ahead")

    def predict(params: ModelParams, view: View, tokens: jnp.ndarray) -> jnp.ndarray:
        """Logits [n B, S, V] of n variants of every row, [n B, S]."""
        mask = visible(view, tokens.shape[1])
        mask = jnp.tile(mask, (len(tokens) // len(mask), 1, 1))
        out = transformer.apply(config, params["target"], tokens, mask=mask, with_logits=False)
        return transformer.unembed(config, params["target"], shift(out.hidden, shifted))

    def compute(params: ModelParams, view: View, store: Any, read: Reader) -> Call:
        proposals: Proposals = view.memory
        B, S = view.tokens.shape
        tries = proposals.waiting & view.active
        rows = jnp.arange(B)
        # Candidate c of every row, then candidate c + 1: [C B, S].
        variants = jnp.stack(
            [
                view.tokens.at[rows, jnp.where(tries, proposals.positions[:, c], S)].set(
                    proposals.tokens[:, c], mode="drop"
                )
                for c in range(candidates)
            ]
        )

        def several(variants: jnp.ndarray) -> tuple[jnp.ndarray, Prediction]:
            logits = predict(params, view, variants.reshape(-1, S))
            found = jax.vmap(lambda x: read(x, None))(logits.reshape(candidates, B, S, -1))
            open_masks = view.open & (variants == config.mask_token_id)
            sure = (open_masks & (found.features["peak"] >= threshold)).sum(axis=2)
            score = proposals.log_q.T + weight * sure
            best = jnp.where(tries, score.argmax(axis=0), 0)
            return best, jax.tree.map(lambda x: x[best, rows], found)

        def single(variants: jnp.ndarray) -> tuple[jnp.ndarray, Prediction]:
            return jnp.zeros((B,), jnp.int32), read(predict(params, view, variants[0]), None)

        best, prediction = jax.lax.cond(tries.any(), several, single, variants)
        log_q = jnp.take_along_axis(proposals.log_q, best[:, None], axis=1)[:, 0]
        one = jnp.ones((B,), jnp.int32)
        return Call(
            store,
            prediction,
            view.active,
            one,
            jnp.where(tries, candidates, 1) * view.ends,
            one,
            extra={TOKENS: tries.astype(jnp.int32), NATS: jnp.where(tries, -log_q, 0.0)},
            tokens=variants[best, rows],
        )

    return Policy(
        lambda batch, slots: (), no_prefill, compute, keep, counters=(TOKENS,), amounts=(NATS,)
    )
