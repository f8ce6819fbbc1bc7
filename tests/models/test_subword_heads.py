"""Heads: exact joint distributions by enumeration, steps against whole words, shapes."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import subword_heads as heads
from models.errors import InputError
from models.subword_heads import HeadConfig

J, V, D = 3, 4, 16
CONFIGS = {
    kind: HeadConfig(vocab_size=V, embed_dim=D, kind=kind, num_slots=J, num_heads=2)
    for kind in heads.KINDS
}
PARAMS = {kind: heads.init(config, jax.random.key(1)) for kind, config in CONFIGS.items()}
log_prob = jax.jit(heads.log_prob, static_argnums=0)


def every_word() -> tuple[np.ndarray, np.ndarray]:
    """All words of at most J pieces: the end of the text, or pieces that are not it."""
    words = [(0,)]
    for count in range(1, J + 1):
        words += itertools.product(range(1, V), repeat=count)
    pieces = np.zeros((len(words), J), np.int32)
    for row, word in enumerate(words):
        pieces[row, : len(word)] = word
    return pieces, np.array(list(map(len, words)), np.int32)


@pytest.mark.parametrize("kind", heads.KINDS)
def test_probabilities_of_all_words_sum_to_one(kind: str) -> None:
    config = CONFIGS[kind]
    pieces, counts = every_word()
    rng = np.random.default_rng(0)
    for vector in rng.normal(size=(2, D)).astype(np.float32):
        hidden = jnp.broadcast_to(vector, (len(pieces), D))
        found = np.asarray(log_prob(config, PARAMS[kind], hidden, pieces, counts))
        assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", heads.KINDS)
def test_steps_have_the_probabilities_of_whole_words(kind: str) -> None:
    """The sum of cached steps is the sequence's log-probability."""
    config, params = CONFIGS[kind], PARAMS[kind]
    pieces, counts = every_word()
    hidden = jax.random.normal(jax.random.key(2), (len(pieces), D))
    whole = np.asarray(log_prob(config, params, hidden, pieces, counts))
    targets = np.asarray(heads.with_end(config, pieces, counts))
    mask = np.asarray(heads.slot_mask(config, pieces, counts))
    step = jax.jit(heads.step, static_argnums=0)
    carry, before = heads.start(config, params, hidden), np.zeros(len(pieces), np.int32)
    summed = np.zeros(len(pieces))
    for slot in range(J):
        scores, carry = step(config, params, carry, hidden, before, slot)
        before = targets[:, slot]
        chosen = jax.nn.log_softmax(scores)[np.arange(len(before)), before]
        summed += np.where(mask[:, slot], chosen, 0)
    np.testing.assert_allclose(summed, whole, atol=1e-4)


def test_ends_count_where_there_is_room() -> None:
    config = CONFIGS["parallel"]
    counts = np.array([0, 1, 2, 3, 7])
    pieces = np.full((5, J), 2)
    np.testing.assert_array_equal(
        heads.slot_mask(config, pieces, counts),
        [[0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]],
    )
    end = np.full((1, J), config.eos_id)  # of the text: a word of one slot
    np.testing.assert_array_equal(heads.slot_mask(config, end, np.array([1])), [[1, 0, 0]])
    np.testing.assert_array_equal(
        heads.with_end(config, pieces, counts),
        [[4, 4, 4], [2, 4, 4], [2, 2, 4], [2, 2, 2], [2, 2, 2]],
    )


@pytest.mark.parametrize("kind", heads.KINDS)
def test_impossible_ids_are_never_likely(kind: str) -> None:
    config = CONFIGS[kind]
    hidden = jax.random.normal(jax.random.key(3), (5, D))
    found = np.asarray(heads.logits(config, PARAMS[kind], hidden, np.ones((5, J), np.int32)))
    assert (found[:, 0, config.end] < -1e8).all() and (found[:, 1:, config.eos_id] < -1e8).all()
    assert (found[:, 1:, config.end] > -1e3).all() and (found[:, 0, config.eos_id] > -1e3).all()


@pytest.mark.parametrize("kind", heads.KINDS)
def test_memory_follows_words_slots_and_vocabulary(kind: str) -> None:
    """No intermediate of loss and gradient is larger than words x slots x V; none has B x N."""
    config = dataclasses.replace(CONFIGS[kind], vocab_size=500)
    params = jax.eval_shape(lambda: heads.init(config, jax.random.key(0)))
    n = 7
    hidden = jax.ShapeDtypeStruct((n, D), jnp.float32)
    pieces = jax.ShapeDtypeStruct((n, J), jnp.int32)
    counts = jax.ShapeDtypeStruct((n,), jnp.int32)
    loss = lambda *given: heads.log_prob(config, *given).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, hidden, pieces, counts)
    sizes = [v.aval.size for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) <= max(n * J * 501, 501 * D)


def test_only_the_autoregressive_head_keeps_two_words_apart() -> None:
    """Of two words that are equally likely the parallel head makes two more, of their pieces."""
    pieces = jnp.array([[1, 2, 0], [3, 1, 0]])
    counts = jnp.array([2, 2])
    hidden = jnp.ones((2, D))
    ghosts = jnp.array([[1, 1, 0], [3, 2, 0]])
    right = {}
    for kind, config in CONFIGS.items():
        optimizer = optax.adam(0.02)

        def loss(params: Any, config: HeadConfig = config) -> jax.Array:
            return -heads.log_prob(config, params, hidden, pieces, counts).mean()

        @jax.jit
        def step(carry: Any, _: Any, loss: Any = loss, optimizer: Any = optimizer) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        begin = (PARAMS[kind], optimizer.init(PARAMS[kind]))
        params = jax.lax.scan(step, begin, None, length=300)[0][0]
        right[kind] = np.exp(log_prob(config, params, hidden, pieces, counts))
        if kind == "parallel":
            np.testing.assert_allclose(right[kind], 0.25, atol=0.02)
            wrong = np.exp(log_prob(config, params, hidden, ghosts, counts))
            np.testing.assert_allclose(wrong, 0.25, atol=0.02)
    np.testing.assert_allclose(right["autoregressive"], 0.5, atol=0.02)


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"head.kind: 'serial' is not known"):
        HeadConfig(4, 8, kind="serial")
    with pytest.raises(InputError, match=r"head.num_slots: 0 must be at least 1"):
        HeadConfig(4, 8, num_slots=0)
    with pytest.raises(InputError, match=r"head.eos_id: 4 must be below 4"):
        HeadConfig(4, 8, eos_id=4)
