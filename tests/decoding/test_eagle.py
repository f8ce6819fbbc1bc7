"""EAGLE-2 and FSPAD: text, law, the tree and the head's cache, for heads that say anything."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, stopping
from decoding.sampling import SamplingConfig, log_probs
from decoding.speculative.drafting import nothing
from decoding.speculative.feature_source import feature_source
from decoding.speculative.method import speculative
from decoding.speculative.reranked_tree import grown_nodes, reranked_tree_drafter
from decoding.speculative.sources import Source, model_source
from decoding.speculative.template import from_paths
from decoding.speculative.template_tree import template_tree_drafter
from models import cache as kv
from models import feature_head, masks, transformer
from models.errors import InputError
from models.feature_head import FeatureHeadConfig
from tests.decoding import exact_laws, tiny

WIDTH, DEPTH, DRAFTS = 3, 2, 8
EAGLE = FeatureHeadConfig()
FSPAD = FeatureHeadConfig("product", alignment="heads")


@functools.cache
def head(config: FeatureHeadConfig = EAGLE, target: Any = tiny.TARGET, noise: float = 0.1) -> Any:
    """Random values everywhere, where training would begin with zeros too."""
    params = feature_head.init(config, target, jax.random.key(2))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + noise * rng.normal(size=x.shape).astype(np.float32), params)


def models(config: FeatureHeadConfig = EAGLE) -> dict[str, Any]:
    return {"target": tiny.params()["target"], "feature_head": head(config)}


def build(temperature: float = 0.0, /, **options: Any) -> loop.Method:
    sizes = {"width": WIDTH, "depth": DEPTH, "num_draft": DRAFTS}
    return tiny.build("eagle2", temperature, **{**sizes, **options})


def decode(method: loop.Method, config: FeatureHeadConfig = EAGLE, **more: Any) -> list:
    stop = more.pop("stop", tiny.STOP)
    return generation.generate(models(config), tiny.PROMPTS, method, stop, **more)


# --- Text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EAGLE, FSPAD, FeatureHeadConfig("mlp")])
def test_text_is_plain_decodings_whatever_the_head_says(config):
    rows = decode(build(), config)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    assert all(row.stats["draft_calls"] == (DEPTH + 1) * row.stats["target_calls"] for row in rows)


@pytest.mark.parametrize("tree", ["chain", "static"])
def test_other_trees_give_the_same_text(tree):
    rows = decode(build(tree=tree))
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()


def test_sampled_text_is_plain_decodings_and_no_row_depends_on_another():
    rows = decode(build(1.0), seed=5)
    plain = tiny.decode(tiny.build("autoregressive", 1.0), seed=5)
    assert tiny.texts(rows) == tiny.texts(plain)
    assert sum(sum(row.stats["accepted"]) for row in rows) > 0
    alone = generation.generate(
        models(), tiny.PROMPTS[2:3], build(1.0), tiny.STOP, seed=5, row_ids=[2]
    )
    assert alone[0].token_ids == rows[2].token_ids
    assert alone[0].stats == rows[2].stats


def test_the_law_is_the_targets():
    config, sampling, eos = tiny.SMALL, SamplingConfig(temperature=0.8), (4,)
    drafting = SamplingConfig(temperature=1.0)
    source = feature_source(config, drafting, 3, grown_nodes(2, 2))
    drafter = reranked_tree_drafter(source, 2, 2, 6)
    method = speculative("eagle2", config, drafter, "exact_match", sampling)
    model = {"target": tiny.params(config)["target"], "feature_head": head(target=config)}
    counts = exact_laws.sampled(method, eos, models=model)
    laws = exact_laws.laws(sampling, eos, config, model["target"])
    assert exact_laws.p_value(counts, laws) > 1e-3


# --- The tree ----------------------------------------------------------------------------------


def table_source(vocab: int) -> Source:
    """A distribution that is a function of the last token and the row's length."""

    def distribution(tokens: jnp.ndarray, lengths: jnp.ndarray) -> jnp.ndarray:
        seeds = tokens * 131 + lengths[:, None] * 17
        key = jax.vmap(jax.vmap(lambda s: jax.random.normal(jax.random.key(s), (vocab,))))(seeds)
        return jax.nn.log_softmax(2 * key)

    def root(params: Any, inner: Any, state: loop.DecodeState) -> Any:
        del params
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        return distribution(last, state.lengths)[:, 0], inner

    def nodes(params: Any, inner: Any, state: Any, tree: Any, first: Any, width: int) -> Any:
        del params
        index = first[:, None] + jnp.arange(width)
        return distribution(jnp.take_along_axis(tree.tokens, index, axis=1), state.lengths), inner

    return Source((), nothing, nothing, root, nodes, lambda inner, *_: inner, False)


