"""Lexinvariant models: blind to which token is which, and without a parameter a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cache as kv
from models import random_embeddings as lex
from models import sharding
from models.errors import InputError
from models.random_embeddings import LexinvariantConfig

B, T, V, D = 4, 12, 23, 16
CONFIG = LexinvariantConfig(
    vocab_size=V, embed_dim=D, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32,
    max_position=64, activation="gelu", gated_mlp=False,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


@functools.cache
def params(config=CONFIG):
    """Nothing is left at 0 or 1."""
    drawn = lex.init(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), drawn)


@jax.jit
def logits_of(table, tokens):
    return lex.apply(CONFIG, params(), table, tokens).logits


def test_renaming_tokens_and_their_vectors_renames_the_logits_exactly():
    table = lex.draw(CONFIG, params(), jax.random.split(jax.random.key(2), B))
    renamed = np.random.default_rng(3).permutation(V)
    moved = jnp.zeros_like(table).at[:, renamed].set(table)  # token v is now renamed[v]
    found = logits_of(moved, renamed[TOKENS])
    expected = logits_of(table, TOKENS)
    assert np.abs(found[:, :, renamed] - expected).max() < 1e-5
    assert np.abs(found - expected).max() > 0.1


def test_the_probability_of_a_text_is_the_same_under_any_renaming_on_average():
    draws = 400
    keys = jax.random.split(jax.random.key(4), draws)
    repeated = np.repeat(TOKENS[:1], draws, axis=0)
    renamed = np.random.default_rng(5).permutation(V)[repeated]

    @jax.jit
    def log_probs(keys, tokens):
        table = lex.draw(CONFIG, params(), keys)
        said = jax.nn.log_softmax(logits_of(table, tokens)[:, :-1])
        return jnp.take_along_axis(said, tokens[:, 1:, None], axis=2).sum(axis=(1, 2))

    one = np.asarray(log_probs(keys, repeated))
    other = np.asarray(log_probs(jax.random.split(jax.random.key(6), draws), renamed))
    error = np.sqrt((one.var() + other.var()) / draws)
    assert error > 0
    assert abs(one.mean() - other.mean()) < 3 * error
    # One fixed table would not do: its two probabilities are not the same.
    assert abs(log_probs(keys[:1], repeated[:1]) - log_probs(keys[:1], renamed[:1]))[0] > 1e-3


def test_no_parameter_has_an_axis_as_long_as_the_vocabulary():
    def axes(config):
        leaves = jax.tree_util.tree_leaves_with_path(lex.param_shapes(config))
        return {sharding.path_string(path): leaf.shape for path, leaf in leaves}

    assert all(V not in shape for shape in axes(CONFIG).values())
    larger = CONFIG.replace(vocab_size=1000, fixed_ids=(7, 500))
    shapes = axes(larger)
    assert {path for path, shape in shapes.items() if shape != axes(CONFIG).get(path)} == {
        "fixed/embedding"
    }
    assert shapes["fixed/embedding"] == (2, D)
    for config in (CONFIG, larger, larger.replace(table="learned"), CONFIG.replace(mlp_bias=True)):
        sizes = [np.prod(shape) for shape in axes(config).values()]
        assert config.num_params() == sum(sizes)


def test_tables_are_standard_normal_but_for_fixed_ids():
    config = CONFIG.replace(vocab_size=400, fixed_ids=(3, 9))
    fixed = params(config)["fixed"]["embedding"]
    tables = np.asarray(lex.draw(config, params(config), jax.random.split(jax.random.key(0), 8)))
    assert tables.shape == (8, 400, D)
    np.testing.assert_array_equal(tables[:, [3, 9]], np.broadcast_to(fixed, (8, 2, D)))
    free = np.delete(tables, [3, 9], axis=1)
    assert abs(free.mean()) < 0.01 and abs(free.std() - 1) < 0.01
    assert len(np.unique(free[:, 0, 0])) == 8


def test_a_cache_read_unevenly_gives_the_logits_of_one_call():
    table = lex.draw(CONFIG, params(), jax.random.split(jax.random.key(2), B))
    expected = logits_of(table, TOKENS)
    cache = kv.create(CONFIG, B, T + 4)
    step = jax.jit(lambda cache, part: lex.apply(CONFIG, params(), table, part, cache=cache))
    for commits in ([4, 1, 3, 2], [2, 4, 3, 2], [2, 3, 2, 4], [4, 4, 4, 4]):
        start = np.asarray(cache.lengths)
        part = np.stack([np.pad(TOKENS[b], (0, 4))[start[b] : start[b] + 4] for b in range(B)])
        out = step(cache, part)
        for b in range(B):
            end = min(start[b] + commits[b], T)
            np.testing.assert_allclose(
                out.logits[b, : end - start[b]], expected[b, start[b] : end], atol=1e-4
            )
        cache = kv.truncate(out.cache, jnp.minimum(start + np.array(commits), T))


def test_a_model_is_read_as_it_was_saved(tmp_path):
    for config in (CONFIG.replace(eos_token_ids=(2,), fixed_ids=(2,)),
                   CONFIG.replace(table="learned")):  # fmt: skip
        folder = tmp_path / config.table
        lex.save(folder, config, params(config))
        found, loaded = lex.load(folder)
        assert found == config == lex.load_config(folder)
        assert hash(found) == hash(config)
        jax.tree.map(np.testing.assert_array_equal, loaded, params(config))


def test_configs_that_make_no_sense_are_refused():
    for field, value in (
        ("table", "random"), ("causal", False), ("tie_embeddings", False), ("fixed_ids", (5, 5)),
        ("fixed_ids", (V,)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=field):
            CONFIG.replace(**{field: value})
