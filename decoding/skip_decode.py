"""Decoding with fewer and fewer layers: SkipDecode (Del Corro et al., arXiv 2307.02628).

All rows of a batch write their first token together and one token a round after it, so the round
says how many layers every row runs, prompts of different lengths or not. A layer that the schedule
leaves out is not run at all. Keys and values need no filling in: a layer that runs for a token has
run for every token before it. Not lossless: the model is trained for the schedule
(`training.skip_decode`).
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
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from models import cache as kv
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.layer_skipping import PLACES, SkipSchedule

PROMPTS = ("full", "max")


@functools.cache
def skip_decode(
    config: TransformerConfig,
    sampling: SamplingConfig,
    schedule: SkipSchedule,
    prompt_layers: str = "full",
) -> Method:
    """One token a round by `schedule.layers(tokens generated so far)` layers.

    Counter: `layers_run`.

    Args:
      config: the model.
      sampling: how tokens are chosen.
      schedule: see `SkipSchedule`.
      prompt_layers: 'full': the prompt runs all layers; 'max': as the first token (published).

    Raises:
      InputError: as `SkipSchedule.check`; an unknown `prompt_layers`.
    """
    schedule.check(config)
    check_choice("prompt_layers", prompt_layers, PROMPTS)
    L = config.num_layers
    of_prompt = [
        layer
        for layer in range(L)
        if prompt_layers == "full" or schedule.runs(layer, L, schedule.max_layers)
    ]

    def init(batch: int, slots: int) -> kv.KVCache:
        return kv.create(config, batch, slots)

    def read(
        params: ModelParams, cache: kv.KVCache, tokens: jnp.ndarray, lengths: jnp.ndarray
    ) -> kv.KVCache:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = transformer.embed(config, params["target"], tokens, index)
        for layer in of_prompt:
            x, cache = one_layer(params, layer, tokens, x, cache)
        return kv.truncate(cache, lengths)

    def one_layer(
        params: ModelParams, layer: int, tokens: jnp.ndarray, x: jnp.ndarray, cache: kv.KVCache
    ) -> tuple[jnp.ndarray, kv.KVCache]:
        """The residual stream after one layer; its keys and values go to the cache."""
        out = transformer.apply(
            config,
            params["target"],
            x if layer else tokens,  # the first layer's call embeds them itself
            cache=cache,
            layers=(layer, layer + 1),
            collect=(layer + 1,),
            with_logits=False,
        )
        assert out.cache is not None
        return out.collected[0], out.cache

    def step(params: ModelParams, state: DecodeState) -> tuple[kv.KVCache, Emission]:
        # Rows that are done have stopped counting; those that go on are all at the same token.
        generated = jnp.where(state.active, state.lengths - state.prompt_lengths, 0).max()
        budget = schedule.layers(generated)
        cache = state.inner
        pending = pending_tokens(state)[:, None]
        x = transformer.embed(config, params["target"], pending, cache.lengths[:, None])
        count = jnp.zeros((), jnp.int32)
        for layer in range(L):
            # A loop that runs once or not at all: what it leaves alone stays in place.
            carry = (schedule.runs(layer, L, budget), x, cache, count)

            def once(carry: Any, layer: int = layer) -> Any:
                _, x, cache, count = carry
                return (
                    jnp.zeros((), bool),
                    *one_layer(params, layer, pending, x, cache),
                    count + 1,
                )

            _, x, cache, count = jax.lax.while_loop(lambda c: c[0], once, carry)
        hidden = transformer.final_norm(config, params["target"], x[:, 0])
        logits = transformer.unembed(config, params["target"], hidden)
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, config.vocab_size)
            logits = penalise(logits, seen, sampling)
        token = draw(logits, state.keys, state.lengths, sampling)
        more = state.active.astype(jnp.int32)
        layers = jnp.broadcast_to(count, more.shape)
        spent = work.round_work(len(token), 0, extra={"layers_run": layers})
        return kv.truncate(cache, cache.lengths + more), Emission(token[:, None], more, spent)

    return Method(
        "skip_decode",
        ("target",),
        0,
        1,
        init,
        read,
        step,
        counters=("layers_run",),
        lossless=False,
    )


def default_layers(num_layers: int, speed_up: float) -> tuple[int, int]:
    """(max, min) layers whose mean is L / `speed_up`, spread as the published pairs are.

    Raises:
      InputError: a speed-up below 1.
    """
    if not speed_up >= 1:
        raise InputError(f"speed_up: {speed_up} must be at least 1")
    if speed_up == 1:
        return num_layers, num_layers
    mean = num_layers / speed_up
    most = min(num_layers, max(2, round(4 / 3 * mean)))
    return most, max(2, min(most, round(2 * mean - most)))


def schedule(config: TransformerConfig, options: Mapping[str, Any]) -> SkipSchedule:
    """The schedule that the method's options, all of them, describe for a model."""
    most, least = default_layers(config.num_layers, options["speed_up"])
    return SkipSchedule(
        options["max_layers"] or most,
        options["min_layers"] or max(least, options["warmup"] + 1),
        options["span"],
        options["warmup"],
        options["place"],
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    return skip_decode(config, sampling, schedule(config, options), options["prompt_layers"])


SPEC = MethodSpec(
    "fewer layers for later tokens, by a schedule (not lossless)",
    ("target",),
    {
        "speed_up": Option(2.0, "all layers over the mean of those that run", minimum=1.0),
        "max_layers": Option(0, "of the first token; 0 for what speed_up gives", minimum=0),
        "min_layers": Option(0, "of token `span` and later; 0 for what speed_up gives", minimum=0),
        "span": Option(128, "tokens over which layers fall", minimum=1),
        "warmup": Option(1, "layers at the bottom that always run", minimum=0),
        "place": Option("top", "where the other layers are", choices=PLACES),
        "prompt_layers": Option(
            "full", "of the prompt: all layers, or max_layers", choices=PROMPTS
        ),
    },
    _build,
)
