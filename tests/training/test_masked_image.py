"""Training of masked image models: corruption, reuse from the averaged network, loss, resuming."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from models import enat
from models.errors import InputError
from training import image_batches, masked_image
from training.data_parallel import RunConfig
from training.image_tokens import TokenImages
from training.masked_image import TrainConfig
from training.optimizers import OptimizerConfig

MODEL = enat.ENATConfig(
    num_codes=6, num_tokens=16, num_classes=3, embed_dim=8, num_heads=2, encoder_layers=1
)
CONFIG = TrainConfig(
    model=MODEL,
    run=RunConfig(
        num_steps=120,
        batch_size=8,
        log_every=40,
        eval_every=60,
        checkpoint_every=60,
        keep_checkpoints=2,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    ema_decay=0.5,
)
RNG = np.random.default_rng(0)
# Every image of a class is the same: there is something to learn.
LABELS = RNG.integers(0, 3, size=40).astype(np.int32)
IDS = ((np.arange(16)[None] + 2 * LABELS[:, None]) % 6).astype(np.int32)
TOKENS = TokenImages(IDS, LABELS)
N, B = MODEL.num_tokens, CONFIG.run.batch_size


def drawn(config, count):
    rng = np.random.default_rng(5)
    return [masked_image.corrupt(config, B, rng, rng) for _ in range(count)]


def test_a_batch_has_one_number_of_masks_of_the_beta_law():
    """Beta(12, 3) of N, rounded and clipped, one draw a batch: by chi-square."""
    batches = drawn(CONFIG, 2000)
    counts = [(batch["masked"] < N).sum(1) for batch in batches]
    assert all((c == c[0]).all() for c in counts)
    edges = np.concatenate([[0], (np.arange(1, N - 1) + 0.5) / N, [1]])
    expected = np.diff(scipy.stats.beta.cdf(edges, 12, 3)) * len(batches)
    observed = np.bincount([c[0] for c in counts], minlength=N)[1:]
    small = expected < 5
    observed, expected = (
        np.append(x[~small], x[small].sum()).astype(float) for x in (observed, expected)
    )
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3
    assert np.mean([c[0] / N for c in counts]) == pytest.approx(0.8, abs=0.01)


def test_lists_share_out_the_positions_and_have_few_lengths():
    batches = drawn(CONFIG, 300)
    reuses = 0
    for batch in batches:
        for row in range(B):
            parts = [batch[name][row] for name in ("old", "new", "masked")]
            real = np.concatenate([part[part < N] for part in parts])
            assert sorted(real) == list(range(N))
        reuses += (batch["old"] < N).any()
    lengths = {tuple(batch[n].shape[1] for n in ("old", "new", "masked")) for batch in batches}
    assert len(lengths) <= 3
    # Half of the batches, less those in which all visible tokens were drawn to be new.
    assert 0.35 < reuses / len(batches) < 0.5
    assert not any((b["old"] < N).any() for b in drawn(plain(), 50))
    # 4 of 16 tokens are visible in 1820 ways: hardly two rows of a batch are alike.
    fours = [batch["masked"] for batch in batches if (batch["masked"][0] < N).sum() == 12]
    assert np.mean([len({tuple(row) for row in rows}) for rows in fours]) > B - 0.5


def plain():
    return dataclasses.replace(CONFIG, reuse_probability=0.0)


def test_the_uniform_network_has_one_length_and_no_reuse():
    uniform = dataclasses.replace(
        CONFIG, model=dataclasses.replace(MODEL, disentangled=False), mask_ratio="cosine"
    )
    batches = drawn(uniform, 200)
    assert {batch["masked"].shape[1] for batch in batches} == {N - 1}
    assert not any((batch["old"] < N).any() for batch in batches)
    # MaskGIT's cos(pi u / 2) has the mean 2 / pi.
    ratios = [(batch["masked"][0] < N).mean() * (N - 1) / N for batch in batches]
    assert np.mean(ratios) == pytest.approx(2 / np.pi, abs=0.06)


def test_labels_are_dropped_twice():
    labels = jnp.zeros(40_000, jnp.int32)
    given, seen = masked_image.drop_conditions(CONFIG, labels, jax.random.key(0))
    null = MODEL.null_class
    assert np.mean(given == null) == pytest.approx(0.15, abs=0.01)
    assert np.mean(seen == null) == pytest.approx(0.235, abs=0.01)
    assert (seen[given == null] == null).all()


@functools.cache
def state():
    return jax.jit(lambda: masked_image.init_state(CONFIG))()


def noisy(rng):
    return lambda x: np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32)


def batch_of(config, seed, want_reuse):
    for number in range(100):
        rng = np.random.default_rng((seed, number))
        found = masked_image.corrupt(config, B, rng, rng)
        if (found["old"] < N).any() == want_reuse:
            return {"ids": IDS[:B], "labels": LABELS[:B], **found}
    raise AssertionError


def test_reused_features_are_the_averaged_networks_on_old_tokens_alone():
    batch = batch_of(CONFIG, 0, True)
    rng = np.random.default_rng(3)
    ema = jax.tree.map(noisy(rng), state().ema)
    reuse = jax.jit(functools.partial(masked_image.reused_features, CONFIG))
    found = reuse(ema, batch["ids"], batch["labels"], batch["old"])
    masked = np.ones((B, N), bool)
    for row in range(B):
        masked[row, batch["old"][row][batch["old"][row] < N]] = False
    again = np.where(masked, MODEL.mask_id, IDS[:B])
    full = jax.jit(enat.apply, static_argnums=0)(
        MODEL, ema, again, batch["labels"], enat.indices_of(masked)
    )
    expected = np.where(masked[..., None], 0, full.features)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    nothing = np.full_like(batch["old"], N)
    assert (np.asarray(reuse(ema, batch["ids"], batch["labels"], nothing)) == 0).all()
    gradient = jax.jit(
        jax.grad(
            lambda e: jnp.sum(
                masked_image.reused_features(CONFIG, e, batch["ids"], batch["labels"], batch["old"])
            )
        )
    )(ema)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) == 0


def test_the_loss_is_smoothed_cross_entropy_of_masked_tokens():
    batch = batch_of(plain(), 1, False)
    rng = np.random.default_rng(4)
    params = jax.tree.map(noisy(rng), state().params)
    loss_fn = jax.jit(functools.partial(masked_image.loss_fn, plain()), static_argnums=4)
    reused = jnp.zeros((B, N, MODEL.embed_dim))
    loss, nats = loss_fn(params, batch, batch["labels"], reused, None)
    masked = np.zeros((B, N), bool)
    for row in range(B):
        masked[row, batch["masked"][row][batch["masked"][row] < N]] = True
    indices = enat.indices_of(masked)
    hidden = np.where(masked, MODEL.mask_id, IDS[:B])
    output = jax.jit(enat.apply, static_argnums=0)(MODEL, params, hidden, batch["labels"], indices)
    log_probs = np.asarray(jax.nn.log_softmax(output.logits), np.float64)
    target = np.eye(MODEL.num_codes)[IDS[:B][masked].reshape(B, -1)]
    np.testing.assert_allclose(nats, -(target * log_probs).sum(-1).mean(), rtol=1e-4)
    smooth = 0.9 * target + 0.1 / MODEL.num_codes
    np.testing.assert_allclose(loss, -(smooth * log_probs).sum(-1).mean(), rtol=1e-4)


def fit(workdir, config=CONFIG):
    return masked_image.train(
        config,
        train_batches=image_batches.train_batches([(TOKENS, B)], seed=1),
        eval_batches=lambda: image_batches.in_order(TOKENS, B, B),
        workdir=workdir,
    )


def test_training_learns_and_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole")
    assert whole.metrics["eval_loss"] < 1.7  # log 6 is 1.79

    # As a run that was killed after the checkpoint of step 60 leaves it.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "120")
    resumed = fit(tmp_path / "cut")
    assert resumed.metrics == whole.metrics
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.ema, whole.state.ema)
    # The average is of all steps: not the parameters themselves.
    kernel = lambda tree: np.asarray(tree["head"]["kernel"])  # noqa: E731
    assert np.abs(kernel(whole.state.ema) - kernel(whole.state.params)).max() > 1e-5


def test_two_devices_give_the_same_as_one(tmp_path):
    short = dataclasses.replace(CONFIG.run, num_steps=4)
    results = [
        fit(
            tmp_path / str(devices),
            dataclasses.replace(CONFIG, run=dataclasses.replace(short, devices=devices)),
        )
        for devices in (1, 2)
    ]
    one, two = (np.asarray(r.state.params["head"]["kernel"]) for r in results)
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_bad_configs():
    for options, message in (
        ({"mask_ratio": "linear"}, "mask_ratio: 'linear' is not known"),
        ({"ema_decay": 1.5}, "ema_decay: 1.5 must be between 0 and 1"),
        ({"reuse_probability": -1}, "reuse_probability: -1 must be between"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(CONFIG, **options)
    with pytest.raises(InputError, match=r"run.batch_size: 3 must be a multiple of run.devices, 2"):
        RunConfig(batch_size=3, devices=2)
