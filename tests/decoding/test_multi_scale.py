"""MuLo-SD against the same algorithm in plain Python, which runs whole images without a cache.

In a model of one layer a token's keys and values depend on the token alone, so that what the cache
holds for kept tokens behind a change is what a run from scratch has: there the reference must agree
everywhere. Models of two layers are compared where nothing is kept behind a change.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import ndimage

from decoding import randomness
from decoding.images import (
    image_tokens,
    islands,
    local_resampling,
    multi_scale,
    raster,
    raster_rejection,
    wavefront,
)
from decoding.images.local_resampling import LocalConfig
from decoding.images.raster_rejection import RasterConfig
from models import sharding
from models.errors import InputError
from tests.decoding import tiny_images as tiny

N, M, n = tiny.SIDE**2, tiny.LOW_SIDE**2, tiny.SIDE
HEIGHT = 2
W = HEIGHT * n
SHALLOW = tiny.CONFIG.replace(num_layers=1)


@functools.cache
def models(depth: int = 2) -> dict:
    """Parameters; of both models only the first layer if `depth` is 1."""
    params = dict(tiny.params())
    if depth == 1:
        for role in ("target", "draft"):
            params[role] = {k: v for k, v in params[role].items() if k != "layers_1"}
    return params


def pair(depth: int = 2, guidance: float = 1.0, temperature: float = 1.0) -> multi_scale.Pair:
    config = SHALLOW if depth == 1 else tiny.CONFIG
    make = functools.partial(
        tiny.sampler, temperature=temperature, guidance=guidance, config=config
    )
    return multi_scale.Pair(make(tiny.SIDE), make(tiny.LOW_SIDE), tiny.up, tiny.down)


def run(threshold, which, settle, labels=tiny.LABELS, keys=tiny.KEYS, params=None, **options):
    params = params or models(which.target.config.num_layers)
    return multi_scale.generate(
        params, labels, keys, threshold, pair=which, settle=settle, **options
    )


def local(which, rows=1, **options):
    return local_resampling.local_resampling(which.target, 2 * rows, LocalConfig(**options))


def plain(which):
    params = models(which.target.config.num_layers)["target"]
    return raster.generate(params, tiny.LABELS, tiny.KEYS, sampler=which.target)


# The reference.


def scratch(which, params, tokens):
    """Guided logits [B, T, V] of a sampler's model on whole images, no cache."""
    run = tiny.forward(which.config)
    tokens = jnp.asarray(tokens)
    logits = run(params, tokens)
    if which.guidance != 1:
        null = run(params, tokens.at[:, 0].set(which.config.vocab_size - 1))
        logits = null + which.guidance * (logits - null)
    return jnp.where(jnp.arange(which.config.vocab_size) < tiny.K, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 4))
def drawn_by(which, params, tokens, code, purpose):
    at = jnp.full((len(tokens),), code + 1)
    logits = scratch(which, params, tokens)[:, code]
    return image_tokens.draw(which, logits, tiny.KEYS, at, purpose)


def draw(which, params, tokens, code, purpose=randomness.SAMPLE):
    return np.asarray(drawn_by(which, params, jnp.asarray(tokens), jnp.int32(code), purpose))


