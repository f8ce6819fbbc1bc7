"""ENAT against a naive NumPy network, and the properties that its saving rests on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from models import enat
from models.errors import InputError

CONFIG = enat.ENATConfig(
    num_codes=7, num_tokens=9, num_classes=3, embed_dim=8, num_heads=2, encoder_layers=2
)
UNIFORM = dataclasses.replace(CONFIG, disentangled=False)
B, N, MASK = 3, CONFIG.num_tokens, CONFIG.mask_id
RNG = np.random.default_rng(0)
CLASSES = np.array([0, 2, CONFIG.null_class])
TRUTH = RNG.integers(0, 7, size=(B, N))


def random_masks(count, within=None):
    """bool [B, N] with `count` True in each row, inside `within` where given."""
    weights = RNG.uniform(size=(B, N)) + (0 if within is None else ~within)
    return np.argsort(np.argsort(weights, 1), 1) < count


BEFORE = random_masks(6)
NOW = random_masks(4, within=BEFORE)
IDS = np.where(NOW, MASK, TRUTH)
IDS_BEFORE = np.where(BEFORE, MASK, TRUTH)


@functools.cache
def params_of(config):
    """Random everywhere: nothing is zero as adaLN-Zero would have it."""
    params = jax.jit(enat.init, static_argnums=0)(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


apply = jax.jit(enat.apply, static_argnums=0, static_argnames=("padded",))


# The network again: float64 NumPy, row by row and head by head, from the description.


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(x, p=None):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(p, x):
    return dense(p["down"], gelu(dense(p["up"], x)))


def block(p, x, c, context=None):
    d, heads = x.shape[-1], CONFIG.num_heads
    parts = dense(p["modulation"], c * scipy.special.expit(c)).reshape(-1, d)
    own = norm(x) * (1 + parts[1]) + parts[0]
    keys_values = [dense(p["kv_self"], own)]
    if len(parts) == 8 and context is not None and len(context):
        other = norm(context) * (1 + parts[3]) + parts[2]
        keys_values.insert(0, dense(p["kv_context"], other))
    keys, values = np.split(np.concatenate(keys_values), 2, axis=1)
    queries, mixed = dense(p["query"], own), np.zeros_like(x)
    for head in range(heads):
        part = slice(head * d // heads, (head + 1) * d // heads)
        scores = queries[:, part] @ keys[:, part].T / np.sqrt(d // heads)
        mixed[:, part] = scipy.special.softmax(scores, axis=1) @ values[:, part]
    gate, shift, scale, mlp_gate = parts[-4:]
    x = x + gate * dense(p["out"], mixed)
    return x + mlp_gate * mlp(p["mlp"], norm(x) * (1 + scale) + shift)


def reference(config, ids, label, masked, feat=None, before=None):
    """Section 2.3 for one row: logits [N, K] at masked places (zero elsewhere), features [N, d]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(config))
    embedded = norm(p["words"]["embedding"][ids] + p["positions"], p["input_norm"])
    c = p["classes"]["embedding"][label]
    if not config.disentangled:
        feat_now = embedded
        for layer in (*sorted(k for k in p if k.startswith("encoder")), "decoder_0"):
            feat_now = block(p[layer], feat_now, c)
    else:
        before = np.ones_like(masked) if before is None else before
        feat_now = np.zeros_like(embedded)
        old, new = ~before, before & ~masked
        if old.any():
            r = feat[old]
            feat_now[old] = r + mlp(p["reuse"]["mlp"], norm(r, p["reuse"]["norm"]))
        e = embedded[new]
        if new.any():
            for layer in range(config.encoder_layers):
                e = block(p[f"encoder_{layer}"], e, c, feat_now[old])
        feat_now[new] = e
        m = embedded[masked]
        for layer in range(config.decoder_layers):
            m = block(p[f"decoder_{layer}"], m, c, feat_now[~masked])
        feat_now[masked] = m
    hidden = gelu(dense(p["head"], norm(feat_now, p["head_norm"])))
    logits = norm(hidden, p["output_norm"]) @ p["words"]["embedding"].T + p["output_bias"]
    return np.where(masked[:, None], logits[:, :MASK], 0), feat_now


def on_grid(output, indices):
    logits = jnp.zeros((B, N, CONFIG.num_codes))
    return np.asarray(enat.scatter(logits, indices.masked, output.logits))


