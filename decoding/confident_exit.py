"""A token leaves the model at the first layer that is sure of it: CALM (arXiv 2207.07061).

The baseline CALM-DEC of SkipDecode. The layers that a token did not run get their keys and values
from the stream that it left with. Rows leave at different layers, and a batch runs a layer while
any of its rows wants it: the cost that a schedule by position avoids. Not lossless.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from decoding import stats as work
from decoding.autoregressive import pending_tokens
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from models import cache as kv
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.state_propagation import propagate

MEASURES = ("softmax", "cosine")


def confidence(
    config: TransformerConfig, params: Any, measure: str, before: jnp.ndarray, after: jnp.ndarray
) -> jnp.ndarray:
    """How sure each row is after a layer: float32 [B].

    Args:
      config, params: the model.
      measure: 'softmax': the likeliest token's probability less the next one's; 'cosine': of the
        streams before and after the layer.
      before, after: [B, D] residual streams.
    """
    if measure == "cosine":
        a, b = before.astype(jnp.float32), after.astype(jnp.float32)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return (a * b).sum(axis=-1) / jnp.maximum(norms, 1e-9)
    hidden = transformer.final_norm(config, params, after)
    p = jax.nn.softmax(transformer.unembed(config, params, hidden), axis=-1)
    best = jax.lax.top_k(p, 2)[0]
    return best[:, 0] - best[:, 1]


def threshold(least: float, generated: Any, span: int, decay: float = 4.0) -> Any:
    """lambda(t) = 0.9 lambda + 0.1 exp(-tau t / N), at most 1 (CALM, equation 5)."""
    falling = 0.9 * least + 0.1 * jnp.exp(-decay * generated / span)
    return jnp.clip(falling, 0.0, 1.0)


@functools.cache
def confident_exit(
    config: TransformerConfig,
    sampling: SamplingConfig,
    least: float,
    span: int,
    measure: str = "softmax",
    min_layers: int = 1,
) -> Method:
    """One token a round, by as many layers as it needs.

    Counters: `layers_run`, by the batch while the row was in it; `layers_needed`, the row's own.

    Args:
      config: the model.
      sampling: how tokens are chosen.
      least: lambda; a row leaves when its confidence is at least `threshold`. Above 1.2 none does.
      span: N, tokens over which the threshold falls.
      measure: of `MEASURES`.
      min_layers: that every token runs.

    Raises:
      InputError: an unknown measure, or a number out of range.
    """
    check_choice("measure", measure, MEASURES)
    if not 1 <= min_layers <= config.num_layers:
        raise InputError(f"min_layers: {min_layers} must be between 1 and {config.num_layers}")
    if span < 1:
        raise InputError(f"span: {span} must be at least 1")
    L = config.num_layers

    def step(params: ModelParams, state: DecodeState) -> tuple[kv.KVCache, Emission]:
        model, cache = params["target"], state.inner
        pending = pending_tokens(state)[:, None]
        wanted = threshold(least, state.lengths - state.prompt_lengths, span)
        x = transformer.embed(config, model, pending, cache.lengths[:, None])
        gone = ~state.active  # rows that are done want nothing
        run = jnp.zeros((), jnp.int32)
        needed = jnp.zeros(gone.shape, jnp.int32)
        for layer in range(L):

            def once(carry: Any, layer: int = layer) -> Any:
                _, x, cache, gone, run, needed = carry
                out = transformer.apply(
                    config,
                    model,
                    x if layer else pending,  # the first layer's call embeds them itself
                    cache=cache,
                    layers=(layer, layer + 1),
                    collect=(layer + 1,),
                    with_logits=False,
                )
                assert out.cache is not None
                # A row that has left keeps its stream, of which its keys and values here were made.
                after = jnp.where(gone[:, None, None], x, out.collected[0])
                needed += ~gone
                if min_layers <= layer + 1 < L:
                    sure = confidence(config, model, measure, x[:, 0], after[:, 0]) >= wanted
                    gone |= sure
                return jnp.zeros((), bool), after, out.cache, gone, run + 1, needed

            def skip(carry: Any, layer: int = layer) -> Any:
                _, x, cache = carry
                return jnp.zeros((), bool), x, propagate(config, model, x, cache, layer)

            # Loops that run once or not at all: what they leave alone stays in place.
            wants = ~gone.all()
            _, x, cache = jax.lax.while_loop(lambda c: c[0], skip, (~wants, x, cache))
            carry = (wants, x, cache, gone, run, needed)
            _, x, cache, gone, run, needed = jax.lax.while_loop(lambda c: c[0], once, carry)
        hidden = transformer.final_norm(config, model, x[:, 0])
        logits = transformer.unembed(config, model, hidden)
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, config.vocab_size)
            logits = penalise(logits, seen, sampling)
        token = draw(logits, state.keys, state.lengths, sampling)
        more = state.active.astype(jnp.int32)
        counts = {"layers_run": jnp.broadcast_to(run, more.shape), "layers_needed": needed}
        spent = work.round_work(len(token), 0, extra=counts)
        return kv.truncate(cache, cache.lengths + more), Emission(token[:, None], more, spent)

    return Method(
        "calm",
        ("target",),
        0,
        1,
        lambda batch, slots: kv.create(config, batch, slots),
        lambda params, cache, tokens, lengths: prefill(
            config, params["target"], cache, tokens, lengths
        ),
        step,
        counters=("layers_run", "layers_needed"),
        lossless=False,
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    return confident_exit(
        configs["target"],
        sampling,
        options["threshold"],
        options["span"],
        options["measure"],
        options["min_layers"],
    )


SPEC = MethodSpec(
    "a token leaves at the first layer that is sure of it (not lossless)",
    ("target",),
    {
        "threshold": Option(0.9, "least confidence to leave with", minimum=0.0),
        "span": Option(128, "tokens over which the threshold falls", minimum=1),
        "measure": Option("softmax", "of confidence", choices=MEASURES),
        "min_layers": Option(1, "layers that every token runs", minimum=1),
    },
    _build,
)
