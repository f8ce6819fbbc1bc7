"""Draft trees from proposal to commit: scoring, rules, caches, the n-gram and the model drafter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import special, stats
from transformers.generation import logits_process as hf

from decoding import loop, randomness, sampling, stopping
from decoding.autoregressive import autoregressive
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig
from decoding.speculative import drafting, ngram, scoring, verification
from decoding.speculative.draft_model import model_drafter
from decoding.speculative.method import speculative
from decoding.speculative.tree import DraftTree, chain, proposed_by_depth
from models import cache as kv
from models import transformer
from models.errors import InputError
from tests.decoding import tiny
from tests.models import random_models


def make_tree(tokens, parents, valid=None, log_q=None) -> DraftTree:
    """A tree of one shape for all rows: tokens [B, N], parents [N]."""
    tokens, depth = np.asarray(tokens, np.int32), tiny.depths(parents)
    return DraftTree(
        tokens=jnp.asarray(tokens),
        parent=jnp.broadcast_to(jnp.asarray(parents, jnp.int32), tokens.shape),
        depth=jnp.broadcast_to(jnp.asarray(depth, jnp.int32), tokens.shape),
        valid=jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid),
        log_q=log_q,
        max_depth=max(depth),
        is_chain=False,
    )


def ancestors(node: int, parents=tiny.PARENTS) -> list[int]:
    """Nodes from the root to `node`."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


# --- Trees -------------------------------------------------------------------------------------


