"""The hypernetwork against a naive NumPy loop, and what section 6 of ZeTT asks of its tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from models import hypernetwork, sharding, token_tables, transformer
from models.errors import InputError
from models.hypernetwork import HypernetworkConfig
from tests.models import random_models

V, PAD = 64, 3
CONFIG = HypernetworkConfig(
    embed_dim=16,
    vocab_size=V,
    num_fallback=4,
    pad_id=PAD,
    hidden_dim=16,
    mlp_dim=32,
    num_heads=2,
    num_layers=2,
    bias=True,
    initializer_range=0.3,
)


@functools.cache
def params(config: HypernetworkConfig = CONFIG):
    """Nothing is left at 0 or 1, and rows differ well."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        name = sharding.path_string(path)
        if name.endswith("scale"):
            noise = 1 + 0.3 * noise
        elif name.endswith("kernel"):
            fan_in = leaf.size / leaf.shape[-1] if "out" in name else leaf.shape[0]
            noise = 1.5 * noise * fan_in**-0.5
        else:
            noise = 0.5 * noise
        return jnp.asarray(noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, hypernetwork.param_shapes(config))


@functools.cache
def table(columns: int = CONFIG.columns) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(V, columns)) * rng.uniform(0.5, 2, columns), jnp.float32)


def some_surfaces(n: int = 40) -> np.ndarray:
    """Of 1 to 7 ids, appended tokens among them."""
    rng = np.random.default_rng(2)
    found = np.full((n, 7), PAD, np.int32)
    for row in found:
        length = rng.integers(1, 8)
        row[:length] = rng.choice(np.delete(np.arange(V + 4), PAD), length)
    return found


predict = jax.jit(hypernetwork.apply, static_argnums=0)
init = jax.jit(hypernetwork.init, static_argnums=0)


