import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import hierarchical, sharding
from models.errors import InputError
from tests.models.tiny_hierarchical import (
    CONFIGS,
    HAT,
    POOLED,
    params,
    random_words,
    wider,
    without_ends,
)

B, N = 2, 5


@functools.cache
def compiled(config, function=hierarchical.apply):
    return jax.jit(functools.partial(function, config))


@functools.cache
def batch(config):
    """One row of one document from its start, one of the ends of two others."""
    units, lengths = random_words(config, (B, N + 1))
    source, source_lengths = units[:, :-1].copy(), lengths[:, :-1].copy()
    source_lengths[0, 0] = 0
    segments = np.array([[1] * 5, [1, 1, 2, 2, 2]], np.int32)
    positions = np.array([[0, 0, 1, 2, 3], [0, 1, 0, 1, 2]], np.int32)
    return source, source_lengths, units[:, 1:], segments, positions


def logits(config, source, lengths, target, segments, positions):
    found = compiled(config)(
        params(config), source, lengths, target, segment_ids=segments, positions=positions
    )
    return np.asarray(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_is_what_its_words_are_one_after_another(name):
    """The naive way: words one at a time, documents one at a time, nothing packed."""
    config, model = CONFIGS[name], params(CONFIGS[name])
    source, lengths, target, segments, positions = batch(config)
    found = logits(config, source, lengths, target, segments, positions)
    for row, document in ((0, 1), (1, 1), (1, 2)):
        words = np.flatnonzero(segments[row] == document)
        read = [w for w in words if lengths[row, w]]
        vectors = np.zeros((1, N, config.num_prefix, config.backbone.embed_dim), np.float32)
        for place, w in enumerate(read):
            one = source[row, w : w + 1], lengths[row, w : w + 1]
            vectors[0, place] = compiled(config, hierarchical.encode)(model, *one)[0]
        said = np.asarray(compiled(config, hierarchical.think)(model, vectors)[0][0])
        for w in words:
            prefix = said[read.index(w)] if w in read else model["first"]
            one = prefix[None], target[row, w : w + 1]
            expected = compiled(config, hierarchical.write)(model, *one)[0]
            np.testing.assert_allclose(found[row, w], expected, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_sees_one_word(name):
    config = CONFIGS[name]
    units, lengths = random_words(config, (4, 6))
    encode = compiled(config, hierarchical.encode)
    before = np.asarray(encode(params(config), units, lengths))
    assert before.shape == (4, 6, config.num_prefix, config.backbone.embed_dim)
    others = random_words(config, (4, 6), seed=1)
    units[1:], lengths[1:] = others[0][1:], others[1][1:]
    units[0, 3], lengths[0, 3] = others[0][0, 3], others[1][0, 3]
    after = np.asarray(encode(params(config), units, lengths))
    same = np.ones((4, 6), bool)
    same[1:], same[0, 3] = False, False
    np.testing.assert_array_equal(before[same], after[same])
    assert (before != after).any(axis=(2, 3))[~same].mean() > 0.9


def test_the_encoder_sees_the_whole_word_and_nothing_beyond_it():
    units, _ = random_words(HAT, (1,))
    lengths = np.array([3], np.int32)
    encode = functools.partial(compiled(HAT, hierarchical.encode), params(HAT))
    base = encode(units, lengths)
    for k in range(HAT.max_word):
        changed = units.copy()
        changed[0, k] = 65 if changed[0, k] != 65 else 66
        assert (np.asarray(encode(changed, lengths)) != base).any() == (k < 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_past_reaches_the_decoder_through_the_prefix_alone(name):
    """A stored copy of p_i gives the same logits whatever the words were."""
    config, model = CONFIGS[name], params(CONFIGS[name])
    source, lengths, target, segments, positions = batch(config)
    expected = logits(config, source, lengths, target, segments, positions)
    vectors = compiled(config, hierarchical.encode)(model, source[:1, 1:], lengths[:1, 1:])
    prefix, _ = compiled(config, hierarchical.think)(model, vectors)
    stored = np.concatenate([model["first"][None, None], np.asarray(prefix)], axis=1)
    found = compiled(config, hierarchical.write)(model, stored, target[:1])
    np.testing.assert_allclose(found, expected[:1], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_words_say_nothing_about_themselves(name):
    """Unit k of a target moves logits k + 1 and on of that word, and those of nothing else."""
    config = CONFIGS[name]
    source, lengths, target, segments, positions = batch(config)
    before = logits(config, source, lengths, target, segments, positions)
    other = next(u for u in without_ends(config) if u != target[0, 2, 1])
    changed = target.copy()
    changed[0, 2, 1] = other
    moved = logits(config, source, lengths, changed, segments, positions) != before
    assert moved[0, 2, 2:].any()
    moved[0, 2, 2:] = False
    assert not moved.any()
    # A source word moves what is written from it on, in its own document.
    changed = source.copy()
    changed[1, 2, 0] = next(u for u in without_ends(config) if u != source[1, 2, 0])
    moved = (logits(config, changed, lengths, target, segments, positions) != before).any((2, 3))
    assert moved.tolist() == [[False] * 5, [False, False, True, True, True]]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_do_not_depend_on_the_room_for_words(name):
    config = CONFIGS[name]
    source, lengths, target, segments, positions = batch(config)
    before = logits(config, source, lengths, target, segments, positions)
    pad = lambda x: np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=1)  # noqa: E731
    model = params(config)
    found = compiled(wider(config))(
        model, pad(source), lengths, pad(target),
        segment_ids=segments, positions=positions,
    )  # fmt: skip
    np.testing.assert_allclose(found[:, :, : config.max_word], before, atol=1e-5)


def test_probabilities_of_all_words_and_of_longer_ones_sum_to_one():
    """All words of one and two units, the end of the document, and what goes on after two."""
    model = params(POOLED)
    prefix = np.asarray(model["first"])
    units = without_ends(POOLED)
    texts = list(itertools.product(units, units))
    rows = np.zeros((len(texts), POOLED.max_word), np.int32)
    rows[:, :2] = texts
    write = compiled(POOLED, hierarchical.write)
    found = write(model, np.stack([prefix] * len(texts)), rows)
    log_p = np.asarray(jax.nn.log_softmax(found))
    end, total, longer = POOLED.word_end, 0.0, 0.0
    for row, (a, b) in enumerate(texts):
        both = log_p[row, 0, a] + log_p[row, 1, b]
        total += np.exp(both + log_p[row, 2, end])
        longer += np.exp(both) * (1 - np.exp(log_p[row, 2, end]))
        if b == units[0]:
            total += np.exp(log_p[row, 0, a] + log_p[row, 1, end])
    total += np.exp(log_p[0, 0, POOLED.document_end])
    assert total == pytest.approx(1 - longer, abs=1e-5)
    assert 0.1 < longer < 0.95
    # No empty words, no document's end within a word.
    assert np.exp(log_p[0, 0, end]) == 0 and np.exp(log_p[0, 1:, POOLED.document_end]).sum() == 0


def test_a_word_of_full_length_must_end():
    logits = jnp.zeros((HAT.max_word + 1, 256))
    allowed = np.asarray(hierarchical.possible(HAT, logits, jnp.arange(HAT.max_word + 1))) == 0
    units = set(without_ends(HAT))
    assert len(units) == 243  # the values that occur in UTF-8
    assert set(np.flatnonzero(allowed[0])) == units | {HAT.document_end}
    for written in range(1, HAT.max_word):
        assert set(np.flatnonzero(allowed[written])) == units | {HAT.word_end}
    assert np.flatnonzero(allowed[HAT.max_word]).tolist() == [HAT.word_end]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded(name, tmp_path):
    config = CONFIGS[name]
    hierarchical.save(tmp_path / "model", config, params(config))
    found, loaded = hierarchical.load(tmp_path / "model")
    assert found == config == hierarchical.load_config(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded, params(config))
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(loaded))


def test_sharded_is_what_one_device_gives():
    source, lengths, target, segments, positions = batch(HAT)
    expected = logits(HAT, source, lengths, target, segments, positions)
    mesh = sharding.make_mesh(2, 2)
    placed = jax.device_put(params(HAT), sharding.tree_shardings(params(HAT), mesh))
    assert not placed["backbone"]["layers_0"]["mlp"]["down"]["kernel"].is_fully_replicated
    rows = sharding.batch_sharding(mesh)
    inputs = jax.device_put((source, lengths, target, segments, positions), rows)
    found = compiled(HAT)(placed, *inputs[:3], segment_ids=inputs[3], positions=inputs[4])
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_word": 0}, "max_word: 0 must be at least 1"),
        ({"markers": ()}, "markers: .* is empty"),
        ({"markers": (256,)}, "markers: 256 is out of range; allowed: 0 to 255"),
        ({"word_end": -1}, "word_end: -1"),
        ({"rule": "spaces"}, "rule: 'spaces' is not known"),
        ({"encoder": HAT.decoder}, "causal: the encoder must be bidirectional"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(HAT, **changes)


def test_published_sizes():
    """Section 3: encoder and decoder 23M each (3 layers), backbone 1.1B of 18 layers."""
    config = hierarchical.hat(
        width=768, layers=3, backbone_width=2304, backbone_layers=18, head_dim=128
    )
    shapes = hierarchical.param_shapes(config)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes["backbone"]) == pytest.approx(1.15e9, rel=0.02)
    for part, connector in (("encoder", "into_backbone"), ("decoder", "into_decoder")):
        assert count(shapes[part]) + count(shapes[connector]) == pytest.approx(23.2e6, rel=0.02)