def test_a_chain_is_a_tree():
    valid = np.array([[True, True, False, True], [False, True, True, True]])
    drafts = np.arange(8).reshape(2, 4)
    tree = chain(jnp.array([10, 11]), jnp.asarray(drafts), jnp.asarray(valid))
    assert tree.is_chain
    assert (tree.num_nodes, tree.max_depth) == (5, 4)
    np.testing.assert_array_equal(tree.tokens, [[10, 0, 1, 2, 3], [11, 4, 5, 6, 7]])
    np.testing.assert_array_equal(tree.parent, [[-1, 0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(tree.depth, [[0, 1, 2, 3, 4]] * 2)
    # What follows an invalid draft is invalid.
    np.testing.assert_array_equal(tree.valid, [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(proposed_by_depth(tree), [[1, 1, 0, 0], [0, 0, 0, 0]])


def test_proposed_by_depth_counts_a_depth_once():
    valid = np.ones((2, 8), bool)
    valid[1, [3, 4, 5]] = False  # every node of depth 2
    tree = make_tree(np.zeros((2, 8)), tiny.PARENTS, valid)
    np.testing.assert_array_equal(proposed_by_depth(tree), [[1, 1, 1], [1, 0, 1]])


# --- Scoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "learned_positions"])
def test_scoring_a_tree_is_running_every_path_alone(name):
    """Rows of different lengths, sliding windows shorter than the tree is wide included."""
    config = random_models.CASES[name].replace(window=3 if name == "local" else None)
    params, rng = random_models.params(random_models.CASES[name]), np.random.default_rng(0)
    lengths, slots = np.array([9, 1, 4]), 20
    text = rng.integers(0, config.vocab_size, (3, 9)).astype(np.int32)
    tokens = rng.integers(0, config.vocab_size, (3, len(tiny.PARENTS)))
    tree = make_tree(tokens, tiny.PARENTS)

    @jax.jit
    def score(params, text, lengths, tree):
        cache = prefill(config, params, kv.create(config, 3, slots), text, lengths)
        return scoring.score(config, params, cache, tree)

    out = score(params, text, lengths, tree)
    np.testing.assert_array_equal(out.cache.lengths, lengths)
    rows, wanted = [], []
    for b in range(3):
        for node in range(len(tiny.PARENTS)):
            rows.append(text[b, : lengths[b]].tolist() + tokens[b, ancestors(node)].tolist())
            wanted.append(np.asarray(out.logits)[b, node])
    found = tiny.last_logits(config, params, rows, width=16)
    np.testing.assert_allclose(wanted, found, atol=1e-4)


def test_scoring_a_chain_as_a_tree_changes_nothing():
    config, rng = tiny.SMALL, np.random.default_rng(1)
    model, lengths = tiny.params(config)["target"], jnp.array([4, 0])
    text, drafts = rng.integers(0, 5, (2, 4)), rng.integers(0, 5, (2, 3))
    tree = chain(jnp.array([1, 2]), jnp.asarray(drafts), jnp.ones((2, 3), bool))

    @jax.jit
    def both(model):
        cache = prefill(config, model, kv.create(config, 2, 10), jnp.asarray(text), lengths)
        return [
            scoring.score(config, model, cache, tree.replace(is_chain=flag)).logits
            for flag in (True, False)
        ]

    as_chain, as_tree = both(model)
    np.testing.assert_allclose(as_chain, as_tree, atol=1e-5)


def test_the_penalty_counts_the_text_and_the_drafts_of_the_nodes_own_path():
    rng, V, B = np.random.default_rng(2), 12, 3
    tokens = rng.integers(0, V, (B, 9)).astype(np.int32)
    lengths = np.array([9, 1, 4])
    drafts = rng.integers(0, V, (B, len(tiny.PARENTS)))
    drafts[:, 0] = tokens[np.arange(B), lengths - 1]
    logits = rng.normal(size=(B, len(tiny.PARENTS), V)).astype(np.float32)
    found = jax.jit(scoring.penalised_logits, static_argnums=5)(
        logits,
        make_tree(drafts, tiny.PARENTS).ancestry,
        drafts,
        tokens,
        lengths,
        SamplingConfig(repetition_penalty=1.7),
    )
    found = np.asarray(found)
    processor = hf.RepetitionPenaltyLogitsProcessor(1.7)
    for b, node in np.ndindex(drafts.shape):
        text = tokens[b, : lengths[b]].tolist() + drafts[b, ancestors(node)].tolist()
        expected = processor(torch.tensor([text]), torch.tensor(logits[b, node][None]))
        np.testing.assert_allclose(found[b, node], expected[0], rtol=1e-6)


# --- Rules -------------------------------------------------------------------------------------


def follow(tree: DraftTree, target: np.ndarray) -> list[list[int]]:
    """Accepted nodes of each row: from a node to its first child that holds the target's token.

    Args:
      target: int [B, N], the token that the target says after each node.
    """
    paths = []
    for b in range(len(target)):
        path, going = [0], True
        while going:
            children = [
                i
                for i in range(1, tree.num_nodes)
                if tree.valid[b, i]
                and tree.parent[b, i] == path[-1]
                and tree.tokens[b, i] == target[b, path[-1]]
            ]
            going = bool(children)
            path += children[:1]
        paths.append(path)
    return paths


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact_match_follows_the_targets_own_tokens(temperature):
    rng, B, N, V = np.random.default_rng(3), 200, len(tiny.PARENTS), 3
    config = SamplingConfig(temperature)
    logits = rng.normal(size=(B, N, V)).astype(np.float32)
    tree = make_tree(rng.integers(0, V, (B, N)), tiny.PARENTS, rng.random((B, N)) < 0.9)
    keys, positions = randomness.row_keys(0, jnp.arange(B)), rng.integers(1, 9, B)
    verdict = jax.jit(verification.exact_match, static_argnums=4)(
        tree, logits, keys, positions, config
    )
    # Plain decoding's draw at the position of each node's next token.
    at = np.asarray(positions)[:, None] + tiny.depths(tiny.PARENTS)
    draw = jax.jit(sampling.draw, static_argnums=3)
    target = np.stack(
        [draw(logits[:, i], keys, jnp.asarray(at[:, i]), config) for i in range(N)], axis=1
    )
    lengths = set()
    for b, path in enumerate(follow(jax.device_get(tree), target)):
        assert verdict.count[b] == len(path)
        np.testing.assert_array_equal(verdict.path[b, : len(path)], path)
        np.testing.assert_array_equal(verdict.tokens[b, : len(path)], target[b, path])
        lengths.add(len(path))
    assert lengths == {1, 2, 3, 4}


def test_speculative_sampling_accepts_with_the_ratio_and_corrects_with_the_residual():
    """One draft: joint frequencies of (accepted, token) against Leviathan et al., theorem 3.5."""
    rows, V = 40_000, 5
    p = np.array([0.4, 0.3, 0.1, 0.2, 0.0])
    q = np.array([0.1, 0.25, 0.35, 0.1, 0.2])
    keys = randomness.row_keys(1, jnp.arange(rows))
    positions = jnp.full(rows, 6)
    log_q = jnp.broadcast_to(jnp.log(q), (rows, 1, V))
    draw = jax.jit(sampling.draw, static_argnums=(3, 4))
    draft = draw(log_q[:, 0], keys, positions, SamplingConfig(1.0), randomness.DRAFT)
    second = special.softmax(np.arange(V) * 0.3)  # after an accepted draft
    logits = jnp.log(np.broadcast_to(np.stack([p, second]), (rows, 2, V)))
    # Rows without a draft take the target's own distribution.
    valid = np.arange(rows) % 4 != 0
    tree = chain(jnp.zeros(rows, jnp.int32), draft[:, None], valid[:, None], log_q)
    verdict = jax.jit(verification.speculative_sampling, static_argnums=4)(
        tree, logits, keys, positions, SamplingConfig(1.0)
    )
    count, tokens = np.asarray(verdict.count), np.asarray(verdict.tokens)
    np.testing.assert_array_equal(verdict.path, np.tile([0, 1], (rows, 1)) * (count > 1)[:, None])

    accepted = np.minimum(p, q)
    residual = np.maximum(p - q, 0)
    expected = np.concatenate([accepted, residual])  # the residual's mass is that of rejection
    np.testing.assert_allclose(expected.sum(), 1)
    cell = np.where(count == 2, 0, V) + tokens[:, 0]
    observed = np.bincount(cell[valid], minlength=2 * V)
    assert not observed[expected == 0].any()
    some = expected > 0
    assert stats.chisquare(observed[some], expected[some] * valid.sum()).pvalue > 1e-3

    assert (count[~valid] == 1).all()
    plain = np.bincount(tokens[~valid, 0], minlength=V)
    assert plain[4] == 0
    assert stats.chisquare(plain[:4], p[:4] * (~valid).sum()).pvalue > 1e-3
    bonus = np.bincount(tokens[count == 2, 1], minlength=V)
    assert stats.chisquare(bonus, second * bonus.sum()).pvalue > 1e-3
    # The bonus token does not depend on the draft before it.
    table = np.zeros((4, V))
    np.add.at(table, (tokens[count == 2, 0], tokens[count == 2, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_residual():
    p, q = np.array([[0.6, 0.4, 0], [0.5, 0.25, 0.25]]), np.array([[0.2, 0.3, 0.5]] * 2)
    found = np.exp(verification.residual(jnp.log(p), jnp.log(q)))
    np.testing.assert_allclose(found, [[0.4, 0.1, 0], [0.3, 0, 0]], atol=1e-6)
    same = np.exp(verification.residual(jnp.log(p), jnp.log(p)))
    np.testing.assert_allclose(same, p, atol=1e-6)


def test_a_rule_that_needs_q_refuses_a_drafter_that_has_none():
    drafter = tiny.branching_drafter(tiny.PARENTS, 5, False)
    with pytest.raises(
        InputError,
        match="rule: 'speculative_sampling' needs a sampled chain; these drafts are deterministic",
    ):
        speculative("x", tiny.SMALL, drafter, "speculative_sampling", SamplingConfig(1.0))
    with pytest.raises(InputError, match=r"rule: 'exact_mach' is not known .*'exact_match'"):
        speculative("x", tiny.SMALL, drafter, "exact_mach", SamplingConfig(1.0))


# --- Branching trees, end to end ---------------------------------------------------------------

SMALL_PROMPTS = tiny.prompts((9, 1, 15, 4), vocab=5)
SLOTS = BUFFER = 48
MODELS = tiny.params(tiny.SMALL)


def run(method: loop.Method, until: int = 99) -> loop.DecodeState:
    """SMALL_PROMPTS, 24 tokens each, or up to round `until`."""
    state = tiny.start(method, MODELS, SMALL_PROMPTS, slots=SLOTS, buffer=BUFFER)
    stop = stopping.StopConfig(24)
    return loop.advance(MODELS, state, jnp.int32(until), method=method, stop=stop, slots=SLOTS)


@functools.cache
def prefilled(role: str):
    config = tiny.SMALL_CONFIGS[role]
    return jax.jit(
        lambda params, tokens, lengths: prefill(
            config, params, kv.create(config, len(tokens), SLOTS), tokens, lengths
        )
    )


def assert_cache_is_a_prefill(cache: kv.KVCache, state: loop.DecodeState, role: str, valid) -> None:
    """The first `valid` [B] slots of each row hold what reading the text anew writes there."""
    fresh = prefilled(role)(MODELS[role], state.tokens, jnp.asarray(valid))
    for found, expected in zip(
        (*cache.keys, *cache.values), (*fresh.keys, *fresh.values), strict=True
    ):
        for b, length in enumerate(valid):
            np.testing.assert_allclose(found[b, :, :length], expected[b, :, :length], atol=1e-4)


@pytest.mark.parametrize("temperature,random", [(0.0, True), (1.0, True), (1.0, False)])
def test_branching_drafts_give_the_text_of_plain_decoding(temperature, random):
    config = SamplingConfig(temperature)
    drafter = tiny.branching_drafter(tiny.PARENTS, 5, random)
    method = speculative("branching", tiny.SMALL, drafter, "exact_match", config)
    plain = jax.device_get(run(autoregressive(tiny.SMALL, config)))
    state = run(method, until=5)
    np.testing.assert_array_equal(state.inner.target.lengths, state.lengths - 1)
    assert_cache_is_a_prefill(state.inner.target, state, "target", np.asarray(state.lengths) - 1)
    state = run(method)
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    np.testing.assert_array_equal(state.lengths, plain.lengths)
    assert_cache_is_a_prefill(state.inner.target, state, "target", np.asarray(state.lengths) - 1)
    # The caches of rows that are done do not move on while others run.
    beyond = np.asarray(state.inner.target.lengths - (state.lengths - 1))
    assert (beyond <= method.depth).all()
    assert len(np.unique(state.stats.target_calls)) > 1
    accepted = np.asarray(state.stats.accepted).sum(axis=0)
    assert (accepted[:2] > 0).all()
    assert (state.stats.target_calls < 24).all()


def test_the_penalty_holds_inside_branching_trees():
    config = SamplingConfig(0.0, repetition_penalty=1.4)
    drafter = tiny.branching_drafter(tiny.PARENTS, 5, True)
    method = speculative("branching", tiny.SMALL, drafter, "exact_match", config)
    plain, state = run(autoregressive(tiny.SMALL, config)), run(method)
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    assert np.asarray(state.stats.accepted).sum() > 0


# --- The model drafter -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_drafts_cache_stays_in_step_with_the_text(temperature):
    """After every round, whatever was accepted, the slots that the next round relies on."""
    config = SamplingConfig(temperature)
    purpose = randomness.DRAFT if temperature else randomness.SAMPLE
    rule = "speculative_sampling" if temperature else "exact_match"
    drafter = model_drafter(tiny.SMALL_DRAFT, 2, config, purpose)
    method = speculative("speculative_sampling", tiny.SMALL, drafter, rule, config)
    for until in range(1, 8):
        state = run(method, until)
        lengths = np.asarray(state.lengths)
        assert np.asarray(state.active).all()
        assert_cache_is_a_prefill(state.inner.drafter, state, "draft", np.maximum(lengths - 2, 0))
        np.testing.assert_array_equal(state.inner.target.lengths, lengths - 1)
        assert_cache_is_a_prefill(state.inner.target, state, "target", lengths - 1)
    by_depth = np.asarray(state.stats.accepted).sum(axis=0)
    assert 0 < by_depth[1] < by_depth[0] < 7 * len(SMALL_PROMPTS)  # 0, 1 and 2 were accepted


def test_drafts_and_their_distribution_are_the_draft_models_own():
    """log_q of every draft, given the drafts before it, from the draft model without a cache."""
    config = SamplingConfig(1.3, top_p=0.9, repetition_penalty=1.5)
    drafter = model_drafter(tiny.SMALL_DRAFT, 3, config, randomness.DRAFT)
    assert (drafter.num_nodes, drafter.max_depth) == (4, 3)
    method = speculative("x", tiny.SMALL, drafter, "speculative_sampling", config)
    state = tiny.start(method, MODELS, SMALL_PROMPTS, slots=SLOTS, buffer=BUFFER)
    draft = jax.jit(drafter.propose)(MODELS, state.inner.drafter, state)
    tree, cache = draft.tree, draft.inner
    assert draft.calls == 3
    np.testing.assert_array_equal(cache.lengths, np.asarray(state.lengths) - 1)
    np.testing.assert_array_equal(tree.tokens[:, 0], [row[-1] for row in SMALL_PROMPTS])
    processor = hf.RepetitionPenaltyLogitsProcessor(1.5)
    for i in range(3):
        texts = [
            row + np.asarray(tree.tokens)[b, 1 : i + 1].tolist()
            for b, row in enumerate(SMALL_PROMPTS)
        ]
        logits = tiny.last_logits(tiny.SMALL_DRAFT, MODELS["draft"], texts, width=32)
        penalised = np.concatenate(
            [
                processor(torch.tensor([text]), torch.tensor(row[None])).numpy()
                for text, row in zip(texts, logits, strict=True)
            ]
        )
        expected = sampling.log_probs(jnp.asarray(penalised), config)
        np.testing.assert_allclose(tree.log_q[:, i], expected, atol=1e-4)
        drafted = np.asarray(tree.log_q)[np.arange(4), i, np.asarray(tree.tokens)[:, i + 1]]
        assert np.isfinite(drafted).all()


# --- Prompt lookup -----------------------------------------------------------------------------


def naive_continuation(text, num_draft, max_ngram, min_ngram):
    """What followed the longest suffix: latest with `num_draft` tokens after it, else earliest."""
    for n in range(max_ngram, min_ngram - 1, -1):
        found = []
        for start in range(len(text) - n):
            if text[start : start + n] == text[-n:]:
                found.append(text[start + n : start + n + num_draft])
        if found:
            return next((f for f in reversed(found) if len(f) == num_draft), found[0])
    return []


@pytest.mark.parametrize("max_ngram,min_ngram", [(3, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("vocab", [2, 4])
def test_find_continuation(max_ngram, min_ngram, vocab):
    rng, rows, width, E = np.random.default_rng(0), 500, 14, 4
    tokens = rng.integers(0, vocab, (rows, width))
    lengths = rng.integers(1, width + 1, rows)
    tokens[np.arange(width) >= lengths[:, None]] = 0
    find = jax.jit(ngram.find_continuation, static_argnums=(2, 3, 4))
    drafts, exist = map(
        np.asarray, find(jnp.asarray(tokens), jnp.asarray(lengths), E, max_ngram, min_ngram)
    )
    found = set()
    for b in range(rows):
        text = tokens[b, : lengths[b]].tolist()
        expected = naive_continuation(text, E, max_ngram, min_ngram)
        assert exist[b].sum() == len(expected)
        assert drafts[b][exist[b]].tolist() == expected
        found.add(len(expected))
    assert found == {0, 1, 2, 3, 4}


def test_drafters_that_learn_nothing_keep_their_state():
    marker = object()
    assert drafting.observe_nothing(marker, None, None, None, None) is marker


def test_params_are_what_the_reference_assumes():
    """The two models of the tiny pair differ, so that roles cannot be confused unseen."""
    shapes = {
        role: jax.tree.structure(transformer.param_shapes(config))
        for role, config in tiny.SMALL_CONFIGS.items()
    }
    assert {role: jax.tree.structure(MODELS[role]) for role in MODELS} == shapes
    assert shapes["target"] != shapes["draft"]
