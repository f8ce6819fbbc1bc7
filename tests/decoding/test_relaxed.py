"""The relaxed rules against their definition, and LANTERN's law against enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from decoding import randomness
from decoding.images import neighbourhoods, relaxed
from decoding.sampling import SamplingConfig
from decoding.speculative import verification
from decoding.speculative.tree import DraftTree, chain

V, E, ROWS = 8, 2, 20_000
SAMPLING = SamplingConfig(temperature=1.0)
RNG = np.random.default_rng(4)
CODEBOOK = jnp.asarray(RNG.normal(size=(V, 2)), jnp.float32)
TABLE = neighbourhoods.nearest_codes(CODEBOOK, 4)
LOGITS = jnp.asarray(1.2 * RNG.normal(size=(E + 2, V)), jnp.float32)
DRAFTS = np.array([3, 5])
P = np.asarray(jax.nn.softmax(LOGITS, axis=-1), np.float64)


def p_value(counts, law):
    """Chi-square; what the law rules out must not occur."""
    possible = law > 1e-9
    assert not counts[~possible].any()
    expected = law[possible] / law[possible].sum() * counts.sum()
    assert expected.min() >= 5
    return stats.chisquare(counts[possible], expected).pvalue


def rows(delta, clear="used", tree=None):
    """ROWS verdicts on the same draft with noise of their own."""
    one = tree or chain(jnp.zeros(1, int), jnp.asarray(DRAFTS)[None], jnp.ones((1, E), bool))
    siblings = 1 if tree is None else 2
    keys = randomness.row_keys(0, jnp.arange(ROWS))
    run = jax.jit(
        functools.partial(relaxed.lantern, clear=clear, max_siblings=siblings, sampling=SAMPLING)
    )
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (ROWS, *x.shape[1:])), one)
    logits = jnp.broadcast_to(LOGITS[: one.num_nodes], (ROWS, one.num_nodes, V))
    found = run(
        TABLE, jnp.float32(delta), tree=wide, logits=logits, keys=keys, positions=jnp.full(ROWS, 7)
    )
    return np.asarray(found.count), np.asarray(found.tokens)


def law(p, draft, delta, clear):
    """The law of one token in plain Python: (chance of the draft, law of what replaces it)."""
    bound = delta if delta <= 1 else (delta - 1) * p[draft]
    total, used = 0.0, []
    for code in np.asarray(TABLE)[draft, 1:]:
        if delta == 0 or total + p[code] > bound:
            break
        total += p[code]
        used.append(code)
    left = p.copy()
    left[draft] = 0
    left[list(TABLE[draft, 1:]) if clear == "all" and used else used] = 0
    return p[draft] + total, left / left.sum()


@pytest.mark.parametrize(
    ("delta", "clear"), [(0.0, "used"), (0.25, "used"), (0.25, "all"), (2.5, "used")]
)
def test_lantern_has_the_law_of_its_definition(delta, clear):
    count, tokens = rows(delta, clear)
    chance, left = law(P[0], DRAFTS[0], delta, clear)
    expected = left * (1 - chance)
    expected[DRAFTS[0]] += chance
    seen = np.bincount(tokens[:, 0], minlength=V)
    assert p_value(seen, expected) > 1e-3
    if delta == 0:
        np.testing.assert_allclose(expected, P[0], atol=1e-6)
    elif clear == "used" and delta <= 1:
        assert 0.5 * np.abs(expected - P[0]).sum() <= delta + 1e-9
        assert chance > P[0][DRAFTS[0]]
    # The second draft is reached by acceptance alone, and judged by its own distribution.
    second = count >= 2
    assert abs(second.mean() - chance) < 0.02
    chance2, _ = law(P[1], DRAFTS[1], delta, clear)
    assert abs((count[second] >= 3).mean() - chance2) < 0.02


def test_lantern_at_zero_tries_siblings_exactly():
    tree = DraftTree(
        tokens=jnp.asarray([[0, 3, 5]]), parent=jnp.asarray([[-1, 0, 0]]),
        depth=jnp.asarray([[0, 1, 1]]), valid=jnp.ones((1, 3), bool), log_q=None, max_depth=1,
        is_chain=False,
    )  # fmt: skip
    count, tokens = rows(0.0, tree=tree)
    assert p_value(np.bincount(tokens[:, 0], minlength=V), P[0]) > 1e-3
    # Either sibling is accepted as often as the target would draw it.
    assert abs((count == 2).mean() - P[0][[3, 5]].sum()) < 0.02
    follows = [
        np.bincount(tokens[(count == 2) & (tokens[:, 0] == t), 1], minlength=V) for t in (3, 5)
    ]
    assert p_value(follows[0], P[1]) > 1e-3 and p_value(follows[1], P[2]) > 1e-3


def test_pooled_threshold_accepts_until_the_first_failure():
    B = 64
    logits = jnp.asarray(RNG.normal(size=(B, E + 1, V)), jnp.float32)
    drafts = RNG.integers(0, V, (B, E))
    valid = RNG.random((B, E)) < 0.9
    keys = randomness.row_keys(1, jnp.arange(B))
    positions = jnp.arange(B)
    tree = chain(jnp.zeros(B, int), jnp.asarray(drafts), jnp.asarray(valid))
    found = relaxed.pooled_threshold(TABLE, 0.5, tree, logits, keys, positions, SAMPLING)
    probs = np.asarray(jax.nn.softmax(logits, axis=-1))
    never = relaxed.pooled_threshold(TABLE, 1.1, tree, logits, keys, positions, SAMPLING)
    own = np.asarray(verification.exact_match(tree, logits, keys, positions, SAMPLING).tokens)
    np.testing.assert_array_equal(never.count, 1)
    np.testing.assert_array_equal(never.tokens[:, 0], own[:, 0])  # plain decoding's own token
    lengths = set()
    for b in range(B):
        kept = 0
        while kept < E and valid[b, kept]:
            near = np.asarray(TABLE)[drafts[b, kept]]
            if probs[b, kept, near].sum() < 0.5:
                break
            kept += 1
        assert found.count[b] == kept + 1
        assert found.tokens[b, :kept].tolist() == drafts[b, :kept].tolist()
        lengths.add(kept)
    assert lengths == {0, 1, 2}