def after(source: Source, state: loop.DecodeState) -> Any:
    """(row, path) -> log_q [V] after it, a path at a time."""

    def one(row: int, path: tuple[int, ...]) -> np.ndarray:
        last = path[-1] if path else int(state.tokens[row, state.lengths[row] - 1])
        only = state.replace(tokens=jnp.full((1, 1), last), lengths=jnp.ones((1,), jnp.int32))
        if path:
            tree = type("T", (), {"tokens": jnp.full((1, 1), last)})
            real = only.replace(lengths=state.lengths[row][None])
            return np.asarray(source.nodes(None, (), real, tree, jnp.zeros(1, int), 1)[0])[0, 0]
        tokens = jnp.zeros((1, int(state.lengths[row])), jnp.int32).at[0, -1].set(last)
        real = only.replace(tokens=tokens, lengths=state.lengths[row][None])
        return np.asarray(source.root(None, (), real)[0])[0]

    return one


def brute_force(source: Source, state: loop.DecodeState, row: int) -> set[tuple[int, ...]]:
    """The best paths of the pool, by plain lists."""
    plain = after(source, state)
    pool: list[tuple[float, tuple[int, ...]]] = []
    frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(DEPTH + 1):
        found = []
        for score, path in frontier:
            log_q = plain(row, path)
            for token in np.argsort(-log_q)[:WIDTH]:
                found.append((score + float(log_q[token]), (*path, int(token))))
        pool += found
        frontier = sorted(found, reverse=True)[:WIDTH]
    return {path for _, path in sorted(pool, reverse=True)[:DRAFTS]}


def test_the_tree_is_the_best_of_the_pool_connected_and_full():
    source = table_source(64)
    drafter = reranked_tree_drafter(source, WIDTH, DEPTH, DRAFTS)
    method = speculative("x", tiny.TARGET, drafter, "exact_match", SamplingConfig())
    state = tiny.start(method, models(), tiny.PROMPTS, slots=64, buffer=64)
    tree = jax.jit(lambda s: drafter.propose({}, (), s).tree)(state)
    assert bool(tree.valid.all())
    shapes = set()
    for b in range(len(tiny.PROMPTS)):
        paths: dict[int, tuple[int, ...]] = {0: ()}
        for node in range(1, DRAFTS + 1):
            parent = int(tree.parent[b, node])
            assert parent < node  # parents come first
            paths[node] = (*paths[parent], int(tree.tokens[b, node]))
            assert len(paths[node]) == int(tree.depth[b, node])
        assert set(paths.values()) - {()} == brute_force(source, state, b)
        shapes.add(tuple(np.asarray(tree.parent[b]).tolist()))
    assert len(shapes) > 3  # it follows the context


def test_a_static_tree_has_the_ranks_of_its_template():
    source = table_source(64)
    template = from_paths(((0,), (2,), (0, 1), (2, 0), (2, 0, 3)))
    drafter = template_tree_drafter(source, template)
    method = speculative("x", tiny.TARGET, drafter, "exact_match", SamplingConfig())
    state = tiny.start(method, models(), tiny.PROMPTS, slots=64, buffer=64)
    tree = jax.jit(lambda s: drafter.propose({}, (), s).tree)(state)
    assert bool(tree.valid.all())
    plain = after(source, state)
    for b in range(len(tiny.PROMPTS)):
        paths: dict[int, tuple[int, ...]] = {0: ()}
        for node, ranks in enumerate(template.paths[1:], start=1):
            above = paths[int(tree.parent[b, node])]
            best = np.argsort(-plain(b, above), kind="stable")
            assert int(tree.tokens[b, node]) == best[ranks[-1]]
            paths[node] = (*above, int(tree.tokens[b, node]))
            assert int(tree.depth[b, node]) == len(ranks)
    # What ends the text has no children here either.
    eos = int(tree.tokens[0, 1])
    ending = template_tree_drafter(source, template, (eos,))
    tree = jax.jit(lambda s: ending.propose({}, (), s).tree)(state)
    assert np.asarray(tree.valid)[0].tolist() == [True, True, True, False, True, True]


