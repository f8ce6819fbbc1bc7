"""Chains that a target drafts with its own first layers; the layers above verify them.

The pending token and every draft go through the first layers once, in the target's own cache, and
the target's call begins where they left off. What makes a draft of a residual stream is a
`Reader`: Kangaroo's adapter, or M2R2's accelerated stream.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, ModelParams
from decoding.sampling import SamplingConfig, draw, log_probs, penalise, seen_tokens
from decoding.speculative import verification
from decoding.speculative.drafting import Begun, Draft, Drafter
from decoding.speculative.exit_state import check_exit
from decoding.speculative.tree import DraftTree, chain
from models import cache as kv
from models import transformer
from models.config import TransformerConfig


class Node(NamedTuple):
    """A token that the first layers have read.

    Attributes:
      token: int [B].
      stream: [B, 1, D], the residual stream after the first layers.
      cache: the target's, with the token's keys and values of these layers written.
      position: int [B].
    """

    token: jnp.ndarray
    stream: jnp.ndarray
    cache: kv.KVCache
    position: jnp.ndarray


class Reader(NamedTuple):
    """What reads drafts off the streams.

    Attributes:
      roles: its parameters'.
      init: (batch, slots) -> state.
      prefill: as `Drafter.prefill`, with the prompts' streams after the first layers.
      begin: (params, state, node) -> (hidden [B, D], working state) of the pending token; hidden
        is what the target's head reads.
      read: (params, working state, node) -> the same of a draft.
      observe: (state before the round, working state, streams [B, N, D] of all nodes, verdict,
        committed length before the round [B], active [B]) -> state.
    """

    roles: tuple[str, ...]
    init: Callable[[int, int], Any]
    prefill: Callable[..., Any]
    begin: Callable[[ModelParams, Any, Node], tuple[jnp.ndarray, Any]]
    read: Callable[[ModelParams, Any, Node], tuple[jnp.ndarray, Any]]
    observe: Callable[..., Any]


class _Turn(NamedTuple):
    """A round's drafting.

    Attributes:
      target: the target's cache.
      reader: the reader's working state.
      seen: bool [B, V] for the repetition penalty; None without one.
      streams: [B, E + 1, D], of the pending token and the drafts.
      drafts: int32 [B, E].
      log_q: float32 [B, E, V]; None where drafts are not sampled.
      written: int32 [B], drafts so far.
      writing: bool [B], rows that draft on.
    """

    target: kv.KVCache
    reader: Any
    seen: jnp.ndarray | None
    streams: jnp.ndarray
    drafts: jnp.ndarray
    log_q: jnp.ndarray | None
    written: jnp.ndarray
    writing: jnp.ndarray


def drafter(
    config: TransformerConfig,
    exit_layer: int,
    num_draft: int,
    threshold: float,
    sampling: SamplingConfig,
    purpose: int,
    reader: Reader,
) -> Drafter:
    """Drafts up to `num_draft` tokens with the target's first layers and a reader.

    A draft is always proposed, be the drafter sure of it or not; one that it is not sure of is the
    last. `layers_run` counts a layer once a call, on however many tokens, the reader not at all.
    The test reads the whole distribution before temperature and filters, so that it does not
    depend on the token that was drawn, which would bias the text.

    Args:
      config: the target's architecture.
      exit_layer: l, how many layers are the first ones.
      num_draft: E.
      threshold: drafting goes on while the largest probability is at least this.
      sampling: how drafts are drawn.
      purpose: noise stream of the draws, as `draft_model.model_drafter`.
      reader: see `Reader`.

    Raises:
      InputError: the exit leaves no layer above it.
    """
    check_exit(config, exit_layer)
    samples = purpose == randomness.DRAFT and not sampling.greedy
    E, V = num_draft, config.vocab_size

    def propose(params: ModelParams, inner: Any, state: DecodeState) -> Draft:
        base = state.inner.target.lengths  # where the pending token stands
        batch = len(base)

        def shallow(turn: _Turn, token: jnp.ndarray, i: Any) -> _Turn:
            """The first layers on node i: token int [B]."""
            out = transformer.apply(
                config,
                params["target"],
                token[:, None],
                cache=kv.truncate(turn.target, base + i),
                layers=(0, exit_layer),
            )
            assert out.cache is not None
            streams = jax.lax.dynamic_update_slice_in_dim(turn.streams, out.hidden, i, axis=1)
            return turn._replace(target=out.cache, streams=streams)

        def decide(turn: _Turn, hidden: jnp.ndarray, i: Any) -> _Turn:
            """Draft number i from the reader's output [B, D] before it, and its own stream."""
            logits = transformer.unembed(config, params["target"], hidden)
            seen = turn.seen
            if seen is not None:
                logits = penalise(logits, seen, sampling)
            token = draw(logits, state.keys, state.lengths + i, sampling, purpose)
            if seen is not None:
                seen = seen.at[jnp.arange(batch), token].set(True)
            sure = jax.nn.softmax(logits, axis=-1).max(axis=-1) >= threshold
            ends = jnp.isin(token, jnp.asarray(config.eos_token_ids, token.dtype))
            log_q = turn.log_q
            if log_q is not None:
                log_q = log_q.at[:, i].set(log_probs(logits, sampling))
            turn = turn._replace(
                seen=seen,
                drafts=turn.drafts.at[:, i].set(token),
                log_q=log_q,
                written=turn.written + turn.writing,
                writing=turn.writing & sure & ~ends,
            )
            return shallow(turn, token, i + 1)

        def node(turn: _Turn, token: jnp.ndarray, i: Any) -> Node:
            stream = jax.lax.dynamic_slice_in_dim(turn.streams, i, 1, axis=1)
            return Node(token, stream, turn.target, base + i)

        def proceed(carry: tuple[_Turn, jnp.ndarray]) -> jnp.ndarray:
            turn, i = carry
            return (i < E) & turn.writing.any()

        def extend(carry: tuple[_Turn, jnp.ndarray]) -> tuple[_Turn, jnp.ndarray]:
            turn, i = carry
            token = jax.lax.dynamic_index_in_dim(turn.drafts, i - 1, axis=1, keepdims=False)
            hidden, working = reader.read(params, turn.reader, node(turn, token, i))
            return decide(turn._replace(reader=working), hidden, i), i + 1

        seen = None
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, V)
        turn = _Turn(
            target=state.inner.target,
            reader=None,
            seen=seen,
            streams=jnp.zeros((batch, E + 1, config.embed_dim), config.compute_dtype),
            drafts=jnp.zeros((batch, E), jnp.int32),
            log_q=jnp.full((batch, E, V), -jnp.inf) if samples else None,
            written=jnp.zeros((batch,), jnp.int32),
            writing=state.active,
        )
        pending = pending_tokens(state)
        turn = shallow(turn, pending, 0)
        hidden, working = reader.begin(params, inner, node(turn, pending, 0))
        turn = decide(turn._replace(reader=working), hidden, 0)
        turn, _ = jax.lax.while_loop(proceed, extend, (turn, jnp.int32(1)))
        tree = chain(pending, turn.drafts, jnp.arange(E) < turn.written[:, None], turn.log_q)
        return Draft(
            tree,
            (inner, turn.reader, turn.streams),
            turn.written,
            {
                "shallow_calls": turn.written + 1,
                "layers_run": exit_layer * turn.written + config.num_layers,
            },
            Begun(turn.streams, kv.truncate(turn.target, base), exit_layer),
        )

    def observe(
        inner: tuple[Any, Any, jnp.ndarray],
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> Any:
        before, working, streams = inner
        assert output.cache is not None
        return reader.observe(before, working, streams, verdict, output.cache.lengths, active)

    return Drafter(
        roles=reader.roles,
        num_nodes=E + 1,
        max_depth=E,
        law=verification.CHAIN if samples else verification.DETERMINISTIC,
        init=reader.init,
        prefill=reader.prefill,
        propose=propose,
        observe=observe,
        counters=("shallow_calls", "layers_run"),
        reads=(exit_layer,),
    )
