"""Sparse trees for parallel prompt decoding, made from measured marginals (PPD, arXiv 2405.18628).

Candidates of a round are top-K lists, one a distance, that the prompt tokens of the last accepted
node gave; a node is a path of ranks in these lists. Each node carries prompt tokens of its own, so
that whichever node is accepted last can give the next round's lists: k of them allow a tree of
depth k, the round's *state*. What is built here is, for each state, which paths are put up and how
many prompt tokens each carries, under a limit on the two together (section 3.3 of the paper).
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

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


def plan(marginals: np.ndarray, limit: int, *, first: int = 10, dead_end: bool = False) -> TreePlan:
    """The best trees under a limit: every pair of sizes is tried, as in the official code.

    Args:
      marginals: [n, K], probability that candidate r of distance q is the true token.
      limit: nodes and their prompt tokens together, the root's n not counted.
      first: nodes of state 1, whose candidates are K.
      dead_end: rounds in which only the root is accepted count as a step more (the official code);
        False sends them to state n at once, which is what happens.

    Raises:
      InputError: marginals that are no probabilities, or a limit that leaves no room.
    """
    marginals = np.asarray(marginals, float)
    if marginals.ndim != 2 or (marginals < 0).any() or (marginals > 1).any():
        raise InputError(f"marginals: shape {marginals.shape} must be [n, K] of probabilities")
    n = len(marginals)
    least, most = max(1, limit // (n + 1)), limit // 2
    if most < least or most < 1:
        raise InputError(f"limit: {limit} must be at least {2 * (n + 1)} for {n} distances")
    ranked = [_ranked(marginals, depth) for depth in range(1, n + 1)]
    tops = [min(len(paths), top) for paths, top in zip(ranked, (first, *(most,) * n), strict=False)]
    spans = [(tops[0],)] + [range(min(least, top), top + 1) for top in tops[1:]]
    best: TreePlan | None = None
    for sizes in itertools.product(*spans):
        found = _with_sizes(ranked, sizes, limit, dead_end)
        if best is None or found.tokens_per_call > best.tokens_per_call:
            best = found
    assert best is not None
    return best


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


def _with_sizes(
    ranked: Sequence[Sequence[tuple[float, Path]]],
    sizes: Sequence[int],
    limit: int,
    dead_end: bool,
) -> TreePlan:
    n = len(sizes)
    totals = [sum(value for value, _ in ranked[s][: sizes[s]]) for s in range(n)]
    trees, transitions = [], np.zeros((n, n + 1))  # column 0: only the root is accepted
    for s in range(n):
        chosen = ranked[s][: sizes[s]]
        prompts = _prune(chosen, tuple(totals), limit)
        last = _last_accepted(chosen)
        for (_, path), k in zip(chosen, prompts, strict=True):
            transitions[s, k] += last[path]
        transitions[s, 0] = 1 - transitions[s, 1:].sum()
        order = sorted(range(len(chosen)), key=lambda i: (len(chosen[i][1]), chosen[i][1]))
        trees.append(
            SparseTree(tuple(chosen[i][1] for i in order), tuple(int(prompts[i]) for i in order))
        )
    occupancy, value = _steady(transitions, totals, dead_end)
    return TreePlan(tuple(trees), 1 + value, tuple(occupancy.tolist()))


def _last_accepted(chosen: Sequence[tuple[float, Path]]) -> dict[Path, float]:
    """Probability of each node that it is accepted and none of its children is."""
    last = {path: value for value, path in chosen}
    for value, path in chosen:
        if len(path) > 1:
            last[path[:-1]] -= value
    return last


def _prune(
    chosen: Sequence[tuple[float, Path]], totals: tuple[float, ...], limit: int
) -> list[int]:
    """Prompt tokens of each node: n everywhere, then one less where that loses least."""
    n = len(totals)
    last = _last_accepted(chosen)
    prompts = [n] * len(chosen)

    def gain(i: int) -> float:
        """What taking one from node i changes: the states' expected nodes, weighted; below 0."""
        k = prompts[i]
        return last[chosen[i][1]] * (totals[k - 2] - totals[k - 1])

    queue = [(-gain(i), i) for i in range(len(chosen))] if n > 1 else []
    heapq.heapify(queue)
    excess = sum(prompts) - (limit - len(chosen))
    while excess > 0 and queue:
        _, i = heapq.heappop(queue)
        prompts[i] -= 1
        excess -= 1
        if prompts[i] > 1:
            heapq.heappush(queue, (-gain(i), i))
    return prompts


def _steady(
    transitions: np.ndarray, totals: Sequence[float], dead_end: bool
) -> tuple[np.ndarray, float]:
    """Stationary distribution over the states 1..n, and the mean of their expected nodes."""
    n = len(totals)
    if dead_end:
        chain = np.zeros((n + 1, n + 1))
        chain[0, n] = 1.0
        chain[1:] = transitions
        stationary = _stationary(chain)
        return stationary[1:], float(stationary[1:] @ np.asarray(totals))
    chain = transitions[:, 1:].copy()
    chain[:, n - 1] += transitions[:, 0]
    stationary = _stationary(chain)
    return stationary, float(stationary @ np.asarray(totals))


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