def test_confidence_is_what_ranks_nodes():
    """A drafter that is the target knows which nodes are reached; with its probabilities exchanged
    for noise on the same candidates, fewer drafts are accepted."""
    sampling = SamplingConfig(temperature=0.2)  # a random model says little clearly
    source = model_source(tiny.TARGET, sampling)

    def noisy(log_q: jnp.ndarray) -> jnp.ndarray:
        place = jnp.argsort(jnp.argsort(-log_q, axis=-1), axis=-1)
        seed = (1e4 * jnp.abs(log_q).max(axis=-1)).astype(jnp.uint32).reshape(-1)
        drawn = jax.vmap(lambda s: jax.random.uniform(jax.random.key(s), log_q.shape[-1:]))(seed)
        return jnp.where(place < WIDTH, -drawn.reshape(log_q.shape), -1e6)

    def root(*given: Any) -> Any:
        log_q, inner = source.root(*given)
        return noisy(log_q), inner

    def nodes(*given: Any) -> Any:
        log_q, inner = source.nodes(*given)
        return noisy(log_q), inner

    model = {role: tiny.params()["target"] for role in ("target", "draft")}
    calls = []
    for one in (source, source._replace(root=root, nodes=nodes)):
        drafter = reranked_tree_drafter(one, WIDTH, DEPTH, 4)
        method = speculative("x", tiny.TARGET, drafter, "exact_match", SamplingConfig())
        rows = generation.generate(model, tiny.PROMPTS, method, tiny.STOP)
        calls.append(sum(row.stats["target_calls"] for row in rows))
    assert calls[1] > 1.1 * calls[0]


def test_what_ends_the_text_has_no_children():
    source = table_source(64)
    plain = reranked_tree_drafter(source, WIDTH, DEPTH, DRAFTS)
    method = speculative("x", tiny.TARGET, plain, "exact_match", SamplingConfig())
    state = tiny.start(method, models(), tiny.PROMPTS, slots=64, buffer=64)
    tree = jax.jit(lambda s: plain.propose({}, (), s).tree)(state)
    inner = np.asarray(tree.tokens)[0, np.asarray(tree.parent)[0, 1:]]
    eos = int(inner[inner != int(tree.tokens[0, 0])][0])
    ending = reranked_tree_drafter(source, WIDTH, DEPTH, DRAFTS, (eos,))
    tree = jax.jit(lambda s: ending.propose({}, (), s).tree)(state)
    for b in range(len(tiny.PROMPTS)):
        for node in range(1, DRAFTS + 1):
            parent = int(tree.parent[b, node])
            if parent and int(tree.tokens[b, parent]) == eos:
                assert not bool(tree.valid[b, node])


def test_more_nodes_than_candidates_are_refused():
    with pytest.raises(InputError, match="num_draft: 22 must be at most 21"):
        build(num_draft=22)


# --- The head ----------------------------------------------------------------------------------


def test_at_first_fspad_is_eagle_to_the_bit():
    rng = np.random.default_rng(0)
    D, T = tiny.TARGET.embed_dim, 6
    e, f = (jnp.asarray(rng.normal(size=(2, T, D)), jnp.float32) for _ in range(2))
    index = jnp.broadcast_to(jnp.arange(T), (2, T))
    fresh = feature_head.init(FSPAD, tiny.TARGET, jax.random.key(0))
    assert float(jnp.abs(fresh["chosen"]["kernel"]).max()) == 0
    assert float(jnp.abs(fresh["read"]["kernel"]).max()) == 0
    paths = ("of_feature", "of_token", "chosen", "read")
    eagle = {name: value for name, value in fresh.items() if name not in paths}
    call = functools.partial(
        feature_head.apply, tiny.TARGET, positions=index, mask=masks.causal(index, T)
    )
    both = [call(params=params, embeddings=e, features=f) for params in (fresh, eagle)]
    np.testing.assert_array_equal(both[0].features, both[1].features)
    np.testing.assert_array_equal(both[0].readable, both[1].readable)
    np.testing.assert_array_equal(both[0].readable, both[0].features)
    # The token after each position matters, and is not mixed up within the batch.
    other = call(params=head(FSPAD), embeddings=e[::-1], features=f)
    mine = call(params=head(FSPAD), embeddings=e, features=f)
    assert float(jnp.abs(other.features - mine.features).max()) > 1e-3
    assert float(jnp.abs(mine.readable - mine.features).max()) > 1e-3


def test_a_head_is_written_and_read(tmp_path):
    for config in (EAGLE, FSPAD, FeatureHeadConfig("mlp", width=5)):
        feature_head.save(tmp_path / config.fusion, config, head(config))
        found, params = feature_head.load(tmp_path / config.fusion, tiny.TARGET)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, params, head(config))


