"""Checkpoints load whole or not at all, save bit-identically, and open in transformers."""

import gc
import json
import math
import os
import subprocess
import sys
import textwrap
import tracemalloc

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from models import hf_checkpoint, hf_names, sharding, sizes, transformer
from models.errors import InputError
from tests.models import hf_fixtures

SINGLE = "model.safetensors"


def stored(directory) -> dict[str, np.ndarray]:
    """All tensors of a directory, read without the code under test."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


def edit(directory, change) -> None:
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = stored(directory)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / SINGLE, {"format": "pt"})


def edit_config(directory, name="config.json", **fields) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def random_parameters(config):
    rng = np.random.default_rng(0)
    dtype = config.compute_dtype
    shapes = transformer.param_shapes(config)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), shapes)


@pytest.fixture
def llama(tmp_path):
    return hf_fixtures.checkpoint("llama", tmp_path / "llama")


# The table of names


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "mixtral"]
)
def test_the_table_has_every_parameter_and_every_tensor_once(name):
    model = hf_fixtures.build(name)
    config = hf_checkpoint.hf_config.from_hf(model.config.to_dict())
    shapes = flax.traverse_util.flatten_dict(transformer.param_shapes(config))
    for fused in (False, True):
        table = hf_names.table(config, fused_experts=fused)
        assert {p: v.shape for p, v in table.items()} == {p: s.shape for p, s in shapes.items()}
        pieces = [piece for parameter in table.values() for piece in parameter.pieces]
        assert len({piece.name for piece in pieces}) == len(pieces)
        for parameter in table.values():  # the pieces cover it exactly once
            cover = np.zeros(parameter.shape, int)
            for piece in parameter.pieces:
                cover[piece.block] += 1
            assert (cover == 1).all()
    in_memory = {n: tuple(p.shape) for n, p in model.named_parameters()}  # experts fused
    assert {piece.name: piece.shape for piece in pieces} == in_memory


def test_layout_of_a_fused_kernel():
    """qkv.kernel[:, k] holds group k's queries, then its key, then its value."""
    config = sizes.get("tiny_llama")
    K, G, H, D = config.num_kv_heads, config.queries_per_kv, config.head_dim, config.embed_dim
    pieces = hf_names.table(config)["layers_0", "attention", "qkv", "kernel"].pieces
    rng = np.random.default_rng(0)
    q = rng.normal(size=(K * G * H, D))
    k = rng.normal(size=(K * H, D))
    kernel = np.zeros((D, K, G + 2, H))
    for piece, tensor in zip(pieces, (q, k, k)):
        whole = tuple(slice(0, b.stop - b.start) for b in piece.block)
        kernel[piece.block] = hf_names.to_parameter(piece, whole, tensor)
        np.testing.assert_array_equal(
            hf_names.to_stored(piece, kernel).reshape(piece.shape), tensor
        )
    x = rng.normal(size=D)
    np.testing.assert_allclose(
        np.einsum("d,dkgh->kgh", x, kernel[:, :, :G]).reshape(-1), q @ x, rtol=1e-12
    )
    np.testing.assert_allclose(np.einsum("d,dkh->kh", x, kernel[:, :, G]).reshape(-1), k @ x)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_mixtral", "tiny_opt"])
def test_parts_of_parameters_read_only_their_part(name):
    """Any box of a parameter, through `stored_index`, equals the box of the whole."""
    rng = np.random.default_rng(0)
    for parameter in hf_names.table(sizes.get(name)).values():
        for piece in parameter.pieces[:3]:
            tensor = rng.normal(size=piece.shape)
            whole = np.zeros(parameter.shape)
            everything = tuple(slice(0, n) for n in parameter.shape)
            full = hf_names.overlap(piece, everything)
            whole[piece.block] = hf_names.to_parameter(piece, full, tensor)
            for _ in range(4):
                ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in parameter.shape]
                index = tuple(slice(int(a), int(b)) for a, b in ends)
                box = np.zeros([s.stop - s.start for s in index])
                part = hf_names.overlap(piece, index)
                if part is not None:
                    read = tensor[hf_names.stored_index(piece, part)]
                    target = tuple(
                        slice(b.start + p.start - i.start, b.start + p.stop - i.start)
                        for b, p, i in zip(piece.block, part, index)
                    )
                    box[target] = hf_names.to_parameter(piece, part, read)
                np.testing.assert_array_equal(box, whole[index])


# Round trips


