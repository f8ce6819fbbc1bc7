"""The same loop on eight simulated devices gives the tokens of one."""

import re

import jax
import numpy as np
import pytest

from decoding import generation, loop
from models import sharding
from models.errors import InputError
from tests.decoding import tiny

METHODS = ("autoregressive", "prompt_lookup", "speculative_sampling")
MESHES = ((2, 4), (8, 1), (1, 4))


def placed(mesh: jax.sharding.Mesh) -> dict:
    return {
        role: jax.device_put(
            tiny.params()[role], sharding.param_shardings(tiny.CONFIGS[role], mesh)
        )
        for role in ("target", "draft")
    }


def method_of(name: str) -> loop.Method:
    return tiny.build(name, **({} if name == "autoregressive" else {"num_draft": 2}))


def shard_shape(array: jax.Array) -> tuple[int, ...]:
    return array.sharding.shard_shape(array.shape)


@pytest.mark.parametrize("shape", MESHES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", METHODS)
def test_tokens_and_counters_are_those_of_one_device(name, shape):
    mesh, method = sharding.make_mesh(*shape), method_of(name)
    rows = tiny.decode(method)
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    found = generation.generate(placed(mesh), tiny.PROMPTS, method, tiny.STOP, mesh=mesh)
    assert found == rows


@pytest.mark.parametrize("shape", MESHES, ids="{0[0]}x{0[1]}".format)
def test_caches_are_split_over_rows_and_heads_before_and_after_rounds(shape):
    mesh, method = sharding.make_mesh(*shape), method_of("speculative_sampling")
    params = placed(mesh)
    kernel = params["target"]["layers_0"]["attention"]["qkv"]["kernel"]
    assert shard_shape(kernel)[1] == 4 // shape[1]
    state, slots = generation.begin(params, tiny.PROMPTS, method, tiny.STOP, mesh=mesh)
    fixed = {"method": method, "stop": tiny.STOP, "mesh": mesh}

    def check(state: loop.DecodeState) -> None:
        found = loop.caches(state.inner)
        assert len(found) == 2
        for cache in found:
            for store in (*cache.keys, *cache.values):
                assert shard_shape(store) == (8 // shape[0], 4 // shape[1], slots, 4)
                assert len(store.sharding.device_set) == shape[0] * shape[1]
            assert shard_shape(cache.lengths) == (8 // shape[0],)

    check(state)
    assert shard_shape(state.tokens)[0] == 8 // shape[0]
    state, _ = generation.advance(params, state, slots, rounds=2, **fixed)
    check(state)


def test_rows_on_different_devices_do_not_talk_to_each_other():
    """Split over rows alone, a round exchanges whether to go on, and never keys or values."""
    mesh, method = sharding.make_mesh(8, 1), method_of("speculative_sampling")
    params = placed(mesh)
    state, slots = generation.begin(params, tiny.PROMPTS, method, tiny.STOP, mesh=mesh)
    text = (
        loop.advance.lower(params, state, np.int32(9), method=method, stop=tiny.STOP, slots=slots)
        .compile()
        .as_text()
    )
    kinds = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S+) (?:{kinds})\(", text)
    assert found
    assert {shape.split("{")[0] for shape in found} <= {"pred[]", "s32[]"}


def test_rows_that_a_mesh_does_not_divide():
    mesh = sharding.make_mesh(2, 4)
    with pytest.raises(InputError, match="mesh: 3 rows do not divide over 2 data devices"):
        tiny.decode(tiny.build("autoregressive"), tiny.PROMPTS[:3], mesh=mesh)


def test_heads_that_a_mesh_does_not_divide():
    method = tiny.build("autoregressive")
    state, _ = generation.begin(tiny.params(), tiny.PROMPTS, method, tiny.STOP)
    with pytest.raises(InputError, match="mesh: 1x8 does not divide 8 rows and 4 key/value heads"):
        generation.place(state, sharding.make_mesh(1, 8))
