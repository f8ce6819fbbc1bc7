"""The published architecture as a setting of the hierarchical core: p vectors, blocks of GPT."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import hierarchical, transformer, word_pooling
from models.errors import InputError
from models.word_pooling import Sizes
from models.word_units import NormalForm, WordUnits
from tests.models.tiny_hierarchical import params, random_words

FORM = NormalForm(max_bytes=4)
LETTERS = WordUnits("char", FORM, symbols=("a", "b"))  # and the unknown
SIZES = Sizes(
    num_prefix=4,
    width=16,
    layers=1,
    heads=2,
    backbone_width=16,
    backbone_layers=2,
    backbone_heads=2,
)
MAX_WORDS = 40  # what the decoding tests' teacher reads
CONFIG = word_pooling.pooled(SIZES, LETTERS, max_word=3, max_words=MAX_WORDS)
N = 5


@functools.cache
def apply(config=CONFIG):
    """Logits of one document of `N` targets, its first word written from nothing."""

    def run(model, words, lengths):
        source = jnp.pad(words[:, :-1], ((0, 0), (1, 0), (0, 0)))
        sizes = jnp.pad(lengths[:, :-1], ((0, 0), (1, 0)))
        positions = jnp.broadcast_to(jnp.maximum(jnp.arange(N) - 1, 0), lengths.shape)
        return hierarchical.apply(
            config, model, source, sizes, words,
            segment_ids=jnp.ones_like(lengths), positions=positions,
        )  # fmt: skip

    return jax.jit(run)


def device(model):
    """Arrays that can be indexed while a function is traced."""
    return jax.tree.map(jnp.asarray, model)


@functools.cache
def said():
    """What the backbone says after each word but the last."""

    def run(model, words, lengths):
        return hierarchical.think(CONFIG, model, hierarchical.encode(CONFIG, model, words, lengths))

    return jax.jit(run)(params(CONFIG), WORDS[:, :-1], LENGTHS[:, :-1])[0]


WORDS, LENGTHS = random_words(CONFIG, (2, N))


def logits(words=WORDS, lengths=LENGTHS, config=CONFIG, model=None):
    return np.asarray(apply(config)(params(config) if model is None else model, words, lengths))


def test_words_leak_nothing():
    """Section 6, item 2: not into their own first unit, nor backwards."""
    before = logits()
    changed = WORDS.copy()
    changed[:, 2, 0] = 1 - np.minimum(changed[:, 2, 0], 1)
    moved = (logits(changed) != before).any(axis=(0, 3))  # by word and unit
    assert not moved[:2].any() and not moved[2, 0] and moved[2, 1]
    assert moved[3:].any(axis=1).all()


def test_logits_do_not_depend_on_the_room_for_words():
    """Section 6, item 3: the key mask is right; learned positions of more slots are more rows."""
    wide = word_pooling.pooled(SIZES, LETTERS, max_word=5, max_words=MAX_WORDS)
    model = jax.tree.map(np.copy, params(CONFIG))
    for part in ("encoder", "decoder"):
        table = model[part]["embedder"]["positions"]
        rows = np.random.default_rng(0).normal(size=(2, table.shape[1]))
        model[part]["embedder"]["positions"] = np.concatenate([table, rows.astype(np.float32)])
    padded = np.pad(WORDS, ((0, 0), (0, 0), (0, 2)), constant_values=2)
    found = logits(padded, LENGTHS, wide, model)
    # What may follow a full word differs; all else does not.
    np.testing.assert_allclose(found[:, :, :3], logits(), atol=1e-5)


def test_the_decoder_knows_the_past_by_its_p_vectors_alone():
    """Section 6, item 4, and item 1: each of the p vectors has a say."""
    model, prefix = params(CONFIG), said()
    write = jax.jit(functools.partial(hierarchical.write, CONFIG))
    stored = np.asarray(write(model, prefix, WORDS[:, 1:]))
    np.testing.assert_allclose(stored, logits()[:, 1:], atol=2e-5)
    assert prefix.shape == (2, N - 1, 4, 16)
    for k in range(4):
        other = np.asarray(write(model, prefix.at[:, :, k].multiply(-1.0), WORDS[:, 1:]))
        assert np.abs(other - stored).max() > 1e-3


def test_vectors_of_a_word_are_positions_of_their_own_in_causal_order():
    """Section 6, item 1 (2.2, step 5): vector k of a word moves what is said from (word, k) on."""
    model = params(CONFIG)
    vectors = jax.random.normal(jax.random.key(0), (2, N, 4, 16))
    think = jax.jit(lambda v: hierarchical.think(CONFIG, device(model), v)[0])
    before = np.asarray(think(vectors)).reshape(2, N * 4, -1)
    for word, k in itertools.product((0, 2), range(4)):
        after = np.asarray(think(vectors.at[:, word, k].multiply(-1.0))).reshape(2, N * 4, -1)
        moved = np.abs(after - before).max(axis=(0, 2))
        assert moved[: word * 4 + k].max(initial=0) == 0 and moved[word * 4 + k :].min() > 1e-3


def test_all_words_are_written_in_one_call(monkeypatch):
    """Section 6, item 7: encoder and decoder see B N rows at once, the backbone N p positions."""
    shapes = []
    original = transformer.apply

    def spy(config, params, inputs, **more):
        shapes.append(inputs.shape)
        return original(config, params, inputs, **more)

    monkeypatch.setattr(transformer, "apply", spy)
    apply.cache_clear()
    jax.eval_shape(apply(), params(CONFIG), WORDS, LENGTHS)
    apply.cache_clear()
    p, C, d = 4, CONFIG.max_word, 16
    assert shapes == [(2 * N, p + C), (2, N * p, d), (2 * N, p + C - 1, d)]


def test_probabilities_of_short_words_and_of_longer_ones_sum_to_one():
    """Section 6, item 5, at any place of a text: words of one and two units, and 'longer'."""
    model = params(CONFIG)
    letters = range(LETTERS.num_units)
    pairs = np.array(list(itertools.product(letters, letters)), np.int32)
    prefix = said()[0, -1]
    rows = np.zeros((len(pairs), CONFIG.max_word), np.int32)
    rows[:, :2] = pairs
    write = jax.jit(functools.partial(hierarchical.write, CONFIG))
    found = write(model, jnp.stack([prefix] * len(pairs)), rows)
    p = np.asarray(jax.nn.softmax(found))
    end, document_end = CONFIG.word_end, CONFIG.document_end
    two = sum(p[i, 0, a] * p[i, 1, b] for i, (a, b) in enumerate(pairs))
    shorter = sum(p[i, 0, a] * p[i, 1, end] for i, (a, b) in enumerate(pairs) if b == 0)
    longer = sum(p[i, 0, a] * p[i, 1, b] * (1 - p[i, 2, end]) for i, (a, b) in enumerate(pairs))
    closed = two - longer
    assert shorter + closed + longer + p[0, 0, document_end] == pytest.approx(1, abs=1e-5)
    assert min(shorter, closed, longer) > 1e-4


def test_published_sizes():
    """Section 3: 25M, 6.3M and 6.3M, about 38M; 77M of a model of GPT-2's sub-words."""
    units = WordUnits("byte", NormalForm())
    shapes = hierarchical.param_shapes(
        word_pooling.pooled(Sizes(), units, max_word=20, max_words=192)
    )
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes["backbone"]["layers_0"]) * 8 == pytest.approx(25.2e6, rel=0.01)
    for part in ("encoder", "decoder"):
        assert count(shapes[part]) == pytest.approx(6.5e6, rel=0.05)
    assert count(shapes) == pytest.approx(38e6, rel=0.05)
    words = WordUnits("word", NormalForm(), symbols=tuple(map(str, range(50_256))))
    flat = word_pooling.flat(Sizes(num_prefix=0), words, max_units=192)
    assert flat.num_params() == pytest.approx(77e6, rel=0.02)