@pytest.mark.parametrize("name", hf_fixtures.CASES)
def test_save_load_save_is_bit_identical(name, tmp_path):
    first = hf_fixtures.checkpoint(name, tmp_path / "first")
    config, params = hf_checkpoint.load(first)
    hf_checkpoint.save(tmp_path / "second", config, params, max_shard_bytes=5000)
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert same_bits(stored(first), stored(tmp_path / "second"))
    again, params_again = hf_checkpoint.load(tmp_path / "second")
    assert again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_half_precision_round_trip(name, dtype, tmp_path):
    model = hf_fixtures.build(name, dtype=getattr(torch, dtype))
    first = hf_fixtures.save(model, tmp_path / "first")
    config, params = hf_checkpoint.load(first)
    assert config.dtype == dtype
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    hf_checkpoint.save(tmp_path / "second", config, params)
    assert same_bits(stored(first), stored(tmp_path / "second"))
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert reopened.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", hf_fixtures.CASES)
def test_transformers_opens_what_is_saved(name, tmp_path):
    model = hf_fixtures.build(name)
    config, params = hf_checkpoint.load(hf_fixtures.save(model, tmp_path / "first"))
    hf_checkpoint.save(tmp_path / "second", config, params, max_shard_bytes=20000)
    reopened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "second", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (key, expected), (_, actual) in zip(
        model.state_dict().items(), reopened.state_dict().items(), strict=True
    ):
        assert torch.equal(expected, actual), key
    tokens = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reopened(tokens).logits)


def test_llada_round_trip(tmp_path):
    first = hf_fixtures.llada_checkpoint(hf_fixtures.build("llama"), tmp_path / "first")
    config, params = hf_checkpoint.load(first)
    assert (config.family, config.mask_token_id) == ("llada", hf_fixtures.VOCAB - 1)
    hf_checkpoint.save(tmp_path / "second", config, params)
    assert same_bits(stored(first), stored(tmp_path / "second"))
    assert hf_checkpoint.load_config(tmp_path / "second") == config


def test_conversion_on_load_and_save(llama, tmp_path):
    config, params = hf_checkpoint.load(llama, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    original = stored(llama)["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(
        np.asarray(params["layers_1"]["mlp"]["gate_up"]["kernel"])[:, 1],
        original.T.astype(ml_dtypes.bfloat16),
    )
    config, params = hf_checkpoint.load(llama)
    hf_checkpoint.save(tmp_path / "out", config, params, dtype="float16")
    converted = stored(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(converted, original.astype(np.float16))
    assert hf_checkpoint.load_config(tmp_path / "out").dtype == "float16"
    with pytest.raises(InputError, match=r"dtype: 'bf16' is not known \(did you mean 'bfloat16'"):
        hf_checkpoint.load(llama, dtype="bf16")


def test_random_parameters_can_be_saved(tmp_path):
    config = sizes.get("tiny_mixtral").replace(dtype="bfloat16")
    params = random_parameters(config)
    hf_checkpoint.save(tmp_path / "out", config, params)
    again, params_again = hf_checkpoint.load(tmp_path / "out")
    assert again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))


def test_tokenizer_files_are_copied(llama, tmp_path):
    (llama / "tokenizer.json").write_text("{}")
    (llama / "chat_template.jinja").write_text("x")
    config, params = hf_checkpoint.load(llama)
    hf_checkpoint.save(tmp_path / "out", config, params, tokenizer_from=llama)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "x"
    with pytest.raises(InputError, match=r"tokenizer_from: .* is not a directory"):
        hf_checkpoint.save(tmp_path / "out", config, params, tokenizer_from=tmp_path / "nope")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_saving_over_itself(llama):
    before = stored(llama)
    config, params = hf_checkpoint.load(llama)
    hf_checkpoint.save(llama, config, params, max_shard_bytes=4000)
    assert same_bits(before, stored(llama))


# Variants found in the wild


def rename(directory, change) -> None:
    tensors = {change(name): tensor for name, tensor in stored(directory).items()}
    safetensors.numpy.save_file(tensors, directory / SINGLE, {"format": "pt"})


def same_parameters(directory, name) -> bool:
    _, params = hf_checkpoint.load(directory)
    fresh = hf_fixtures.checkpoint(name, directory.parent / "fresh")
    _, expected = hf_checkpoint.load(fresh)
    return jax.tree.all(jax.tree.map(np.array_equal, params, expected))


