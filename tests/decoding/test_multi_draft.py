"""Rules for several drafts a position, judged one position at a time by simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import randomness
from decoding.sampling import SamplingConfig
from decoding.speculative import multi_draft, verification
from decoding.speculative.rules import RULES, check
from decoding.speculative.tree import DraftTree, chain
from models.errors import InputError

Q, P = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
ROWS = 40_000
T1 = SamplingConfig(1.0)


def root_tree(drafts: np.ndarray, q: np.ndarray, sequences: bool) -> DraftTree:
    """A root with the drafts [B, K] as its children."""
    B, K = drafts.shape
    node = np.broadcast_to(np.arange(K + 1), (B, K + 1))
    return DraftTree(
        tokens=jnp.asarray(np.concatenate([np.zeros((B, 1)), drafts], axis=1), jnp.int32),
        parent=jnp.asarray(np.where(node == 0, -1, 0), jnp.int32),
        depth=jnp.asarray(node > 0, jnp.int32),
        valid=jnp.ones((B, K + 1), bool),
        log_q=jnp.broadcast_to(jnp.log(jnp.asarray(q, jnp.float32)), (B, 1, len(q))),
        max_depth=1,
        is_chain=False,
        sequences=jnp.asarray(node[:, 1:, None]) if sequences else None,
    )


def draws(q: np.ndarray, k: int, replace: bool, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(k)
    if replace:
        return rng.choice(len(q), (rows, k), p=q)
    with np.errstate(divide="ignore"):
        noise = np.log(q) + rng.gumbel(size=(rows, len(q)))
    return np.argsort(-noise, axis=1)[:, :k]


def judge(rule, tree: DraftTree, p: np.ndarray, sampling=T1, seed: int = 0):
    B, N = tree.tokens.shape
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (B, N, len(p)))
    keys = randomness.row_keys(seed, jnp.arange(B))
    return jax.jit(rule, static_argnums=4)(tree, logits, keys, jnp.full((B,), 7), sampling)


@pytest.mark.parametrize(
    "rule,replace,accepted",
    [
        (multi_draft.k_seq, True, (0.7, 0.791355, 0.858519)),
        (multi_draft.multi_round, True, (0.7, 0.76, 0.808)),
        (multi_draft.recursive_rejection, False, (0.7, 0.82, 1.0)),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_acceptance_and_law_at_one_position(rule, replace, accepted):
    """The published acceptance table, and the target's law whatever happened, to four sigma."""
    for k, expected in enumerate(accepted, start=1):
        verdict = judge(rule, root_tree(draws(Q, k, replace), Q, replace), P)
        share = float((verdict.count == 2).mean())
        assert share == pytest.approx(expected, abs=4 * 0.5 / ROWS**0.5)
        first = np.bincount(np.asarray(verdict.tokens[:, 0]), minlength=3) / ROWS
        np.testing.assert_allclose(first, P, atol=4 * 0.5 / ROWS**0.5)


def test_every_token_as_a_child_is_always_accepted():
    tree = root_tree(draws(Q, 3, False, 500), Q, False)
    assert (judge(multi_draft.recursive_rejection, tree, P).count == 2).all()


def test_a_rejected_sibling_is_never_emitted():
    tree = root_tree(draws(Q, 2, False, 4000), Q, False)
    verdict = judge(multi_draft.recursive_rejection, tree, P)
    rejected = np.asarray(verdict.count == 1)
    drafts, token = np.asarray(tree.tokens)[:, 1:], np.asarray(verdict.tokens)[:, 0]
    assert rejected.sum() > 100
    assert not (drafts[rejected] == token[rejected, None]).any()


def test_siblings_must_be_tried_in_draw_order():
    """Reversed, the same drafts give another law: the rule does depend on the order."""
    reverse = draws(Q, 2, False)[:, ::-1]
    verdict = judge(multi_draft.recursive_rejection, root_tree(reverse, Q, False), P)
    first = np.bincount(np.asarray(verdict.tokens[:, 0]), minlength=3) / ROWS
    assert np.abs(first - P).max() > 0.02


def test_choosing_among_draws_by_their_probability_is_biased():
    """What DySpec must not do: a draw that is dropped because it is unlikely is still a draw."""
    tree = root_tree(draws(Q, 1, False), Q, False)
    likely = jnp.asarray(Q)[tree.tokens] >= 0.25
    chosen = tree.replace(valid=tree.valid & likely.at[:, 0].set(True))
    first = np.asarray(judge(multi_draft.recursive_rejection, chosen, P).tokens[:, 0])
    # Of the drafts 0 two in five stand; where 2 was dropped, the token is drawn from P.
    expected = 0.5 * 0.4 + 0.2 * 0.2
    assert (first == 0).mean() == pytest.approx(expected, abs=0.01) and expected > P[0] + 0.03


