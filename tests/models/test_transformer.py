"""The Transformer as a function: caches, layer ranges, inputs and dtypes do not change its sums.

That the sums are the right ones is held by the agreement with transformers in test_agreement.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cache as kv
from models import layers, masks, transformer
from models.config import TransformerConfig
from tests.models.random_models import BASE, CASES, params

B, T = 3, 14
TOKENS = np.random.default_rng(0).integers(0, BASE.vocab_size, (B, T)).astype(np.int32)
# Tokens that each row commits after each chunk of four: rows advance unevenly, and what a chunk
# wrote beyond is written again by the next one.
CHUNK = 4
COMMITS = np.array([[4, 1, 3], [2, 4, 2], [3, 4, 1], [1, 1, 4], [4, 4, 4]])


def close(found, expected, atol=1e-4):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=1e-5)


@functools.cache
def everything(name: str, tokens: bytes = TOKENS.tobytes()) -> dict:
    """The model run in every way the tests compare, on int32 tokens [B, T] given as bytes."""
    return compiled(name)(params(CASES[name]), np.frombuffer(tokens, np.int32).reshape(B, T))


@functools.cache
def compiled(name: str):
    """One call for all of them, so that each case is compiled once."""
    config = CASES[name]
    L, a = config.num_layers, 1

    @jax.jit
    def run(p, tokens):
        positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        full = transformer.apply(config, p, tokens, collect=range(L + 1))
        lower = transformer.apply(config, p, tokens, layers=(0, a))
        upper = transformer.apply(config, p, lower.hidden, layers=(a, L))
        rows = p["embedder"]["embedding"][tokens] * (config.embedding_scale or 1.0)
        return {
            "full": full,
            "lower": lower,
            "upper": upper,
            "nothing": transformer.apply(config, p, tokens, layers=(0, 0)),
            "embeddings": transformer.apply(config, p, rows),
            "embed": transformer.embed(config, p, tokens, positions),
            "unembed": transformer.unembed(config, p, full.hidden),
            "final_norm": transformer.final_norm(config, p, full.collected[L]),
            "silent": transformer.apply(config, p, tokens, with_logits=False),
        }

    return run


@functools.cache
def chunk_of(config: TransformerConfig):
    """One chunk through the cache; through two layer ranges that share it, at the same time."""

    @jax.jit
    def run(p, tokens, cache):
        whole = transformer.apply(config, p, tokens, cache=cache)
        lower = transformer.apply(config, p, tokens, cache=cache, layers=(0, 1))
        upper = transformer.apply(
            config, p, lower.hidden, cache=lower.cache, layers=(1, config.num_layers)
        )
        return whole, upper

    return run


@pytest.mark.parametrize("name", CASES)
def test_cached_chunks_give_the_logits_of_one_call(name):
    config = CASES[name]
    expected = np.asarray(everything(name)["full"].logits)
    cache = kv.create(config, B, T + CHUNK)
    padded = np.pad(TOKENS, ((0, 0), (0, 2 * CHUNK)))
    for commits in COMMITS:
        done = np.asarray(cache.lengths)
        at = np.minimum(done, T)[:, None] + np.arange(CHUNK)
        out, composed = chunk_of(config)(
            params(config), np.take_along_axis(padded, at, axis=1), cache
        )
        np.testing.assert_array_equal(out.cache.lengths, done)
        inside = at < T
        found = np.asarray(out.logits)[inside]
        close(found, np.take_along_axis(expected, np.minimum(at, T - 1)[..., None], 1)[inside])
        close(composed.logits, out.logits, atol=1e-5)
        jax.tree.map(functools.partial(close, atol=1e-5), composed.cache, out.cache)
        cache = kv.truncate(out.cache, np.minimum(done + commits, T))
    np.testing.assert_array_equal(cache.lengths, np.minimum(COMMITS.sum(axis=0), T))


@pytest.mark.parametrize("name", CASES)
def test_ranges_of_layers_compose(name):
    run, L = everything(name), CASES[name].num_layers
    full = run["full"]
    close(run["upper"].logits, full.logits, atol=1e-5)
    close(run["upper"].hidden, full.hidden, atol=1e-5)
    close(run["lower"].hidden, full.collected[1], atol=1e-5)
    close(run["nothing"].hidden, full.collected[0], atol=1e-5)
    close(run["embed"], full.collected[0], atol=1e-5)
    close(run["final_norm"], full.hidden, atol=1e-5)
    close(run["unembed"], full.logits, atol=1e-5)
    assert len(full.collected) == L + 1
    assert full.cache is None
    for partial in ("lower", "nothing", "silent"):
        assert run[partial].logits is None
    close(run["silent"].hidden, full.hidden, atol=1e-5)
    # Every layer does something, so that a range which skipped one would show.
    for before, after in zip(full.collected[:-1], full.collected[1:], strict=True):
        assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_embeddings_are_tokens(name):
    run = everything(name)
    close(run["embeddings"].logits, run["full"].logits, atol=1e-5)


def test_remat_changes_neither_logits_nor_gradients():
    def loss(p, remat):
        return transformer.apply(BASE, p, TOKENS, remat=remat).logits.std()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    jax.tree.map(functools.partial(close, atol=1e-5), run(params(BASE), True), run(params(BASE), 0))


@pytest.mark.parametrize("name", CASES)
def test_later_tokens_do_not_change_earlier_logits(name):
    changed = TOKENS.copy()
    changed[:, 9:] = (changed[:, 9:] + 7) % BASE.vocab_size
    found, expected = (
        everything(name, changed.tobytes())["full"].logits,
        everything(name)["full"].logits,
    )
    close(found[:, :9], expected[:, :9], atol=1e-5)
    assert np.abs(found[:, 9:] - expected[:, 9:]).max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_as_many_as_the_config_says(name):
    shapes = transformer.param_shapes(CASES[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == CASES[name].num_params()


def test_initial_kernels_have_variance_near_one_over_fan_in():
    key = jax.random.key(0)
    dense, experts = layers.Dense((64,), contract=2), layers.ExpertDense(8, (32,))
    kernels = jax.jit(
        lambda key: (
            dense.init(key, jnp.zeros((1, 4, 8)))["params"]["kernel"],
            experts.init(key, jnp.zeros((8, 16)), jnp.ones(8, jnp.int32))["params"]["kernel"],
        )
    )(key)
    for kernel, shape, fan_in in zip(kernels, ((4, 8, 64), (8, 16, 32)), (32, 16), strict=True):
        assert kernel.shape == shape
        assert np.std(kernel) == pytest.approx(0.88 * fan_in**-0.5, rel=0.05)


def test_a_window_hides_what_is_further_away():
    """With one local layer a token more than `window` back has no way to the logits."""
    config = BASE.replace(num_layers=1, window=5, local_layers=(True,))
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % config.vocab_size
    run = jax.jit(lambda p, t: transformer.apply(config, p, t).logits)
    p = {k: v for k, v in params(BASE).items() if k != "layers_1"}
    difference = np.abs(run(p, changed) - run(p, TOKENS)).max(axis=(0, 2))
    assert (difference[3:8] > 1e-3).all()
    assert (difference[:3] == 0).all()
    assert (difference[8:] == 0).all()


def test_a_bidirectional_model_sees_everything():
    config = BASE.replace(causal=False)
    run = jax.jit(lambda p, t: transformer.apply(config, p, t).logits)
    causal = everything("base")["full"].logits
    found = run(params(config), TOKENS)
    mask = jnp.ones((B, T, T), bool)
    explicit = jax.jit(lambda p, t: transformer.apply(BASE, p, t, mask=mask).logits)
    close(found, explicit(params(BASE), TOKENS), atol=1e-5)
    assert np.abs(found[:, 0] - causal[:, 0]).max() > 0.1


def test_a_bidirectional_model_with_a_cache_sees_what_was_written():
    """The call's tokens see each other and the committed ones, and no slot beyond."""
    config, cut = BASE.replace(causal=False), 5
    cache = kv.create(config, B, T + 7)
    cache = cache.replace(keys=tuple(store + 3.0 for store in cache.keys))  # would be noticed

    @jax.jit
    def run(p, tokens):
        whole = transformer.apply(config, p, tokens, cache=cache)
        first = transformer.apply(config, p, tokens[:, :cut], cache=cache).cache
        first = kv.truncate(first, jnp.full((B,), cut))
        return whole.logits, transformer.apply(config, p, tokens[:, cut:], cache=first).logits

    whole, rest = run(params(config), TOKENS)
    alone = jax.jit(lambda p, t: transformer.apply(config, p, t).logits)
    close(whole, alone(params(config), TOKENS), atol=1e-5)
    # The second call's first layer sees the first call's keys, which did not see it.
    late = jnp.arange(T) >= cut
    seen = jnp.broadcast_to(late[:, None] | ~late[None, :], (B, T, T))
    masked = jax.jit(lambda p, t: transformer.apply(BASE, p, t, mask=seen).logits)
    close(rest, masked(params(BASE), TOKENS)[:, cut:], atol=1e-5)