def test_models_have_equal_parameters():
    """Section 6, item 8."""
    byte = WordUnits("byte", NormalForm())
    word = WordUnits("word", NormalForm(), symbols=tuple(map(str, range(1500))))
    common = {
        "width": 64, "layers": 1, "heads": 2, "backbone_width": 96, "backbone_layers": 3,
        "backbone_heads": 3, "num_params": 500_000,
    }  # fmt: skip
    for blocks in ("gpt", "llama"):
        sizes = functools.partial(Sizes, blocks=blocks)
        found = [
            word_pooling.pooled(sizes(num_prefix=p, **common), byte, max_word=12, max_words=32)
            for p in (1, 2, 4)
        ]
        layers = common | {"backbone_layers": 4}
        flat = functools.partial(word_pooling.flat, max_units=160)
        found += [
            flat(sizes(num_prefix=0, **layers), byte),
            flat(sizes(num_prefix=0, **common), word),
        ]
        for config in found:
            assert config.num_params() == pytest.approx(500_000, rel=0.05)
    with pytest.raises(InputError, match=r"sizes.num_params: 1000 is less than \d+"):
        flat(Sizes(num_prefix=0, **{**common, "num_params": 1000}), byte)


def test_the_published_baseline_has_no_positions():
    """Section 2.4: order reaches it through the causal mask alone."""
    flat = functools.partial(word_pooling.flat, units=LETTERS, max_units=8)
    sizes = dataclasses.replace(SIZES, num_prefix=0, backbone_layers=1)
    moved = {}
    for positions in (True, False):
        config = flat(dataclasses.replace(sizes, positions=positions))
        model = transformer.init(config, jax.random.key(0))
        tokens = np.array([[0, 1, 2, 1, 0], [1, 0, 2, 1, 0]])  # the first two in the other order
        run = jax.jit(functools.partial(transformer.apply, config))
        found = np.asarray(run(model, tokens).logits)
        moved[positions] = np.abs(found[0, -1] - found[1, -1]).max()
    assert moved[True] > 1e-4 and moved[False] < 1e-5


def test_bad_sizes_are_refused():
    with pytest.raises(InputError, match="positions: False is for flat models"):
        dataclasses.replace(SIZES, positions=False)
    with pytest.raises(InputError, match="3 heads must divide a width of 16"):
        word_pooling.flat(dataclasses.replace(SIZES, backbone_heads=3), LETTERS, max_units=8)
    with pytest.raises(InputError, match="'word' have no end of words; allowed: byte, char"):
        words = WordUnits("word", FORM, symbols=("a",))
        word_pooling.pooled(SIZES, words, max_word=1, max_words=8)
