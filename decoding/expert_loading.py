"""Experts in fast and slow memory: what loading them ahead of time saves (M2R2, section 2.6).

A simulation of memory and time alone. Fast memory holds some experts of each layer, of which the
least recently used makes room; one channel brings experts from slow memory, one after another; a
layer computes when all of its experts are there. Which experts those are, and which were predicted,
comes from a model: nothing here has any part in what the model computes.

Stated costs: an expert takes `load`, a layer `compute`. Whatever a layer is found to need at its
start goes before all that is only predicted, but a transfer that has begun is finished. Predictions
that have not begun when their layer starts are dropped.
"""

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class MemoryTiers:
    """The cost model.

    Attributes:
      slots: C, experts of each layer that fast memory holds.
      load: time that the channel takes for an expert.
      compute: time that a layer takes.
    """

    slots: int
    load: float
    compute: float = 1.0

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise InputError(f"slots: {self.slots} must be at least 1")
        for field in ("load", "compute"):
            if not (value := getattr(self, field)) > 0:
                raise InputError(f"{field}: {value} must be positive")


class Prediction(NamedTuple):
    """What is said of one layer's experts, token by token.

    Attributes:
      issued: layer before which it is known.
      layer: the layer that it is of, later than `issued`.
      experts: int [T, P], the likeliest first; negative where nothing is said.
    """

    issued: int
    layer: int
    experts: np.ndarray


class Timeline(NamedTuple):
    """What a run took.

    Attributes:
      seconds: until the last layer of the last token, in the unit of the costs.
      stalled: of these, those in which a layer waited for experts.
      needed: experts that layers needed, one for each token, layer and choice.
      present: of these, those that were in fast memory when their layer was to begin.
      loads: experts that the channel brought.
    """

    seconds: float
    stalled: float
    needed: int
    present: int
    loads: int


@dataclasses.dataclass
class _Memory:
    """Fast memory and the channel.

    Attributes:
      arrivals: by layer, expert -> when it is there; the least recently used first.
      queue: (layer, expert, since when) of what is predicted and has not begun.
      free: when the channel has nothing left to do.
      loads: experts brought so far.
    """

    tiers: MemoryTiers
    arrivals: list[OrderedDict[int, float]]
    queue: deque[tuple[int, int, float]]
    free: float = 0.0
    loads: int = 0


def simulate(
    experts: np.ndarray, predictions: Sequence[Prediction], tiers: MemoryTiers
) -> Timeline:
    """Runs tokens through layers, one after another.

    Args:
      experts: int [T, L, K], what each layer needs.
      predictions: at most one of each layer.
      tiers: see `MemoryTiers`.

    Raises:
      InputError: fast memory that does not hold the experts of a token; a prediction that is not
        earlier than its layer.
    """
    T, L, K = experts.shape
    if tiers.slots < K:
        raise InputError(f"slots: {tiers.slots} must be at least the {K} experts of a token")
    for said in predictions:
        if not 0 <= said.issued < said.layer < L:
            raise InputError(f"predictions: layer {said.layer} is said of before {said.issued}")
    memory = _Memory(tiers, [OrderedDict() for _ in range(L)], deque())
    now = stalled = 0.0
    present = 0
    for t in range(T):
        for layer in range(L):
            for said in predictions:
                if said.issued == layer:
                    _expect(memory, said.layer, said.experts[t].tolist(), now)
            ready, there = _need(memory, layer, experts[t, layer].tolist(), now)
            present += there
            stalled += ready - now
            now = ready + tiers.compute
    return Timeline(now, stalled, T * L * K, present, memory.loads)


def _expect(memory: _Memory, layer: int, experts: Sequence[int], now: float) -> None:
    """Queues what is predicted; what is there already counts as used."""
    waiting = {(where, which) for where, which, _ in memory.queue}
    for expert in experts:
        if expert in memory.arrivals[layer]:
            memory.arrivals[layer].move_to_end(expert)
        elif expert >= 0 and (layer, expert) not in waiting:
            memory.queue.append((layer, expert, now))


def _need(memory: _Memory, layer: int, experts: Sequence[int], now: float) -> tuple[float, int]:
    """When all of a layer's experts are there, and how many of them are at once."""
    _transfer(memory, now)
    held = memory.arrivals[layer]
    memory.queue = deque(entry for entry in memory.queue if entry[0] != layer)
    there = sum(held.get(expert, now + 1) <= now for expert in experts)
    for expert in experts:
        if expert in held:
            held.move_to_end(expert)
    for expert in experts:
        if expert not in held:
            _bring(memory, layer, expert, max(now, memory.free), kept=experts)
    return max(now, *(held[expert] for expert in experts)), there


def _transfer(memory: _Memory, now: float) -> None:
    """Begins what the channel would have begun before `now`."""
    while memory.queue:
        layer, expert, since = memory.queue[0]
        start = max(since, memory.free)
        if start >= now:
            return
        memory.queue.popleft()
        _bring(memory, layer, expert, start)


def _bring(
    memory: _Memory, layer: int, expert: int, start: float, kept: Sequence[int] = ()
) -> None:
    """Begins a transfer into the place of the least recently used expert but those `kept`."""
    held = memory.arrivals[layer]
    if len(held) >= memory.tiers.slots:
        del held[next(other for other in held if other not in kept)]
    memory.free = held[expert] = start + memory.tiers.load
    memory.loads += 1


def recall(experts: np.ndarray, predictions: Sequence[Prediction]) -> float:
    """Share of the needed experts of the predicted layers that were predicted; 0 of nothing."""
    shares = [
        (experts[:, said.layer, :, None] == said.experts[:, None, :]).any(-1).mean()
        for said in predictions
    ]
    return float(np.mean(shares)) if shares else 0.0


def of_previous_token(experts: np.ndarray, pairs: Sequence[tuple[int, int]]) -> list[Prediction]:
    """The experts that the token before needed, said when the others are: (issued, layer)."""
    before = np.concatenate([np.full_like(experts[:1], -1), experts[:-1]])
    return [Prediction(issued, layer, before[:, layer]) for issued, layer in pairs]