def test_drafts_and_caches_are_those_of_a_fresh_run_on_true_features():
    """After every round: the target's cache is a prefill's; the head's entries are made of the
    target's features, and the root's distribution is that of one call on the whole text."""
    sampling = SamplingConfig(temperature=1.0)
    source = feature_source(tiny.TARGET, sampling, DEPTH + 1, grown_nodes(WIDTH, DEPTH))
    drafter = reranked_tree_drafter(source, WIDTH, DEPTH, DRAFTS)
    method = speculative("eagle2", tiny.TARGET, drafter, "exact_match", SamplingConfig())
    slots, model, counts = 64, models(FSPAD), []
    state = tiny.start(method, model, tiny.PROMPTS, slots=slots, buffer=64)

    @jax.jit
    def fresh(tokens: jnp.ndarray) -> Any:
        out = transformer.apply(tiny.TARGET, model["target"], tokens)
        index = jnp.broadcast_to(jnp.arange(slots), tokens.shape)
        following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        said = feature_head.apply(
            tiny.TARGET,
            model["feature_head"],
            transformer.embed(tiny.TARGET, model["target"], following, index + 1),
            out.hidden,
            positions=index,
            cache=kv.create(tiny.TARGET, len(tokens), slots, num_layers=1),
        )
        logits = transformer.unembed(tiny.TARGET, model["target"], said.readable)
        committed = kv.create(tiny.TARGET, len(tokens), slots)
        whole = transformer.apply(tiny.TARGET, model["target"], tokens, cache=committed).cache
        return said.cache, log_probs(logits, sampling), whole

    ask = jax.jit(lambda s: source.root(model, s.inner.drafter, s))
    for _ in range(4):
        before = np.asarray(state.lengths)
        state = loop.advance(
            model, state, np.int32(state.rounds + 1), method=method, stop=tiny.STOP, slots=slots
        )
        counts.append(np.asarray(state.lengths) - before)
        cache, wanted, whole = fresh(state.tokens[:, :slots])
        log_q, inner = ask(state)
        for b, length in enumerate(np.asarray(state.lengths)):
            np.testing.assert_allclose(log_q[b], wanted[b, length - 2], rtol=1e-4, atol=1e-3)
            end = length - 1
            for layer in range(2):
                mine, theirs = state.inner.target.keys[layer], whole.keys[layer]
                np.testing.assert_allclose(mine[b, :, :end], theirs[b, :, :end], atol=1e-4)
            for mine, theirs in (
                (inner.cache.keys, cache.keys), (inner.cache.values, cache.values)
            ):  # fmt: skip
                np.testing.assert_allclose(mine[0][b, :, :end], theirs[0][b, :, :end], atol=1e-4)
    assert np.max(counts) > 1 and np.min(counts) == 1


def test_every_nodes_distribution_is_that_of_its_path_alone():
    """Features fed back along the path, with no tree around."""
    sampling = SamplingConfig(temperature=1.0)
    N = grown_nodes(WIDTH, DEPTH)
    source = feature_source(tiny.TARGET, sampling, DEPTH + 1, N)
    asked: list[Any] = []

    def nodes(params: Any, inner: Any, state: Any, tree: Any, first: Any, width: int) -> Any:
        log_q, inner = source.nodes(params, inner, state, tree, first, width)
        asked.append((tree, first, log_q))
        return log_q, inner

    drafter = reranked_tree_drafter(source._replace(nodes=nodes), WIDTH, DEPTH, DRAFTS)
    method = speculative("eagle2", tiny.TARGET, drafter, "exact_match", SamplingConfig())
    model = models(FSPAD)
    state = tiny.start(method, model, tiny.PROMPTS, slots=64, buffer=64)

    def trace(state: loop.DecodeState) -> Any:
        asked.clear()
        drafter.propose(model, state.inner.drafter, state)
        return list(asked)

    found = jax.jit(trace)(state)
    rows, alone = [0, 3], []
    for b in rows:
        prompt = tiny.PROMPTS[b]
        tree, first, log_q = found[-1]
        node = int(first[b])
        path = []
        while node:
            path.insert(0, int(tree.tokens[b, node]))
            node = int(tree.parent[b, node])
        hidden = transformer.apply(tiny.TARGET, model["target"], jnp.asarray([prompt])).hidden
        text, features = [*prompt, *path], hidden[:, :-1]
        for _ in range(len(path) + 1):
            T = features.shape[1]
            index = jnp.arange(T)[None]
            ids = jnp.asarray([text[1 : T + 1]])
            said = feature_head.apply(
                tiny.TARGET, model["feature_head"],
                transformer.embed(tiny.TARGET, model["target"], ids, index + 1),
                features, positions=index, mask=masks.causal(index, T),
            )  # fmt: skip
            features = jnp.concatenate([features, said.features[:, -1:]], axis=1)
        logits = transformer.unembed(tiny.TARGET, model["target"], said.readable[:, -1])
        alone.append(log_probs(logits, sampling)[0])
        np.testing.assert_allclose(log_q[b, 0], alone[-1], rtol=1e-4, atol=1e-3)


def test_stops_at_an_end_of_text_inside_accepted_drafts():
    plain = tiny.plain_greedy()
    eos = plain[0][4]
    stop = stopping.StopConfig(tiny.NEW_TOKENS, (eos,))
    for row, whole in zip(decode(build(), stop=stop), plain, strict=True):
        cut = whole.index(eos) + 1 if eos in whole else len(whole)
        assert row.token_ids == list(whole[:cut])
