"""Big Little Decoder: a small model writes while it is sure; the large one repairs and goes on.

Kim et al., 'Speculative Decoding with Big Little Decoder', NeurIPS 2023, arXiv 2302.07863. A turn
of both models is a round of draft and verify: the small model's drafts end where it is no longer
sure (*fallback*), and the rule `rollback` decides how many of them stay.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding import randomness
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from decoding.speculative import rollback, verification
from decoding.speculative.draft_model import feed, feed_pending
from decoding.speculative.drafting import Draft, Drafter
from decoding.speculative.method import speculative
from decoding.speculative.tree import DraftTree, chain
from models import cache as kv
from models import transformer
from models.config import TransformerConfig

LOOPS = ("paper", "official")


class FallbackState(struct.PyTreeNode):
    """What `fallback_drafter` keeps.

    Attributes:
      cache: the small model's; before a round it lacks at most the last two tokens.
      silent: bool [B], rows that draft nothing in the next round.
    """

    cache: kv.KVCache
    silent: jnp.ndarray


class _Turn(NamedTuple):
    """The small model's turn, between two of its steps; [B] unless said otherwise."""

    cache: kv.KVCache
    seen: Any  # bool [B, V], tokens that are penalised; None without a penalty
    drafts: jnp.ndarray  # [B, E]
    written: jnp.ndarray  # drafts that stand
    calls: jnp.ndarray
    writing: jnp.ndarray  # bool
    fell_back: jnp.ndarray  # bool


@functools.cache
def fallback_drafter(
    config: TransformerConfig,
    fallback: float,
    max_small: int,
    sampling: SamplingConfig,
    eos_ids: tuple[int, ...] = (),
    official: bool = False,
) -> Drafter:
    """Drafts with the model of role 'draft' while max q >= `fallback`, `max_small` tokens at most.

    The step that falls short is discarded: it costs a call and drafts nothing. q is the
    distribution before temperature and filters, penalised where a repetition penalty is used.

    Args:
      config: the small model's architecture.
      fallback: alpha_FB, least probability of the likeliest token.
      max_small: E, longest run of the small model.
      sampling: how drafts are drawn.
      eos_ids: tokens that are not drafted beyond.
      official: the turns of the official code: the large model writes the first token alone, and
        another one alone after each rollback.
    """

    def init(batch: int, slots: int) -> FallbackState:
        return FallbackState(kv.create(config, batch, slots), jnp.full((batch,), official))

    def read(
        params: ModelParams, inner: FallbackState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> FallbackState:
        cache = prefill(config, params["draft"], inner.cache, tokens, lengths)
        return inner.replace(cache=cache)

    def propose(params: ModelParams, inner: FallbackState, state: DecodeState) -> Draft:
        lengths = state.lengths

        def decide(turn: _Turn, hidden: jnp.ndarray, i: Any) -> _Turn:
            """Draft number i of the rows that still write, from hidden [B, D] before it."""
            logits = transformer.unembed(config, params["draft"], hidden)
            seen = turn.seen
            if seen is not None:
                logits = penalise(logits, seen, sampling)
            token = draw(logits, state.keys, lengths + i, sampling, randomness.DRAFT)
            if seen is not None:
                seen = seen.at[jnp.arange(len(token)), token].set(True)
            sure = jax.nn.softmax(logits, axis=-1).max(axis=-1) >= fallback
            stands = turn.writing & sure
            ends = jnp.isin(token, jnp.asarray(eos_ids, token.dtype))
            return turn._replace(
                seen=seen,
                drafts=turn.drafts.at[:, i].set(token),
                written=turn.written + stands,
                calls=turn.calls + turn.writing,
                writing=stands & ~ends,
                fell_back=turn.fell_back | (turn.writing & ~sure),
            )

        def proceed(carry: tuple[_Turn, jnp.ndarray]) -> jnp.ndarray:
            turn, i = carry
            return (i < max_small) & turn.writing.any()

        def extend(carry: tuple[_Turn, jnp.ndarray]) -> tuple[_Turn, jnp.ndarray]:
            turn, i = carry
            last = jax.lax.dynamic_slice_in_dim(turn.drafts, i - 1, 1, axis=1)
            hidden, cache = feed(config, params["draft"], turn.cache, last)
            return decide(turn._replace(cache=cache), hidden[:, 0], i), i + 1

        # Silent rows need no call, but what they have not read is read here all the same.
        hidden, cache = feed_pending(config, params["draft"], inner.cache, state)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, lengths, config.vocab_size)
        none = jnp.zeros_like(lengths)
        drafts = jnp.zeros((len(lengths), max_small), jnp.int32)
        writing = state.active & ~inner.silent
        turn = _Turn(cache, seen, drafts, none, none, writing, jnp.zeros_like(writing))
        turn = decide(turn, hidden, 0)
        turn, _ = jax.lax.while_loop(proceed, extend, (turn, jnp.int32(1)))
        valid = jnp.arange(max_small) < turn.written[:, None]
        cache = kv.truncate(turn.cache, jnp.maximum(lengths - 1, 0))
        return Draft(
            chain(pending_tokens(state), turn.drafts, valid),
            inner.replace(cache=cache),
            turn.calls,
            {"fallbacks": turn.fell_back.astype(jnp.int32), "small_tokens": turn.written},
        )

    def observe(
        inner: FallbackState,
        tree: DraftTree,
        verdict: verification.Verdict,
        output: transformer.Output,
        active: jnp.ndarray,
    ) -> FallbackState:
        if not official:
            return inner
        corrected = verdict.counters["rollbacks"] > 0
        return inner.replace(silent=jnp.where(active, corrected, inner.silent))

    return Drafter(
        roles=("draft",),
        num_nodes=max_small + 1,
        max_depth=max_small,
        law=verification.CHAIN,
        init=init,
        prefill=read,
        propose=propose,
        observe=observe,
        counters=("fallbacks", "small_tokens"),
    )