def reference(which, params, threshold, config):
    """Tokens, low tokens, and the maps and counters of every cycle."""
    target, draft = which.target, which.draft
    x = np.array(image_tokens.blank(target, tiny.LABELS))
    y = np.array(image_tokens.blank(draft, tiny.LABELS))
    m = tiny.LOW_SIDE
    maps, calls = [], np.zeros(len(x), int)
    for cycle in range(m):
        for code in range(cycle * m, (cycle + 1) * m):
            y[:, code + 1] = draw(draft, params["draft"], y, code, randomness.DRAFT)
        first = cycle * W
        high = np.asarray(tiny.up(None, jnp.asarray(y[:, 1:].reshape(-1, m, m)), 0))
        x[:, 1 + first : 1 + first + W] = high.reshape(len(x), N)[:, first : first + W]
        logits = scratch(target, params["target"], x)[:, first : first + W]
        probs = np.asarray(jax.nn.softmax(logits / (target.sampling.temperature or 1.0)))
        table = np.asarray(params["neighbours"])
        rejected = np.zeros((len(x), W), bool)
        for b, i in np.ndindex(len(x), W):
            near = table[x[b, 1 + first + i]]
            rejected[b, i] = probs[b, i, near].sum() < threshold
        grown = np.stack([dilated(marks.reshape(HEIGHT, n), config) for marks in rejected])
        maps.append((rejected, grown.reshape(-1, W)))
        queues = [groups(marks, config) for marks in grown]
        calls += [max((len(q) for q in row), default=1) - 1 for row in queues]
        while any(any(row) for row in queues):
            now = [[group.pop(0) for group in row if group] for row in queues]
            old = x.copy()
            for code in sorted({code for row in now for code in row}):
                drawn = draw(target, params["target"], old, first + code)
                for b, row in enumerate(now):
                    if code in row:
                        x[b, 1 + first + code] = drawn[b]
        low = np.asarray(tiny.down(None, jnp.asarray(x[:, 1:].reshape(-1, n, n)), 0))
        y[:, 1 + cycle * m : 1 + (cycle + 1) * m] = low[:, cycle]
    rejected, grown = (np.concatenate(parts, axis=1) for parts in zip(*maps))
    return x[:, 1:], y[:, 1:], rejected, grown, calls


def dilated(marks, config):
    grown = np.zeros_like(marks)
    for i, j in np.argwhere(marks):
        rows = slice(max(i - config.radius, 0), i + config.radius + 1)
        grown[rows, max(j - config.radius, 0) : j + config.radius + 1] = True
    if config.expansion == "first_rejected" and marks.any():
        grown.reshape(-1)[: np.flatnonzero(marks)[0]] = False
    return grown


