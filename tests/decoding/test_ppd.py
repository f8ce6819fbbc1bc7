"""Parallel prompt decoding: the published trees, text, caches, and which prompt tokens count."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, stopping
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig
from decoding.speculative import prompt_trees
from decoding.speculative.method import speculative
from decoding.speculative.ppd import prompt_drafter
from decoding.speculative.prompt_trees import SparseTree
from models import cache as kv
from models import prompt_tokens, transformer
from models.errors import InputError
from models.prompt_tokens import PromptTokensConfig
from tests.decoding import exact_laws, tiny

TREES = (
    SparseTree(((0,), (1,)), (3, 2)),
    SparseTree(((0,), (1,), (0, 0), (0, 1)), (2, 3, 1, 2)),
    SparseTree(((0,), (2,), (0, 0), (2, 1), (0, 0, 0)), (1, 2, 3, 1, 2)),
)
K = 4


# --- Trees -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit", "sizes", "prompts", "histograms", "objective", "corrected"),
    [
        ("vicuna_7b", 60, (10, 20, 20), (30, 40, 40), ({2: 20}, {2: 20}), 1.0619, 1.2446),
        ("vicuna_7b", 75, (10, 25, 25), (30, 50, 50), ({2: 25}, {2: 25}), 1.1182, None),
        ("vicuna_7b", 105, (10, 33, 34), (30, 72, 71),
         ({2: 27, 3: 6}, {2: 31, 3: 3}), 1.1841, 1.3667),
        ("mobilellama_1_4b", 75, (10, 26, 26), (30, 49, 49), None, None, None),
        ("mobilellama_1_4b", 105, (10, 35, 36), (30, 70, 69), None, None, None),
        ("mobilellama_1_4b", 285, (10, 84, 89), (30, 201, 196), None, None, None),
    ],
)  # fmt: skip
def test_published_trees_are_rebuilt(name, limit, sizes, prompts, histograms, objective, corrected):
    marginals = np.asarray(prompt_trees.PUBLISHED[name])
    found = prompt_trees.plan(marginals, limit, dead_end=True)
    assert found.sizes == sizes
    assert tuple(sum(tree.prompts) for tree in found.trees) == prompts
    if histograms:
        counted = tuple(dict(collections.Counter(tree.prompts)) for tree in found.trees[1:])
        assert counted == histograms
    if objective:
        assert found.tokens_per_call - 1 == pytest.approx(objective, abs=5e-5)
    if corrected:
        right = prompt_trees.plan(marginals, limit)
        assert right.sizes == sizes
        assert right.tokens_per_call - 1 == pytest.approx(corrected, abs=5e-5)
        assert sum(right.occupancy) == pytest.approx(1)


def test_trees_are_connected_and_within_their_limit():
    rng = np.random.default_rng(0)
    marginals = np.sort(rng.dirichlet(np.ones(12), 3)[:, :6])[:, ::-1]
    found = prompt_trees.plan(marginals, 40)
    for state, tree in enumerate(found.trees, start=1):
        assert max(map(len, tree.paths)) <= state
        assert all(len(p) == 1 or p[:-1] in tree.paths for p in tree.paths)
        assert all(1 <= k <= 3 for k in tree.prompts)
    assert len(found.trees[2].paths) + sum(found.trees[2].prompts) <= 40
    small = prompt_trees.plan(marginals, 8)
    assert prompt_trees.num_inputs(small.trees) == 1 + 3 + 8
    larger = prompt_trees.plan(marginals, 80)
    assert larger.tokens_per_call >= found.tokens_per_call


def test_prompt_tokens_where_they_serve_beat_as_many_everywhere_and_at_random():
    marginals = prompt_trees.PUBLISHED["vicuna_7b"]
    for limit in (20, 105):
        plans = {name: prompt_trees.shaped(name, marginals, limit) for name in prompt_trees.SHAPES}
        order = [plans[name].tokens_per_call for name in ("dynamic", "uniform", "random", "chain")]
        assert order == sorted(order, reverse=True) and len(set(order)) == 4
        for name in ("uniform", "random"):
            assert prompt_trees.num_inputs(plans[name].trees) <= 4 + limit
        for tree in plans["uniform"].trees:
            assert len(set(tree.prompts)) == 1
        for mine, planned in zip(plans["random"].trees, plans["dynamic"].trees, strict=True):
            assert mine.paths == planned.paths and sum(mine.prompts) == sum(planned.prompts)
            assert set(mine.prompts) <= {1, 2, 3}
    assert [tree.paths for tree in plans["chain"].trees] == [
        ((0,),), ((0,), (0, 0)), ((0,), (0, 0), (0, 0, 0)),
    ]  # fmt: skip


def test_a_plan_promises_what_a_simulated_text_gives():
    """Ranks drawn from the marginals, round after round: tokens a call and states."""
    marginals = np.asarray(prompt_trees.PUBLISHED["vicuna_7b"])
    found = prompt_trees.plan(marginals, 60)
    rng = np.random.default_rng(0)
    cumulative, rounds = marginals.cumsum(axis=1), 40_000
    drawn = (rng.random((rounds, 3, 1)) > cumulative).sum(axis=2)
    state, tokens, states = 3, 0, np.zeros(4)
    trees = [dict(zip(tree.paths, tree.prompts, strict=True)) for tree in found.trees]
    for row in drawn.tolist():
        states[state] += 1
        tree, depth, state = trees[state - 1], 0, 3
        while (path := tuple(row[: depth + 1])) in tree and depth < 3:
            depth, state = depth + 1, tree[path]
        tokens += 1 + depth
    assert tokens / rounds == pytest.approx(found.tokens_per_call, abs=0.02)
    np.testing.assert_allclose(states[1:] / rounds, found.occupancy, atol=0.01)


def test_embeddings_of_one_prompt_token_take_places():
    marginals = np.asarray(prompt_trees.PUBLISHED["vicuna_7b"])
    found = prompt_trees.plan(marginals, 60, ensemble=2)
    assert prompt_trees.num_inputs(found.trees, 2) <= 1 + 6 + 60
    assert found.tokens_per_call < prompt_trees.plan(marginals, 60).tokens_per_call


def test_marginals_are_read_from_a_directory(tmp_path):
    file = tmp_path / prompt_trees.MARGINALS_FILE
    file.write_text('{"marginals": [[0.5, 0.25], [0.25, 0.125]]}')
    assert prompt_trees.read_marginals(tmp_path) == ((0.5, 0.25), (0.25, 0.125))
    built = tiny.build("ppd", limit=8, marginals=str(tmp_path))
    assert built.name == "ppd"
    file.write_text('{"marginals": [[1.5]]}')
    with pytest.raises(InputError, match="no marginals"):
        prompt_trees.read_marginals(tmp_path)
    with pytest.raises(InputError, match="must be one of vicuna_7b"):
        prompt_trees.read_marginals(tmp_path / "nowhere")
    with pytest.raises(InputError, match="trained prompt tokens"):
        tiny.build("ppd", marginals="part")
    with pytest.raises(InputError, match="limit: 0 must be at least 8"):
        tiny.build("ppd", limit=0)


def test_bad_marginals_and_limits_are_refused():
    with pytest.raises(InputError, match="marginals"):
        prompt_trees.plan(np.full((2, 3), 1.5), 40)
    with pytest.raises(InputError, match="limit: 1"):
        prompt_trees.plan(np.full((3, 3), 0.1), 1)


# Attention to the whole text, for references with a mask of their own.
WHOLE = tiny.TARGET.replace(window=None, local_layers=())


# --- Decoding ----------------------------------------------------------------------------------


@functools.cache
def method(temperature: float = 0.0, config: Any = tiny.TARGET) -> loop.Method:
    drafter = prompt_drafter(config, TREES, K)
    sampling = SamplingConfig(temperature=temperature)
    return speculative("ppd", config, drafter, "exact_match", sampling)


def models(config: Any = tiny.TARGET) -> dict[str, Any]:
    prompts = prompt_tokens.init(PromptTokensConfig(), config, jax.random.key(1))
    return {"target": tiny.params(config)["target"], "prompt_tokens": prompts}


def decode(temperature: float = 0.0, **more: Any) -> list:
    stop = more.pop("stop", tiny.STOP)
    return generation.generate(models(), tiny.PROMPTS, method(temperature), stop, **more)


def test_text_is_plain_decodings_whatever_prompt_tokens_say():
    rows = decode()
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    assert sum(row.stats["accepted"][0] for row in rows) > 0
    sampled = decode(1.0, seed=3)
    plain = tiny.decode(tiny.build("autoregressive", 1.0), seed=3)
    assert tiny.texts(sampled) == tiny.texts(plain)
    alone = generation.generate(
        models(), tiny.PROMPTS[:1], method(1.0), tiny.STOP, seed=3, row_ids=[0]
    )
    assert alone[0].token_ids == sampled[0].token_ids


def test_the_law_is_the_targets():
    config, sampling, eos = tiny.SMALL, SamplingConfig(temperature=0.8), (4,)
    model = models(config)
    counts = exact_laws.sampled(method(0.8, config), eos, models=model)
    laws = exact_laws.laws(sampling, eos, config, model["target"])
    assert exact_laws.p_value(counts, laws) > 1e-3


def test_caches_candidates_and_states_are_those_of_a_fresh_pass():
    """After every round: the cache is a prefill's; the lists are what prompt tokens behind the
    committed text say, as many as the last accepted node carried."""
    model, slots, states = models(), 96, []
    run = method()
    state = tiny.start(run, model, tiny.PROMPTS, slots=slots, buffer=96)

    @jax.jit
    def fresh(tokens, lengths):
        cache = kv.create(tiny.TARGET, len(lengths), slots)
        return prefill(tiny.TARGET, model["target"], cache, tokens[:, :slots], lengths)

    def candidates(text: list[int]) -> np.ndarray:
        """The text without its pending token, and prompt tokens behind: logits [3, V]."""
        embedded = transformer.token_embeddings(
            tiny.TARGET, model["target"], jnp.asarray([text[:-1]])
        )
        inputs = jnp.concatenate([embedded, model["prompt_tokens"]["embedding"][None]], axis=1)
        out = transformer.apply(tiny.TARGET, model["target"], inputs)
        return np.asarray(out.logits[0, -3:])

    for turn in range(3):
        state = loop.advance(
            model, state, np.int32(state.rounds + 1), method=run, stop=tiny.STOP, slots=slots
        )
        committed = np.asarray(state.lengths) - 1
        cache = fresh(state.tokens, jnp.asarray(committed))
        np.testing.assert_array_equal(state.inner.target.lengths, committed)
        for b, length in enumerate(committed):
            for layer in range(2):
                np.testing.assert_allclose(
                    state.inner.target.keys[layer][b, :, :length],
                    cache.keys[layer][b, :, :length],
                    atol=1e-5,
                )
        inner = state.inner.drafter
        for b in range(3):
            text = np.asarray(state.tokens)[b, : committed[b] + 1].tolist()
            logits = candidates(text)
            for k in range(int(inner.state[b])):
                best = np.argsort(-logits[k], kind="stable")[:K]
                np.testing.assert_array_equal(inner.lists[b, k], best)
        states.append(np.asarray(inner.state))
        assert turn or set(states[0].tolist()) == {3}  # only roots were there, with all of theirs
    assert len(set(np.concatenate(states).tolist())) > 1


@pytest.mark.parametrize("mask", prompt_tokens.MASKS)
def test_ensembles_say_what_the_mean_of_their_embeddings_says(mask):
    """Two embeddings a prompt token: lists after a round, against a pass with an explicit mask."""
    n, m = 3, 2
    own = PromptTokensConfig(n, m, mask)
    model = models() | {"prompt_tokens": prompt_tokens.init(own, WHOLE, jax.random.key(1))}
    drafter = prompt_drafter(WHOLE, TREES, K, m, mask)
    run = speculative("ppd", WHOLE, drafter, "exact_match", SamplingConfig())
    prompts = tiny.PROMPTS[:3]
    state = tiny.start(run, model, prompts, slots=128, buffer=96)
    for _ in range(2):
        state = loop.advance(
            model, state, np.int32(state.rounds + 1), method=run, stop=tiny.STOP, slots=128
        )
    for b in range(len(prompts)):
        length = int(state.lengths[b]) - 1
        text = transformer.token_embeddings(WHOLE, model["target"], state.tokens[b, :length])
        embedded = jnp.concatenate([text, model["prompt_tokens"]["embedding"]])
        seen = np.tri(length + n * m, dtype=bool)
        for i in range(n * m):
            for j in range(i):
                seen[length + i, length + j] = {
                    "ensemble": i % m == j % m, "decoder": True, "independent": False
                }[mask]  # fmt: skip
        places = np.concatenate([np.arange(length), length + np.arange(n * m) // m])
        out = transformer.apply(
            WHOLE, model["target"], embedded[None],
            positions=jnp.asarray(places)[None], mask=jnp.asarray(seen)[None],
        )  # fmt: skip
        logits = np.asarray(out.logits[0, length:]).reshape(n, m, -1).mean(axis=1)
        inner = state.inner.drafter
        for k in range(int(inner.state[b])):
            best = np.argsort(-logits[k], kind="stable")[:K]
            np.testing.assert_array_equal(inner.lists[b, k], best)


def test_states_are_counted():
    rows = decode()
    for row in rows:
        states = [row.stats[f"rounds_in_state_{s}"] for s in (1, 2, 3)]
        # The first round has no lists yet.
        assert sum(states) == row.stats["target_calls"] - 1
    assert len({tuple(row.stats[f"rounds_in_state_{s}"] for s in (1, 2, 3)) for row in rows}) > 1


def test_prompt_tokens_leave_what_tokens_say_as_it_is():
    """Logits of the root and of nodes, with other prompt tokens beside them."""
    run, other = method(), models()
    other["prompt_tokens"] = jax.tree.map(lambda x: -3 * x, other["prompt_tokens"])
    texts = [
        tiny.texts(generation.generate(model, tiny.PROMPTS, run, tiny.STOP))
        for model in (models(), other)
    ]
    assert texts[0] == texts[1]


def test_the_text_ends_inside_accepted_drafts():
    plain = tiny.plain_greedy()
    stop = stopping.StopConfig(tiny.NEW_TOKENS, (plain[1][3],))
    for row, whole in zip(decode(stop=stop), plain, strict=True):
        eos = stop.eos_ids[0]
        cut = whole.index(eos) + 1 if eos in whole else len(whole)
        assert row.token_ids == list(whole[:cut])


@pytest.mark.parametrize(
    "trees",
    [
        (SparseTree(((0, 0),), (1,)),),
        (SparseTree(((0,),), (1,)), SparseTree(((0, 0),), (1,))),
        (SparseTree(((9,),), (1,)),),
        (SparseTree(((0,),), (2,)),),
    ],
)
def test_trees_that_do_not_fit_are_refused(trees):
    with pytest.raises(InputError, match="trees: path"):
        prompt_drafter(tiny.TARGET, trees, K)


def test_by_name_with_untrained_prompt_tokens():
    built = tiny.build("ppd", limit=12)
    rows = generation.generate(models(), tiny.PROMPTS, built, tiny.STOP)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
