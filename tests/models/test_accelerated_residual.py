"""Accelerated streams: where they are to be, what their adapters are and cost, and the routers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import method_parts
from models import accelerated_residual as accelerated
from models import cache as kv
from models import exit_router, expert_routing, sharding, sizes, transformer
from models.accelerated_residual import AcceleratorConfig
from models.errors import InputError
from tests.decoding import tiny_accelerated
from tests.models import random_models

CONFIG = tiny_accelerated.CONFIG  # four layers


@pytest.mark.parametrize(
    ("config", "aims"),
    [
        # Two layers an interval: at each gate the last layer.
        (AcceleratorConfig(4), [0, 4, 8, 5, 8, 6, 8]),
        (AcceleratorConfig(4, rate=2.0), [0, 2, 4, 4, 6, 6, 8]),
        # A single interval, until it is at the end; at most three ahead.
        (AcceleratorConfig(1, rate=2.0), [0, 2, 4, 6, 8]),
        (AcceleratorConfig(1, rate=2.0, max_lead=3), [0, 2, 4, 6, 7, 8]),
        # One that goes on does not fall back at a gate.
        (AcceleratorConfig(4, restart=False), [0, 4, 8, 8, 8, 8, 8]),
        (AcceleratorConfig(2, rate=1.5), [0, 2, 3, 5, 6]),
    ],
)
def test_where_the_stream_is_to_be(config, aims):
    count = accelerated.num_adapted(config, 8)
    assert [accelerated.ahead(config, 8, i) for i in range(count + 1)] == aims
    assert accelerated.gates(config.intervals, 8)[-1] == 8


def test_at_first_the_stream_is_a_copy():
    params = accelerated.init(AcceleratorConfig(2), CONFIG, jax.random.key(0))
    p = jax.random.normal(jax.random.key(1), (2, 3, CONFIG.embed_dim))
    cache = kv.create(CONFIG, 2, 8)
    cache = cache.replace(keys=tuple(k + 1.0 for k in cache.keys))
    positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
    for found in accelerated.apply(CONFIG, params, p, cache, (0, 2), positions=positions):
        np.testing.assert_array_equal(found, p)


def test_queries_begin_as_the_best_of_their_rank():
    target = tiny_accelerated.models()["target"]
    wide = np.asarray(target["layers_1"]["attention"]["qkv"]["kernel"])
    wide = wide[:, :, : CONFIG.queries_per_kv].reshape(CONFIG.embed_dim, -1)
    sizes_of = np.linalg.svd(wide, compute_uv=False)
    for rank in (4, CONFIG.embed_dim):
        config = AcceleratorConfig(2, attention_rank=rank)
        params = accelerated.init(config, CONFIG, jax.random.key(0))
        one = accelerated.begin(CONFIG, target, params)["layers_1"]
        left = np.asarray(one["query_down"]) @ np.asarray(one["query_up"])
        # Eckart and Young: what no matrix of this rank can do without.
        assert np.linalg.norm(wide - left) == pytest.approx(
            np.linalg.norm(sizes_of[rank:]), abs=1e-4
        )
        np.testing.assert_array_equal(
            one["attention_norm"]["scale"], target["layers_1"]["attention_norm"]["scale"]
        )


def test_cost_is_that_of_the_shapes_and_small():
    """Section 6, items 4 and 5."""
    for name in ("llama2_7b", "llama3_8b"):
        cost = accelerated.multiply_adds(AcceleratorConfig(4), sizes.get(name))
        assert cost["adapter"] <= 0.1 * cost["layer"]
        assert cost["router"] <= 0.1 * cost["layer"]
    config = AcceleratorConfig(2, router_width=8)
    params = accelerated.init(config, CONFIG, jax.random.key(0))
    cost = accelerated.multiply_adds(config, CONFIG)
    count = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(params["layers_0"])
        if "scale" not in sharding.path_string(path)
    )
    assert cost["adapter"] == count
    model = tiny_accelerated.models()["target"]["layers_0"]
    kernels = [x.size for x in jax.tree.leaves(model) if x.ndim > 1]
    assert cost["layer"] == sum(kernels)
    # Nothing in it makes keys or values.
    names = set(params["layers_0"])
    assert names == {
        "attention_norm", "query_down", "query_up", "out_down", "out_up", "mlp_norm", "mlp_down",
        "mlp_up",
    }  # fmt: skip


@pytest.mark.parametrize("kind", exit_router.ROUTERS)
def test_routers_are_their_loops(kind):
    rng = np.random.default_rng(0)
    params = exit_router.init(6, 3, 4, jax.random.key(0))
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape), params)
    states = [rng.normal(size=(2, 6)) for _ in range(3)]
    found = exit_router.score(kind, params, [jnp.asarray(x) for x in states])
    for b in range(2):
        wanted = tiny_accelerated.router(params, kind, [x[b] for x in states])
        assert float(jax.nn.sigmoid(found[b])) == pytest.approx(wanted, rel=1e-4)


def test_what_a_router_says_is_what_the_model_is_routed_by():
    """With experts that write nothing a layer's output is what its router's norm reads."""
    config = random_models.BASE.replace(num_experts=4, experts_per_token=2, num_layers=3)
    params = transformer.init(config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, config.embed_dim))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    mask = jnp.broadcast_to(jnp.tri(5, dtype=bool), (2, 5, 5))
    found = expert_routing.true_logits(config, params, 1, x, positions=positions, mask=mask)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "moe/down" in sharding.path_string(path) else leaf, params
    )
    read = transformer.apply(config, silent, x, layers=(1, 2), collect=(2,)).collected[0]
    wanted = expert_routing.predicted_logits(config, params, 1, read)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    chosen = np.asarray(expert_routing.chosen(config, found))
    assert (np.sort(chosen, -1) == np.sort(np.argsort(-np.asarray(found), -1)[..., :2], -1)).all()
    assert expert_routing.chosen(config, found, extra=1).shape == (2, 5, 3)
    with pytest.raises(InputError, match="num_experts: 0"):
        expert_routing.check(random_models.BASE)


def test_adapters_are_written_and_read(tmp_path):
    for number, config in enumerate((AcceleratorConfig(2), AcceleratorConfig(2, kind="mlp"))):
        params = accelerated.init(config, CONFIG, jax.random.key(0))
        accelerated.save(tmp_path / str(number), config, params)
        found, read = accelerated.load(tmp_path / str(number), CONFIG)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, params, read)
    with pytest.raises(InputError, match="shape"):
        accelerated.load(tmp_path / "0", CONFIG.replace(embed_dim=32))
    # A method is told when its options are not those that the adapters were trained for.
    load = functools.partial(method_parts.load_part, accelerated.ROLE, tmp_path / "0")
    assert set(load({"intervals": 2, "restart": True, "router": "arla"}, CONFIG)) == set(
        accelerated.init(AcceleratorConfig(2), CONFIG, jax.random.key(0))
    )
    with pytest.raises(InputError, match="intervals: 4 given, but the adapters of"):
        load({"intervals": 4}, CONFIG)
    with pytest.raises(InputError, match="restart: False given"):
        load({"intervals": 2, "restart": False}, CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intervals": 0}, "intervals: 0"),
        ({"rate": 1.0}, "rate: 1.0 must be above 1"),
        ({"kind": "attention"}, "kind: 'attention'"),
        ({"mlp_rank": -1}, "mlp_rank: -1"),
        ({"intervals": 3}, "intervals: 3 must divide the model's 4 layers"),
    ],
)
def test_configs_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        accelerated.init(AcceleratorConfig(**fields), CONFIG, jax.random.key(0))
