"""From bits to rounds: how much information each round of unmasking carries, and what that bounds.

A text's information is its negative log-likelihood along the order in which it was written, and
rounds are at least that over what a round may carry ('From Bits to Rounds', arXiv 2511.21103).
Everything here is in nats. At temperature 0 it is the surprise of arg-max tokens, which is no
entropy: the bounds hold all the same, round by round.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.stopping import StopConfig
from experiments import results
from models import transformer
from models.config import TransformerConfig

_PROMPTS = 24
_RESCORED = 8  # texts that are rescored token by token


def quota_budget(tokens: int, vocab_size: int) -> float:
    """Most that a round of `tokens` tokens carries: log V each; says nothing in practice."""
    return tokens * math.log(vocab_size)


def threshold_budget(threshold: float, tokens: int) -> float:
    """Most that `tokens` sure tokens carry: each has a probability of `threshold` or more."""
    return tokens * math.log(1 / threshold)


def factor_budget(factor: float) -> float:
    """Most that the sure tokens of a round carry, however many they are.

    Of n tokens each has p >= p_n > 1 - f / (n + 1), so they carry at most
    n * -log(1 - f / (n + 1)) <= f n / (n + 1 - f) < f, for 0 < f < 1.
    """
    if not 0 < factor < 1:
        raise ValueError(f"factor: {factor} must be above 0 and below 1")
    return factor


def exploring_budget(exploit: float, entropies: Sequence[float]) -> float:
    """What a round carries in expectation at temperature 1: sure tokens, and explored ones' H."""
    return exploit + sum(entropies)


class Rounds(NamedTuple):
    """What each round wrote, a line for each row and each of its model calls.

    Attributes:
      row: int [n].
      tokens: int [n], masks that were filled.
      sure: int [n], those of them that the rule was sure of.
      nats: float [n], information of what was written.
      sure_nats: float [n], of the sure tokens.
      newly_sure: int [n], masks that this round's call found sure and the call before had not;
        -1 in a row's first round.
    """

    row: np.ndarray
    tokens: np.ndarray
    sure: np.ndarray
    nats: np.ndarray
    sure_nats: np.ndarray
    newly_sure: np.ndarray


@functools.cache
def _law(config: TransformerConfig) -> Callable[..., jnp.ndarray]:
    """(params, tokens [B, S], ends [B]) -> log-probabilities [B, S, V] without the mask token."""

    @jax.jit
    def run(params: Any, tokens: jnp.ndarray, ends: jnp.ndarray) -> jnp.ndarray:
        S = tokens.shape[1]
        mask = jnp.broadcast_to((jnp.arange(S) < ends[:, None])[:, None], (len(tokens), S, S))
        logits = transformer.apply(config, params, tokens, mask=mask).logits
        assert logits is not None
        own = jnp.arange(logits.shape[-1]) == config.mask_token_id
        return jax.nn.log_softmax(jnp.where(own, -jnp.inf, logits), axis=-1)

    return run


