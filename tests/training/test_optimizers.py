import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from models.config import TransformerConfig
from models.errors import InputError
from training import optimizers
from training.optimizers import MuonConfig, OptimizerConfig

SHAPES = {"mlp": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}}


def _trees(seed, count):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return [jax.tree.map(draw, SHAPES, is_leaf=is_shape) for _ in range(count)]


def _adamw(config, rates, params, gradients):
    """AdamW with clipping, written out in float64 from the paper's algorithm 2."""
    flat = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(k): v.astype(np.float64)
        for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }
    x = flat(params)
    m, v = ({name: np.zeros_like(value) for name, value in x.items()} for _ in range(2))
    for t, (rate, gradient) in enumerate(zip(rates, map(flat, gradients)), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, g in gradient.items():
            g = g * clip
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            mean, square = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
            decay = config.weight_decay * x[name] if "kernel" in name else 0.0
            x[name] = x[name] - rate * (mean / (np.sqrt(square) + config.epsilon) + decay)
    return x


@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_updates_are_adamw_with_clipping_and_masked_decay(clip_norm):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, clip_norm=clip_norm)
    (params,), gradients = _trees(0, 1), _trees(1, 6)
    optimizer = optimizers.create(config, num_steps=6)
    state, x = optimizer.init(params), params
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, x)
        x = optax.apply_updates(x, updates)
    rate = optimizers.schedule(config, 6)
    expected = _adamw(config, [float(rate(i)) for i in range(6)], params, gradients)
    for path, value in jax.tree_util.tree_leaves_with_path(x):
        np.testing.assert_allclose(
            value, expected[jax.tree_util.keystr(path)], rtol=2e-5, atol=1e-6
        )


def test_schedule_warms_up_then_follows_a_cosine_to_the_final_fraction():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.25)
    rate = optimizers.schedule(config, 110)
    for step in (0, 5, 10, 35, 60, 110):
        if step <= 10:
            expected = 2.0 * step / 10
        else:
            cosine = (1 + math.cos(math.pi * (step - 10) / 100)) / 2
            expected = 2.0 * (0.25 + 0.75 * cosine)
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 4), (20, 4), (1, 1)])
def test_short_runs_have_positive_finite_rates(warmup, num_steps):
    rate = optimizers.schedule(OptimizerConfig(warmup_steps=warmup), num_steps)
    rates = [float(rate(step)) for step in range(num_steps)]
    assert all(0 <= r <= 1.00001e-3 for r in rates)
    assert num_steps == 1 or rates[-1] > 0


def test_only_matrices_of_a_transformer_decay():
    config = TransformerConfig(
        vocab_size=8, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4,
        mlp_dim=8, max_position=4, positions="learned", norm="layernorm", qkv_bias=True,
        tie_embeddings=False,
    )  # fmt: skip
    tree = optimizers.decayed(transformer.param_shapes(config))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decays in jax.tree_util.tree_leaves_with_path(tree)
        if decays
    }
    names = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
    assert found == {f"layers_0/{name}/kernel" for name in names} | {"lm_head/kernel"}


def test_accumulated_batches_make_one_update_with_their_mean_gradient():
    (params,), gradients = _trees(2, 1), _trees(3, 6)
    many = OptimizerConfig(learning_rate=0.1, warmup_steps=2, accumulate=3)
    optimizer = optimizers.create(many, num_steps=6)
    state, x = optimizer.init(params), params
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, x)
        x = optax.apply_updates(x, updates)

    one = optimizers.create(OptimizerConfig(learning_rate=0.1, warmup_steps=2), num_steps=2)
    state, expected = one.init(params), params
    for group in (gradients[:3], gradients[3:]):
        mean = jax.tree.map(lambda *g: jnp.mean(jnp.stack(g), 0), *group)
        updates, state = one.update(mean, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), x, expected)
    rates = [float(optimizers.schedule(many, 6)(step)) for step in range(6)]
    assert rates[0] == rates[2] != rates[3] == rates[5]


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("warmup_steps", -1), ("clip_norm", 0.0), ("beta2", 1.0),
     ("final_fraction", 1.5), ("accumulate", 0), ("weight_decay", -0.1)],
)  # fmt: skip
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=f"optimizer.{field}: {value}"):
        OptimizerConfig(**{field: value})


def _orthogonal(matrix):
    """U V' of a matrix, by what Muon's iteration comes near to: singular values near 1."""
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def test_muon_orthogonalises_the_matrices_of_blocks_and_leaves_the_rest_to_adamw():
    config = MuonConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=None, update_rms=0.2
    )
    model = TransformerConfig(
        vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_dim=32, max_position=16, tie_embeddings=True,
    )  # fmt: skip
    params = transformer.init(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    moved, plain = (
        optimizer.update(gradient, optimizer.init(params), params)[0]
        for optimizer in (
            optimizers.create(config, 10),
            optimizers.create(OptimizerConfig(**_shared(config)), 10),
        )
    )
    block, given = moved["layers_0"], gradient["layers_0"]
    for part in range(3):  # queries, keys and values are matrices of their own
        update = np.asarray(block["attention"]["qkv"]["kernel"])[:, :, part].reshape(16, 16)
        matrix = np.asarray(given["attention"]["qkv"]["kernel"])[:, :, part].reshape(16, 16)
        direction = _orthogonal(matrix)
        cosine = -np.sum(update * direction) / np.linalg.norm(update) / np.linalg.norm(direction)
        assert cosine > 0.95
        values = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * 4)
        assert values.min() > 0.5
        assert values.max() < 1.3
    down = np.asarray(block["mlp"]["down"]["kernel"])
    assert np.sqrt(np.mean(down**2)) == pytest.approx(0.1 * 0.2, rel=0.2)
    for name in ("embedder", "final_norm"):
        # AdamW's first update is the sign of the gradient, here with Nesterov's look ahead.
        ours, theirs = (jax.tree.leaves(tree[name])[0] for tree in (moved, plain))
        np.testing.assert_array_equal(np.sign(ours), np.sign(theirs))


def _shared(config):
    names = [field.name for field in dataclasses.fields(OptimizerConfig)]
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(("field", "value"), [("momentum", 1.0), ("update_rms", 0.0)])
def test_values_of_muon_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=f"optimizer.{field}: {value}"):
        MuonConfig(**{field: value})


def test_a_config_file_names_the_kind_of_optimiser():
    assert optimizers.from_fields(learning_rate=0.5) == OptimizerConfig(learning_rate=0.5)
    assert optimizers.from_fields("muon", momentum=0.5) == MuonConfig(momentum=0.5)
    with pytest.raises(InputError, match=r"optimizer.kind: 'sgd'.*adafactor"):
        optimizers.from_fields("sgd")
