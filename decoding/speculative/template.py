"""Static draft trees: which candidate of which node is drafted, the same in every round.

A node is named by its *rank path*: (2, 0) is the best successor of the root's third best one. A
template is a set of paths that holds every prefix of its members. It fits any drafter that ranks
the successors of a token: tables of successors (Token Recycling, arXiv 2408.08696), draft heads.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Iterable

import numpy as np

from decoding.speculative.tree import NO_PARENT
from models.errors import InputError, check_choice

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """The shape of a draft tree, level by level and in lexicographic order of paths in a level.

    So a parent comes before its children, and siblings are in the order of their ranks.

    Attributes:
      parent: index of each node's parent; NO_PARENT at the root, which is node 0.
      rank: which of its parent's successors each node is, 0 for the best; -1 at the root.
      depth: of each node, 0 at the root.
      levels: (first, end) of the nodes at depth 1, 2, ...
    """

    parent: tuple[int, ...]
    rank: tuple[int, ...]
    depth: tuple[int, ...]
    levels: tuple[tuple[int, int], ...]

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return len(self.parent)

    @property
    def max_depth(self) -> int:
        return len(self.levels)

    @property
    def width(self) -> int:
        """How many successors of a token it needs."""
        return max(self.rank) + 1

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every node's rank path; the root's is empty."""
        found: list[Path] = [()]
        for parent, rank in zip(self.parent[1:], self.rank[1:], strict=True):
            found.append((*found[parent], rank))
        return tuple(found)


def from_paths(paths: Iterable[Path]) -> Template:
    """The template of some rank paths, the root's not among them, in any order.

    Raises:
      InputError: no path, or one whose prefix is missing.
    """
    ordered = sorted(set(paths), key=lambda path: (len(path), path))
    if not ordered:
        raise InputError("paths: none given; a template needs at least one node below its root")
    index: dict[Path, int] = {(): 0}
    for path in ordered:
        if path[:-1] not in index:
            raise InputError(f"paths: {path} is given without its prefix {path[:-1]}")
        index[path] = len(index)
    depth = [len(path) for path in index]
    return Template(
        parent=(NO_PARENT, *(index[path[:-1]] for path in ordered)),
        rank=(-1, *(path[-1] for path in ordered)),
        depth=tuple(depth),
        levels=tuple(
            (depth.index(level), depth.index(level) + depth.count(level))
            for level in range(1, depth[-1] + 1)
        ),
    )


def narrow(template: Template, width: int) -> Template:
    """The template without the nodes that need more than `width` successors of a token."""
    return from_paths(path for path in template.paths[1:] if max(path) < width)


# Children of each inner node of the tree that Token Recycling was published with; they are its
# best successors: ranks 0, 1, ...
_CHILDREN = {
    "": 8,
    # depth 1
    "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1,
    # depth 2
    "00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1,
    "10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1,
    # depth 3
    "000": 5, "001": 2, "002": 1, "003": 1, "004": 1,
    "010": 1, "020": 1, "100": 1, "200": 1, "300": 1,
    # depth 4
    "0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1,
    # depth 5
    "00000": 2, "00010": 1,
}  # fmt: skip

# 80 nodes below the root in levels of 8, 21, 25, 15, 8 and 3; 40 leaves.
DEFAULT80 = from_paths(
    (*map(int, path), rank) for path, children in _CHILDREN.items() for rank in range(children)
)


def grow(
    acceptance: Callable[[Path], float | None],
    num_nodes: int,
    *,
    width: int = 8,
    max_depth: int = 8,
) -> Template:
    """The nodes that are accepted most often, each with all its ancestors.

    Best first: of all children of the nodes taken so far, the one with the highest acceptance is
    next (ties: the shorter path, then the smaller). Where acceptance never rises along a path, as
    measured ones never do, no other tree of this size has a larger sum, which is the expected
    number of drafts accepted a round.

    Args:
      acceptance: rank path -> how often a round accepts that node, such as `get` of
        `measured_acceptance` on a larger tree. Nodes of 0 or None are not taken.
      num_nodes: nodes below the root.
      width: most successors of a token.
      max_depth: most levels.

    Raises:
      InputError: there are fewer than `num_nodes` candidates.
    """
    taken: list[Path] = []
    front: list[tuple[float, int, Path]] = []

    def open_children(path: Path) -> None:
        for child in ((*path, rank) for rank in range(width)):
            if len(child) <= max_depth and (value := acceptance(child)):
                heapq.heappush(front, (-value, len(child), child))

    open_children(())
    while front and len(taken) < num_nodes:
        taken.append(heapq.heappop(front)[-1])
        open_children(taken[-1])
    if num_nodes < 1 or len(taken) < num_nodes:
        raise InputError(
            f"num_nodes: {num_nodes} is out of range; allowed: 1 to the {len(taken)} paths with "
            f"ranks below {width}, at most {max_depth} levels and an acceptance above 0"
        )
    return from_paths(taken)


def estimated_acceptance(path: Path) -> float:
    """How often a node is accepted, by its ranks alone: the product of (1.5 (rank + 1))^-2.

    For want of a measurement. With this constant the 80 best nodes are nearest to the published
    tree: 69 of them are the same.
    """
    return (1.5 ** len(path) * math.prod(rank + 1 for rank in path)) ** -2


def measured_acceptance(template: Template, reached: np.ndarray) -> dict[Path, float]:
    """How often a round accepts each node of a template: what `grow` chooses from.

    Args:
      template: the tree that was decoded with.
      reached: int [..., N], rounds that accepted each node, the root (every round) included.
    """
    counts = np.asarray(reached).reshape(-1, template.num_nodes).sum(axis=0)
    shares = counts / max(int(counts[0]), 1)
    return dict(zip(template.paths[1:], shares[1:].tolist(), strict=True))


_GROWN = {f"nodes{size}": size for size in (8, 16, 20, 32, 40, 64, 80, 160)}
NAMES = ("default80", *_GROWN)


@functools.cache
def named(name: str, width: int) -> Template:
    """A template by name for tables of `width` successors.

    Args:
      name: 'default80', the published tree without the nodes that need more than `width`; or
        'nodes8', 'nodes16', .. 'nodes160' (see `NAMES`): so many nodes with ranks below `width`,
        grown from `estimated_acceptance`, each inside the next.
      width: at least 1.

    Raises:
      InputError: unknown name; fewer paths than nodes.
    """
    check_choice("template", name, NAMES)
    if name in _GROWN:
        return grow(estimated_acceptance, _GROWN[name], width=width)
    return narrow(DEFAULT80, width)
