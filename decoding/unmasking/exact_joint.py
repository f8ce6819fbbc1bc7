"""An oracle in place of a model: exact conditionals of a small joint distribution, by enumeration.

What a rule for unmasking promises about information and error can be checked on it without any
training. Its parameters are the distribution, so that one compiled loop serves all of a size.
"""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from decoding.loop import ModelParams
from decoding.unmasking.canvas import View
from decoding.unmasking.policies import Call, Policy, keep, no_prefill
from decoding.unmasking.prediction import Reader
from models.config import TransformerConfig


def config(vocab_size: int, eos_ids: tuple[int, ...] = ()) -> TransformerConfig:
    """A config whose vocabulary is that of the texts and then the mask; its sizes mean nothing."""
    return TransformerConfig(
        vocab_size=vocab_size + 1,
        embed_dim=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=8,
        max_position=64,
        causal=False,
        mask_token_id=vocab_size,
        eos_token_ids=eos_ids,
        family="llada",
    )


def joint(texts: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of the oracle: texts int [N, n] and their probabilities [N], to be normalised."""
    kept = probabilities > 0
    return {
        "texts": np.asarray(texts[kept], np.int32),
        "log_p": np.log(probabilities[kept] / probabilities.sum()).astype(np.float32),
    }


def markov_chain(
    vocab_size: int, length: int, *, sharpness: float, seed: int = 0, order: int = 2
) -> dict[str, np.ndarray]:
    """A random Markov chain, enumerated: `vocab_size` ** `length` texts.

    Args:
      vocab_size: tokens.
      length: of a text.
      sharpness: standard deviation of the logits of each conditional: 0 is uniform, and the more,
        the less information a text has.
      seed: of the logits.
      order: tokens that each one depends on.
    """
    texts = np.array(list(itertools.product(range(vocab_size), repeat=length)))
    rng = np.random.default_rng(seed)
    log_p = np.zeros(len(texts))
    for i in range(length):
        known = min(i, order)
        logits = sharpness * rng.normal(size=(vocab_size,) * (known + 1))
        law = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        log_p += law[tuple(texts[:, i - known : i + 1].T)]
    return joint(texts, np.exp(log_p))


@functools.cache
def exact(model: TransformerConfig) -> Policy:
    """Conditionals of params['target'] (see `joint`) given what is visible, in every round.

    Canvases are as long as the texts; what precedes them is not looked at.
    """

    def compute(params: ModelParams, view: View, store: Any, read: Reader) -> Call:
        texts, log_p = params["target"]["texts"], params["target"]["log_p"]
        (B, S), n = view.tokens.shape, texts.shape[1]
        positions = view.prompt_lengths[:, None] + jnp.arange(n)
        tokens = jnp.take_along_axis(view.tokens, positions, axis=1)
        hidden = jnp.take_along_axis(view.masked, positions, axis=1)
        agrees = (hidden[:, None] | (tokens[:, None] == texts)).all(axis=2)
        weight = jnp.where(agrees, jnp.exp(log_p - log_p.max()), 0.0)
        each = (texts[..., None] == jnp.arange(model.vocab_size)).astype(jnp.float32)
        found = jnp.log(jnp.einsum("bt,tiv->biv", weight, each, precision="highest"))
        rows = jnp.arange(B)[:, None]
        logits = jnp.zeros((B, S, model.vocab_size)).at[rows, positions].set(found, mode="drop")
        one = jnp.ones((B,), jnp.int32)
        return Call(store, read(logits, None), view.active, one, view.ends, one)

    return Policy(lambda batch, slots: (), no_prefill, compute, keep)
