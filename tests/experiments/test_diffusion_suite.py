"""The diffusion suite's config, charts and table, without running it."""

import math

from decoding import methods
from decoding.sampling import SamplingConfig
from experiments.benchmarks import diffusion
from tests.decoding import masked, tiny


def test_every_method_of_the_suite_exists_and_is_on_one_curve():
    config = diffusion.config(repeats=1)
    labels = [entry.label for entry in config.decode.methods]
    assert len(labels) == len(set(labels))
    assert labels[0] == diffusion.BASELINE
    for entry in config.decode.methods:
        causal = entry.method == diffusion.AUTOREGRESSIVE
        target = tiny.TARGET if causal else masked.CONFIG
        method = methods.build(
            entry.method, {"target": target}, SamplingConfig(), entry.options.to_dict()
        )
        assert (method.canvas is None) is causal
        assert entry.role in config.models
        assert not entry.part or entry.part in config.parts


def records():
    """Made-up results: time is exactly proportional to positions."""
    found = []
    for curve, entries in diffusion.curves().items():
        for i, entry in enumerate(entries, start=1):
            positions = 100.0 * i + len(found)
            found.append(
                {
                    "label": entry.label, "curve": curve, "rounds": 10.0 / i, "rows": 4,
                    "positions": positions, "exact_match": 1 / i, "tokens_per_second": 5.0,
                    "speedup": 1.0, "seconds": [positions / 100, positions / 50],
                }
            )  # fmt: skip
    return found


def test_charts_and_table():
    found = records()
    assert math.isclose(diffusion.time_follows_positions(found), 1.0)
    slower = [{**r, "seconds": [1 / r["positions"]]} for r in found]
    assert math.isclose(diffusion.time_follows_positions(slower), -1.0)
    quality, computed, time = diffusion.charts(found)
    steps = quality["series"][0]
    assert (steps["label"], steps["x"], steps["y"]) == (
        "fixed steps", [10 / 3, 5.0, 10.0], [1 / 3, 1 / 2, 1.0],
    )  # fmt: skip
    assert computed["series"][0]["x"] == [100.0, 201.0, 302.0]
    assert time["series"][0]["y"][0] == 1.5 / 4
    lines = diffusion.table(found).splitlines()
    assert len(lines) == len(found) + 4
    assert lines[2] == "| one token a round | 100% | 10.0 | 100 | 5 | 1.00x |"
