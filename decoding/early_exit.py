"""Decoding that leaves the model at a gate when it may: M2R2's dynamic early exit.

arXiv 2502.02040. At each gate a router says whether the head would say the same after all layers;
if so the token is read off the accelerated stream, and the layers above are not run unless another
row of the batch needs them. Not lossless. With the ordinary stream and a test of its confidence it
is plain early exit, the baseline.

Layers that a token has not run lack its keys and values. Either they are computed from the state
that it left with ('copy'), or the token waits in a queue and runs them, exactly, with the next
token that gets so far ('exact', a reference for quality).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding import stats as work
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from models import accelerated_residual, exit_router, masks, transformer
from models import cache as kv
from models.accelerated_residual import ROLE
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.state_propagation import propagate

STREAMS = ("accelerated", "slow")
ROUTERS = (*exit_router.ROUTERS, "confidence", "fixed")
KEYS = ("copy", "exact")


@dataclasses.dataclass(frozen=True)
class ExitRule:
    """When a token leaves, and with which state.

    Attributes:
      intervals: J; gates stand after each L / J layers.
      router: 'arla' or 'linear' (trained, of the accelerated stream); 'confidence': the largest
        probability at the gate; 'fixed': all tokens leave at `exit_gate`.
      threshold: leave where the router's probability is above it.
      exit_gate: number of the gate, from 1, of 'fixed'.
      stream: which one is read at a gate: 'accelerated' or 'slow'.
      restart: the accelerated stream starts anew at each gate, as it was trained to.
      keys: 'copy' or 'exact', see the module.
      queue: most tokens in a row that 'exact' lets wait.
    """

    intervals: int = 4
    router: str = "arla"
    threshold: float = 0.9
    exit_gate: int = 1
    stream: str = "accelerated"
    restart: bool = True
    keys: str = "copy"
    queue: int = 8

    def __post_init__(self) -> None:
        check_choice("router", self.router, ROUTERS)
        check_choice("stream", self.stream, STREAMS)
        check_choice("keys", self.keys, KEYS)
        if self.router in exit_router.ROUTERS and self.stream == "slow":
            raise InputError(
                f"router: {self.router!r} reads the accelerated stream; allowed with stream 'slow':"
                " confidence, fixed"
            )
        if not 1 <= self.exit_gate < max(self.intervals, 2):
            raise InputError(
                f"exit_gate: {self.exit_gate} must be between 1 and {self.intervals - 1}, the "
                "gates before the last layer"
            )
        if self.queue < 1:
            raise InputError(f"queue: {self.queue} must be at least 1")


class GateState(struct.PyTreeNode):
    """What the method keeps.

    Attributes:
      cache: the model's; with 'exact' not all layers of waiting tokens are in it.
      streams: [B, W, D], residual streams of the last W tokens; the pending one comes next.
      depth: int32 [B, W], layers that each of them has run.
    """

    cache: kv.KVCache
    streams: jnp.ndarray
    depth: jnp.ndarray


class _Turn(NamedTuple):
    """A round between two gates.

    Attributes:
      streams: [B, W, D], the pending token's last.
      depth: int32 [B, W].
      ahead: [B, 1, D], the accelerated stream of the pending token.
      answer: [B, D], what the head will read of rows that have left.
      going: bool [B], rows that have not.
    """

    streams: jnp.ndarray
    depth: jnp.ndarray
    ahead: jnp.ndarray
    answer: jnp.ndarray
    going: jnp.ndarray


@functools.cache
def early_exit(config: TransformerConfig, sampling: SamplingConfig, rule: ExitRule) -> Method:
    """One token a round by as many layers as it needs.

    Counters: `layers_run`, layers that the round ran for any row; `layers_needed`, those of the row
    itself.

    Args:
      config: the model.
      sampling: how tokens are chosen.
      rule: see `ExitRule`.

    Raises:
      InputError: intervals that do not divide the layers, or a single one.
    """
    gates = accelerated_residual.gates(rule.intervals, config.num_layers)
    if rule.intervals < 2:
        raise InputError(f"intervals: {rule.intervals} must be at least 2 to leave between them")
    L, exact = config.num_layers, rule.keys == "exact"
    W = rule.queue + 1 if exact else 1
    faster = rule.stream == "accelerated"

    def init(batch: int, slots: int) -> GateState:
        return GateState(
            kv.create(config, batch, slots),
            jnp.zeros((batch, W, config.embed_dim), config.compute_dtype),
            jnp.full((batch, W), L, jnp.int32),
        )

    def read(
        params: ModelParams, inner: GateState, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> GateState:
        return inner.replace(cache=prefill(config, params["target"], inner.cache, tokens, lengths))

    def leaves(
        params: ModelParams, number: int, states: tuple[jnp.ndarray, ...], hidden: jnp.ndarray
    ) -> jnp.ndarray:
        """Which rows may leave at gate `number`: bool [B]."""
        if rule.router == "fixed":
            return jnp.full(hidden.shape[:1], number == rule.exit_gate)
        if rule.router == "confidence":
            logits = transformer.unembed(config, params["target"], hidden)
            return jax.nn.softmax(logits, axis=-1).max(axis=-1) > rule.threshold
        router = params[ROLE][f"router_{gates[number]}"]
        odds = exit_router.score(rule.router, router, [state[:, 0] for state in states])
        return jax.nn.sigmoid(odds) > rule.threshold

    def interval(params: ModelParams, number: int, turn: _Turn, cache: kv.KVCache) -> Any:
        """Layers up to gate `number` and what happens there."""
        start, stop = gates[number - 1], gates[number]
        needs = turn.going[:, None] & (turn.depth == start)
        first = cache.lengths[:, None] - (W - 1)
        positions = jnp.maximum(first + jnp.arange(W), 0)
        x, slots = turn.streams, None
        if exact:  # tokens that wait run with the pending one; the others' keys stay as they are
            slots = jnp.where(needs, positions, cache.slots)
        elif number > 1:  # rows that have left write keys of the state that they left with
            needs = turn.going[:, None]
        pending = cache.lengths[:, None]
        ahead = turn.ahead if not rule.restart else x[:, -1:]
        states: tuple[jnp.ndarray, ...] = ()
        for layer in range(start, stop):
            x, cache = one_layer(params, layer, x, cache, needs, positions, slots)
            if faster and number < rule.intervals:
                (ahead,) = accelerated_residual.apply(
                    config, params[ROLE], ahead, cache, (layer, layer + 1), positions=pending
                )
                states = (*states, ahead)
        depth = jnp.where(needs, stop, turn.depth)
        found = ahead if faster and number < rule.intervals else x[:, -1:]
        hidden = transformer.final_norm(config, params["target"], found[:, 0])
        out = turn.going
        if number < rule.intervals:
            out &= leaves(params, number, states, hidden)
            if exact:  # the oldest is about to fall out of the queue
                out &= turn.depth[:, 0] == L
        answer = jnp.where(out[:, None], hidden, turn.answer)
        if not exact and number < rule.intervals:
            x = jnp.where(out[:, None, None], found, x)
        return cache, _Turn(x, depth, ahead, answer, turn.going & ~out)

    def one_layer(
        params: ModelParams,
        layer: int,
        x: jnp.ndarray,
        cache: kv.KVCache,
        needs: jnp.ndarray,
        positions: jnp.ndarray,
        slots: jnp.ndarray | None,
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        """Streams [B, W, D] after a layer; those that do not need it stay as they are."""
        out = transformer.apply(
            config,
            params["target"],
            x,
            positions=positions,
            mask=masks.causal(positions, cache.slots),
            cache=cache,
            slots=slots,
            layers=(layer, layer + 1),
            collect=(layer + 1,),
            with_logits=False,
        )
        assert out.cache is not None
        return jnp.where(needs[..., None], out.collected[0], x), out.cache

    def fill(params: ModelParams, number: int, turn: _Turn, cache: kv.KVCache) -> Any:
        """Keys and values alone, of the states that all rows have left with."""
        if not exact:
            for layer in range(gates[number - 1], gates[number]):
                cache = propagate(config, params["target"], turn.streams, cache, layer)
        return cache, turn

    def step(params: ModelParams, state: DecodeState) -> tuple[GateState, Emission]:
        inner, active = state.inner, state.active
        pending, lengths = pending_tokens(state)[:, None], inner.cache.lengths
        x = transformer.embed(config, params["target"], pending, lengths[:, None])
        turn = _Turn(
            jnp.concatenate([inner.streams[:, 1:], x.astype(inner.streams.dtype)], axis=1),
            jnp.concatenate([inner.depth[:, 1:], jnp.zeros((len(lengths), 1), jnp.int32)], axis=1),
            x,
            jnp.zeros_like(x[:, 0]),
            active,
        )
        cache, turn = interval(params, 1, turn, inner.cache)
        run = jnp.full((), gates[1], jnp.int32)
        needed = jnp.full(lengths.shape, gates[1], jnp.int32)
        for number in range(2, rule.intervals + 1):
            size = gates[number] - gates[number - 1]
            run += size * turn.going.any()
            needed += size * turn.going
            cache, turn = kv.switch(
                turn.going.any().astype(jnp.int32),
                [
                    functools.partial(fill, params, number, turn),
                    functools.partial(interval, params, number, turn),
                ],
                cache,
            )
        logits = transformer.unembed(config, params["target"], turn.answer)
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, config.vocab_size)
            logits = penalise(logits, seen, sampling)
        token = draw(logits, state.keys, state.lengths, sampling)
        more = active.astype(jnp.int32)
        spent = work.round_work(
            len(token),
            0,
            extra={
                "layers_run": jnp.broadcast_to(run, more.shape),
                "layers_needed": needed,
            },
        )
        kept = GateState(
            kv.truncate(cache, cache.lengths + more),
            jnp.where(active[:, None, None], turn.streams, inner.streams),
            jnp.where(active[:, None], turn.depth, inner.depth),
        )
        return kept, Emission(token[:, None], more, spent)

    return Method(
        "m2r2_exit",
        ("target", *((ROLE,) if faster else ())),
        0,
        1,
        init,
        read,
        step,
        counters=("layers_run", "layers_needed"),
        lossless=False,
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    return early_exit(configs["target"], sampling, ExitRule(**options))


_DEFAULT = ExitRule()
SPEC = MethodSpec(
    "leaves the model at a gate when a router says that it may (M2R2, not lossless)",
    ("target",),
    {
        "intervals": Option(_DEFAULT.intervals, "J, equal parts of the layers", minimum=2),
        "router": Option(_DEFAULT.router, "what decides at a gate", choices=ROUTERS),
        "threshold": Option(_DEFAULT.threshold, "leave above this probability", minimum=0.0),
        "exit_gate": Option(_DEFAULT.exit_gate, "gate at which 'fixed' leaves", minimum=1),
        "stream": Option(
            _DEFAULT.stream, "read at gates; slow is plain early exit", choices=STREAMS
        ),
        "restart": Option(_DEFAULT.restart, "the accelerated stream starts anew at each gate"),
        "keys": Option(
            _DEFAULT.keys, "of layers that a token left out: of its state, or run later",
            choices=KEYS,
        ),
        "queue": Option(_DEFAULT.queue, "most tokens that wait with keys=exact", minimum=1),
    },
    _build,
    parts=(ROLE,),
    parts_with=("stream", "accelerated"),
)  # fmt: skip