def test_packed_segments_are_independent_sequences():
    """Two texts in one row, with their own positions and a segment mask, equal two rows."""
    config = CASES["local"]
    p, cut = params(config), 6
    ids = np.where(np.arange(T) < cut, 1, 2)[None].repeat(B, 0)
    positions = np.where(np.arange(T) < cut, np.arange(T), np.arange(T) - cut)[None].repeat(B, 0)
    packed = jax.jit(
        lambda p, t: (
            transformer.apply(
                config, p, t, positions=jnp.asarray(positions), mask=masks.packed_causal(ids)
            ).logits
        )
    )(p, TOKENS)
    alone = jax.jit(lambda p, t: transformer.apply(config, p, t).logits)
    close(packed[:, :cut], everything("local")["full"].logits[:, :cut], atol=1e-5)
    close(packed[:, cut:], alone(p, np.roll(TOKENS, -cut, axis=1))[:, : T - cut], atol=1e-5)


@pytest.mark.parametrize("name", ["base", "multi_query_tied"])
def test_logits_are_float32_under_bfloat16_compute(name):
    config = CASES[name].replace(dtype="bfloat16")
    cache = kv.create(config, B, T)
    out = jax.jit(lambda p, t, c: transformer.apply(config, p, t, cache=c))(
        params(CASES[name]), TOKENS, cache
    )
    assert out.logits.dtype == jnp.float32
    assert out.hidden.dtype == jnp.bfloat16
    assert {store.dtype for store in out.cache.keys} == {jnp.dtype(jnp.bfloat16)}
    expected = np.asarray(everything(name)["full"].logits)
    assert np.abs(out.logits - expected).mean() < 0.05 * expected.std()
    # The sums are not rounded to bfloat16 on their way.
    assert (out.logits != out.logits.astype(jnp.bfloat16)).mean() > 0.5


@pytest.mark.parametrize("span", [(-1, 1), (2, 1), (0, 3)])
def test_a_range_outside_the_model(span):
    with pytest.raises(ValueError, match=r"is not a range within 0\.\.2"):
        transformer.apply(BASE, params(BASE), TOKENS, layers=span)


def test_a_stream_outside_the_range():
    with pytest.raises(ValueError, match=r"collect: \(2,\) must lie within 0\.\.1"):
        transformer.apply(BASE, params(BASE), TOKENS, layers=(0, 1), collect=[2])
