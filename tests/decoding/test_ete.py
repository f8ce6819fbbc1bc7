"""Explore-then-exploit: theorems on enumerated distributions, the rule against a naive loop."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, methods, stopping
from decoding.sampling import SamplingConfig
from decoding.unmasking import exact_joint, explore
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.explore import Exploration
from decoding.unmasking.method import unmasking
from models import sharding
from models.errors import InputError
from tests.decoding import masked, tiny
from tests.decoding.exact_laws import p_value
from tests.decoding.masked import EOS, MASK, NEW
from tests.models import random_models

V, N = 3, 6  # of the enumerated distributions
ORACLE = exact_joint.config(V)
COPIES = 64


def oracle_method(temperature=1.0, block=N, horizon=0, **how):
    schedule = Schedule(block, horizon=horizon)
    return unmasking(
        "ete", ORACLE, SamplingConfig(temperature=temperature), schedule,
        explore.explore(Exploration(**how), schedule, ()), exact_joint.exact(ORACLE),
    )  # fmt: skip


def law_of(joint):
    """Probabilities [V] * N of a joint."""
    law = np.zeros((V,) * N)
    law[tuple(joint["texts"].T)] = np.exp(joint["log_p"].astype(np.float64))
    return law / law.sum()


def conditional(law, known):
    """The joint given `known` (token or None, by position), as one array of N axes."""
    index = tuple(slice(None) if token is None else slice(token, token + 1) for token in known)
    part = law[index]
    return part / part.sum()


def marginal(part, i):
    return part.sum(axis=tuple(j for j in range(N) if j != i))


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def rounds_of(method, joint, copies=COPIES, seed=0):
    """Every round of every row: (row, canvas before with None for masks, written, its counters)."""
    params, stop = {"target": joint}, stopping.StopConfig(N)
    state, slots = generation.begin(params, [[0]] * copies, method, stop, seed=seed)
    found = []
    while bool(state.active.any()):
        before = jax.device_get((state.tokens, state.active, state.stats.extra))
        state, slots = generation.advance(params, state, slots, method, stop, rounds=1)
        after = jax.device_get((state.tokens, state.stats.extra))
        for row in np.flatnonzero(before[1]):
            old, new = before[0][row, 1 : 1 + N], after[0][row, 1 : 1 + N]
            known = [None if token == V else int(token) for token in old]
            written = {i: int(new[i]) for i in range(N) if old[i] == V and new[i] != V}
            spent = {k: after[1][k][row] - before[2][k][row] for k in after[1]}
            found.append((row, known, written, spent))
    texts = np.asarray(state.tokens)[:, 1 : 1 + N]
    assert (texts < V).all()
    return found, texts


RULES = {
    "threshold": {"threshold": 0.7},
    "factor": {"rule": "factor", "factor": 0.8},
    "far": {"threshold": 0.6, "block": 2, "horizon": 2, "score": "entropy"},
}


@pytest.mark.parametrize("rule", RULES)
def test_ledger_budgets_and_the_bound_on_total_correlation(rule):
    """Section 6, items 1 to 4 and 8, in every round of a few dozen samples."""
    how = RULES[rule]
    joint = exact_joint.markov_chain(V, N, sharpness=2.0, seed=1)
    law = law_of(joint)
    found, _ = rounds_of(oracle_method(1.0, **how), joint)
    tight = 0
    for _, known, written, spent in found:
        part = conditional(law, known)
        laws = {i: marginal(part, i) for i in written}
        nats = {i: -np.log(laws[i][token]) for i, token in written.items()}
        total = spent[explore.EXPLOITED_NATS] + spent[explore.EXPLORED_NATS]
        assert total == pytest.approx(sum(nats.values()), abs=1e-5)
        assert spent[explore.EXPLOITED] + spent[explore.EXPLORED] == len(written)
        entropies = [entropy(p) for p in laws.values()]
        bound = sum(entropies) - max(entropies)
        assert spent[explore.ERROR_BOUND] == pytest.approx(bound, abs=1e-5)
        keep = part.sum(axis=tuple(j for j in range(N) if j not in written))
        correlation = sum(entropies) - entropy(keep)
        assert correlation <= bound + 1e-6
        tight += correlation > 0.5 * bound > 0.01
    assert tight  # the bound is not a trivial one
    kinds = [
        np.array([spent[name] for *_, spent in found])
        for name in (explore.EXPLOITED, explore.EXPLOITED_NATS, explore.EXPLORED,
                     explore.EXPLORED_NATS)
    ]  # fmt: skip
    assert kinds[1].sum() / kinds[0].sum() < 0.8 * kinds[3].sum() / kinds[2].sum()


def test_sure_tokens_carry_less_than_the_factor_and_rounds_follow():
    """R >= I / B for every sample, at temperature 0, whatever the distribution."""
    for seed, factor in itertools.product(range(3), (0.3, 0.8)):
        joint = exact_joint.markov_chain(V, N, sharpness=3.0, seed=seed)
        method = oracle_method(0.0, rule="factor", factor=factor, score="random")
        found, _ = rounds_of(method, joint, copies=COPIES, seed=seed)
        exploit = np.array([spent[explore.EXPLOITED_NATS] for *_, spent in found])
        starved = np.array([spent[explore.STARVED] for *_, spent in found])
        assert (exploit < factor).all() and exploit.max() > 0
        assert (exploit[starved > 0] == 0).all()
        for row in range(COPIES):
            mine = np.array([r == row for r, *_ in found])
            assert (mine & (starved == 0)).sum() >= exploit[mine].sum() / factor


def test_one_token_a_round_at_temperature_one_is_the_joint():
    joint = exact_joint.markov_chain(V, N, sharpness=1.5, seed=2)
    method = oracle_method(1.0, threshold=1.0, when="every", score="entropy")
    copies = 8192
    rows = generation.generate({"target": joint}, [[0]] * copies, method, stopping.StopConfig(N))
    assert all(row.stats["target_calls"] == N for row in rows)
    law = law_of(joint)
    texts = [tuple(row.token_ids) for row in rows]
    assert p_value(_by_ends(texts), _ends(law)[None]) > 1e-3
    assert p_value(_by_ends(texts), np.roll(_ends(law), 1)[None]) < 1e-6
    # The chain rule: what was written one by one is the text's own information.
    nats = [row.stats[explore.EXPLORED_NATS] + row.stats[explore.EXPLOITED_NATS] for row in rows]
    np.testing.assert_allclose(nats, [-np.log(law[text]) for text in texts], rtol=2e-6, atol=2e-6)


def _ends(law):
    """Of the first and the last two tokens, for which a few thousand samples are enough."""
    return law.sum(axis=(1, 2, 3)).ravel()


def _by_ends(texts):
    counts = np.zeros((V, V, V), int)
    np.add.at(counts, tuple(np.array(texts)[:, [0, 4, 5]].T), 1)
    return counts.reshape(1, -1)


def cascade():
    """Token 0 says what tokens 1 to 3 are; 4 and 5 are nearly known, and say nothing."""
    texts = np.array(list(itertools.product(range(V), repeat=N)))
    a = texts[:, 0]
    follows = (texts[:, 1] == (a > 0)) & (texts[:, 2] == a % 2) & (texts[:, 3] == (a < 2))
    coins = np.prod([np.choose(texts[:, i], (0.85, 0.1, 0.05)) for i in (4, 5)], axis=0)
    return exact_joint.joint(texts, follows * coins)


def test_one_uncertain_token_beside_certain_ones_keeps_the_joint():
    method = oracle_method(1.0, threshold=1.0, when="every", score="entropy")
    rows = generation.generate(
        {"target": cascade()}, [[0]] * 8192, method, stopping.StopConfig(N), seed=1
    )
    # Token 0 is explored, then three are sure, with one of the coins explored beside them.
    assert {row.stats["target_calls"] for row in rows} == {3}
    texts = [tuple(row.token_ids) for row in rows]
    assert p_value(_by_ends(texts), _ends(law_of(cascade()))[None]) > 1e-3


def test_exploring_sets_off_more_than_its_controls():
    """Item 7: tokens that are sure after one token was written, by what was written."""
    after = {}
    for score in ("entropy", "frontier", "confident", "random"):
        method = oracle_method(0.0, threshold=0.9, when="every", score=score)
        found, _ = rounds_of(method, cascade(), copies=8)
        second = [
            spent[explore.EXPLOITED] for _, known, _, spent in found if known.count(None) == 5
        ]
        after[score] = np.mean(second)
    assert after["entropy"] == after["frontier"] == 3
    assert after["confident"] == 0
    assert after["random"] < 3


# The rule itself, on a tiny model.


def build(temperature=0.0, **options):
    return tiny.build("ete", temperature, **{"block_length": 8, "early_stop": False, **options})


def naive(prompt, how: Exploration, *, horizon=2, ratio=0.5, weight=0.1):
    """Section 2.9 for one row at temperature 0, and section 2.6 for `how.look_ahead` above 1."""
    model, L = masked.Reference(), 8
    canvas = np.array([*prompt, *[MASK] * NEW])
    start, end = len(prompt), len(prompt) + NEW
    calls = explored_tokens = ahead = 0
    proposals: list[tuple] = []

    def predict(text):
        return masked.softmax(model(text, 0, end))

    while (canvas[start:] == MASK).any():  # masks in a prompt stay
        b0 = int(np.flatnonzero(canvas[start:] == MASK)[0]) // L
        blocks, j = [b0], b0
        while len(blocks) <= horizon and start + (j + 1) * L < end:
            inside = canvas[start + j * L : start + (j + 1) * L]
            if (inside != MASK).sum() < ratio * L:
                break
            j += 1
            blocks.append(j)
        spans = [range(start + b * L, start + (b + 1) * L) for b in blocks]
        calls += 1
        if proposals:
            scores, laws = [], []
            for position, token, log_q in proposals:
                text = canvas.copy()
                text[position] = token
                laws.append(predict(text))
                sure = sum(
                    laws[-1][i].max() >= how.threshold
                    for span in spans for i in span if text[i] == MASK
                )  # fmt: skip
                scores.append(log_q + weight * sure)
            best = int(np.argmax(scores))
            canvas[proposals[best][0]], law = proposals[best][1], laws[best]
            explored_tokens += 1
            proposals = []
        else:
            law = predict(canvas)
        peak, token = law.max(axis=1), law.argmax(axis=1)
        H = np.array([entropy(row) for row in law])
        masks = [[i for i in span if canvas[i] == MASK] for span in spans]
        far = {i for span in masks[1:] for i in span} if masks else set()
        free = [i for span in masks for i in span]
        if how.guard:
            free = [i for i in free if i not in far or token[i] != EOS]
        if how.rule == "threshold":
            sure = [i for i in free if peak[i] >= how.threshold]
        else:
            ranked = sorted(free, key=lambda i: -peak[i])
            fits = [n for n in range(1, len(ranked) + 1)
                    if (n + 1) * (1 - peak[ranked[n - 1]]) < how.factor]  # fmt: skip
            sure = ranked[: max(fits, default=0)]
        chosen, held = [], None
        lively = sum(map(bool, masks))
        if how.when == "every" or (how.when == "starved" and len(sure) < how.trigger * lively):
            for number, span in enumerate(masks):
                left = [i for i in span if i not in sure]
                likely = [i for i in left if i in free and peak[i] >= how.least]
                if number == 0 and not likely:
                    likely = left
                if not likely:
                    continue
                near = span[: how.frontier]
                order = sorted(likely, key=lambda i: (i not in near, -H[i]))
                if number == 0 and how.look_ahead > 1 and len(likely) > 1:
                    proposals = [(i, token[i], np.log(peak[i])) for i in order[: how.look_ahead]]
                    held = max(H[i] for i, *_ in proposals)
                    continue
                S = [H[i] for i in [*sure, *chosen, order[0]]] + ([] if held is None else [held])
                if number == 0 or sum(S) - max(S) <= how.error_budget:
                    chosen.append(order[0])
        if not sure and not chosen and held is None:
            chosen = [max(masks[0], key=peak.__getitem__)]
        for i in {*sure, *chosen}:
            canvas[i] = token[i]
        explored_tokens += len(chosen)
        ahead += len({*sure, *chosen} & far)
    text = canvas[start:].tolist()
    text = text[: text.index(EOS) + 1] if EOS in text else text
    return text, calls, explored_tokens, ahead


CASES = {
    "threshold": Exploration(threshold=0.4),
    "factor": Exploration(rule="factor", factor=0.95, trigger=1),
    "every": Exploration(threshold=0.4, when="every", error_budget=4.0, guard=False),
    "look_ahead": Exploration(threshold=0.4, look_ahead=3, trigger=1, error_budget=4.0),
}
NAMES = {"when": "explore", "guard": "eos_guard", "look_ahead": "candidates"}


def options_of(how):
    changed = {
        field.name: getattr(how, field.name)
        for field in dataclasses.fields(how)
        if getattr(how, field.name) != field.default
    }
    return {NAMES.get(name, name): value for name, value in changed.items()}


@functools.cache
def decoded(case):
    return masked.decode(build(**options_of(CASES[case])))


@pytest.mark.parametrize("case", CASES)
def test_texts_and_ledgers_are_those_of_a_naive_loop(case):
    rows = decoded(case)
    for prompt, row in zip(tiny.PROMPTS[:5], rows):
        text, calls, explored, ahead = naive(prompt, CASES[case])
        assert row.token_ids == text
        stats = row.stats
        assert stats["target_calls"] == calls
        assert stats[explore.EXPLORED] + stats.get("look_ahead_tokens", 0) == explored
        assert stats[explore.AHEAD] == ahead
        assert 1 < calls < NEW
    assert sum(row.stats[explore.AHEAD] for row in rows) > 0
    if case == "look_ahead":
        assert all(
            row.stats["target_positions"]
            == (row.stats["target_calls"] + 2 * row.stats["look_ahead_tokens"])
            * (len(row.prompt_ids) + NEW)
            for row in rows
        )


def test_no_end_of_text_is_written_beyond_the_current_block():
    """Token 1 repeats token 0; all others are an end of text, nearly for sure."""
    texts = np.array(list(itertools.product(range(V), repeat=N)))
    repeats = (texts[:, 0] == texts[:, 1]) & (texts[:, 0] < 2)
    ends = np.prod([np.choose(texts[:, i], (0.04, 0.01, 0.95)) for i in range(2, N)], axis=0)
    params = {"target": exact_joint.joint(texts, repeats * ends)}
    config, schedule = exact_joint.config(V, (2,)), Schedule(2, horizon=2)
    for guard, ahead in ((True, 0), (False, 2)):
        method = unmasking(
            "ete", config, SamplingConfig(temperature=0.0), schedule,
            explore.explore(Exploration(guard=guard), schedule, (2,)), exact_joint.exact(config),
        )  # fmt: skip
        row = generation.generate(params, [[0]], method, stopping.StopConfig(N))[0]
        assert row.token_ids == [0, 0, 2, 2, 2, 2]
        assert row.stats[explore.AHEAD] == ahead


def test_most_confident_one_by_one_is_plain_unmasking():
    plain = masked.decode(tiny.build("llada", block_length=8, early_stop=False))
    rows = masked.decode(build(explore="every", threshold=1, horizon=0, score="confident"))
    assert tiny.texts(rows) == tiny.texts(plain)
    assert all(row.stats["target_calls"] == NEW for row in rows)
    # And without exploring it is the threshold rule.
    rows = masked.decode(build(explore="never", threshold=0.3, horizon=0))
    rule = tiny.build("llada", block_length=8, early_stop=False, rule="threshold", threshold=0.3)
    expected = masked.decode(rule)
    assert tiny.texts(rows) == tiny.texts(expected)
    calls = [row.stats["target_calls"] for row in rows]
    assert calls == [row.stats["target_calls"] for row in expected]


def test_a_prefix_cache_changes_nothing_where_it_is_exact():
    """In a model of one layer keys and values depend on their own token alone."""
    config = random_models.BASE.replace(
        num_layers=1, num_kv_heads=random_models.BASE.num_heads, causal=False, mask_token_id=1,
        eos_token_ids=(2,), family="llada",
    )  # fmt: skip
    params = {"target": random_models.params(config)}
    stop = stopping.StopConfig(NEW, (2,))
    found = {}
    for cache in ("none", "prefix", "dual"):
        method = methods.build(
            "ete", {"target": config}, SamplingConfig(temperature=0.0),
            {"block_length": 8, "threshold": 0.2, "cache": cache, "early_stop": False},
        )  # fmt: skip
        found[cache] = generation.generate(params, tiny.PROMPTS, method, stop)
    for cache in ("prefix", "dual"):
        assert tiny.texts(found[cache]) == tiny.texts(found["none"])
        for mine, plain in zip(found[cache], found["none"]):
            assert mine.stats["target_calls"] == plain.stats["target_calls"]
            assert mine.stats[explore.EXPLORED] == plain.stats[explore.EXPLORED]
            assert mine.stats["target_positions"] <= plain.stats["target_positions"]
        full = [sum(row.stats["full_calls"] for row in found[which]) for which in (cache, "none")]
        assert full[0] < full[1]


def test_rows_depend_neither_on_neighbours_nor_on_devices():
    method = build(1.0, threshold=0.4)
    rows = masked.decode(method)
    for i in (1, 4):
        alone = masked.decode(method, [tiny.PROMPTS[i]], row_ids=[i])
        assert alone[0].token_ids == rows[i].token_ids
    mesh = sharding.make_mesh(4, 2)
    placed = jax.device_put(
        masked.params()["target"], sharding.param_shardings(masked.CONFIG, mesh)
    )
    for chosen, expected in ((method, rows), (build(**options_of(CASES["look_ahead"])), None)):
        split = generation.generate(
            {"target": placed}, tiny.PROMPTS, chosen, masked.STOP, mesh=mesh
        )
        assert tiny.texts(split) == tiny.texts(expected or decoded("look_ahead"))


def test_sure_tokens_by_factor_are_none_when_none_is_sure_enough():
    how = Exploration(rule="factor", factor=0.5)
    among = jnp.asarray([[True] * 4, [True, True, True, False]])
    peak = jnp.asarray([[0.7, 0.6, 0.5, 0.4], [0.99, 0.9, 0.8, 1.0]])
    found = explore.sure_tokens(how, among, peak)
    assert found.tolist() == [[False] * 4, [True, True, False, False]]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"factor": 1.0}, "factor: 1.0 must be above 0 and below 1"),
        ({"threshold": 1.5}, "threshold: 1.5 must be between 0 and 1"),
        ({"least": -0.5}, "least: -0.5 must be between 0 and 1"),
        ({"open_ratio": 0}, "open_ratio: 0.0 must be above 0 and at most 1"),
        ({"block_length": 0}, "horizon: 2 given with block_length 0, one block; allowed: 0"),
        ({"candidates": 2, "cache": "prefix"}, "candidates: 2 need cache=none; given: prefix"),
        ({"explore": "often"}, "explore: 'often' is not known"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as error:
        build(**options)
    assert message in str(error.value)
    with pytest.raises(InputError, match="candidates: 4 at temperature 1: the best of several"):
        build(1.0, candidates=4)