def test_without_deflation_duplicates_bias():
    """q one-hot at x, p(x) = .5, three copies: K-SEQ accepts half, plain trials .875."""
    q, p = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    drafts = np.zeros((20_000, 3), int)
    verdict = judge(multi_draft.k_seq, root_tree(drafts, q, True), p)
    assert float((verdict.count == 2).mean()) == pytest.approx(0.5, abs=0.015)
    assert float((verdict.tokens[:, 0] == 0).mean()) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("name", ["k_seq", "multi_round", "recursive_rejection"])
def test_one_draft_is_speculative_sampling_token_for_token(name):
    """Under the same noise; a chain of three over a random model's logits."""
    rng = np.random.default_rng(0)
    B, E, V = 400, 3, 6
    logits = jnp.asarray(rng.normal(size=(B, E + 1, V)) * 2, jnp.float32)
    log_q = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(B, E, V)) * 2, jnp.float32))
    drafts = jnp.argmax(log_q + rng.gumbel(size=(B, E, V)), axis=-1).astype(jnp.int32)
    tree = chain(jnp.zeros(B, jnp.int32), drafts, jnp.ones((B, E), bool), log_q)
    keys = randomness.row_keys(3, jnp.arange(B))
    positions = jnp.asarray(rng.integers(5, 50, B))
    expected, found = (
        jax.jit(rule, static_argnums=4)(tree, logits, keys, positions, T1)
        for rule in (verification.speculative_sampling, RULES[name].verify)
    )
    np.testing.assert_array_equal(found.count, expected.count)
    inside = np.arange(E + 1) < np.asarray(expected.count)[:, None]
    np.testing.assert_array_equal(found.tokens * inside, expected.tokens * inside)
    np.testing.assert_array_equal(found.path * inside, expected.path * inside)
    assert len(np.unique(expected.count)) == E + 1


def test_fewer_sequences_stay_alive_down_the_tree_and_rho_follows(monkeypatch):
    """Every depth solves for the number of drafts that still agree with the accepted prefix."""
    seen = []
    deflation = multi_draft.transport.deflation

    def spy(q, p, k):
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), k)
        return deflation(q, p, k)

    monkeypatch.setattr(multi_draft.transport, "deflation", spy)
    rng = np.random.default_rng(1)
    B, K, L, V = 64, 4, 3, 3
    tokens = rng.integers(0, V, (B, K * L))
    node = 1 + np.arange(L)[None] * K + np.arange(K)[:, None]
    parent = np.concatenate([[-1], np.repeat(0, K), 1 + np.arange(K * (L - 1))])
    tree = DraftTree(
        tokens=jnp.asarray(np.pad(tokens, ((0, 0), (1, 0))), jnp.int32),
        parent=jnp.asarray(np.broadcast_to(parent, (B, K * L + 1)), jnp.int32),
        depth=jnp.asarray(np.broadcast_to(np.r_[0, np.repeat([1, 2, 3], K)], (B, K * L + 1))),
        valid=jnp.ones((B, K * L + 1), bool),
        log_q=jnp.full((B, 1 + K * (L - 1), V), -np.log(V), jnp.float32),
        max_depth=L,
        is_chain=False,
        sequences=jnp.asarray(np.broadcast_to(node, (B, K, L))),
    )
    judge(multi_draft.k_seq, tree, np.full(V, 1 / V))
    jax.effects_barrier()
    by_depth = [np.unique(k).tolist() for k in seen]
    assert by_depth[0] == [K]
    assert len(set(np.concatenate(by_depth).tolist())) > 2


def test_typical_acceptance_keeps_what_is_likely_enough():
    """Hand-made: H = log 2 on (.5, .5), so the threshold is min(.09, .3 / 2) = .09."""
    p = np.array([0.5, 0.45, 0.05])
    tree = root_tree(np.array([[2, 1, 0]] * 8), Q, False)
    verdict = judge(RULES["typical_acceptance"].verify, tree, p)
    assert (verdict.count == 2).all() and (verdict.path[:, 1] == 2).all()
    tree = dataclasses.replace(tree, valid=tree.valid.at[:, 2:].set(False))
    assert (judge(RULES["typical_acceptance"].verify, tree, p).count == 1).all()


def test_a_rule_that_is_wrong_for_the_drafts_is_refused_with_the_reason():
    message = "rule: 'k_seq' needs a sampled chain or independent sampled sequences; these drafts "
    with pytest.raises(InputError, match=message):
        check("k_seq", verification.WITHOUT_REPLACEMENT)
    for law in verification.LAWS:
        assert check("exact_match", law).lossless
