"""The mask-predict sampler against a plain loop on the host, and the work that it skips."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from decoding import randomness
from decoding.images import mask_predict
from decoding.images.mask_predict import SamplerConfig
from models import enat, sharding
from models.errors import InputError

CONFIG = enat.ENATConfig(
    num_codes=7, num_tokens=16, num_classes=3, embed_dim=8, num_heads=2, encoder_layers=1
)
UNIFORM = dataclasses.replace(CONFIG, disentangled=False)
SAMPLER = SamplerConfig(steps=3, guidance=2.0, sampling_temperature=2.0)
B = 4
CLASSES = jnp.array([0, 1, 2, 1])


@functools.cache
def params_of(config):
    params = jax.jit(enat.init, static_argnums=0)(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [np.asarray(x) + 0.4 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    )


def keys_of(rows):
    return randomness.row_keys(3, jnp.asarray(rows))


KEYS = keys_of(range(B))
apply = jax.jit(enat.apply, static_argnums=0)


def draw(config, sampler=SAMPLER, keys=KEYS, classes=CLASSES):
    return mask_predict.sample(config, sampler, params_of(config), keys, classes)


def plain_loop(config, sampler, keys, classes):
    """Section 2.4 with NumPy and one call a guidance branch, each with a previous state of its own.

    Noise is the sampler's, by row key, step and position.
    """
    rows, N, K, T = len(classes), config.num_tokens, config.num_codes, sampler.steps
    params, trace = params_of(config), []
    ids = np.full((rows, N), config.mask_id)
    null = np.full(rows, config.null_class)
    previous = {"conditional": None, "null": None}
    g = 0.0
    for step in range(T):
        rho = (step + 1) / T
        masked = ids == config.mask_id
        log_probs = {}
        for branch, labels in (("conditional", np.asarray(classes)), ("null", null)):
            state = previous[branch] if sampler.reuse and config.disentangled else None
            before, feat = (None, None) if state is None else state
            indices = enat.indices_of(masked, before)
            out = apply(config, params, ids, labels, indices, reused=feat)
            features = np.array(out.features)
            if sampler.project_once and state is not None:
                features[~before] = feat[~before]
            previous[branch] = (masked, features)
            grid = np.zeros((rows, N, K))
            np.put_along_axis(grid, np.asarray(indices.masked)[..., None], out.logits, axis=1)
            log_probs[branch] = grid
        logits = log_probs["conditional"]
        logits = logits + g * (logits - log_probs["null"])
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = lambda purpose: randomness.at(keys, jnp.full(rows, step), purpose)  # noqa: B023, E731
        noise = np.asarray(randomness.gumbel(at(randomness.SAMPLE), N * K)).reshape(rows, N, K)
        jitter = np.asarray(randomness.gumbel(at(randomness.ORDER), N))
        tau = max(sampler.sampling_temperature * (1 - rho), 1e-3)
        sampled = np.argmax(logits / tau + noise, -1)
        ids = np.where(masked, sampled, ids)
        confidence = np.take_along_axis(logits, sampled[..., None], -1)[..., 0]
        confidence = confidence + jitter * sampler.mask_temperature * (1 - rho)
        confidence[~masked] = np.inf
        keep = int(np.floor(N * np.cos(np.pi / 2 * rho)))
        hidden = np.argsort(confidence, axis=1)[:, :keep]
        np.put_along_axis(ids, hidden, config.mask_id, axis=1)
        trace.append(ids.copy())
        g = rho * sampler.guidance
    return np.stack(trace)


@pytest.mark.parametrize(
    "config,options",
    [(CONFIG, {}), (CONFIG, {"project_once": True}), (CONFIG, {"reuse": False}), (UNIFORM, {})],
    ids=["enat", "project once", "no reuse", "uniform"],
)
def test_the_sampler_is_the_plain_loop(config, options):
    # Four steps: the third is the first to project features that were projected before.
    sampler = dataclasses.replace(SAMPLER, **{"steps": 4, **options})
    found = draw(config, sampler)
    expected = plain_loop(config, sampler, KEYS, CLASSES)
    np.testing.assert_array_equal(found.trace, expected)
    np.testing.assert_array_equal(found.ids, expected[-1])
    assert found.ids.max() < config.num_codes  # no mask is left


def test_what_is_visible_stays_and_the_schedule_is_followed():
    trace = np.asarray(draw(CONFIG).trace)
    masks = mask_predict.masks_before(CONFIG.num_tokens, SAMPLER.steps)
    assert [(ids == CONFIG.mask_id).sum(1).tolist() for ids in trace] == [
        [count] * B for count in masks[1:]
    ]
    for before, after in itertools.pairwise(trace):
        visible = before != CONFIG.mask_id
        np.testing.assert_array_equal(before[visible], after[visible])


def test_a_row_does_not_depend_on_its_neighbours():
    whole = np.asarray(draw(CONFIG).ids)
    order = np.array([2, 0, 3, 1])
    mixed = draw(CONFIG, keys=keys_of(order), classes=CLASSES[order])
    np.testing.assert_array_equal(mixed.ids, whole[order])
    assert len({tuple(row) for row in whole}) == B
    other = np.asarray(draw(CONFIG, keys=randomness.row_keys(4, jnp.arange(B))).ids)
    assert (other != whole).any(1).all()


def test_classes_and_guidance_matter():
    whole = np.asarray(draw(CONFIG).ids)
    same = np.asarray(draw(CONFIG, classes=jnp.zeros(B, jnp.int32)).ids)
    np.testing.assert_array_equal(same[0], whole[0])
    assert (same[1:] != whole[1:]).any()
    unguided = draw(CONFIG, dataclasses.replace(SAMPLER, guidance=0.0))
    assert (np.asarray(unguided.ids) != whole).any()


def test_rows_on_several_devices_are_the_same():
    mesh = sharding.make_mesh(4)
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    found = mask_predict.sample(
        CONFIG,
        SAMPLER,
        jax.device_put(params_of(CONFIG), everywhere),
        jax.device_put(KEYS, rows),
        jax.device_put(CLASSES, rows),
    )
    np.testing.assert_array_equal(found.ids, draw(CONFIG).ids)


def test_tokens_through_each_layer_are_the_published_numbers():
    """N = 256 in eight steps, counted where they enter the blocks."""
    config = dataclasses.replace(CONFIG, num_tokens=256, encoder_layers=1)
    seen = {"encoder_0": [], "decoder_0": []}

    def count(next_fun, args, kwargs, context):
        if context.module.name in seen and context.method_name == "__call__":
            context_length = 0 if kwargs["context"] is None else kwargs["context"].shape[1]
            seen[context.module.name].append((*args[0].shape[:2], context_length))
        return next_fun(*args, **kwargs)

    shapes = enat.param_shapes(config)
    with nn.intercept_methods(count):
        jax.eval_shape(
            lambda params, keys, classes: mask_predict.sample.__wrapped__(
                config, SamplerConfig(), params, keys, classes
            ),
            shapes, KEYS[:1], CLASSES[:1],
        )  # fmt: skip
    masks = [256, 251, 236, 212, 181, 142, 97, 49]
    new, old = [5, 15, 24, 31, 39, 45, 48], [0, 5, 20, 44, 75, 114, 159]
    # The first step is unguided and has nothing to encode; the others have two branches.
    assert seen["encoder_0"] == [(2, n, o) for n, o in zip(new, old, strict=True)]
    visible = [256 - m for m in masks]
    branches = [1] + [2] * 7
    assert seen["decoder_0"] == list(zip(branches, masks, visible, strict=True))
    assert mask_predict.work(config, SamplerConfig()) == list(
        zip([0, *old], [0, *new], masks, strict=True)
    )


def test_counted_work_and_its_saving():
    found = draw(CONFIG)
    masks = mask_predict.masks_before(16, 3)
    assert found.stats.target_calls.tolist() == [1 + 2 * 2] * B
    assert found.stats.extra["encoder_tokens"].tolist() == [16 - masks[2]] * B
    assert found.stats.extra["decoder_tokens"].tolist() == [sum(masks)] * B
    assert found.stats.tokens_emitted.tolist() == [16] * B
    plain = dataclasses.replace(SAMPLER, reuse=False)
    anew = draw(CONFIG, plain).stats
    assert anew.extra["encoder_tokens"].tolist() == [sum(16 - m for m in masks[:3])] * B
    assert anew.extra["reused_tokens"].tolist() == [0] * B
    # By hand for this size: a sum over steps of what each call costs, branches counted.
    by_hand = sum(
        (2 if step else 1) * enat.macs(CONFIG, 16 - b, b - m, m)
        for step, (b, m) in enumerate(zip([16, *masks], masks[:3], strict=False))
    )
    assert mask_predict.macs(CONFIG, SAMPLER) == by_hand < mask_predict.macs(CONFIG, plain)
    large = SamplerConfig(guidance=0)
    full = mask_predict.macs(enat.ENAT_L, dataclasses.replace(large, reuse=False))
    assert 1 - mask_predict.macs(enat.ENAT_L, large) / full == pytest.approx(0.43, abs=0.01)


def test_schedules():
    """Guidance grows linearly from 0; both temperatures are annealed; MaskGIT keeps its own."""
    sampler = SamplerConfig()
    assert [sampler.scale(step) for step in range(8)] == [2.5 * s / 8 for s in range(8)]
    assert sampler.temperature(0) == pytest.approx(5.25)
    assert sampler.temperature(7) == 1e-3
    assert mask_predict.MASKGIT.temperature(3) == 1.0
    assert mask_predict.masks_before(256, 8) == [256, 251, 236, 212, 181, 142, 97, 49, 0]


def test_confidence_has_no_sampling_temperature_and_no_noise_at_the_end():
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (B, 3, 5)))
    masked = jnp.tile(jnp.array([1, 4, 7]), (B, 1))
    last = SAMPLER.steps - 1
    tokens, confidence = mask_predict.draw(log_probs, KEYS, last, masked, SAMPLER, 16)
    np.testing.assert_array_equal(tokens, jnp.argmax(log_probs, -1))  # tau is 1e-3 there
    np.testing.assert_allclose(confidence, log_probs.max(-1), rtol=1e-6)
    still = dataclasses.replace(SAMPLER, mask_temperature=0.0)
    tokens, confidence = mask_predict.draw(log_probs, KEYS, 0, masked, still, 16)
    expected = jnp.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(confidence, expected, rtol=1e-6)


def test_tokens_follow_the_tempered_distribution():
    """20,000 rows of one position against softmax(l / tau), by chi-square."""
    rows = 20_000
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = randomness.row_keys(0, jnp.arange(rows))
    tiled = jnp.tile(logits, (rows, 1, 1))
    tokens, _ = mask_predict.draw(tiled, keys, 0, jnp.zeros((rows, 1), jnp.int32), SAMPLER, 1)
    expected = np.exp(np.asarray(logits, np.float64) / SAMPLER.temperature(0))
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=4)
    assert scipy.stats.chisquare(counts, expected / expected.sum() * rows).pvalue > 1e-3


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"guidance": -1.0}, "guidance: -1.0"),
        ({"sampling_temperature": 0.0}, "sampling_temperature: 0.0 must be positive"),
        ({"mask_temperature": -0.1}, "mask_temperature: -0.1"),
    ],
    ids=str,
)
def test_bad_samplers(options, message):
    with pytest.raises(InputError, match=message):
        SamplerConfig(**options)
    with pytest.raises(InputError, match="steps: 40 are too many for 16 tokens"):
        mask_predict.masks_before(16, 40)
