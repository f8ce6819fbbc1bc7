"""Static tree templates: the published one, growing from acceptance, measuring acceptance."""

import itertools

import numpy as np
import pytest

from decoding import generation
from decoding.sampling import SamplingConfig
from decoding.speculative import template
from decoding.speculative.method import speculative
from decoding.speculative.template import (
    DEFAULT80,
    estimated_acceptance,
    from_paths,
    grow,
    measured_acceptance,
    named,
    narrow,
)
from decoding.speculative.token_recycling import recycling_drafter
from models.errors import InputError
from tests.decoding import tiny

SMALL = from_paths([(1,), (0, 1), (0,), (0, 0), (1, 0)])


def test_nodes_stand_level_by_level_and_in_lexicographic_order():
    assert SMALL.paths == ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    assert SMALL.parent == (-1, 0, 0, 1, 1, 2)
    assert SMALL.rank == (-1, 0, 1, 0, 1, 0)
    assert SMALL.depth == (0, 1, 1, 2, 2, 2)
    assert SMALL.levels == ((1, 3), (3, 6))
    assert (SMALL.num_nodes, SMALL.max_depth, SMALL.width) == (6, 2, 2)
    assert from_paths(reversed(SMALL.paths[1:])) == SMALL
    assert hash(from_paths(SMALL.paths[1:])) == hash(SMALL)


def test_paths_that_are_not_a_tree():
    with pytest.raises(InputError, match=r"^paths: none given"):
        from_paths([])
    with pytest.raises(InputError, match=r"^paths: \(1, 0\) is given without its prefix \(1,\)$"):
        from_paths([(0,), (1, 0)])


def test_the_published_tree():
    assert DEFAULT80.num_nodes == 81
    assert [end - first for first, end in DEFAULT80.levels] == [8, 21, 25, 15, 8, 3]
    assert len(set(range(81)) - set(DEFAULT80.parent)) == 40  # leaves
    assert (DEFAULT80.width, DEFAULT80.max_depth) == (8, 6)
    paths = DEFAULT80.paths
    assert list(paths) == sorted(set(paths), key=lambda path: (len(path), path))
    for node in range(1, 81):
        assert DEFAULT80.parent[node] < node
        assert paths[DEFAULT80.parent[node]] == paths[node][:-1]
        # Children have ranks 0, 1, ...: the better sibling is there too, and comes before.
        rank = DEFAULT80.rank[node]
        assert rank == 0 or paths[node - 1] == (*paths[node][:-1], rank - 1)
    children = {paths[i]: DEFAULT80.parent.count(i) for i in range(81)}
    assert [children[rank,] for rank in range(8)] == [8, 4, 3, 2, 1, 1, 1, 1]
    assert children[0, 0] == 8 and children[0, 0, 0] == 5 and children[1, 0, 0] == 1
    assert [path for path in paths if len(path) == 6] == [
        (0, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 1),
        (0, 0, 0, 1, 0, 0),
    ]


def test_a_narrow_table_has_no_use_for_high_ranks():
    found = narrow(DEFAULT80, 3)
    assert found.width == 3
    assert set(found.paths) == {path for path in DEFAULT80.paths if max(path, default=0) < 3}
    assert narrow(DEFAULT80, 8) == DEFAULT80 == narrow(DEFAULT80, 16)
    assert named("default80", 1).paths[-1] == (0,) * 6


# --- Growing -----------------------------------------------------------------------------------


def random_acceptance(seed: int, width: int, depth: int) -> dict[template.Path, float]:
    """Falls along every path, as the chance to reach a node does."""
    rng = np.random.default_rng(seed)
    found = {(): 1.0}
    for length in range(1, depth + 1):
        for path in itertools.product(range(width), repeat=length):
            found[path] = found[path[:-1]] * rng.uniform(0.1, 0.9)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_no_other_tree_of_the_size_is_accepted_more_often(seed):
    acceptance = random_acceptance(seed, 2, 3)
    paths = [path for path in acceptance if path]
    best = max(
        sum(acceptance[path] for path in chosen)
        for chosen in itertools.combinations(paths, 5)
        if all(path[:-1] in (*chosen, ()) for path in chosen)
    )
    found = grow(acceptance.get, 5, width=2)
    assert found.num_nodes == 6
    assert sum(acceptance[path] for path in found.paths[1:]) == pytest.approx(best)


