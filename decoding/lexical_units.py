"""Several tokens a call while the model is sure of them: Lexical Unit Decoding (arXiv 2405.15208).

Placeholders stand behind the text where its next tokens will; one call reads a prediction off the
last token and off each placeholder, and the longest run of sure ones is taken at once. Nothing is
verified: not lossless. The model is trained for it (`training.lexical_units`). What placeholders
have written into the cache is replaced by the tokens that come to stand there.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from decoding import stats as work
from decoding.loop import DecodeState, Emission, Method, ModelParams
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw, penalise, seen_tokens
from decoding.speculative.method import speculative
from decoding.speculative.ppd import prompt_drafter
from decoding.speculative.prompt_trees import SparseTree
from models import cache as kv
from models import transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.prompt_tokens import ROLE


@functools.cache
def lexical_units(
    config: TransformerConfig,
    sampling: SamplingConfig,
    window: int,
    threshold: float,
    pad_id: int,
    *,
    control: bool = True,
    first_too: bool = True,
) -> Method:
    """Up to `window` tokens a call.

    Counters: `span_1` .. `span_{window}`, calls that took so many tokens.

    Args:
      config: the model.
      sampling: of the first token of a call; the others are the likeliest ones.
      window: k, tokens predicted a call.
      threshold: beta; a token is sure when its probability is at least this.
      pad_id: the placeholder.
      control: a span ends before a token that repeats the one before it: places cannot see what
        the others chose (rule R1).
      first_too: a first token that is not sure stands alone; False takes it as given and asks of
        the others alone.

    Raises:
      InputError: a window below 1, or a placeholder that is no token.
    """
    if window < 1:
        raise InputError(f"window: {window} must be at least 1")
    if not 0 <= pad_id < config.vocab_size:
        raise InputError(f"pad_id: {pad_id} is out of range; allowed: 0 to {config.vocab_size - 1}")
    k, T = window, 2 * window - 1

    def step(params: ModelParams, state: DecodeState) -> tuple[kv.KVCache, Emission]:
        cache: kv.KVCache = state.inner
        base, index = cache.lengths, jnp.arange(T)
        waiting = state.lengths - base  # tokens that are in no cache yet: 1 .. k
        at = jnp.minimum(base[:, None] + index, state.tokens.shape[1] - 1)
        real = jnp.take_along_axis(state.tokens, at, axis=1)
        inputs = jnp.where(index < waiting[:, None], real, pad_id)
        out = transformer.apply(config, params["target"], inputs, cache=cache, with_logits=False)
        assert out.cache is not None
        # Of the last token and the k - 1 placeholders behind it.
        seen_at = waiting[:, None] - 1 + jnp.arange(k)
        hidden = jnp.take_along_axis(out.hidden, seen_at[..., None], axis=1)
        logits = transformer.unembed(config, params["target"], hidden)
        if sampling.repetition_penalty != 1:
            seen = seen_tokens(state.tokens, state.lengths, config.vocab_size)
            logits = penalise(logits, seen[:, None], sampling)
        first = draw(logits[:, 0], state.keys, state.lengths, sampling)
        tokens = logits.argmax(axis=-1).astype(jnp.int32).at[:, 0].set(first)
        sure = jax.nn.softmax(logits, axis=-1).max(axis=-1) >= threshold
        if not first_too:
            sure = sure.at[:, 0].set(True)
        if control:
            repeats = jnp.pad(tokens[:, 1:] == tokens[:, :-1], ((0, 0), (1, 0)))
            sure &= ~repeats
        run = jnp.cumprod(sure.astype(jnp.int32), axis=1).sum(axis=1)
        count = jnp.where(state.active, jnp.maximum(run, 1), 0)
        spans = {f"span_{n}": (count == n).astype(jnp.int32) for n in range(1, k + 1)}
        spent = work.round_work(len(count), 0, target_positions=T, extra=spans)
        # Only tokens stay; placeholders lie beyond the length and are overwritten.
        kept = jnp.where(state.active, state.lengths, base)
        return kv.truncate(out.cache, kept), Emission(tokens, count, spent)

    return Method(
        "lud",
        ("target",),
        0,
        T,
        lambda batch, slots: kv.create(config, batch, slots),
        lambda params, cache, tokens, lengths: prefill(
            config, params["target"], cache, tokens, lengths
        ),
        step,
        counters=tuple(f"span_{n}" for n in range(1, k + 1)),
        lossless=False,
    )


@functools.cache
def verified_units(
    config: TransformerConfig, sampling: SamplingConfig, window: int, pad_id: int
) -> Method:
    """The same placeholders as a drafter: what the model would not have written is dropped.

    A chain of the likeliest tokens at `window` - 1 placeholders, verified by the next call, which
    carries placeholders of its own. Lossless; an extension of this project.

    Args: as `lexical_units`; there is no threshold.
    """
    depth = window - 1
    if depth < 1:
        raise InputError(f"window: {window} must be at least 2 to draft anything")
    trees = tuple(
        SparseTree(tuple((0,) * (i + 1) for i in range(s)), (depth,) * s)
        for s in range(1, depth + 1)
    )
    drafter = prompt_drafter(config, trees, 1)
    method = speculative("lud", config, drafter, "exact_match", sampling)

    def step(params: ModelParams, state: DecodeState) -> tuple[Any, Emission]:
        row = transformer.token_embeddings(config, params["target"], jnp.array([pad_id]))
        placeholders = jnp.broadcast_to(row, (depth, row.shape[-1]))
        return method.step({**params, ROLE: {"embedding": placeholders}}, state)  # type: ignore[return-value]

    return method._replace(roles=("target",), step=step)


def placeholder(config: TransformerConfig, given: int) -> int:
    """The option's token, else the model's padding, else its first end of text.

    Raises:
      InputError: there is none of the three.
    """
    for found in (given if given >= 0 else None, config.pad_token_id, *config.eos_token_ids[:1]):
        if found is not None:
            return found
    raise InputError("pad_id: -1, and the model has neither padding nor an end of text; give one")


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config, window = configs["target"], options["window"]
    pad_id = placeholder(config, options["pad_id"])
    if options["verify"]:
        return verified_units(config, sampling, window, pad_id)
    return lexical_units(
        config,
        sampling,
        window,
        options["threshold"],
        pad_id,
        control=options["repetition_control"],
        first_too=options["first_too"],
    )


SPEC = MethodSpec(
    "takes the next tokens together while the model is sure of them (not lossless)",
    ("target",),
    {
        "window": Option(5, "tokens predicted a call", minimum=1),
        "threshold": Option(0.9, "least probability of a token that is sure", minimum=0.0),
        "pad_id": Option(-1, "placeholder; -1 for the model's padding or end of text"),
        "repetition_control": Option(True, "no token twice in a row within a call"),
        "first_too": Option(True, "a first token that is not sure stands alone"),
        "verify": Option(False, "verify by the next call instead (lossless)"),
    },
    _build,
)