@functools.cache
def bild(
    config: TransformerConfig,
    draft_config: TransformerConfig,
    sampling: SamplingConfig,
    *,
    fallback: float,
    threshold: float,
    max_small: int,
    policy: str,
    official: bool,
    verify_eos: bool,
) -> Method:
    """The two-model loop.

    Counters: `fallbacks`, rounds in which the small model was not sure; `rollbacks`, rounds in
    which drafts were cut; `small_tokens`, drafts; `rolled_back_tokens`, those that were cut;
    `unchecked_ends`, texts that the small model ended itself. Every round but one of the last kind
    is one call of the large model and one token of its own.

    Args:
      config: the large model's architecture.
      draft_config: the small model's.
      sampling: how both models choose tokens.
      fallback, max_small, official: see `fallback_drafter`.
      threshold, policy: see `rollback.rollback`.
      verify_eos: False: an end of text that the small model writes is not checked, nor is what it
        wrote before since the last call of the large model.
    """
    eos_ids = config.eos_token_ids
    drafter = fallback_drafter(draft_config, fallback, max_small, sampling, eos_ids, official)
    unchecked = () if verify_eos else eos_ids
    options: Any = (("threshold", threshold), ("policy", policy), ("unchecked_eos", unchecked))
    method = speculative("bild", config, drafter, "rollback", sampling, options)

    def step(params: ModelParams, state: DecodeState) -> tuple[Any, Emission]:
        inner, emission = method.step(params, state)
        assert isinstance(emission, Emission)
        # A text that ended unchecked has no use for the call that the batch made anyway.
        work = emission.work
        calls = work.target_calls - work.extra["unchecked_ends"]
        work = work.replace(target_calls=calls, target_positions=calls * work.target_positions)
        return inner, emission.replace(work=work)

    return method if verify_eos else method._replace(step=step)


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    return bild(
        configs["target"],
        configs["draft"],
        sampling,
        fallback=options["fallback"],
        threshold=options["rollback"],
        max_small=options["max_small"],
        policy=options["policy"],
        official=options["loop"] == "official",
        verify_eos=options["verify_eos"],
    )


SPEC = MethodSpec(
    "a small model writes while it is sure, the large one repairs and goes on (not lossless)",
    ("target", "draft"),
    {
        "fallback": Option(
            0.6, "alpha_FB: least top probability with which the small model writes", minimum=0.0
        ),
        "rollback": Option(
            5.0, "alpha_RB, nats: a draft that surprises the large model more is cut; inf: none",
            minimum=0.0,
        ),
        "max_small": Option(10, "tokens that the small model writes in a row at most", minimum=1),
        "policy": Option(
            "joint", "whether a draft that is the large model's arg-max may be cut",
            choices=rollback.POLICIES,
        ),
        "loop": Option(
            "paper", "who writes the first token, and that after a correction", choices=LOOPS
        ),
        "verify_eos": Option(True, "whether the large model checks the end of the text"),
    },
    _build,
)  # fmt: skip