def test_growing_keeps_ancestors_and_the_limits():
    # A child that is better than its parent still needs it; ties go to the smaller path.
    acceptance = {(2,): 0.2, (2, 0): 0.9, (0,): 0.3, (1,): 0.1, (1, 0): 0.1, (3,): 0.0}
    assert grow(acceptance.get, 1).paths == ((), (0,))
    assert grow(acceptance.get, 3).paths == ((), (0,), (2,), (2, 0))
    assert grow(acceptance.get, 4).paths == ((), (0,), (1,), (2,), (2, 0))
    assert grow(acceptance.get, 2, width=2).paths == ((), (0,), (1,))
    assert grow(acceptance.get, 3, max_depth=1).max_depth == 1
    with pytest.raises(InputError, match=r"^num_nodes: 6 is out of range; allowed: 1 to the 5 "):
        grow(acceptance.get, 6)
    with pytest.raises(InputError, match=r"^num_nodes: 0 is out of range"):
        grow(acceptance.get, 0)


def test_templates_of_the_ablation_lie_inside_each_other():
    for width in (2, 4, 8, 16):
        family = [named(f"nodes{size}", width) for size in (20, 40, 80, 160)]
        assert [found.num_nodes - 1 for found in family] == [20, 40, 80, 160]
        assert all(found.width <= width for found in family)
        for small, large in itertools.pairwise(family):
            assert set(small.paths) < set(large.paths)
    assert named("nodes80", 16).width > 8
    # The estimate comes near the tree that was published.
    assert len(set(named("nodes80", 8).paths[1:]) & set(DEFAULT80.paths)) == 69
    # Chances of siblings do not exceed the chance of their parent.
    siblings = [estimated_acceptance((3, rank)) for rank in range(16)]
    assert sum(siblings) < estimated_acceptance((3,))
    assert siblings == sorted(siblings, reverse=True)


def test_unknown_names():
    with pytest.raises(InputError, match=r"^template: .nodes30. is not known .*nodes160"):
        named("nodes30", 8)
    with pytest.raises(InputError, match=r"^num_nodes: 20 is out of range; allowed: 1 to the 8 "):
        named("nodes20", 1)  # a chain of 8 at most


def test_measured_acceptance_is_a_share_of_all_rounds():
    reached = np.array([[10, 4, 3, 0, 4, 1], [10, 5, 1, 2, 0, 1]])
    found = measured_acceptance(SMALL, reached)
    assert found == {(0,): 0.45, (1,): 0.2, (0, 0): 0.1, (0, 1): 0.2, (1, 0): 0.1}
    assert grow(found.get, 3).paths == ((), (0,), (1,), (0, 1))
    assert set(measured_acceptance(SMALL, np.zeros(6, int)).values()) == {0.0}


def test_a_tree_grown_from_what_was_accepted_beats_one_that_was_not():
    """Twenty nodes of the published tree, chosen by measurement, on the prompts measured."""
    method = tiny.build("token_recycling")
    state, slots = generation.begin(tiny.params(), tiny.PROMPTS, method, tiny.STOP)
    state, _ = generation.advance(tiny.params(), state, slots, method, tiny.STOP)
    reached = np.asarray(state.inner.drafter.reached)
    grown = grow(measured_acceptance(DEFAULT80, reached).get, 20)
    assert set(grown.paths) < set(DEFAULT80.paths)
    drafter = recycling_drafter(tiny.TARGET, 8, grown)
    tuned = speculative("tuned", tiny.TARGET, drafter, "exact_match", SamplingConfig())
    rows = tiny.decode(tuned)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    estimated = tiny.decode(tiny.build("token_recycling", template="nodes20"))
    # The text is the same: the calls decide.
    calls = [sum(row.stats["target_calls"] for row in found) for found in (rows, estimated)]
    assert calls[0] < calls[1]