def sure_at(options: Mapping[str, Any], peak: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Masks that a rule would write for being sure: bool [B, S].

    Args:
      options: of the method: its `rule`, and `threshold` or `factor`; with any other rule a
        probability of 0.9 counts as sure.
      peak: float [B, S], largest probability.
      masks: bool [B, S], positions that the rule looks at.
    """
    if options.get("rule") != "factor":
        least = options["threshold"] if options.get("rule") == "threshold" else 0.9
        return masks & (peak >= least)
    order = np.argsort(np.where(masks, -peak, np.inf), axis=1, kind="stable")
    place = np.argsort(order, axis=1)
    return masks & ((place + 2) * (1 - peak) < options["factor"])


def trace(
    config: TransformerConfig,
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    method: Method,
    options: Mapping[str, Any],
    stop: StopConfig,
    *,
    seed: int = 0,
) -> tuple[Rounds, list[list[int]]]:
    """Decodes, and measures each round with the model on the whole canvas.

    A method's own approximations (caches, windows) do not show here: this is what the model says.

    Args:
      config: of the target.
      params: by role.
      prompts: token ids.
      method: with a canvas.
      options: the method's own, for `sure_at`.
      stop: stop rules.
      seed: base of all randomness.

    Returns:
      The rounds, and each row's text.
    """
    state, slots = generation.begin(params, prompts, method, stop, seed=seed)
    lines: list[tuple[Any, ...]] = []
    before = np.zeros((len(prompts), slots), bool)
    fresh = np.ones(len(prompts), bool)
    while bool(state.active.any()):
        tokens = state.tokens[:, :slots]
        law = _law(config)(params["target"], tokens, state.ends)
        old, active, block, ends = jax.device_get((tokens, state.active, state.inner.block,
                                                   state.ends))  # fmt: skip
        calls = np.asarray(state.stats.target_calls)
        state, slots = generation.advance(params, state, slots, method, stop, rounds=1)
        served = active & (np.asarray(state.stats.target_calls) > calls)  # others waited
        new = np.asarray(state.tokens)[:, : old.shape[1]]
        index = np.arange(old.shape[1])
        lengths = np.asarray(state.prompt_lengths)[:, None]
        inside = (index >= lengths) & (index < ends[:, None])
        masks = inside & (old == config.mask_token_id)
        written = masks & (new != config.mask_token_id) & (index < np.asarray(state.ends)[:, None])
        chosen = jnp.take_along_axis(law, jnp.asarray(new)[..., None], axis=-1)[..., 0]
        nats = np.where(written, -np.asarray(chosen), 0.0)
        peak = np.exp(np.asarray(law.max(axis=-1)))
        # What a rule looks at: the open blocks; a ranking by factor depends on it.
        length = options.get("block_length") or old.shape[1]
        reach = lengths + (block[:, None] + 1 + options.get("horizon", 0)) * length
        sure = sure_at(options, peak, masks & (index < reach))
        before = before[:, : old.shape[1]]
        grown = (sure & ~before).sum(axis=1)
        for row in np.flatnonzero(served):
            both = written[row] & sure[row]
            lines.append(
                (row, written[row].sum(), both.sum(), nats[row].sum(), nats[row][both].sum(),
                 -1 if fresh[row] else grown[row])
            )  # fmt: skip
        before, fresh = np.where(served[:, None], sure, before), fresh & ~served
    tokens, lengths = jax.device_get((state.tokens, state.lengths))
    texts = [tokens[row, len(prompt) : lengths[row]].tolist() for row, prompt in enumerate(prompts)]
    return Rounds(*map(np.asarray, zip(*lines, strict=True))), texts


def surprise(
    config: TransformerConfig,
    params: Any,
    prompt: Sequence[int],
    text: Sequence[int],
    new_tokens: int,
) -> float:
    """Nats of a text from left to right, a token at a time on a canvas of `new_tokens`."""
    canvas = np.full(len(prompt) + new_tokens, config.mask_token_id, np.int32)
    canvas[: len(prompt)] = prompt
    rows = np.tile(canvas, (new_tokens, 1))  # one shape for texts of all lengths
    for i in range(len(text)):
        rows[i, len(prompt) : len(prompt) + i] = text[:i]
    ends = np.full(len(rows), len(canvas), np.int32)
    law = _law(config)(params, jnp.asarray(rows), jnp.asarray(ends))
    at = np.arange(len(text))
    return float(-np.asarray(law[at, len(prompt) + at, jnp.asarray(text)]).sum())


def budget_of(options: Mapping[str, Any], canvas: int) -> float | None:
    """Most nats that the sure tokens of a round carry; None for rules that promise nothing."""
    if options.get("rule") == "factor":
        return factor_budget(options["factor"]) if options["factor"] < 1 else None
    if options.get("rule") == "threshold":
        length = options["block_length"] or canvas
        return threshold_budget(options["threshold"], length * (1 + options.get("horizon", 0)))
    return None


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Rounds over information, text by text, for every method of the comparison.

    Claims: no text has fewer rounds with sure tokens than their information over the budget. The
    figure's `table` has each method's nats a round, the masks that become sure in a round, and the
    nats of its texts when they are rescored a token at a time.
    """
    target, canvas = configs["target"], config.decode.max_new_tokens
    sampling = SamplingConfig(temperature=config.decode.temperatures[0])
    ends = None if config.decode.get("stop_at_eos") else ()
    stop = generation.stop_config(target, canvas, ends)
    series, claims, table = [], [], []
    for entry in config.decode.methods:
        options = methods.parse_options(entry.method, entry.options.to_dict())
        method = methods.build(entry.method, {"target": target}, sampling, options)
        if method.canvas is None or set(method.roles) != {"target"}:
            continue
        chosen = [list(prompt) for prompt in prompts[:_PROMPTS]]
        found, texts = trace(target, params, chosen, method, options, stop, seed=config.seed)
        count = len(chosen)
        total = lambda values: np.bincount(found.row, values, count)  # noqa: E731, B023
        rounds, nats = np.bincount(found.row, minlength=count), total(found.nats)
        order = np.argsort(nats)
        series.append(
            {"label": entry.label, "x": nats[order].tolist(), "y": rounds[order].tolist()}
        )
        if (budget := budget_of(options, canvas)) is not None:
            sure_rounds, sure_nats = total(found.sure > 0), total(found.sure_nats)
            slack = sure_rounds * budget / np.maximum(sure_nats, 1e-9)
            claims.append(
                results.at_least(
                    f"{entry.label}: rounds with sure tokens over I / B, least of {count} texts "
                    f"(median {np.median(slack):.1f})", float(slack.min()), 1.0,
                )
            )  # fmt: skip
        rescored = [
            surprise(target, params["target"], prompt, text, canvas)
            for prompt, text in zip(chosen[:_RESCORED], texts, strict=False)
        ]
        grown = found.newly_sure[found.newly_sure >= 0]
        table.append(
            {
                "label": entry.label,
                "rounds": float(rounds.mean()),
                "nats": float(nats.mean()),
                "nats_a_round": float(nats.sum() / rounds.sum()),
                "rescored_nats": float(np.mean(rescored)),
                "newly_sure_a_round": float(grown.mean()) if len(grown) else 0.0,
                "r_squared": r_squared(nats, rounds),
            }
        )
    figure = {
        "title": "Rounds over information, a point a text",
        "x_label": "nats along the path",
        "y_label": "rounds",
        "series": series,
        "table": table,
    }
    return figure, claims


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the variance of y that a line through x explains; 0 where either is constant."""
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1] ** 2)
