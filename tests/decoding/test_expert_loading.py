"""Simulated memory tiers: least recently used experts, the timeline by hand, and what bounds it."""

import collections
import itertools

import numpy as np
import pytest

from decoding import expert_loading
from decoding.expert_loading import MemoryTiers, Prediction, simulate
from models.errors import InputError

L, E, K = 4, 8, 2
PAIRS = [(1, 2), (1, 3)]


def tokens(*rows: list[list[int]]) -> np.ndarray:
    return np.asarray(rows)


def routing(length: int = 40, seed: int = 0) -> np.ndarray:
    """Distinct experts, some much likelier than others, for every token and layer."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(E, 0.5), L)
    return np.stack(
        [[rng.choice(E, K, replace=False, p=(q + 0.02) / (q + 0.02).sum()) for q in p]
         for _ in range(length)]
    )  # fmt: skip


def guesses(experts: np.ndarray, right: float, seed: int = 1) -> list[Prediction]:
    """Predictions of which a share is right."""
    rng = np.random.default_rng(seed)
    found = []
    for issued, layer in PAIRS:
        said = experts[:, layer].copy()
        wrong = rng.random(said.shape) >= right
        said[wrong] = (said[wrong] + 1 + rng.integers(E - 1, size=wrong.sum())) % E
        found.append(Prediction(issued, layer, said))
    return found


def test_a_timeline_by_hand():
    """One layer of one expert that holds two: 0 and 1 are brought, 0 is there, 2 evicts 1."""
    experts = tokens([[0]], [[1]], [[0]], [[2]], [[1]])
    found = simulate(experts, [], MemoryTiers(2, load=3.0, compute=1.0))
    assert found == (5 * 1 + 4 * 3, 12.0, 5, 1, 4)


def test_a_prediction_overlaps_with_computing():
    """Layer 1's expert comes while layer 0 computes: it stalls for what is left of its load."""
    experts = tokens([[0], [5]])
    said = [Prediction(0, 1, np.asarray([[5]]))]
    for load, stall in ((0.5, 0.5), (1.0, 1.0 + 0.0), (3.0, 3.0 + 2.0)):
        alone = simulate(experts, [], MemoryTiers(1, load))
        found = simulate(experts, said, MemoryTiers(1, load))
        assert alone.seconds == 2 + 2 * load
        # The first expert is needed at once and goes first; the second begins behind it.
        assert found.stalled == pytest.approx(stall)
        assert found.loads == 2


def test_what_is_needed_goes_before_what_is_predicted_but_after_what_has_begun():
    # Layer 0 says 6 and 7 of layer 2; layer 1 needs 1.
    experts = tokens([[0], [1], [6]])
    said = [Prediction(0, 2, np.asarray([[6, 7]]))]
    found = simulate(experts, said, MemoryTiers(2, load=2.0, compute=1.0))
    # 0 needed: 0-2. 6 begins at 2 and ends at 4. Layer 1 begins at 3 and waits for 6 to end, then
    # for its own: 6. Layer 1 computes to 7, when 7 has begun; layer 2 finds 6.
    assert found == (8.0, 2.0 + 3.0, 3, 1, 4)


@pytest.mark.parametrize("slots", [2, 3, 5, 8])
def test_without_predictions_loads_are_those_of_an_lru_cache(slots):
    experts = routing()
    held = [collections.OrderedDict() for _ in range(L)]
    misses = 0
    for token, layer in itertools.product(range(len(experts)), range(L)):
        cache, wanted = held[layer], experts[token, layer].tolist()
        for expert in wanted:
            if expert in cache:
                cache.move_to_end(expert)
        for expert in wanted:
            if expert not in cache:
                misses += 1
                if len(cache) == slots:
                    cache.pop(next(e for e in cache if e not in wanted))
                cache[expert] = None
    found = simulate(experts, [], MemoryTiers(slots, load=0.7))
    assert found.loads == misses
    assert found.present == found.needed - misses
    assert found.stalled == pytest.approx(0.7 * misses)
    assert found.seconds == pytest.approx(0.7 * misses + experts.shape[0] * L)


def test_speed_rises_with_the_share_of_right_predictions():
    """Section 6, item 7: monotone in the hit rate, of which the oracle's is 1."""
    experts = routing(200)
    tiers = MemoryTiers(3, load=0.5)
    rates, seconds = [], []
    for right in (0.0, 0.3, 0.6, 0.8, 1.0):
        said = guesses(experts, right)
        rates.append(expert_loading.recall(experts, said))
        seconds.append(simulate(experts, said, tiers).seconds)
    assert rates == sorted(rates) and rates[-1] == 1
    assert seconds == sorted(seconds, reverse=True)
    alone = simulate(experts, [], tiers)
    assert seconds[-1] < alone.seconds
    assert expert_loading.recall(experts, []) == 0
    # Nothing beats computing alone, nor hiding the smaller of the two behind the larger.
    assert seconds[-1] >= 200 * L
    assert alone.seconds / seconds[-1] <= 1 + 0.5 * K


def test_memory_for_all_experts_loads_each_once_at_most():
    experts = routing()
    found = simulate(experts, guesses(experts, 1.0), MemoryTiers(E, load=2.0))
    assert found.loads == sum(len(np.unique(experts[:, layer])) for layer in range(L))


def test_the_previous_token_says_what_it_needed():
    experts = routing(5)
    said = expert_loading.of_previous_token(experts, PAIRS)
    assert [(s.issued, s.layer) for s in said] == PAIRS
    assert (said[0].experts[0] == -1).all()
    np.testing.assert_array_equal(said[1].experts[1:], experts[:-1, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryTiers(0, 1.0), "slots: 0"),
        (lambda: MemoryTiers(2, 0.0), "load: 0.0"),
        (lambda: simulate(routing(2), [], MemoryTiers(1, 1.0)), "slots: 1 must be at least the 2"),
        (
            lambda: simulate(routing(2), [Prediction(2, 2, routing(2)[:, 2])], MemoryTiers(2, 1.0)),
            "predictions: layer 2",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
