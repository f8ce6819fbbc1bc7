import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import tfree_hat, transformer, words
from models.errors import InputError

CONFIG = tfree_hat.tfree(
    width=16, layers=2, backbone_width=16, backbone_layers=1, window=6, head_dim=8
)
TEXTS = ("the cat sat, on the mat", "isn't it odd? Yes, itis")
T, N = 23, 8


@functools.cache
def params():
    rng = np.random.default_rng(0)
    tree = tfree_hat.init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32), tree)


@functools.cache
def batch():
    lengths = np.zeros((len(TEXTS), N), np.int32)
    for row, text in enumerate(TEXTS):
        assert len(text) == T
        pieces = words.split_unicode(text, 16)
        lengths[row, : len(pieces)] = [len(piece) for piece in pieces]
    units = np.array([list(text.encode()) for text in TEXTS], np.int32)
    return units, np.asarray(tfree_hat.word_numbers(jnp.asarray(lengths), T)), lengths


apply = jax.jit(functools.partial(tfree_hat.apply, CONFIG), static_argnums=3)


def test_word_numbers_are_those_of_the_split():
    _, word_of, lengths = batch()
    for row in range(len(TEXTS)):
        expected = np.repeat(np.arange(N), lengths[row])
        np.testing.assert_array_equal(word_of[row], expected)
    padded = tfree_hat.word_numbers(jnp.array([[2, 1, 0]]), 6)
    assert padded.tolist() == [[0, 0, 1, 1, 1, 1]]


def test_a_words_guide_is_what_the_backbone_said_after_the_word_before():
    """Section 6, item 11: built by hand, one word at a time."""
    units, word_of, _ = batch()
    model = params()
    found = np.asarray(apply(model, units, word_of, N))
    out = functools.partial(transformer.apply, with_logits=False)
    states = jax.jit(functools.partial(out, CONFIG.encoder))(model["encoder"], units).hidden
    vectors = tfree_hat.connect(CONFIG, model["connector"], states, word_of, N)
    said = out(CONFIG.backbone, model["backbone"], vectors).hidden
    guides = np.stack(
        [np.broadcast_to(model["first_word"], said[:, 0].shape)]
        + [np.asarray(said[:, i - 1]) for i in range(1, N)],
        axis=1,
    )
    expected = tfree_hat.decode(CONFIG, model, states, guides, word_of)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Moving the guide by one word is another model.
    shifted = tfree_hat.decode(CONFIG, model, states, said, word_of)
    assert np.abs(shifted - found).max() > 0.1


def test_queries_and_keys_of_the_guides_attention_have_no_effect():
    """Full cross-attention with random query and key projections, over its one key."""
    _, word_of, _ = batch()
    rng = np.random.default_rng(1)
    heads, head = 2, 8
    x = rng.normal(size=(2, T, 16)).astype(np.float32)
    guides = rng.normal(size=(2, N, 16)).astype(np.float32)
    layer = params()["guide_0"]
    normed = guides / np.sqrt((guides**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    normed = normed * layer["scale"]
    own = np.take_along_axis(normed, word_of[..., None], axis=1)
    q = (x @ rng.normal(size=(16, 16))).reshape(2, T, heads, head)
    k = (own @ rng.normal(size=(16, 16))).reshape(2, T, 1, heads, head)
    v = (own @ layer["value"]).reshape(2, T, 1, heads, head)
    scores = np.einsum("bthd,btshd->bths", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    mixed = np.einsum("bths,btshd->bthd", weights, v).reshape(2, T, 16) @ layer["out"]
    found = tfree_hat._guide(CONFIG, layer, jnp.asarray(guides))
    found = np.take_along_axis(np.asarray(found), word_of[..., None], axis=1)
    np.testing.assert_allclose(found, mixed, atol=1e-4)


def test_nothing_is_said_before_it_is_read():
    """A byte moves no logits before its own; its word moves the guides of later words alone."""
    units, word_of, _ = batch()
    before = np.asarray(apply(params(), units, word_of, N))
    for place in (2, 9, 17):
        changed = units.copy()
        changed[:, place] = 90
        moved = (np.asarray(apply(params(), changed, word_of, N)) != before).any(axis=2)
        assert not moved[:, :place].any()
        assert moved[:, place].all()
        # Beyond both windows only the backbone carries it, from the next word on.
        far = np.arange(T) > place + 2 * 2 * (CONFIG.encoder.window - 1)
        later = word_of > word_of[:, place : place + 1]
        assert moved[far & later].all()


def test_a_words_vector_is_of_its_own_bytes():
    word_of = batch()[1]
    rng = np.random.default_rng(2)
    states = rng.normal(size=(2, T, 16)).astype(np.float32)
    connect = jax.jit(functools.partial(tfree_hat.connect, CONFIG), static_argnums=3)
    first = np.asarray(connect(params()["connector"], states, word_of, N))
    states[0, word_of[0] == 3] += 1.0
    second = np.asarray(connect(params()["connector"], states, word_of, N))
    moved = (first != second).any(axis=2)
    real = batch()[2][0] > 0  # words without bytes are not in sight of those before them
    np.testing.assert_array_equal(moved[0][real], (np.arange(N) == 3)[real])
    assert not moved[1].any()


def test_it_learns():
    units, word_of, _ = batch()
    optimizer = optax.adam(1e-2)

    def loss(model):
        logits = tfree_hat.apply(CONFIG, model, units[:, :-1], word_of[:, :-1], N)
        return optax.softmax_cross_entropy_with_integer_labels(logits, units[:, 1:]).mean()

    @jax.jit
    def step(model, state):
        value, gradient = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, updates), state, value

    model = tfree_hat.init(CONFIG, jax.random.key(1))
    state = optimizer.init(model)
    values = []
    for _ in range(60):
        model, state, value = step(model, state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]


def test_bad_configs_are_refused():
    with pytest.raises(InputError, match="encoder: every layer must be causal with a window"):
        dataclasses.replace(CONFIG, encoder=CONFIG.encoder.replace(window=None, local_layers=()))
    with pytest.raises(InputError, match="connector_heads: 3"):
        dataclasses.replace(CONFIG, connector_heads=3)
