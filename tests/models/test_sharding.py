"""The partition table: every large parameter is split, by heads, width or vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from models import cache as kv
from models import placement, sharding, transformer
from models.errors import InputError
from tests.models.random_models import BASE, CASES, params

# The axis of every parameter that 'model' splits, by the end of its path. What is not named is
# small and lies everywhere.
SPLIT_AXIS = {
    "embedder/embedding": 0,  # V
    "relative_bias/embedding": 1,  # K
    "attention/qkv/kernel": 1,  # K
    "attention/qkv/bias": 0,  # K
    "attention/out/kernel": 0,  # K
    "mlp/gate_up/kernel": 2,  # F
    "mlp/gate_up/bias": 1,  # F
    "mlp/up/kernel": 1,  # F
    "mlp/up/bias": 0,  # F
    "mlp/down/kernel": 0,  # F
    "moe/gate_up/kernel": 3,  # F
    "moe/down/kernel": 1,  # F
    "lm_head/kernel": 1,  # V
}
REPLICATED = ("scale", "router/kernel", "embedder/positions", "out/bias", "down/bias", "norm/bias")


def paths(config) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = jax.tree_util.tree_leaves_with_path(transformer.param_shapes(config))
    return {sharding.path_string(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_split_on_the_intended_axis_or_meant_to_be_everywhere(name):
    for path, leaf in paths(CASES[name]).items():
        spec = placement.spec_for(path)
        named = [end for end in SPLIT_AXIS if path.endswith(end)]
        if named:
            assert len(spec) == leaf.ndim, path
            assert [a for a, split in enumerate(spec) if split] == [SPLIT_AXIS[named[0]]], path
            assert spec[SPLIT_AXIS[named[0]]] == "model", path
        else:
            assert path.endswith(REPLICATED), path
            assert spec == P(), path


def test_together_the_cases_reach_every_entry_of_the_table():
    seen = {end for config in CASES.values() for path in paths(config) for end in SPLIT_AXIS
            if path.endswith(end)}  # fmt: skip
    assert seen == set(SPLIT_AXIS)
    assert len(placement.PARTITION_TABLE) == len(SPLIT_AXIS) + 1


@pytest.mark.parametrize(
    "name", ["multi_head", "post_norms_softcaps", "experts", "learned_positions"]
)
def test_logits_do_not_depend_on_the_mesh(name):
    config = CASES[name]
    mesh = sharding.make_mesh(2, config.num_kv_heads)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 6)))
    run = jax.jit(lambda p, t: transformer.apply(config, p, t).logits)
    split = jax.device_put(params(config), sharding.param_shardings(config, mesh))
    kernel = split["layers_0"]["attention"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == 1
    found = run(split, jax.device_put(tokens, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(found, run(params(config), tokens), atol=1e-5)


def test_an_optimisers_moments_lie_as_their_parameters_do():
    mesh = sharding.make_mesh(1, 2)
    shapes = transformer.param_shapes(BASE)
    adam = jax.eval_shape(optax.adam(1e-3).init, shapes)
    expected = sharding.param_shardings(BASE, mesh)
    assert sharding.tree_shardings(adam, mesh)[0].mu == expected
    assert sharding.tree_shardings(adam, mesh)[0].nu == expected
    assert sharding.tree_shardings(adam, mesh)[0].count.spec == P()


def test_cache_is_split_over_rows_and_heads():
    mesh = sharding.make_mesh(4, 2)
    cache = kv.create(BASE, 8, 16)
    placed = jax.device_put(cache, sharding.cache_shardings(cache, mesh))
    for store in (*placed.keys, *placed.values):
        assert store.addressable_shards[0].data.shape == (2, 1, 16, BASE.head_dim)
        assert len({str(shard.index) for shard in store.addressable_shards}) == 8
    assert placed.lengths.addressable_shards[0].data.shape == (2,)


def test_a_mesh_that_does_not_divide_a_parameter_names_it():
    mesh = sharding.make_mesh(1, 4)
    with pytest.raises(InputError, match=r"'model' of size 4 .*layers_0/attention/out/kernel"):
        sharding.param_shardings(BASE, mesh)  # two key/value heads
    with pytest.raises(InputError, match=r"axis 0 of embedder/embedding \(5, 16\)"):
        sharding.param_shardings(BASE.replace(vocab_size=5), sharding.make_mesh(1, 2))


@pytest.mark.parametrize("shape", [(0, 1), (1, -2), (3, 3), (16, 1)])
def test_a_mesh_that_the_machine_cannot_hold(shape):
    with pytest.raises(InputError, match=f"mesh: {shape[0]}x{shape[1]} needs .* 8 available"):
        sharding.make_mesh(*shape)


def test_mesh_axes():
    mesh = sharding.make_mesh(2, 3)
    assert dict(mesh.shape) == {"data": 2, "model": 3}
    assert list(mesh.devices.flat) == jax.devices()[:6]


@pytest.mark.parametrize(
    ("spec", "shape", "size", "found"),
    [
        (P(None, "model"), (8, 4), 2, P("data", "model")),
        (P(None, None, "model"), (6, 2, 4), 2, P("data", None, "model")),  # the largest
        (P(None, None, "model"), (6, 8, 4), 4, P(None, "data", "model")),  # the one that divides
        (P("model", None), (4, 6), 4, P("model", None)),  # none does
        (P(), (8, 4), 4, P("data", None)),
        (P("model"), (8,), 2, P("model")),
        (P(), (8,), 2, P()),  # vectors stay whole
    ],
)
def test_fsdp_splits_the_largest_whole_axis_that_data_divides(spec, shape, size, found):
    assert placement.over_data(spec, shape, size) == found


def test_outside_of_a_mesh_placement_does_nothing():
    x = jnp.ones((3, 2))
    assert placement.split_rows(x) is x and placement.gathered(x, "mlp", "up", "kernel") is x


@pytest.mark.parametrize("name", ["multi_head", "experts", "learned_positions"])
def test_gradients_of_gathered_parameters_are_those_of_one_device(name):
    config, mesh = CASES[name], sharding.make_mesh(4, 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 6)))

    def loss(p, t):
        return jnp.mean(jax.nn.log_softmax(transformer.apply(config, p, t, remat=True).logits) ** 2)

    def on_mesh(p, t):
        with placement.traced_for(mesh):
            return jax.grad(loss)(p, t)

    lies = sharding.tree_shardings(params(config), mesh, fsdp=True)
    split = jax.device_put(params(config), lies)
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    found = jax.jit(on_mesh, out_shardings=lies)(split, rows)
    wanted = jax.jit(jax.grad(loss))(params(config), tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)