def check(config, output, indices, rows):
    for row, (logits, features) in enumerate(rows):
        np.testing.assert_allclose(on_grid(output, indices)[row], logits, atol=2e-4)
        np.testing.assert_allclose(output.features[row], features, atol=2e-4)


def first_call():
    return apply(CONFIG, params_of(CONFIG), IDS_BEFORE, CLASSES, enat.indices_of(BEFORE))


@pytest.mark.parametrize("config", [CONFIG, UNIFORM], ids=["enat", "uniform"])
def test_a_call_without_reuse_is_the_naive_network(config):
    indices = enat.indices_of(BEFORE)
    output = apply(config, params_of(config), IDS_BEFORE, CLASSES, indices)
    assert output.logits.shape == (B, 6, CONFIG.num_codes)  # the mask is no choice
    check(
        config,
        output,
        indices,
        [reference(config, IDS_BEFORE[i], CLASSES[i], BEFORE[i]) for i in range(B)],
    )


def test_a_call_with_reuse_is_the_naive_network():
    feat = np.asarray(first_call().features)
    indices = enat.indices_of(NOW, BEFORE)
    assert [x.shape[1] for x in indices] == [3, 2, 4]
    output = apply(CONFIG, params_of(CONFIG), IDS, CLASSES, indices, reused=feat)
    rows = [reference(CONFIG, IDS[i], CLASSES[i], NOW[i], feat[i], BEFORE[i]) for i in range(B)]
    check(CONFIG, output, indices, rows)


def test_edge_cases_are_the_naive_network():
    """No visible token; nothing visible before; no new token."""
    params = params_of(CONFIG)
    everything = np.ones((B, N), bool)
    feat = np.asarray(first_call().features)
    cases = ((everything, None), (BEFORE, everything), (BEFORE, BEFORE))
    for masked, before in cases:
        ids = np.where(masked, MASK, TRUTH)
        indices = enat.indices_of(masked, before)
        output = apply(CONFIG, params, ids, CLASSES, indices, reused=feat)
        was = [None] * B if before is None else before
        rows = [reference(CONFIG, ids[i], CLASSES[i], masked[i], feat[i], was[i]) for i in range(B)]
        check(CONFIG, output, indices, rows)


def test_padded_lists_give_the_same():
    """As training has them: longer lists, filled up with N."""
    feat = np.asarray(first_call().features)
    pad = lambda x, length: np.concatenate(  # noqa: E731
        [x, np.full((B, length - x.shape[1]), N)], axis=1
    )
    params = params_of(CONFIG)
    for before in (BEFORE, None):
        exact = enat.indices_of(NOW, before)
        longer = enat.Indices(*(pad(x, n) for x, n in zip(exact, (6, 6, 8))))
        plain = apply(CONFIG, params, IDS, CLASSES, exact, reused=feat)
        padded = apply(CONFIG, params, IDS, CLASSES, longer, reused=feat, padded=True)
        np.testing.assert_allclose(padded.features, plain.features, atol=1e-5)
        np.testing.assert_allclose(padded.logits[:, :4], plain.logits, atol=1e-5)
    alone = enat.encode_visible(
        CONFIG, params, IDS, CLASSES, pad(np.nonzero(~NOW)[1].reshape(B, -1), 8)
    )
    visible = np.where(NOW[..., None], 0, plain.features)
    np.testing.assert_allclose(alone, visible, atol=1e-5)


def test_visible_features_do_not_see_masked_tokens_and_logits_see_both():
    """Gradients by position embedding: exactly zero from masked places to visible features."""
    params, indices = params_of(CONFIG), enat.indices_of(NOW)

    @jax.jit
    def gradients(params):
        def visible(positions):
            output = enat.apply(CONFIG, {**params, "positions": positions}, IDS, CLASSES, indices)
            return jnp.sum(jnp.sin(output.features[0]) * ~NOW[0][:, None])

        def first_masked(positions):
            output = enat.apply(CONFIG, {**params, "positions": positions}, IDS, CLASSES, indices)
            return jnp.sum(jnp.sin(output.logits[0, 0]))

        return jax.grad(visible)(params["positions"]), jax.grad(first_masked)(params["positions"])

    of_visible, of_logits = (np.abs(x).sum(-1) for x in gradients(params))
    assert (of_visible[NOW[0]] == 0).all()
    assert (of_visible[~NOW[0]] > 0).all()
    assert (of_logits > 0).all()


