"""Trees grown level by level: distributions, draw order, noise, caches and counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from decoding import generation, loop, methods, randomness
from decoding.sampling import SamplingConfig, log_probs
from decoding.speculative import sampled_tree, sources
from decoding.speculative.sampled_tree import Beam, tree_drafter
from models import cache as kv
from models import transformer
from tests.decoding import tiny

T1 = SamplingConfig(1.0)
PROMPTS = tiny.prompts((9, 1, 15, 4), vocab=5)
CONFIGS = tiny.SMALL_CONFIGS
MODELS = tiny.params(tiny.SMALL)
V = 5
SLOTS = BUFFER = 64
SYSTEMS = {
    "spectr": {"num_sequences": 3, "length": 3},
    "rsd_c": {"branching": "3-2-1"},
    "rsd_s": {"width": 3, "depth": 3},
    "dyspec": {"budget": 9, "threshold": 0.05},
    "top_tree": {"branching": "3-2-1"},
}


@functools.cache
def started(name: str, **options) -> tuple[loop.Method, loop.DecodeState]:
    method = methods.build(name, CONFIGS, T1, {**SYSTEMS[name], **options})
    return method, tiny.start(method, MODELS, PROMPTS, slots=SLOTS, buffer=BUFFER)


@functools.cache
def grown(expansion: str, widths: tuple[int, ...], merge: bool = False):
    """A tree of the draft model after each of PROMPTS, on the host."""
    source = sources.model_source(CONFIGS["draft"], T1)
    drafter = tree_drafter(source, expansion, widths, (), merge)
    _, state = started("rsd_c")
    return jax.device_get(jax.jit(drafter.propose)(MODELS, state.inner.drafter, state))


def path_tokens(tree, row: int, node: int) -> list[int]:
    """Drafted tokens from the root's child down to `node`."""
    found: list[int] = []
    while node > 0:
        found.append(int(tree.tokens[row, node]))
        node = int(tree.parent[row, node])
    return found[::-1]


EXPANDED = [
    ("independent", (3, 3, 3), False),
    ("independent", (3, 3, 3), True),
    ("without_replacement", (3, 6, 6), False),
    ("stochastic_beam", (3, 3, 3), False),
]


@pytest.mark.parametrize("expansion,widths,merge", EXPANDED, ids=str)
def test_the_distribution_at_every_node_is_the_draft_models_own(expansion, widths, merge):
    tree = grown(expansion, widths, merge).tree
    nodes = [
        (row, node)
        for row, node in itertools.product(range(4), range(tree.log_q.shape[1]))
        if tree.valid[row, node]
    ]
    texts = [PROMPTS[row] + path_tokens(tree, row, node) for row, node in nodes]
    logits = tiny.last_logits(CONFIGS["draft"], MODELS["draft"], texts, width=32)
    expected = log_probs(jnp.asarray(logits), T1)
    found = np.stack([tree.log_q[row, node] for row, node in nodes])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("expansion,widths,merge", EXPANDED, ids=str)
def test_the_tree_is_well_formed(expansion, widths, merge):
    draft = grown(expansion, widths, merge)
    tree = draft.tree
    assert (np.asarray(tree.parent)[:, 1:] < np.arange(1, tree.num_nodes)).all()
    offsets = np.cumsum([1, *widths])
    for row in range(4):
        for level, (a, b) in enumerate(itertools.pairwise(offsets)):
            valid = np.flatnonzero(tree.valid[row, a:b]) + a
            assert (tree.depth[row, valid] == level + 1).all()
        children = [
            (int(tree.parent[row, n]), int(tree.tokens[row, n]))
            for n in np.flatnonzero(tree.valid[row]) if n
        ]  # fmt: skip
        if expansion != "independent" or merge:
            assert len(set(children)) == len(children)  # no duplicate siblings
    assert draft.calls == len(widths)
    np.testing.assert_array_equal(draft.counters["tree_nodes"], tree.valid.sum(axis=1) - 1)


def test_more_children_than_tokens_leave_the_rest_invalid():
    """A nucleus of few tokens: only they are drafted."""
    log_q = jnp.log(jnp.asarray([[[0.6, 0.4, 0.0, 0.0]]]))
    keys = randomness.row_keys(0, jnp.arange(1))
    for expand in (sampled_tree.without_replacement, sampled_tree.stochastic_beam):
        level = expand(log_q, None, keys, 4)
        assert level.valid.sum() == 2
        assert sorted(np.asarray(level.tokens)[np.asarray(level.valid)].tolist()) == [0, 1]


