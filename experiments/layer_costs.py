"""Time against layers run: of whole runs and of decoding alone, beside what layers promise."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig
from decoding.stopping import StopConfig
from experiments import results
from models.config import TransformerConfig

_REPEATS = 3
PLAIN = "autoregressive"


class Cost(NamedTuple):
    """Of decoding all prompts once.

    Attributes:
      prompt: seconds until the first round.
      whole: seconds of everything, texts not brought to the host.
      rounds: of all batches.
      layers: that were run in them.
    """

    prompt: float
    whole: float
    rounds: int
    layers: int


def once(
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    method: Method,
    stop: StopConfig,
    batch: int,
    num_layers: int,
) -> Cost:
    """Decodes the prompts, `batch` at a time; methods that do not count layers run all."""
    prompt = decoding = 0.0
    rounds = layers = 0
    for first in range(0, len(prompts), batch):
        begin = time.perf_counter()
        state, slots = generation.begin(params, prompts[first : first + batch], method, stop)
        jax.block_until_ready(state)
        read = time.perf_counter()
        state, _ = generation.advance(params, state, slots, method, stop)
        decoding += time.perf_counter() - read  # it has waited for the last round
        prompt += read - begin
        calls = np.asarray(state.stats.target_calls)
        longest = int(calls.argmax())
        rounds += int(calls[longest])
        counted = state.stats.extra.get("layers_run", num_layers * calls)
        layers += int(np.asarray(counted)[longest])
    return Cost(prompt, prompt + decoding, rounds, layers)


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Milliseconds a round, without prompts, over layers a round; batches of `config.decode`.

    `table` of the figure has by batch size and label: `layers` a round, `milliseconds` a round, and
    speed-ups: `promised` by layers, of `decoding` alone, of the `whole`. Those of decoding are by
    round, since texts that end elsewhere take other numbers of rounds.
    """
    ends = None if config.decode.get("stop_at_eos") else ()
    stop = generation.stop_config(configs["target"], config.decode.max_new_tokens, ends)
    sampling = SamplingConfig(temperature=config.decode.temperatures[0])
    series, claims, table = [], [], {}
    for batch in config.decode.batch_sizes:
        runs: dict[str, list[Cost]] = {entry.label: [] for entry in config.decode.methods}
        for _ in range(_REPEATS + 1):  # the first compiles
            for entry in config.decode.methods:
                role = entry.get("role") or "target"
                method = methods.build(
                    entry.method, {"target": configs[role]}, sampling, entry.options.to_dict()
                )
                runs[entry.label].append(
                    once({"target": params[role]}, prompts, method, stop, batch,
                         configs[role].num_layers)
                )  # fmt: skip
        table[str(batch)] = costs = summarise({k: v[1:] for k, v in runs.items()})
        for family in dict.fromkeys(label.split(",")[0] for label in costs):
            points = sorted(
                (cost["layers"], cost["milliseconds"])
                for label, cost in costs.items()
                if label.split(",")[0] == family
            )
            x, y = zip(*points, strict=True)
            series.append({"label": f"{family}, batch {batch}", "x": list(x), "y": list(y)})
        claims += _claims(config, costs, batch)
    figure = {
        "title": "Time over layers", "x_label": "layers a round",
        "y_label": "milliseconds a round, without prompts", "series": series, "table": table,
    }  # fmt: skip
    return figure, claims


def summarise(runs: Mapping[str, Sequence[Cost]]) -> dict[str, dict[str, float]]:
    """Medians by label, ratios being taken repeat by repeat; the first label is the baseline."""
    plain = next(iter(runs.values()))

    def of_round(cost: Cost) -> float:
        return (cost.whole - cost.prompt) / cost.rounds

    def layers(cost: Cost) -> float:
        return cost.layers / cost.rounds

    def ratio(mine: Sequence[Cost], what: Any) -> float:
        return statistics.median(what(a) / what(b) for a, b in zip(plain, mine, strict=True))

    return {
        label: {
            "layers": layers(mine[0]),
            "milliseconds": 1e3 * statistics.median(map(of_round, mine)),
            "promised": layers(plain[0]) / layers(mine[0]),
            "decoding": ratio(mine, of_round),
            "whole": ratio(mine, lambda cost: cost.whole),
        }
        for label, mine in runs.items()
    }


def _claims(
    config: ConfigDict, costs: Mapping[str, Mapping[str, float]], batch: int
) -> list[results.Claim]:
    """Times lie on a line in layers; fewest layers give half the speed-up that they promise."""
    kinds = {entry.label: entry.method for entry in config.decode.methods}
    points = [
        (cost["layers"], cost["milliseconds"])
        for label, cost in costs.items()
        if kinds[label] in (PLAIN, "skip_decode")
    ]
    x, y = np.array(points).T
    square = float(np.corrcoef(x, y)[0, 1] ** 2)
    fewest = min(costs.values(), key=lambda cost: cost["layers"])
    return [
        results.at_least(f"time a round over layers, batch {batch}: R^2 of a line", square, 0.9),
        results.at_least(
            f"decoding with {fewest['layers']:.3g} layers, batch {batch}: speed-up a round over "
            f"what layers promise",
            fewest["decoding"] / fewest["promised"],
            0.5,
        ),
    ]
