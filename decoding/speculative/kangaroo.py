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

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig, draw, log_probs, penalise, seen_tokens
from decoding.speculative import exit_state, verification
from decoding.speculative.drafting import Begun, Draft, Drafter
from decoding.speculative.exit_state import ExitState
from decoding.speculative.kangaroo_tree import kangaroo_tree_drafter
from decoding.speculative.method import speculative
from decoding.speculative.tree import DraftTree, chain
from models import cache as kv
from models import transformer
from models.config import TransformerConfig
from models.exit_adapter import ROLE


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
    exit_state.check_exit(config, exit_layer)
    samples = purpose == randomness.DRAFT and not sampling.greedy
    E, V = num_draft, config.vocab_size

    def read(
        params: ModelParams,
        inner: ExitState,
        tokens: jnp.ndarray,
        lengths: jnp.ndarray,
        streams: jnp.ndarray,
    ) -> ExitState:
        del tokens
        return exit_state.read(config, params, inner, lengths, streams)

    def propose(params: ModelParams, inner: ExitState, state: DecodeState) -> Draft:
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
            hidden, adapter = exit_state.adapt(config, params, x, turn.adapter, base + i)
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
        hidden, adapter = exit_state.at_pending(config, params, inner, turn.streams[:, 0], base)
        turn = decide(turn._replace(adapter=adapter), hidden, 0)
        turn, _ = jax.lax.while_loop(proceed, extend, (turn, jnp.int32(1)))
        tree = chain(
            pending_tokens(state), turn.drafts, jnp.arange(E) < turn.written[:, None], turn.log_q
        )
        kept = ExitState(kv.truncate(turn.adapter, inner.cache.lengths), inner.carry)
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
        inner: tuple[ExitState, jnp.ndarray],
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> ExitState:
        kept, streams = inner
        assert output.cache is not None
        last = verification.rows(streams, verdict.count - 1)
        return ExitState(
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
        init=functools.partial(exit_state.create, config),
        prefill=read,
        propose=propose,
        observe=observe,
        counters=("shallow_calls", "layers_run"),
        reads=(exit_layer,),
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config, layer, eta = configs["target"], options["exit_layer"], options["threshold"]
    # At temperature 0 both rules are one: keep the draft that equals the target's arg-max. The
    # nodes of a tree are the likeliest ones, not drawn: exact match is what is right for them.
    tree = options["width"] > 1
    rule = "exact_match" if sampling.greedy or tree else options["rule"]
    if tree:
        width = min(options["width"], config.vocab_size)
        drafter = kangaroo_tree_drafter(config, layer, width, options["num_draft"], eta, sampling)
    else:
        purpose = randomness.SAMPLE if rule == "exact_match" else randomness.DRAFT
        drafter = kangaroo_drafter(config, layer, options["num_draft"], eta, sampling, purpose)
    return speculative("kangaroo", config, drafter, rule, sampling)


SPEC = MethodSpec(
    "the target's first layers and an adapter draft while they are sure (lossless)",
    ("target",),
    {
        "exit_layer": Option(2, "layers that draft; the adapter is trained for them", minimum=1),
        "num_draft": Option(6, "most tokens drafted a round, or levels of a tree", minimum=1),
        "threshold": Option(0.6, "drafting stops below this probability; 0 never", minimum=0.0),
        "width": Option(1, "drafts of a level; above 1 a tree, verified by exact match", minimum=1),
        "rule": Option(
            "speculative_sampling",
            "verification rule of a chain; exact_match gives plain decoding's own tokens",
            choices=("speculative_sampling", "exact_match"),
        ),
    },
    _build,
    parts=(ROLE,),
)