def test_all_tokens_are_children_when_there_is_room():
    log_q = jnp.log(jnp.full((1, 1, 4), 0.25))
    level = sampled_tree.without_replacement(log_q, None, randomness.row_keys(1, jnp.arange(1)), 4)
    assert sorted(np.asarray(level.tokens)[0].tolist()) == [0, 1, 2, 3]


def test_conditional_gumbel_golden_numbers(monkeypatch):
    """Worked by hand: psi_s = .4, phi_s = -1.3, q = (.5, .3, .2), noise (.2, -.5, 1.0)."""
    q, noise = np.array([0.5, 0.3, 0.2]), np.array([0.2, -0.5, 1.0])
    monkeypatch.setattr(
        sampled_tree.randomness, "gumbel", lambda keys, size: jnp.asarray(noise)[None, None]
    )
    carry = Beam(jnp.asarray([[-1.3]]), jnp.asarray([[0.4]]))
    keys = randomness.row_keys(0, jnp.arange(1))
    level = sampled_tree.stochastic_beam(jnp.log(jnp.asarray(q))[None, None], carry, keys, 3)
    assert level.tokens[0].tolist() == [0, 2, 1]
    np.testing.assert_allclose(level.carry.psi[0], [0.4, -0.3445, -2.69648], atol=1e-4)
    np.testing.assert_allclose(level.carry.phi[0], [-1.99315, -2.90944, -2.50397], atol=1e-4)


def test_the_largest_child_keeps_its_parents_value_in_float32():
    """For log-probabilities down to -60."""
    rng = np.random.default_rng(0)
    phi = -60 * rng.random((200, 50))
    perturbed = jnp.asarray(phi + rng.gumbel(size=phi.shape), jnp.float32)
    maximum = perturbed.max(axis=1) + jnp.asarray(rng.normal(size=200), jnp.float32)
    shifted = sampled_tree.conditional_gumbel(perturbed, maximum)
    np.testing.assert_allclose(shifted.max(axis=1), maximum, atol=1e-5)
    assert np.isfinite(shifted).all()
    np.testing.assert_array_equal(shifted.argmax(axis=1), perturbed.argmax(axis=1))


def test_a_stochastic_beam_samples_sequences_without_replacement():
    """Two levels over two tokens: the ordered pair of beams has the Plackett-Luce law."""
    first = np.array([0.7, 0.3])
    second = np.array([[0.9, 0.1], [0.4, 0.6]])
    rows = 40_000
    keys = randomness.row_keys(5, jnp.arange(rows))

    @jax.jit
    def sample(keys):
        at = [randomness.at(keys, jnp.full((rows,), i), 0) for i in range(2)]
        log_q = jnp.broadcast_to(jnp.log(jnp.asarray(first)), (rows, 1, 2))
        one = sampled_tree.stochastic_beam(log_q, None, at[0], 2)
        log_q = jnp.log(jnp.asarray(second))[one.tokens]
        two = sampled_tree.stochastic_beam(log_q, one.carry, at[1], 2)
        start = jnp.take_along_axis(one.tokens, two.parent, axis=1)
        return start * 2 + two.tokens

    found = np.asarray(sample(keys))
    law = (first[:, None] * second).ravel()
    for a, b in itertools.permutations(range(4), 2):
        expected = law[a] * law[b] / (1 - law[a])
        share = ((found[:, 0] == a) & (found[:, 1] == b)).mean()
        assert share == pytest.approx(expected, abs=4 * 0.5 / rows**0.5)


def test_merged_and_separate_layouts_give_the_same_tokens():
    stop = generation.stop_config(tiny.SMALL, 20, ())
    runs = []
    for layout in ("merged", "separate"):
        options = {**SYSTEMS["spectr"], "layout": layout}
        method = methods.build("spectr", CONFIGS, T1, options)
        runs.append(generation.generate(MODELS, PROMPTS, method, stop))
    merged, separate = runs
    assert tiny.texts(merged) == tiny.texts(separate)
    nodes = [sum(row.stats["tree_nodes"] for row in rows) for rows in runs]
    assert nodes[0] < nodes[1]  # duplicates did occur