@pytest.mark.parametrize("name", ["llama-bias_tied", "opt"])
def test_bare_backbone_without_prefix(name, tmp_path):
    directory = tmp_path / "bare"
    model = hf_fixtures.build(name)
    hf_fixtures.save(model.model, directory)
    assert not any(tensor.startswith("model.") for tensor in stored(directory))
    assert same_parameters(directory, name)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint(prefix, tmp_path):
    directory = hf_fixtures.checkpoint("gemma3_text", tmp_path / "multi")
    rename(directory, lambda name: prefix + name.removeprefix("model."))
    edit(directory, lambda t: t.update({"vision_tower.x.weight": np.zeros(3, np.float32)}))
    text = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text})
    )
    assert same_parameters(directory, "gemma3_text")


def test_fused_experts(tmp_path):
    """The layout that transformers 5 holds in memory, should someone store it."""
    directory = hf_fixtures.checkpoint("mixtral", tmp_path / "fused")
    model = hf_fixtures.build("mixtral")
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    safetensors.numpy.save_file(tensors, directory / SINGLE, {"format": "pt"})
    assert same_parameters(directory, "mixtral")


def test_buffers_and_tied_copies_are_ignored(tmp_path):
    directory = hf_fixtures.checkpoint("llama-bias_tied", tmp_path / "extra")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit(directory, add)
    assert same_parameters(directory, "llama-bias_tied")


def test_end_of_sequence_of_generation_config(llama):
    edit_config(llama, "generation_config.json", eos_token_id=[7, 9])
    edit_config(llama, eos_token_id=7)
    assert hf_checkpoint.load_config(llama).eos_token_ids == (7, 9)
    edit_config(llama, eos_token_id=[5])
    assert hf_checkpoint.load_config(llama).eos_token_ids == (5, 7, 9)
    edit_config(llama, "generation_config.json", eos_token_id=None)
    assert hf_checkpoint.load_config(llama).eos_token_ids == (5,)
    config = json.loads((llama / "config.json").read_text())
    del config["eos_token_id"]  # what would be assumed gives way to what is said
    (llama / "config.json").write_text(json.dumps(config))
    edit_config(llama, "generation_config.json", eos_token_id=9)
    assert hf_checkpoint.load_config(llama).eos_token_ids == (9,)


# Bad input


def failure(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as excinfo:
        call(*args, **kwargs)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


def test_missing_and_extra_tensors(llama):
    name = "model.layers.1.mlp.down_proj.weight"
    edit(llama, lambda tensors: tensors.pop(name))
    assert f"tensor '{name}' of shape (16, 24) is missing" in failure(hf_checkpoint.load, llama)
    edit(llama, lambda t: t.update({name + "s": np.zeros((16, 24), np.float32)}))
    assert f"did you mean '{name}s'" in failure(hf_checkpoint.load, llama)
    edit(llama, lambda t: t.update({name: t.pop(name + "s"), "odd": np.zeros(3, np.float32)}))
    message = failure(hf_checkpoint.load, llama)
    assert "unexpected tensor 'odd' of shape (3,)" in message and "llama" in message


def test_untied_checkpoint_without_a_head(llama):
    edit(llama, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor 'lm_head.weight' of shape (97, 16) is missing" in failure(
        hf_checkpoint.load, llama
    )


def test_too_many_layers_in_the_files(llama):
    edit_config(llama, num_hidden_layers=1)
    message = failure(hf_checkpoint.load, llama)
    assert "unexpected tensor 'model.layers.1." in message and "(and 8 more)" in message


def test_wrong_shape(llama):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(llama, lambda t: t.update({name: np.zeros((16, 16), np.float32)}))
    message = failure(hf_checkpoint.load, llama)
    assert f"tensor '{name}' has shape (16, 16); expected (8, 16) from config.json" in message


def test_unsupported_dtype(llama):
    name = "model.norm.weight"
    edit(llama, lambda t: t.update({name: np.zeros(16, np.int8)}))
    message = failure(hf_checkpoint.load, llama)
    assert f"tensor '{name}' is stored as I8; allowed: BF16, F16, F32" in message


def test_bad_config_files(llama, tmp_path):
    assert "is not a directory" in failure(hf_checkpoint.load, tmp_path / "nope")
    edit_config(llama, model_type="lama")
    message = failure(hf_checkpoint.load, llama)
    assert message.startswith(f"{llama / 'config.json'}: model_type: 'lama'")
    (llama / "config.json").write_text('{"model_type": ')
    assert "config.json: not readable as JSON" in failure(hf_checkpoint.load, llama)
    (llama / "config.json").write_text("[]")
    assert "must hold a JSON object, not list" in failure(hf_checkpoint.load, llama)
    (llama / "config.json").unlink()
    assert "config.json: missing" in failure(hf_checkpoint.load, llama)


def test_bad_generation_config(llama):
    edit_config(llama, "generation_config.json", eos_token_id="x")
    assert "generation_config.json: eos_token_id: 'x'" in failure(hf_checkpoint.load, llama)


def test_pickled_checkpoint(llama):
    (llama / SINGLE).unlink()
    torch.save({}, llama / "pytorch_model.bin")
    assert "unpickling can run any code" in failure(hf_checkpoint.load, llama)


def test_truncated_shard(tmp_path):
    directory = hf_fixtures.save(
        hf_fixtures.build("llama"), tmp_path / "llama", max_shard_size="8KB"
    )
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard}: truncated or corrupt" in failure(hf_checkpoint.load, directory)