def groups(marks, config):
    """Lists of codes in raster order that are drawn side by side."""
    if config.resampling == "serial":
        found = [np.flatnonzero(marks).tolist()]
    else:
        labels, count = ndimage.label(marks, structure=np.ones((3, 3)))
        found = [np.flatnonzero(labels == i + 1).tolist() for i in range(count)]
    return [group for group in found if group]


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({"radius": 0}, 0.12),
        ({"radius": 1, "expansion": "first_rejected"}, 0.05),
        ({"radius": 0, "resampling": "islands"}, 0.12),
        ({"radius": 0, "refresh": False, "resampling": "islands"}, 0.12),
    ],
)
def test_one_layer_is_the_reference(options, threshold):
    which, config = pair(1, guidance=1.5), LocalConfig(**options)
    found = run(threshold, which, local(which, **options))
    codes, low, rejected, grown, calls = reference(which, models(1), threshold, config)
    assert 0.05 < rejected.mean() < 0.6 and grown.mean() < 0.9  # the test means something
    np.testing.assert_array_equal(found.rejected, rejected)
    np.testing.assert_array_equal(found.resampled, grown)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.low, low)
    work = found.work
    np.testing.assert_array_equal(work.drafter_calls, M)
    np.testing.assert_array_equal(work.window_passes, N // W)
    np.testing.assert_array_equal(work.resample_calls, calls)
    np.testing.assert_array_equal(work.rejected, rejected.sum(axis=1))
    np.testing.assert_array_equal(work.resampled, grown.sum(axis=1))


@pytest.mark.parametrize(
    ("temperature", "guidance", "options"),
    [(1.0, 2.5, {}), (0.0, 1.0, {"resampling": "islands", "refresh": False})],
)
def test_a_threshold_above_one_is_plain_decoding(temperature, guidance, options):
    which = pair(2, guidance, temperature)
    found = run(1.1, which, local(which, **options))
    np.testing.assert_array_equal(found.codes, plain(which))
    assert found.rejected.all() and found.resampled.all()
    np.testing.assert_array_equal(found.work.resample_calls, N - N // W)


def test_a_threshold_of_zero_keeps_all_drafts_and_a_row_is_alone():
    which = pair(2, 2.5)
    settle = local(which)
    found = run(0.0, which, settle)
    codes, low, *_ = reference(which, models(2), 0.0, LocalConfig())
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.low, low)
    assert not found.resampled.any()
    np.testing.assert_array_equal(found.work.window_passes, N // W)
    np.testing.assert_array_equal(found.work.resample_calls, 0)
    # Rows take different work here, and each does what it does alone.
    together = run(0.05, which, settle)
    assert len(set(np.asarray(together.work.resample_calls).tolist())) > 1
    for b in (0, 3):
        own = slice(b, b + 1)
        alone = run(0.05, which, settle, tiny.LABELS[own], tiny.KEYS[own])
        picked = [leaf[own] for leaf in jax.tree.leaves(together)]
        jax.tree.map(np.testing.assert_array_equal, picked, jax.tree.leaves(alone))


def test_sharded_is_unsharded():
    which = pair(2, 2.5)
    settle = local(which)
    mesh = sharding.make_mesh(4, 1)
    place = sharding.batch_sharding(mesh)
    labels, keys = jax.device_put((tiny.LABELS, tiny.KEYS), place)
    params = jax.device_put(models(2), NamedSharding(mesh, PartitionSpec()))
    split = run(0.05, which, settle, labels, keys, params)
    one = run(0.05, which, settle)
    assert len(split.codes.sharding.device_set) == 4
    jax.tree.map(np.testing.assert_array_equal, split, one)


def window_state(which, seed=0, first=2 * W, extra=0):
    """A state in mid-image: random codes up to a window's end, caches of what is settled."""
    rng = np.random.default_rng(seed)
    tokens = np.array(image_tokens.blank(which.target, tiny.LABELS))
    tokens[:, 1 : 1 + first + W] = rng.integers(0, tiny.K, (len(tokens), first + W))
    tokens = jnp.asarray(tokens)
    cache = image_tokens.create_cache(which.target, len(tokens), N + extra)
    target = models(which.target.config.num_layers)["target"]
    _, cache = image_tokens.feed(which.target, target, cache, tokens[:, : first + 1], jnp.int32(0))
    blank = jnp.zeros((len(tokens), N), bool)
    return multi_scale.State(
        tokens, tokens[:, : 1 + M], cache, cache, jnp.full((len(tokens), 0), -1), blank, blank,
        tiny.KEYS, multi_scale.no_work(len(tokens)),
    )  # fmt: skip


def test_emitted_tokens_are_not_touched_and_the_refresh_is_a_run_from_scratch():
    which, first = pair(2), 2 * W
    settle = local(which, radius=2)
    state = window_state(which)
    after = jax.jit(settle.run)(models(2), state, jnp.int32(first), jnp.float32(0.05))
    assert after.resampled.any()
    changed = np.asarray(after.tokens != state.tokens)
    assert not changed[:, : 1 + first].any() and not changed[:, 1 + first + W :].any()
    assert not after.resampled[:, :first].any()
    assert not changed[:, 1:][~np.asarray(after.resampled)].any()
    nxt = jnp.asarray(np.random.default_rng(9).integers(0, tiny.K, (4, W)), jnp.int32)
    tokens = after.tokens.at[:, 1 + first + W :].set(nxt)
    after = after.replace(tokens=tokens)
    expected = scratch(which.target, models(2)["target"], tokens)[:, first + W : first + 2 * W]
    at = jnp.int32(first + W)
    check = jax.jit(local_resampling.verify, static_argnums=(0, 4, 5))
    found, _ = check(which.target, models(2), after, at, W, True)
    np.testing.assert_allclose(found[..., : tiny.K], expected[..., : tiny.K], atol=1e-5)
    late = jnp.full((4, 1), -1)
    stale, _ = check(which.target, models(2), after.replace(pending=late), at, W, False)
    off = np.abs(np.asarray(stale - expected))[..., : tiny.K]
    assert off.max() > 1e-2


@pytest.mark.parametrize(
    ("config", "codes", "count"),
    [(tiny.LOCAL, (0, 1, 7, 13), 3), (tiny.CONFIG, (0, 2, 4, 5, 6, 7), 3)],
    ids=["local", "full"],
)
def test_islands_beyond_the_dependency_range_are_as_good_as_serial(config, codes, count):
    """Two layers of three tokens each: a code depends on the five before it."""
    which = tiny.sampler(config=config)
    parent = pair(2)._replace(target=which)
    redrawn = jnp.zeros((4, W), bool).at[:, jnp.array(codes)].set(True)
    state = window_state(parent)
    first = jnp.int32(2 * W)

    @functools.partial(jax.jit, static_argnums=2)
    def redraw(state, group, count):
        logits, state = local_resampling.verify(which, models(2), state, first, W, True)
        return local_resampling.resample(
            which, models(2), state, first, logits, redrawn, group.reshape(4, W), count
        )

    serial = redraw(state, jnp.where(redrawn, 0, -1), 1)
    labels = islands.components(redrawn.reshape(4, HEIGHT, n))
    assert int(labels.max()) + 1 == count
    parallel = redraw(state, labels, islands.max_components(HEIGHT, n))
    assert (np.asarray(serial.calls) > np.asarray(parallel.calls)).all()
    same = np.asarray(serial.tokens == parallel.tokens)
    assert same.all() == (config is tiny.LOCAL)
    assert (np.asarray(serial.tokens) != np.asarray(state.tokens)).any()


def test_raster_rejection_is_exact_with_exact_match_and_above_one():
    which = pair(2, 2.5)
    exact = raster_rejection.raster_rejection(which.target, HEIGHT, RasterConfig("exact_match"))
    found = run(0.0, which, exact)
    np.testing.assert_array_equal(found.codes, plain(which))
    passes = np.asarray(found.work.window_passes)
    # Each pass ends with the target's own token, or at the end of a window.
    own = np.asarray(found.work.resampled)
    assert (passes >= own).all() and (passes <= own + N // W).all() and (passes < N).all()
    pooled = raster_rejection.raster_rejection(
        which.target, HEIGHT, RasterConfig("pooled_threshold")
    )
    np.testing.assert_array_equal(run(1.1, which, pooled).codes, plain(which))
    found = run(0.0, which, pooled)
    np.testing.assert_array_equal(found.work.window_passes, N // W)
    np.testing.assert_array_equal(found.codes, run(0.0, which, local(which)).codes)
    # The same threshold takes more calls when a rejection flushes what follows.
    flushed, kept = run(0.05, which, pooled).work, run(0.05, which, local(which)).work
    assert flushed.window_passes.sum() > kept.window_passes.sum()


def test_two_rows_drafted_as_a_wavefront():
    which = pair(2)
    settle = local(which, rows=2)
    serial = run(0.0, which, settle, rows=2)
    wide = run(0.0, which, settle, rows=2, draft_width=tiny.LOW_SIDE)
    np.testing.assert_array_equal(wide.codes, serial.codes)
    narrow = run(0.0, which, settle, rows=2, draft_width=1)
    steps = wavefront.schedule(2, tiny.LOW_SIDE, 1, first_row_serial=False).steps
    np.testing.assert_array_equal(narrow.work.drafter_calls, 2 * steps)
    np.testing.assert_array_equal(serial.work.drafter_calls, M)
    assert (np.asarray(narrow.codes) != np.asarray(serial.codes)).any()


def test_bad_input():
    which = pair(2)
    with pytest.raises(InputError, match="rows: 3 must divide the drafter's side 4"):
        multi_scale.window_size(which, 3)
    odd = which._replace(draft=tiny.sampler(3))
    with pytest.raises(InputError, match="side: 3 must be a proper divisor"):
        multi_scale.window_size(odd, 1)
    with pytest.raises(InputError, match="settle: made for windows of 32 codes, these have 16"):
        run(0.0, which, local(which, rows=2))
    with pytest.raises(InputError, match="height: 9 rows exceed the target's side 8"):
        local_resampling.local_resampling(which.target, 9, LocalConfig())
    for field, value in (("expansion", "all"), ("resampling", "rows"), ("radius", -1)):
        with pytest.raises(InputError, match=field):
            LocalConfig(**{field: value})
    with pytest.raises(InputError, match="rule: 'exact'"):
        RasterConfig("exact")