@pytest.mark.parametrize(
    "name,options",
    [
        ("spectr", {"num_sequences": 1, "length": 3}),
        ("rsd_c", {"branching": "1-1-1"}),
        ("rsd_s", {"width": 1, "depth": 3}),
    ],
    ids=str,
)
def test_a_tree_of_one_path_is_the_chain_token_for_token(name, options):
    """Under the same noise: drafts, acceptance tests and corrections."""
    stop = generation.stop_config(tiny.SMALL, 20, ())
    chain = methods.build("speculative_sampling", CONFIGS, T1, {"num_draft": 3})
    tree = methods.build(name, CONFIGS, T1, options)
    expected, found = (
        generation.generate(MODELS, PROMPTS, method, stop) for method in (chain, tree)
    )
    assert tiny.texts(found) == tiny.texts(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.stats["accepted"] == b.stats["accepted"]
        assert a.stats["draft_calls"] == b.stats["draft_calls"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_caches_after_rounds_equal_a_prefill(name):
    """Target and draft, after five rounds of rejections and acceptances."""
    method, _ = started(name)
    state = tiny.start(method, MODELS, PROMPTS, slots=SLOTS, buffer=BUFFER)
    stop = generation.stop_config(tiny.SMALL, 30, ())
    state = loop.advance(MODELS, state, jnp.int32(5), method=method, stop=stop, slots=SLOTS)
    for role, cache in (("target", state.inner.target), ("draft", state.inner.drafter)):
        config = CONFIGS[role]
        whole = jax.jit(lambda p, t, c, config=config: transformer.apply(config, p, t, cache=c))
        fresh = whole(MODELS[role], state.tokens[:, :40], kv.create(config, 4, SLOTS)).cache
        for row in range(4):
            held = int(cache.lengths[row])
            assert held >= int(state.lengths[row]) - 2
            for a, b in zip(cache.keys + cache.values, fresh.keys + fresh.values, strict=True):
                np.testing.assert_allclose(a[row, :, :held], b[row, :, :held], atol=1e-4)


def naive_ngram(text: list[int], path: list[int]) -> np.ndarray:
    """8:2:1 of what followed the last pair, the last token and anything in `text`."""
    context = (text + path)[-2:]
    after = {
        "two": [text[i + 1] for i in range(1, len(text) - 1) if text[i - 1 : i + 1] == context],
        "one": [text[i + 1] for i in range(len(text) - 1) if text[i] == context[-1]],
        "any": text[1:],
    }
    if len(context) < 2:
        after["two"] = []
    counts = np.zeros(V)
    for weight, found in zip((8, 2, 1), after.values(), strict=True):
        for token in found:
            counts[token] += weight / len(found)
    return counts / counts.sum() if counts.any() else np.full(V, 1 / V)


def test_ngram_distributions():
    drafter = tree_drafter(sources.ngram_source(V, T1), "without_replacement", (3, 6))
    _, state = started("rsd_c")
    tree = jax.device_get(jax.jit(drafter.propose)(MODELS, (), state)).tree
    for row, node in itertools.product(range(4), range(4)):
        if tree.valid[row, node]:
            expected = naive_ngram(PROMPTS[row], path_tokens(tree, row, node))
            np.testing.assert_allclose(np.exp(tree.log_q[row, node]), expected, atol=1e-5)


def test_nothing_is_drafted_beyond_the_end_of_text():
    source = sources.model_source(CONFIGS["draft"], T1)
    _, state = started("rsd_c")
    for expansion in ("independent", "without_replacement", "stochastic_beam"):
        drafter = tree_drafter(source, expansion, (4, 4), (2,))
        tree = jax.device_get(jax.jit(drafter.propose)(MODELS, state.inner.drafter, state)).tree
        ended = np.argwhere(tree.valid & (tree.tokens == 2) & (tree.depth == 1))
        assert len(ended)
        for row, node in ended:
            assert not (tree.valid[row] & (tree.parent[row] == node)).any()


def test_probabilities_sum_to_one():
    tree = grown("stochastic_beam", (3, 3, 3)).tree
    np.testing.assert_allclose(special.logsumexp(tree.log_q, axis=-1)[:, 0], 0, atol=1e-5)
