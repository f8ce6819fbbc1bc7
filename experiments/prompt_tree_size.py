"""The size of prompt trees that is fastest on this machine (PPD, arXiv 2405.18628, section 3.4).

Larger trees promise more tokens a call, and a call on more positions takes longer. Both are known
before anything is decoded: the former from measured marginals, the latter from timing the target
on so many positions. The size with the best ratio is chosen; decoding pays nothing for it.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.loop import ModelParams
from decoding.sampling import SamplingConfig
from decoding.speculative import ppd, prompt_trees, scoring
from decoding.speculative.tree import NO_PARENT, DraftTree
from experiments import method_parts, results, timing, trained_parts
from models import cache as kv
from models.config import TransformerConfig
from models.errors import InputError

LIMITS = (8, 12, 16, 24, 32, 48, 64, 96)
BATCHES = (1, 8)
_TEXT, _SLOTS = 100, 256
_REPEATS = 15


@dataclasses.dataclass(frozen=True)
class Curve:
    """What sizes promise and cost.

    Attributes:
      limits: nodes and prompt tokens beside the root's.
      inputs: positions of a target call under each.
      tokens: a call, predicted.
      seconds: a call, measured.
      one_token: seconds of a call on one position.
    """

    limits: tuple[int, ...]
    inputs: tuple[int, ...]
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    one_token: float

    @property
    def speedups(self) -> list[float]:
        """Predicted speed-up over plain decoding, by limit."""
        pairs = zip(self.tokens, self.seconds, strict=True)
        return [tokens * self.one_token / seconds for tokens, seconds in pairs]

    @property
    def chosen(self) -> int:
        """The limit of the best speed-up."""
        return max(zip(self.speedups, self.limits, strict=True))[1]


def call_seconds(
    config: TransformerConfig, params: Any, inputs: Sequence[int], batch: int
) -> dict[int, float]:
    """Seconds of a target call on each number of positions: the least of some, taken in turn."""

    def one(size: int) -> Any:
        parent = jnp.zeros((batch, size), jnp.int32).at[:, 0].set(NO_PARENT)
        tree = DraftTree(
            tokens=jnp.ones((batch, size), jnp.int32),
            parent=parent,
            depth=jnp.ones((batch, size), jnp.int32).at[:, 0].set(0),
            valid=jnp.ones((batch, size), bool),
            log_q=None,
            max_depth=1,
            is_chain=size == 1,
        )
        cache = kv.create(config, batch, _SLOTS)
        cache = cache.replace(lengths=jnp.full((batch,), _TEXT, jnp.int32))

        @jax.jit
        def call(params: Any, cache: kv.KVCache) -> jnp.ndarray:
            out = scoring.score(config, params, cache, tree)
            assert out.logits is not None
            return out.logits.argmax(axis=-1)

        def timed() -> float:
            begin = time.perf_counter()
            jax.block_until_ready(call(params, cache))
            return time.perf_counter() - begin

        return timed

    return timing.best({size: one(size) for size in inputs}, _REPEATS)


def curve(
    config: TransformerConfig,
    params: Any,
    options: Mapping[str, Any],
    batch: int,
) -> Curve:
    """Sizes of `LIMITS` that are possible with options of `ppd`, all of them but the limit."""
    least = 2 * (len(prompt_trees.read_marginals(options["marginals"])) * options["ensemble"] + 1)
    limits = tuple(limit for limit in LIMITS if limit >= least)
    plans = [ppd.plan_of({**options, "limit": limit}, config.vocab_size) for limit in limits]
    inputs = tuple(prompt_trees.num_inputs(plan.trees, options["ensemble"]) for plan in plans)
    seconds = call_seconds(config, params, sorted({1, *inputs}), batch)
    return Curve(
        limits,
        inputs,
        tuple(plan.tokens_per_call for plan in plans),
        tuple(seconds[size] for size in inputs),
        seconds[1],
    )


def options_of(config: ConfigDict, entry: ConfigDict) -> dict[str, Any]:
    """Options of an entry of `ppd`, all of them, with marginals of its part where it asks so."""
    directory = trained_parts.directory_of(config, entry.part) if entry.get("part") else None
    given = method_parts.with_directory("ppd", entry.options.to_dict(), directory)
    return methods.parse_options("ppd", given)


def resolve(
    config: ConfigDict, configs: Mapping[str, TransformerConfig], params: ModelParams
) -> dict[str, ConfigDict]:
    """`config.decode.methods` by label, with what their options leave to be measured filled in.

    For `ppd`: marginals of the part, and for limit 0 the size chosen by a measured latency curve
    at the first batch size.
    """
    batch = config.decode.batch_sizes[0]

    @functools.cache
    def chosen(options: tuple[tuple[str, Any], ...]) -> int:
        return curve(configs["target"], params["target"], dict(options), batch).chosen

    entries = {}
    for entry in config.decode.methods:
        entries[entry.label] = entry = ConfigDict(entry.to_dict())
        if entry.method == "ppd":
            options = options_of(config, entry)
            if options["limit"] == 0:
                options["limit"] = chosen(tuple(sorted(options.items())))
            entry.options = ConfigDict(options)
    return entries


def _first(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """Part and options of the first `ppd` whose size is given."""
    for entry in config.decode.methods:
        if entry.method == "ppd" and (options := options_of(config, entry))["limit"]:
            return entry.part, options
    raise InputError("config.analyses: prompt trees need a method ppd with a limit")


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """What sizes promise and cost at two batch sizes, as a figure; and where the optimum is."""
    del prompts
    options = _first(config)[1]
    curves = {
        batch: curve(configs["target"], params["target"], options, batch) for batch in BATCHES
    }
    limits = list(curves[1].limits)
    series = [{"label": "tokens a call", "x": limits, "y": list(curves[1].tokens)}]
    for batch, found in curves.items():
        ratio = [seconds / found.one_token for seconds in found.seconds]
        series += [
            {"label": f"time of a call, batch {batch}", "x": limits, "y": ratio},
            {"label": f"speed-up, batch {batch}", "x": limits, "y": found.speedups},
        ]
    figure = {
        "title": "What trees promise and cost (plain decoding: 1)",
        "x_label": "limit: nodes and their prompt tokens",
        "x_scale": "log",
        "x_ticks": limits,
        "y_label": "times that of one token",
        "y_scale": "log",
        "series": series,
    }
    one = curves[1].speedups
    claims = [
        results.at_least(
            f"predicted speed-up at limit {curves[1].chosen}, over the better of the two ends "
            f"({limits[0]} and {limits[-1]})",
            max(one) / max(one[0], one[-1]),
            1.01,
        ),
        results.at_least(
            "chosen limit at batch 1, over that at batch 8", curves[1].chosen / curves[8].chosen, 1
        ),
        results.at_least(
            "predicted tokens a call at the largest limit, over the smallest",
            curves[1].tokens[-1] / curves[1].tokens[0],
            1.05,
        ),
    ]
    return figure, claims


def measure_states(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """How often each state is met when decoding at temperature 0, as planned and as counted."""
    name, options = _first(config)
    target = configs["target"]
    plan = ppd.plan_of(options, target.vocab_size)
    part = trained_parts.load(config, configs, "prompt_tokens")[name]
    method = methods.build("ppd", {"target": target}, SamplingConfig(), options)
    stop = generation.stop_config(target, config.decode.max_new_tokens, ())
    rows = timing.decode_all(
        {"target": params["target"]} | part, prompts, method, stop,
        batch_size=config.decode.batch_sizes[0], seed=config.seed,
    )  # fmt: skip
    total = generation.total_stats(rows)
    states = list(range(1, len(plan.trees) + 1))
    counts = [total[f"rounds_in_state_{state}"] for state in states]
    shares = [count / sum(counts) for count in counts]
    figure = {
        "title": f"States of rounds (limit {options['limit']})",
        "x_label": "prompt tokens of the node accepted last",
        "y_label": "share of rounds",
        "form": "bars",
        "series": [
            {"label": "planned", "x": states, "y": list(plan.occupancy)},
            {"label": "counted", "x": states, "y": shares},
        ],
    }
    apart = sum(abs(a - b) for a, b in zip(shares, plan.occupancy, strict=True)) / 2
    claims = [
        results.at_most("share of rounds in another state than planned", apart, 0.1),
        results.at_least(
            "tokens a call at temperature 0, over what the plan promised",
            total["tokens_per_target_call"] / plan.tokens_per_call,
            0.9,
        ),
    ]
    return figure, claims