def test_saving_parameters_that_do_not_fit(llama, tmp_path):
    config, params = hf_checkpoint.load(llama)
    out = tmp_path / "out"
    norm = params["final_norm"].pop("scale")
    message = failure(hf_checkpoint.save, out, config, params)
    assert "params: final_norm/scale of shape (16,) is missing" in message
    params["final_norm"]["scale"] = norm[:3]
    message = failure(hf_checkpoint.save, out, config, params)
    assert "params: final_norm/scale has shape (3,); expected (16,)" in message
    params["final_norm"] |= {"scale": norm, "bias": norm}
    message = failure(hf_checkpoint.save, out, config, params)
    assert "params: final_norm/bias is not a parameter of the config" in message
    del params["final_norm"]["bias"]
    message = failure(hf_checkpoint.save, out, config.replace(causal=False), params)
    assert "causal: False cannot be saved as family 'llama'" in message
    assert not out.exists()


# Memory and sharding


def test_host_memory_stays_within_a_shard_beyond_the_model(tmp_path):
    """Loading holds the model and one tensor; saving, the model and one shard."""
    config = sizes.get("tiny_mixtral").replace(
        embed_dim=256, mlp_dim=512, num_layers=4, vocab_size=2048, dtype="float32"
    )
    shapes = transformer.param_shapes(config)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), shapes)
    shard = 3 << 20
    tracemalloc.start()
    try:
        hf_checkpoint.save(tmp_path / "out", config, params, max_shard_bytes=shard)
        saving = tracemalloc.get_traced_memory()[1]
        size = 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
        del params
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        config, params = hf_checkpoint.load(tmp_path / "out")
        jax.block_until_ready(params)
        loading = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) * 2
    assert size > 4 * shard
    # On a CPU the host buffers are the model, so its size itself shows that nothing is doubled.
    assert size <= loading <= size + largest + (1 << 20)
    assert saving <= shard + (1 << 20)


def test_each_device_reads_its_own_part(tmp_path):
    """Under 8 simulated devices, the parts add up to the whole and no more is read than that."""
    config = sizes.get("tiny_llama")
    directory = tmp_path / "llama"
    hf_checkpoint.save(directory, config, random_parameters(config))
    program = textwrap.dedent(
        f"""
        import jax, numpy as np
        from models import hf_checkpoint, safetensors_io, sharding
        read = 0
        original = safetensors_io.Reader.read
        def counting(self, name, index=None):
            global read
            array = original(self, name, index)
            if "mlp.gate_proj" in name or "self_attn.q_proj" in name:
                read += array.size
            return array
        safetensors_io.Reader.read = counting
        whole_config, whole = hf_checkpoint.load({str(directory)!r})
        once, read = read, 0
        mesh = sharding.make_mesh(data=4, model=2)
        config, params = hf_checkpoint.load({str(directory)!r}, mesh=mesh)
        assert config == whole_config
        assert read == once, (read, once)
        assert jax.tree.map(lambda a: a.sharding, params) == sharding.param_shardings(config, mesh)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, whole))
        kernel = params["layers_0"]["mlp"]["gate_up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (16, 2, 16)
        hf_checkpoint.save({str(tmp_path / "again")!r}, config, params)
        """
    )
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same_bits(stored(directory), stored(tmp_path / "again"))


def test_a_mesh_of_one_device(llama):
    mesh = sharding.make_mesh()
    _, params = hf_checkpoint.load(llama, mesh=mesh)
    assert params["final_norm"]["scale"].sharding.mesh == mesh
    _, expected = hf_checkpoint.load(llama)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
