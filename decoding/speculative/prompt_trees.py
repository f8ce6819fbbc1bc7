"""Sparse trees for parallel prompt decoding, made from measured marginals (PPD, arXiv 2405.18628).

Candidates of a round are top-K lists, one a distance, that the prompt tokens of the last accepted
node gave; a node is a path of ranks in these lists. Each node carries prompt tokens of its own, so
that whichever node is accepted last can give the next round's lists: k of them allow a tree of
depth k, the round's *state*. What is built here is, for each state, which paths are put up and how
many prompt tokens each carries, under a limit on the two together (section 3.3 of the paper).
"""

import dataclasses
import functools
import heapq
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from models.errors import InputError

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SparseTree:
    """The tree of one state.

    Attributes:
      paths: ranks from the root, shortest first, then in order; the root itself is not there.
      prompts: prompt tokens that each node carries.
    """

    paths: tuple[Path, ...]
    prompts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TreePlan:
    """Trees of all states, and what they promise.

    Attributes:
      trees: of states 1, 2, ..., n.
      tokens_per_call: 1 and the nodes accepted beyond the root, in the steady state.
      occupancy: float [n], how often each state is met.
    """

    trees: tuple[SparseTree, ...]
    tokens_per_call: float
    occupancy: tuple[float, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Nodes of each tree."""
        return tuple(len(tree.paths) for tree in self.trees)


def plan(
    marginals: np.ndarray,
    limit: int,
    *,
    first: int = 10,
    dead_end: bool = False,
    ensemble: int = 1,
) -> TreePlan:
    """The best trees under a limit: every pair of sizes is tried, as in the official code.

    Args:
      marginals: [n, K], probability that candidate r of distance q is the true token.
      limit: nodes and their prompt tokens together, the root's n not counted.
      first: nodes of state 1, whose candidates are K.
      dead_end: rounds in which only the root is accepted count as a step more (the official code);
        False sends them to state n at once, which is what happens.
      ensemble: m, embeddings that stand for a prompt token; each takes a place.

    Raises:
      InputError: marginals that are no probabilities, or a limit that leaves no room.
    """
    marginals, n = _checked(marginals, limit, ensemble)
    least, most = max(1, limit // (n * ensemble + 1)), limit // (1 + ensemble)
    ranked = [_ranked(marginals, depth) for depth in range(1, n + 1)]
    tops = [min(len(paths), most) for paths in ranked]
    tops[0] = min(tops[0], first)
    spans = [(tops[0],)] + [range(min(least, top), top + 1) for top in tops[1:]]
    by_size = [[_nodes(ranked[s][:size]) for size in span] for s, span in enumerate(spans)]
    best: tuple[float, tuple[_Nodes, ...], list[list[int]]] | None = None
    for chosen in itertools.product(*by_size):
        totals = tuple(nodes.total for nodes in chosen)
        prompts = [
            _prune(nodes, totals, (limit - len(nodes.paths)) // ensemble) for nodes in chosen
        ]
        value = _steady(chosen, prompts, dead_end)[1]
        if best is None or value > best[0]:
            best = value, chosen, prompts
    assert best is not None
    return _planned(*best[1:], dead_end)


def uniform(marginals: np.ndarray, limit: int, *, ensemble: int = 1) -> TreePlan:
    """The control of equal size in which every node carries as many prompt tokens, the best number.

    Arguments and errors as `plan`.
    """
    marginals, n = _checked(marginals, limit, ensemble)
    found = []
    for k in range(1, n + 1):
        size = max(1, limit // (1 + k * ensemble))
        chosen = [_nodes(_ranked(marginals, depth)[:size]) for depth in range(1, n + 1)]
        found.append(_planned(chosen, [[k] * len(nodes.paths) for nodes in chosen]))
    return max(found, key=lambda one: one.tokens_per_call)


def scattered(marginals: np.ndarray, limit: int, *, ensemble: int = 1, seed: int = 0) -> TreePlan:
    """The control with `plan`'s nodes, whose prompt tokens are spread over them at random.

    Arguments and errors as `plan`.
    """
    planned = plan(marginals, limit, ensemble=ensemble)
    rng = np.random.default_rng(seed)
    n, chosen, prompts = len(planned.trees), [], []
    for tree in planned.trees:
        spread = np.ones(len(tree.paths), int)
        for _ in range(sum(tree.prompts) - len(spread)):
            spread[rng.choice(np.flatnonzero(spread < n))] += 1
        chosen.append(_nodes([(_value(marginals, path), path) for path in tree.paths]))
        prompts.append(spread.tolist())
    return _planned(chosen, prompts)


def chain(marginals: np.ndarray) -> TreePlan:
    """One path of best candidates, each with all prompt tokens: guessing ahead without a tree."""
    n = len(marginals)
    links = [(_value(marginals, (0,) * depth), (0,) * depth) for depth in range(1, n + 1)]
    chosen = [_nodes(links[:s]) for s in range(1, n + 1)]
    return _planned(chosen, [[n] * len(nodes.paths) for nodes in chosen])


SHAPES: dict[str, Callable[[np.ndarray, int, int], TreePlan]] = {
    "dynamic": lambda marginals, limit, m: plan(
        marginals, limit, first=min(10, np.shape(marginals)[1]), ensemble=m
    ),
    "uniform": lambda marginals, limit, m: uniform(marginals, limit, ensemble=m),
    "random": lambda marginals, limit, m: scattered(marginals, limit, ensemble=m),
    "chain": lambda marginals, limit, m: chain(marginals),
}


@functools.cache
def shaped(
    shape: str, marginals: tuple[tuple[float, ...], ...], limit: int, ensemble: int = 1
) -> TreePlan:
    """A plan by the name of its shape, kept; errors as `plan`."""
    return SHAPES[shape](np.asarray(marginals), limit, ensemble)


def num_inputs(trees: Sequence[SparseTree], ensemble: int = 1) -> int:
    """Positions of a target call: root, nodes, and the embeddings of all their prompt tokens."""
    behind_root = 1 + len(trees) * ensemble
    return behind_root + max(sum(1 + k * ensemble for k in tree.prompts) for tree in trees)


def _checked(marginals: np.ndarray, limit: int, ensemble: int) -> tuple[np.ndarray, int]:
    marginals = np.asarray(marginals, float)
    if marginals.ndim != 2 or (marginals < 0).any() or (marginals > 1).any():
        raise InputError(f"marginals: shape {marginals.shape} must be [n, K] of probabilities")
    n = len(marginals)
    if limit < (least := 2 * (n * ensemble + 1)):
        raise InputError(f"limit: {limit} must be at least {least} for {n} distances")
    return marginals, n


def _value(marginals: np.ndarray, path: Path) -> float:
    return float(np.prod([marginals[level][rank] for level, rank in enumerate(path)]))


def _ranked(marginals: np.ndarray, depth: int) -> list[tuple[float, Path]]:
    """Paths up to a depth by falling value, the product of their marginals; the best of them.

    A path's value never exceeds its parent's, so they are found best first.
    """
    K, wanted = marginals.shape[1], 512
    queue: list[tuple[float, Path]] = [(-float(marginals[0, rank]), (rank,)) for rank in range(K)]
    heapq.heapify(queue)
    found: list[tuple[float, Path]] = []
    while queue and len(found) < wanted:
        value, path = heapq.heappop(queue)
        found.append((-value, path))
        if len(path) < depth:
            for rank in range(K):
                longer = value * float(marginals[len(path), rank])
                heapq.heappush(queue, (longer, (*path, rank)))
    return found


class _Nodes(NamedTuple):
    """Nodes of one state's tree.

    Attributes:
      paths: of each.
      total: sum of their values: how many are accepted in expectation.
      last: probability of each that it is accepted and none of its children is.
    """

    paths: tuple[Path, ...]
    total: float
    last: tuple[float, ...]


def _nodes(chosen: Sequence[tuple[float, Path]]) -> _Nodes:
    last = {path: value for value, path in chosen}
    for value, path in chosen:
        if len(path) > 1:
            last[path[:-1]] -= value
    paths = tuple(path for _, path in chosen)
    return _Nodes(paths, sum(value for value, _ in chosen), tuple(last[path] for path in paths))


def _planned(
    chosen: Sequence[_Nodes], prompts: Sequence[Sequence[int]], dead_end: bool = False
) -> TreePlan:
    """Trees of given nodes and prompt tokens, and what they promise."""
    trees = []
    for nodes, carried in zip(chosen, prompts, strict=True):
        pairs = sorted(zip(nodes.paths, carried, strict=True), key=lambda one: (len(one[0]), one))
        trees.append(SparseTree(tuple(path for path, _ in pairs), tuple(k for _, k in pairs)))
    occupancy, value = _steady(chosen, prompts, dead_end)
    return TreePlan(tuple(trees), 1 + value, tuple(occupancy.tolist()))


def _prune(nodes: _Nodes, totals: tuple[float, ...], most: int) -> list[int]:
    """Prompt tokens of each node: n everywhere, then one less where that loses least, until there
    are `most`."""
    n = len(totals)
    prompts = [n] * len(nodes.paths)

    def gain(i: int) -> float:
        """What taking one from node i changes: the states' expected nodes, weighted; below 0."""
        k = prompts[i]
        return nodes.last[i] * (totals[k - 2] - totals[k - 1])

    queue = [(-gain(i), i) for i in range(len(prompts))] if n > 1 else []
    heapq.heapify(queue)
    excess = sum(prompts) - most
    while excess > 0 and queue:
        _, i = heapq.heappop(queue)
        prompts[i] -= 1
        excess -= 1
        if prompts[i] > 1:
            heapq.heappush(queue, (-gain(i), i))
    return prompts


def _steady(
    chosen: Sequence[_Nodes], prompts: Sequence[Sequence[int]], dead_end: bool
) -> tuple[np.ndarray, float]:
    """Stationary distribution over the states 1..n, and the mean of their expected nodes."""
    n = len(chosen)
    totals = np.array([nodes.total for nodes in chosen])
    transitions = np.zeros((n, n + 1))
    for s, (nodes, carried) in enumerate(zip(chosen, prompts, strict=True)):
        transitions[s] = np.bincount(carried, nodes.last, n + 1)
    transitions[:, 0] = 1 - transitions[:, 1:].sum(axis=1)  # only the root is accepted
    if dead_end:
        chain = np.zeros((n + 1, n + 1))
        chain[0, n] = 1.0
        chain[1:] = transitions
        stationary = _stationary(chain)[1:]
    else:
        chain = transitions[:, 1:].copy()
        chain[:, n - 1] += transitions[:, 0]
        stationary = _stationary(chain)
    return stationary, float(stationary @ totals)


def _stationary(chain: np.ndarray) -> np.ndarray:
    size = len(chain)
    system = np.vstack([chain.T - np.eye(size), np.ones(size)])
    return np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]