def naive(config: HypernetworkConfig, weights, source, surface):
    """Section 2.3 for one token."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"].reshape(x.shape[-1], -1) + p["bias"].reshape(-1)

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def mlp(x, p):
        return dense(gelu(dense(x, p["up"])), p["down"])

    def projector(x, p):
        return norm(x + gelu(mlp(x, p["mlp"])), p["norm"])

    def scale(x, p):
        return x * p["scale"] + p["bias"]

    rows = [
        scale(np.asarray(source)[i], w["in_scaler"]) if i < V else w["fallback"][i - V]
        for i in surface
    ]
    x = projector(dense(np.stack(rows), w["projection"]), w["projector"])
    x = norm(x + w["positions"][: len(surface)] + w["token_type_embedding"], w["embedding_norm"])
    real = [i for i, token in enumerate(surface) if token != config.pad_id]
    width = config.hidden_dim // config.num_heads
    for layer in range(config.num_layers):
        p = w[f"layers_{layer}"]
        kernel, bias = p["attention"]["qkv"]["kernel"], p["attention"]["qkv"]["bias"]
        mixed = np.zeros((len(surface), config.num_heads, width))
        for head in range(config.num_heads):
            q, k, v = (x @ kernel[:, head, part] + bias[head, part] for part in range(3))
            for i in range(len(surface)):
                weight = np.exp(k[real] @ q[i] / np.sqrt(width))
                mixed[i, head] = (weight / weight.sum()) @ v[real]
        y = dense(mixed.reshape(len(surface), -1), p["attention"]["out"])
        x = norm(x + y, p["attention_norm"])
        x = norm(x + mlp(x, p["mlp"]), p["mlp_norm"])
    first = x[0]
    found = [
        scale(
            dense(projector(first, w[f"{side}_projector"]), w[f"{side}_head"]), w[f"{side}_scaler"]
        )
        for side in ("input", "output")
    ]
    return (*found, dense(first, w["bias_head"])[0])


def test_rows_are_those_of_a_naive_loop():
    surfaces = some_surfaces()
    found = predict(CONFIG, params(), table(), surfaces)
    expected = [naive(CONFIG, params(), table(), surface) for surface in surfaces]
    for mine, theirs in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(mine, np.stack(theirs), atol=2e-4)


def test_tokens_do_not_see_each_other():
    """Section 6.7: order, neighbours and parts make no difference; nor does padding (2.2)."""
    surfaces = some_surfaces()
    whole = predict(CONFIG, params(), table(), surfaces)
    order = np.random.default_rng(3).permutation(len(surfaces))
    turned = predict(CONFIG, params(), table(), surfaces[order])
    parts = hypernetwork.predict(CONFIG, params(), table(), surfaces, chunk=16)
    short = surfaces[surfaces[:, 4] == PAD]
    narrow = predict(CONFIG, params(), table(), short[:, :4])
    for mine, other, part, cut in zip(whole, turned, parts, narrow, strict=True):
        np.testing.assert_allclose(mine[order], other, atol=1e-5)
        np.testing.assert_allclose(mine, part, atol=1e-5)
        np.testing.assert_allclose(mine[surfaces[:, 4] == PAD], cut, atol=1e-5)
        assert np.std(mine, 0).min() > 0.1
    # Equal surfaces give equal rows; a row of padding alone stays finite.
    alone = predict(CONFIG, params(), table(), np.full((40, 7), PAD, np.int32))
    assert all(np.isfinite(x).all() and (x == x[0]).all() for x in alone)


def test_columns_begin_where_the_source_columns_are():
    """Section 6.6: means and deviations match; what goes in has mean 0 and a small deviation."""
    fresh = init(CONFIG, jax.random.key(0))
    anchors = some_surfaces(200)
    set_up = jax.jit(hypernetwork.calibrate, static_argnums=0)(CONFIG, fresh, table(), anchors)
    found = predict(CONFIG, set_up, table(), anchors)
    joined = token_tables.joined(found._replace(bias=None))
    for mine, theirs in zip(
        token_tables.statistics(joined), token_tables.statistics(table()), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
    scaled = table() * set_up["in_scaler"]["scale"] + set_up["in_scaler"]["bias"]
    mean, deviation = token_tables.statistics(scaled)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(deviation, CONFIG.initializer_range, rtol=1e-5)
    plain = predict(CONFIG, fresh, table(), anchors)
    assert np.abs(np.std(plain.input, 0) - np.std(table()[:, :16], 0)).max() > 0.1


def test_frozen_scalers_have_no_gradient_and_everything_else_has():
    """Section 2.3: the output table's scaler learns, those of the source and the input do not."""

    def loss(weights, surfaces):
        found = hypernetwork.apply(CONFIG, weights, table(), surfaces)
        return sum(jnp.sum(jnp.sin(x + i)) for i, x in enumerate(found))

    gradient = jax.jit(jax.grad(loss))(params(), some_surfaces())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        frozen = path[0].key in ("in_scaler", "input_scaler")
        assert (np.abs(leaf).max() == 0) == frozen, path


def test_languages_are_one_more_position():
    config = HypernetworkConfig(**{**vars(CONFIG), "num_languages": 3, "bias": False})
    weights, surfaces = params(config), some_surfaces(6)
    one = predict(config, weights, table(), surfaces, np.zeros(6, np.int32))
    two = predict(config, weights, table(), surfaces, np.full(6, 2, np.int32))
    mixed = hypernetwork.predict(config, weights, table(), surfaces, np.array([0, 0, 0, 2, 2, 2]))
    assert np.abs(one.input - two.input).max() > 0.01
    np.testing.assert_allclose(mixed.output[:3], one.output[:3], atol=1e-5)
    np.testing.assert_allclose(mixed.output[3:], two.output[3:], atol=1e-5)
    with pytest.raises(InputError, match="languages"):
        hypernetwork.apply(config, weights, table(), jnp.asarray(surfaces))


