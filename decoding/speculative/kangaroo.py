"""The target's first layers and an adapter draft for the layers above (Kangaroo).

arXiv 2404.18911. The first exit is the layer: drafts are read off the residual stream after the
first l layers, through a small trained adapter and the target's own head. The second exit is the
draft: it ends where its most likely token falls below a threshold. The layers above then run once,
on the streams that drafting has computed; no layer runs twice on a token.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding import prefill, randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig, draw, log_probs, penalise, seen_tokens
from decoding.speculative import verification
from decoding.speculative.drafting import Begun, Draft, Drafter
from decoding.speculative.method import speculative
from decoding.speculative.tree import DraftTree, chain
from models import cache as kv
from models import exit_adapter, transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.exit_adapter import ROLE


class KangarooState(struct.PyTreeNode):
    """What the drafter keeps.

    Attributes:
      cache: the adapter's keys and values, one layer.
      carry: [B, D], the residual stream of the last token before the pending one. It is fed to the
        adapter again with the pending token's: after a round whose drafts were all kept the
        adapter has not seen it, and twice changes nothing.
    """

    cache: kv.KVCache
    carry: jnp.ndarray


class _Turn(NamedTuple):
    """A round's drafting.

    Attributes:
      target, adapter: caches.
      seen: bool [B, V] for the repetition penalty; None without one.
      streams: [B, E + 1, D], of the pending token and the drafts.
      drafts: int32 [B, E].
      log_q: float32 [B, E, V]; None where drafts are not sampled.
      written: int32 [B], drafts so far.
      writing: bool [B], rows that draft on.
    """

    target: kv.KVCache
    adapter: kv.KVCache
    seen: jnp.ndarray | None
    streams: jnp.ndarray
    drafts: jnp.ndarray
    log_q: jnp.ndarray | None
    written: jnp.ndarray
    writing: jnp.ndarray


@functools.cache
def kangaroo_drafter(
    config: TransformerConfig,
    exit_layer: int,
    num_draft: int,
    threshold: float,
    sampling: SamplingConfig,
    purpose: int,
) -> Drafter:
    """Drafts up to `num_draft` tokens with the target's first layers and params['adapter'].

    A draft is always proposed, be the drafter sure of it or not; one that it is not sure of is the
    last. `layers_run` counts a layer once a call, on however many tokens, the adapter not at all.
    The test reads the whole distribution before temperature and filters, so that it does not
    depend on the token that was drawn, which would bias the text.

    Args:
      config: the target's architecture.
      exit_layer: l.
      num_draft: E, gamma in the paper.
      threshold: eta; drafting goes on while the largest probability is at least this.
      sampling: how drafts are drawn.
      purpose: noise stream of the draws, as `draft_model.model_drafter`.

    Raises:
      InputError: the exit leaves no layer above it.
    """
    if not 1 <= exit_layer < config.num_layers:
        raise InputError(
            f"exit_layer: {exit_layer} must be between 1 and {config.num_layers - 1}, below the "
            f"target's {config.num_layers} layers"
        )
    samples = purpose == randomness.DRAFT and not sampling.greedy
    E, V = num_draft, config.vocab_size

    def init(batch: int, slots: int) -> KangarooState:
        return KangarooState(
            kv.create(config, batch, slots, num_layers=1),
            jnp.zeros((batch, config.embed_dim), config.compute_dtype),
        )

    def adapt(
        params: ModelParams, x: jnp.ndarray, cache: kv.KVCache, first: jnp.ndarray
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        """The adapter on streams x [B, T, D] of positions first [B] on."""
        found, written = exit_adapter.apply(
            config,
            params[ROLE],
            x,
            positions=first[:, None] + jnp.arange(x.shape[1]),
            cache=kv.truncate(cache, first),
        )
        assert written is not None
        return found, written

    def read(
        params: ModelParams,
        inner: KangarooState,
        tokens: jnp.ndarray,
        lengths: jnp.ndarray,
        streams: jnp.ndarray,
    ) -> KangarooState:
        def part(first: jnp.ndarray, size: int, cache: kv.KVCache) -> kv.KVCache:
            x = jax.lax.dynamic_slice_in_dim(streams, first, size, axis=1)
            return adapt(params, x, cache, jnp.full_like(lengths, first))[1]

        cache = prefill.in_parts(tokens.shape[1], part, inner.cache)
        carry = verification.rows(streams, jnp.maximum(lengths - 1, 0))
        return KangarooState(kv.truncate(cache, jnp.maximum(lengths - 1, 0)), carry)

    def propose(params: ModelParams, inner: KangarooState, state: DecodeState) -> Draft:
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
            """Draft number i from the adapter's output [B, D] before it, and its own stream."""
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

        def proceed(carry: tuple[_Turn, jnp.ndarray]) -> jnp.ndarray:
            turn, i = carry
            return (i < E) & turn.writing.any()

        def extend(carry: tuple[_Turn, jnp.ndarray]) -> tuple[_Turn, jnp.ndarray]:
            turn, i = carry
            x = jax.lax.dynamic_slice_in_dim(turn.streams, i, 1, axis=1)
            hidden, adapter = adapt(params, x, turn.adapter, base + i)
            return decide(turn._replace(adapter=adapter), hidden[:, 0], i), i + 1

        seen = None
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, V)
        turn = _Turn(
            target=state.inner.target,
            adapter=inner.cache,
            seen=seen,
            streams=jnp.zeros((batch, E + 1, config.embed_dim), config.compute_dtype),
            drafts=jnp.zeros((batch, E), jnp.int32),
            log_q=jnp.full((batch, E, V), -jnp.inf) if samples else None,
            written=jnp.zeros((batch,), jnp.int32),
            writing=state.active,
        )
        turn = shallow(turn, pending_tokens(state), 0)
        # A row of one token has its pending token in the first of the two places.
        alone = (base == 0)[:, None]
        first_two = jnp.stack(
            [
                jnp.where(alone, turn.streams[:, 0], inner.carry),
                turn.streams[:, 0],
            ],
            axis=1,
        )
        hidden, adapter = adapt(params, first_two, turn.adapter, jnp.maximum(base - 1, 0))
        hidden = jnp.where(alone, hidden[:, 0], hidden[:, 1])
        turn = decide(turn._replace(adapter=adapter), hidden, 0)
        turn, _ = jax.lax.while_loop(proceed, extend, (turn, jnp.int32(1)))
        tree = chain(
            pending_tokens(state), turn.drafts, jnp.arange(E) < turn.written[:, None], turn.log_q
        )
        kept = KangarooState(kv.truncate(turn.adapter, inner.cache.lengths), inner.carry)
        return Draft(
            tree,
            (kept, turn.streams),
            turn.written,
            {
                "shallow_calls": turn.written + 1,
                "layers_run": exit_layer * turn.written + config.num_layers,
            },
            Begun(turn.streams, kv.truncate(turn.target, base), exit_layer),
        )

    def observe(
        inner: tuple[KangarooState, jnp.ndarray],
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> KangarooState:
        kept, streams = inner
        assert output.cache is not None
        last = verification.rows(streams, verdict.count - 1)
        return KangarooState(
            # The last accepted token is fed again, so the adapter holds all that are before it.
            kv.truncate(
                kept.cache,
                jnp.where(active, output.cache.lengths + verdict.count - 1, kept.cache.lengths),
            ),
            jnp.where(active[:, None], last, kept.carry),
        )

    return Drafter(
        roles=(ROLE,),
        num_nodes=E + 1,
        max_depth=E,
        law=verification.CHAIN if samples else verification.DETERMINISTIC,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe,
        counters=("shallow_calls", "layers_run"),
        reads=(exit_layer,),
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    # At temperature 0 both rules are one: keep the draft that equals the target's arg-max.
    rule = "exact_match" if sampling.greedy else options["rule"]
    purpose = randomness.SAMPLE if rule == "exact_match" else randomness.DRAFT
    drafter = kangaroo_drafter(
        configs["target"],
        options["exit_layer"],
        options["num_draft"],
        options["threshold"],
        sampling,
        purpose,
    )
    return speculative("kangaroo", configs["target"], drafter, rule, sampling)


SPEC = MethodSpec(
    "the target's first layers and an adapter draft while they are sure (lossless)",
    ("target",),
    {
        "exit_layer": Option(2, "layers that draft; the adapter is trained for them", minimum=1),
        "num_draft": Option(6, "most tokens drafted a round", minimum=1),
        "threshold": Option(0.6, "drafting stops below this probability; 0 never", minimum=0.0),
        "rule": Option(
            "speculative_sampling",
            "verification rule; exact_match gives plain decoding's own tokens",
            choices=("speculative_sampling", "exact_match"),
        ),
    },
    _build,
    parts=(ROLE,),
)