# Measured by the authors; recovered from the trees that they published.
PUBLISHED = {
    "vicuna_7b": (
        (.48335, .14342, .07360, .04540, .03087, .02155, .01658, .01323, .00932, .00845),
        (.26256, .14561, .08114, .05760, .04283, .03230, .02570, .02152, .01903, .01550),
        (.16413, .11756, .08092, .05784, .04586, .03672, .03128, .02317, .02372, .01789),
    ),
    "mobilellama_1_4b": (
        (.34988, .14590, .07466, .04727, .03422, .02745, .02199, .01578, .01497, .01404),
        (.17503, .11893, .07428, .05510, .04041, .03290, .02701, .02061, .01766, .01778),
        (.11512, .08801, .06973, .05127, .03952, .03201, .02596, .02498, .02041, .01976),
    ),
}  # fmt: skip


MARGINALS_FILE = "marginals.json"


def read_marginals(source: str | os.PathLike[str]) -> tuple[tuple[float, ...], ...]:
    """Marginals [n, K] by the name of published ones, or from a directory of trained prompt tokens.

    Raises:
      InputError: neither, or the directory's file holds something else.
    """
    if source in PUBLISHED:
        return PUBLISHED[str(source)]
    path = pathlib.Path(source) / MARGINALS_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["marginals"]
        found = tuple(tuple(float(value) for value in row) for row in rows)
        _checked(np.asarray(found), 10**6, 1)
    except OSError:
        raise InputError(
            f"marginals: {str(source)!r} must be one of {', '.join(PUBLISHED)}, or a directory "
            f"with {MARGINALS_FILE} (training.prompt_marginals)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no marginals [n, K] ({error})") from None
    return found