def test_no_gradient_into_reused_features_or_through_the_tied_head():
    params, indices = params_of(CONFIG), enat.indices_of(NOW, BEFORE)
    feat = first_call().features

    @jax.jit
    def gradients(params, feat):
        loss = lambda p, f: jnp.sum(  # noqa: E731
            jnp.sin(enat.apply(CONFIG, p, IDS, CLASSES, indices, reused=f).logits)
        )
        return jax.grad(loss, (0, 1))(params, feat)

    of_params, of_feat = gradients(params, feat)
    assert (of_feat == 0).all()
    assert np.abs(of_params["reuse"]["mlp"]["up"]["kernel"]).sum() > 0
    words = np.abs(of_params["words"]["embedding"]).sum(-1)
    # Only ids of the input have gradients, though every code has a logit.
    used = np.unique(IDS[np.where(BEFORE, True, False)])
    assert set(np.flatnonzero(words)) == set(used)
    assert MASK in used
    assert np.abs(of_params["output_bias"][:MASK]).sum() > 0
    assert of_params["output_bias"][MASK] == 0


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def kernels(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return sum(int(np.prod(x.shape)) for path, x in flat if "kernel" in str(path[-1]))


def test_parameter_counts_are_the_formula():
    d = CONFIG.embed_dim
    assert kernels(enat.param_shapes(CONFIG)["encoder_0"]) == 22 * d * d
    assert kernels(enat.param_shapes(UNIFORM)["encoder_0"]) == 18 * d * d
    # ENAT-L: about 574 million with the official code's MLP of 8 d^2 that is never used.
    total = count(enat.param_shapes(enat.ENAT_L)) + 8 * 1024**2
    assert total == pytest.approx(574e6, rel=0.002)


def test_a_fresh_network_is_the_identity_of_its_embeddings():
    """adaLN-Zero: blocks do nothing before training."""
    params = jax.jit(enat.init, static_argnums=0)(UNIFORM, jax.random.key(0))
    output = apply(UNIFORM, params, IDS, CLASSES, enat.indices_of(NOW))
    expected = norm(np.asarray(params["words"]["embedding"][IDS] + params["positions"]))
    np.testing.assert_allclose(output.features, expected, atol=1e-2)


def test_published_work():
    """GMACs of ENAT-L's eight steps at 256 pixels: uniform, disentangled, with reuse."""
    masks = [256, 251, 236, 212, 181, 142, 97, 49]
    large = enat.ENAT_L
    uniform = dataclasses.replace(large, disentangled=False)
    total = lambda config, before: sum(  # noqa: E731
        enat.macs(config, 256 - b, b - m, m) for b, m in zip(before, masks)
    )
    nothing = [256] * 8
    assert total(uniform, nothing) / 1e9 == pytest.approx(649, rel=0.01)
    assert total(large, nothing) / 1e9 == pytest.approx(221, rel=0.01)
    reused = total(large, [256, *masks[:-1]])
    assert reused / 1e9 == pytest.approx(125, rel=0.01)
    assert 1 - reused / total(large, nothing) == pytest.approx(0.43, abs=0.01)


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="masks only shrink"):
        enat.indices_of(BEFORE, NOW)
    uneven = NOW.copy()
    uneven[0] = True
    with pytest.raises(InputError, match=r"rows have .* allowed: equal"):
        enat.indices_of(uneven)
    with pytest.raises(InputError, match="3 tokens are to be reused"):
        enat.apply(CONFIG, params_of(CONFIG), IDS, CLASSES, enat.indices_of(NOW, BEFORE))
    with pytest.raises(InputError, match="uniform network only"):
        see = jnp.ones((B, N, N), bool)
        enat.apply(
            CONFIG, params_of(CONFIG), IDS, CLASSES, enat.indices_of(NOW), attention_mask=see
        )
    for options, message in (
        ({"num_heads": 3}, "num_heads: 3 must divide"),
        ({"encoder_layers": 0}, "encoder_layers: 0 must be at least 1"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"dtype": "float16"}, "dtype: 'float16' is not known"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CONFIG, **options)


def test_a_saved_network_is_the_same(tmp_path):
    enat.save(tmp_path / "enat", CONFIG, params_of(CONFIG))
    config, loaded = enat.load(tmp_path / "enat")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params_of(CONFIG))
