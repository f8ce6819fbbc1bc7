"""Decoding with a vocabulary of a million tokens: few candidates from an index, scored exactly.

Feher et al., arXiv 2411.18553, section 2.5 of the sheet. A step's logits are computed for the k
tokens that the index finds, not for all; so the law that is sampled is the truncated one, and only
a candidate can be drawn. Not lossless, but for probes of all lists and k of all tokens.
"""

import functools

import jax.numpy as jnp

from decoding import sampling as drawing
from decoding.dynamic_vocabulary import inverted_lists, row_writer
from decoding.dynamic_vocabulary.inverted_lists import ROLE
from decoding.loop import DecodeState, Method, ModelParams
from decoding.method_spec import MethodSpec, Option
from decoding.sampling import SamplingConfig
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError

SEARCHES = ("ivf", "exact")
COUNTERS = ("rows_compared", "bytes_emitted")


def exact_logits(
    config: TransformerConfig, params: ModelParams, hidden: jnp.ndarray, ids: jnp.ndarray
) -> jnp.ndarray:
    """Logits float32 [B, k] of tokens ids [B, k] for hidden [B, D]; -inf where an id is below 0."""
    known = jnp.maximum(ids, 0)
    if config.tie_embeddings:
        rows = params["target"]["embedder"]["embedding"][known]
    else:
        rows = jnp.moveaxis(params["target"]["lm_head"]["kernel"][:, known], 0, -1)
    logits = jnp.einsum(
        "bkd,bd->bk", rows.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32
    )
    if (cap := config.logit_softcap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    return jnp.where(ids >= 0, logits, -jnp.inf)


def seen_candidates(ids: jnp.ndarray, tokens: jnp.ndarray, lengths: jnp.ndarray) -> jnp.ndarray:
    """Which candidates ids [B, k] occur among the first `lengths` of tokens [B, M]: bool [B, k]."""
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return ((ids[:, :, None] == tokens[:, None, :]) & inside[:, None, :]).any(axis=2)


@functools.cache
def ann_vocabulary(
    config: TransformerConfig,
    sampling: SamplingConfig,
    k: int = 20,
    probes: int = 8,
    search: str = "ivf",
    eos_bias: float = 0.0,
) -> Method:
    """Plain decoding whose next token is one of the k that a search finds.

    The final hidden state is the query; its candidates' logits are then computed exactly, with rows
    as they are. Temperature, top-k, top-p and min-p act on the candidates, the repetition penalty
    on those that occur in the row. Draws go by rank, so two searches that find the same candidates
    draw the same token.

    Args:
      config: the target's architecture, with the large vocabulary.
      sampling: how a candidate is chosen.
      k: candidates (published: 20).
      probes: lists that are searched.
      search: 'ivf', or 'exact': the k most likely of all tokens, the oracle.
      eos_bias: added to the logit of an end-of-sequence token that is a candidate.

    Raises:
      InputError: while compiling, an index over another vocabulary.
    """
    V = config.vocab_size

    def candidates(
        params: ModelParams, hidden: jnp.ndarray
    ) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
        if search == "exact":
            logits = transformer.unembed(config, params["target"], hidden)
            ids, best = inverted_lists.exhaustive(logits, k)
            return ids, best, jnp.full((len(hidden),), V, jnp.int32)
        index = params[ROLE]
        if (made_for := (len(index.bytes), index.rows.shape[-1])) != (V, config.embed_dim):
            raise InputError(
                f"index: it is over {made_for[0]} rows of {made_for[1]}; the target has {V} of "
                f"{config.embed_dim}"
            )
        ids, _, compared = inverted_lists.search(index, hidden, k, probes)
        logits = exact_logits(config, params, hidden, ids)
        order = jnp.lexsort((ids, -logits), axis=-1)
        ids = jnp.take_along_axis(ids, order, axis=1)
        return ids, jnp.take_along_axis(logits, order, axis=1), compared

    def choose(
        params: ModelParams, state: DecodeState, hidden: jnp.ndarray
    ) -> tuple[jnp.ndarray, dict[str, jnp.ndarray]]:
        ids, logits, compared = candidates(params, hidden)
        if eos_bias and config.eos_token_ids:
            ends = jnp.isin(ids, jnp.asarray(config.eos_token_ids, ids.dtype))
            logits = logits + eos_bias * ends
        if sampling.repetition_penalty != 1:
            seen = seen_candidates(ids, state.tokens, state.lengths)
            logits = drawing.penalise(logits, seen, sampling)
        rank = drawing.draw(logits, state.keys, state.lengths, sampling)
        token = jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0]
        counts = {"rows_compared": compared}
        if search == "ivf":
            counts["bytes_emitted"] = params[ROLE].bytes[token]
        return token, counts

    roles, counters = (
        (("target", ROLE), COUNTERS) if search == "ivf" else (("target",), COUNTERS[:1])
    )
    return row_writer.row_writer(
        "ann_vocabulary",
        config,
        roles,
        lambda params, ids: row_writer.own_rows(config, params, ids),
        choose,
        counters,
    )._replace(lossless=False)


SPEC = MethodSpec(
    "a huge vocabulary, of which an index finds the tokens that are scored (not lossless)",
    ("target",),
    {
        "k": Option(20, "candidates of a step", minimum=1),
        "probes": Option(8, "lists of the index that are searched", minimum=1),
        "search": Option("ivf", "index, or all tokens", choices=SEARCHES),
        "eos_bias": Option(0.0, "added to the logit of an end-of-sequence candidate"),
    },
    lambda configs, sampling, options: ann_vocabulary(configs["target"], sampling, **options),
    parts=(ROLE,),
    parts_with=("search", "ivf"),
)