def test_tied_models_have_one_table_and_untied_ones_two():
    """Section 6.9, and the published sizes."""
    untied = random_models.CASES["base"]
    tied = random_models.CASES["multi_query_tied"]
    for model in (untied, tied):
        config = hypernetwork.for_model(model, num_extra=2, num_heads=2)
        assert (config.hidden_dim, config.mlp_dim) == (16, 32)
        weights = init(config, jax.random.key(0))
        old = token_tables.tables(model, random_models.params(model))
        source = token_tables.joined(old)
        found = hypernetwork.predict(config, weights, source, some_surfaces())
        assert (found.output is None) == model.tie_embeddings and found.bias is None
        assert source.shape == (V, config.columns)
        places, ids = jnp.array([0, 5]), jnp.array([9, 1])
        new = token_tables.with_rows(found, old, places, ids)
        # Section 6.5: rows of special tokens are the model's own, bit for bit.
        for mine, theirs in zip(new[:2], old[:2], strict=True):
            if mine is not None:
                np.testing.assert_array_equal(mine[places], theirs[ids])
        changed = token_tables.with_tables(random_models.params(model), new)
        other = token_tables.retokenized_config(model, 40)
        logits = transformer.apply(other, changed, jnp.array([[1, 39]])).logits
        assert logits.shape == (1, 2, 40)
        back = token_tables.tables(other, changed)
        np.testing.assert_array_equal(token_tables.joined(back), token_tables.joined(new))
        np.testing.assert_array_equal(
            token_tables.joined(token_tables.split(model, source)), source
        )


def test_a_variant_takes_the_tables_and_keeps_what_it_learned():
    """Section 6.11."""
    model = random_models.BASE
    base, tuned = random_models.params(model), random_models.params(model, 1)
    new = token_tables.Tables(jnp.ones((40, 16)), 2 * jnp.ones((40, 16)))
    swapped = token_tables.with_tables(base, new)
    found = token_tables.transfer_to_variant(base, swapped, tuned, 0.3)
    assert found["embedder"]["embedding"].shape == (40, 16)
    np.testing.assert_array_equal(found["lm_head"]["kernel"], 2)
    kernel = ("layers_0", "attention", "qkv", "kernel")

    def pick(tree):
        return functools.reduce(lambda node, key: node[key], kernel, tree)

    # Zero-shot, the base's blocks did not move.
    np.testing.assert_array_equal(pick(found), pick(tuned))
    trained = jax.tree.map(lambda x: x + 1, swapped)
    moved = token_tables.transfer_to_variant(base, trained, tuned, 0.3)
    np.testing.assert_allclose(pick(moved), pick(tuned) + 0.3, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="variant"):
        token_tables.transfer_to_variant(base, swapped, {**tuned, "more": 1})
    other = random_models.params(model.replace(mlp_dim=8))
    with pytest.raises(InputError, match="shape"):
        token_tables.transfer_to_variant(base, swapped, other)


def test_special_ids_move_with_their_tokens():
    model = random_models.BASE.replace(eos_token_ids=(2, 9), bos_token_id=1)
    new = token_tables.retokenized_config(model, 40, {9: 3})
    assert (new.vocab_size, new.eos_token_ids, new.bos_token_id) == (40, (2, 3), 1)
    with pytest.raises(InputError, match="no room"):
        token_tables.retokenized_config(model, 5)


def test_saved_and_loaded(tmp_path):
    hypernetwork.save(tmp_path / "h", CONFIG, params())
    config, weights = hypernetwork.load(tmp_path / "h")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, weights, params())


def test_split_over_a_mesh_it_is_the_same():
    mesh = sharding.make_mesh(2, 2)
    placed = jax.device_put(params(), sharding.tree_shardings(params(), mesh))
    spec = placed["layers_0"]["attention"]["qkv"]["kernel"].sharding.spec
    assert "model" in spec
    surfaces = jax.device_put(some_surfaces(), sharding.batch_sharding(mesh))
    found = predict(CONFIG, placed, table(), surfaces)
    for mine, theirs in zip(
        found, predict(CONFIG, params(), table(), some_surfaces()), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_dim", 15), ("num_layers", 0), ("num_languages", -1), ("dtype", "x")],
)
def test_wrong_sizes_are_named(field, value):
    with pytest.raises(InputError, match=f"hypernetwork.{'num_heads' if value == 15 else field}"):
        HypernetworkConfig(**{**vars(CONFIG), field: value})


def test_wrong_inputs_are_named():
    with pytest.raises(InputError, match="table: 3 columns"):
        hypernetwork.apply(CONFIG, params(), jnp.zeros((4, 3)), jnp.zeros((1, 7), int))
    with pytest.raises(InputError, match="max_surface"):
        hypernetwork.apply(CONFIG, params(), table(), jnp.zeros((1, 8), int))
