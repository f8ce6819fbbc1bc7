"""Wall-clock time of decoding, measured so that a ratio means something.

Everything that is compared is compiled first, then run in turn, repeat by repeat, so that a slow
moment of a shared machine falls on all alike; the median of the repeats counts.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from decoding import generation
from decoding.generation import Row
from decoding.loop import Method, ModelParams
from decoding.stopping import StopConfig
from experiments import profiling


def decode_all(
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
    method: Method,
    stop: StopConfig,
    *,
    batch_size: int,
    seed: int = 0,
    hot: bool = False,
    memory: Any = None,
) -> list[Row]:
    """Continues all prompts, `batch_size` rows at a time; row numbers are the prompts'.

    Each batch begins with `memory` (a `HotStart.value`); with `hot` the second and further ones
    begin with what the method learned from those before.
    """
    rows: list[Row] = []
    carried = generation.HotStart(memory)
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        ids = range(first, first + len(part))
        start = carried if hot else generation.HotStart(memory)
        rows += generation.generate(params, part, method, stop, seed=seed, row_ids=ids, hot=start)
    return rows


def side_by_side(
    runs: Mapping[str, Callable[[], Any]], repeats: int, *, label: str = "measuring"
) -> dict[str, dict[str, Any]]:
    """Times several callables in turn, after one untimed call of each.

    Where a profile is asked for (`profiling.asked`), each is called once more, for its trace.

    Args:
      runs: what to call, by name; each must wait for its own result.
      repeats: timed calls of each.
      label: of the progress bar on standard error.

    Returns:
      By name: `result` of the first call, `seconds` of every repeat and their `median`.
    """
    measured: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(runs) * (repeats + 1), desc=label, leave=False) as bar:
        for name, run in runs.items():
            bar.set_postfix_str(f"compile {name}")
            measured[name] = {"result": run(), "seconds": []}
            bar.update()
        for _ in range(repeats):
            for name, run in runs.items():
                bar.set_postfix_str(name)
                begin = time.perf_counter()
                run()
                measured[name]["seconds"].append(time.perf_counter() - begin)
                bar.update()
    profiling.trace_once(runs)
    for entry in measured.values():
        entry["median"] = statistics.median(entry["seconds"])
    return measured


def speedup(baseline: Sequence[float], other: Sequence[float]) -> float:
    """Median over repeats of baseline time / other time, repeat by repeat."""
    return statistics.median(b / o for b, o in zip(baseline, other, strict=True))


def best(runs: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Least of the seconds that each callable returns, run in turn after a warm-up.

    For parts of a whole that are compared in absolute terms: other jobs can only add to a time.
    """
    for run in runs.values():
        run()
    seconds = {name: float("inf") for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name] = min(seconds[name], run())
    return seconds


def medians(runs: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, float]:
    """Median of the seconds that each callable returns, run in turn after a warm-up."""
    for run in runs.values():
        run()
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}
