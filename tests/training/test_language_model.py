import dataclasses
import itertools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from models import sharding, transformer
from models.config import TransformerConfig
from models.errors import InputError
from training import checkpoints, language_model, loop, losses, metric_writers, optimizers
from training.language_model import Distillation, Target, TrainConfig
from training.optimizers import OptimizerConfig

B, T, V = 4, 12, 32
MODEL = TransformerConfig(
    vocab_size=V, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4,
    mlp_dim=32, max_position=T, tie_embeddings=True,
)  # fmt: skip
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
    num_steps=6,
    batch_size=B,
    sequence_length=T,
    log_every=1,
    eval_every=3,
    checkpoint_every=3,
)


def make_batch(seed):
    """Two or three segments a row, then padding; tokens mostly count upwards."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    tokens = np.zeros((B, T), np.int32)
    for row in range(B):
        edges = [0, 5, int(rng.integers(8, T)), T - int(rng.integers(0, 2))]
        for segment, (start, stop) in enumerate(itertools.pairwise(edges), start=1):
            segments[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            tokens[row, start:stop] = (rng.integers(V) + np.arange(stop - start)) % V
    targets = np.roll(tokens, -1, axis=1)
    inside = (segments == np.roll(segments, -1, axis=1)) & (segments > 0)
    inside[:, -1] = False
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": inside.astype(np.float32),
        "target_bytes": rng.integers(1, 4, (B, T)).astype(np.int32),
    }


class Batches:
    """Endless, different batches; its position is a number."""

    def __init__(self, before=lambda step: None):
        self._position, self._before = 0, before

    def __next__(self):
        self._before(self._position + 1)
        self._position += 1
        return make_batch(self._position)

    def get_state(self):
        return {"position": self._position}

    def set_state(self, state):
        self._position = state["position"]


def train(config, workdir, before=lambda step: None, **more):
    more.setdefault("eval_batches", [make_batch(1000), make_batch(1001)])
    return language_model.train(config, train_batches=Batches(before), workdir=workdir, **more)


def lines(workdir, *names):
    found = metric_writers.read_metrics(workdir / "metrics.jsonl")
    return [[line[name] for name in names] for line in found if set(names) <= set(line)]


init = jax.jit(lambda key: transformer.init(MODEL, key))


@jax.jit
def plain_logits(params, tokens):
    return transformer.apply(MODEL, params, tokens).logits


@jax.jit
def masked_logits(params, batch):
    """With the mask written out."""
    segments = batch["segment_ids"]
    mask = (segments[:, :, None] == segments[:, None]) & np.tri(T, dtype=bool)
    return transformer.apply(
        MODEL, params, batch["tokens"], positions=batch["positions"], mask=mask
    ).logits


def reference_nats(params, batch):
    """Nats of each token, each segment alone in a row of its own and no mask given."""
    nats = np.zeros((B, T))
    for row in range(B):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            alone = np.zeros((1, T), np.int32)
            alone[0, : len(at)] = batch["tokens"][row, at]
            logits = np.asarray(plain_logits(params, alone), np.float64)[0, : len(at)]
            log_p = special.log_softmax(logits, -1)
            nats[row, at] = -log_p[np.arange(len(at)), batch["targets"][row, at]]
    return nats * batch["loss_mask"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(CONFIG, workdir)


def test_losses_are_those_of_an_unpacked_reference(run):
    workdir, result = run
    params = init(jax.random.key(0))
    first = make_batch(1)
    expected = reference_nats(params, first).sum() / first["loss_mask"].sum()
    assert lines(workdir, "loss")[0][0] == pytest.approx(expected, rel=1e-5)

    batches = [make_batch(1000), make_batch(1001)]
    nats = sum(reference_nats(result.state.params, batch).sum() for batch in batches)
    tokens = sum(batch["loss_mask"].sum() for batch in batches)
    size = sum((batch["loss_mask"] * batch["target_bytes"]).sum() for batch in batches)
    assert result.metrics["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result.metrics["eval_bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_steps_are_those_of_a_plain_loop(run):
    workdir, result = run
    optimizer = optimizers.create(CONFIG.optimizer, CONFIG.num_steps)
    params = init(jax.random.key(0))
    state, expected = optimizer.init(params), []

    @jax.jit
    def loss_and_gradient(params, batch):
        def loss_fn(params):
            logits = masked_logits(params, batch)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

        return jax.value_and_grad(loss_fn)(params)

    update = jax.jit(optimizer.update)
    for step in range(CONFIG.num_steps):
        loss, gradient = loss_and_gradient(params, make_batch(step + 1))
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
        rate = optimizers.schedule(CONFIG.optimizer, CONFIG.num_steps)(step)
        expected.append([step + 1, float(loss), float(norm), float(rate)])
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    found = lines(workdir, "loss", "gradient_norm", "learning_rate")
    np.testing.assert_allclose(found, np.array(expected)[:, 1:], rtol=1e-4, atol=1e-7)
    assert lines(workdir, "tokens_per_second")[-1][0] > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        result.state.params,
        params,
    )


def test_metrics_and_checkpoints_come_when_asked(run):
    workdir, result = run
    assert (result.step, int(result.state.step)) == (6, 6)
    assert [step for step, _ in lines(workdir, "step", "loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in lines(workdir, "step", "eval_loss")] == [3, 6]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]


def test_a_finished_run_is_not_repeated(run):
    workdir, result = run
    before = (workdir / "metrics.jsonl").read_bytes()

    def fail(step):
        raise AssertionError("read a batch")

    again = train(CONFIG, workdir, fail)
    assert (again.step, again.metrics, again.seconds) == (6, result.metrics, result.seconds)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, result.state.params)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_mesh_of_eight_devices_has_the_same_losses(run, tmp_path):
    assert jax.device_count() >= 8, "tests/conftest.py asks for 8 simulated devices"
    workdir, result = run
    spread = train(dataclasses.replace(CONFIG, mesh=(2, 4)), tmp_path)
    kernel = spread.state.params["layers_0"]["mlp"]["down"]["kernel"]
    moment = spread.state.opt_state[1][0].mu["layers_0"]["mlp"]["down"]["kernel"]
    for array in (kernel, moment):
        assert array.sharding.mesh.shape == {"data": 2, "model": 4}
        assert array.addressable_shards[0].data.shape == (MODEL.mlp_dim // 4, MODEL.embed_dim)
    np.testing.assert_allclose(lines(tmp_path, "loss"), lines(workdir, "loss"), atol=1e-5)
    assert spread.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-5)


def test_state_split_over_data_has_the_same_losses_and_goes_on_without_it(run, tmp_path):
    workdir, result = run
    split = dataclasses.replace(CONFIG, mesh=(4, 2), fsdp=True)

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(split, tmp_path, stop)
    whole = train(dataclasses.replace(CONFIG, mesh=(2, 4)), tmp_path)  # from its checkpoint
    np.testing.assert_allclose(lines(tmp_path, "loss"), lines(workdir, "loss"), atol=1e-5)
    assert whole.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-5)


def test_a_device_holds_its_part_of_state_split_over_data(tmp_path):
    split = dataclasses.replace(CONFIG, mesh=(4, 2), fsdp=True, num_steps=1)
    state = train(split, tmp_path).state
    for tree in (state.params, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            parts = array.size // array.addressable_shards[0].data.size
            assert parts == (1 if array.ndim < 2 else 8), sharding.path_string(path)


def test_sigterm_writes_a_checkpoint_and_exits(run, tmp_path):
    workdir, result = run

    def terminate(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        train(CONFIG, tmp_path, terminate)
    assert exit_.value.code == loop.TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == previous
    assert checkpoints.Checkpointer(tmp_path).steps == [3, 5]

    resumed = train(CONFIG, tmp_path)
    assert lines(tmp_path, "step", "loss") == lines(workdir, "step", "loss")
    jax.tree.map(np.testing.assert_array_equal, resumed.state, result.state)


@pytest.mark.parametrize("spoiled", [2, 5])
def test_non_finite_loss_stops_and_is_never_saved(run, tmp_path, monkeypatch, spoiled):
    original = losses.masked_mean

    def spoil(values, mask):
        # The bad batch is known by a mask entry of 2, which no other batch has.
        return jnp.where(mask[0, 0] == 2.0, jnp.nan, original(values, mask))

    monkeypatch.setattr(losses, "masked_mean", spoil)

    class Spoiled(Batches):
        def __next__(self):
            batch = super().__next__()
            if self._position == spoiled:
                batch["loss_mask"][0, 0] = 2.0
            return batch

    # One line a window of two steps: the report must still name the exact step.
    config = dataclasses.replace(CONFIG, log_every=2)
    with pytest.raises(InputError) as failure:
        language_model.train(config, train_batches=Spoiled(), eval_batches=None, workdir=tmp_path)
    kept = "; the checkpoint of step 3 is kept" if spoiled == 5 else ""
    assert str(failure.value) == f"loss: nan at step {spoiled} is not finite; stopped{kept}"
    saved = checkpoints.Checkpointer(tmp_path).steps
    assert saved == ([3] if spoiled == 5 else [])


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    state = {"x": jnp.ones(3), "count": jnp.int32(0), "key": jax.random.key(0)}
    with pytest.raises(InputError, match=r"state: not finite at step 2; .* step 1 is kept"):
        loop.run(
            lambda state, batch: ({**state, "x": state["x"] * 1e30}, {"loss": jnp.float32(1.0)}),
            lambda: state,
            template=state,
            batches=Batches(),
            num_steps=3,
            workdir=tmp_path,
            config={},
            checkpoint_every=1,
        )


def test_distillation_follows_the_target(tmp_path):
    target = Target(MODEL, init(jax.random.key(7)))
    config = dataclasses.replace(
        CONFIG, num_steps=2, distillation=Distillation(weight=0.75, temperature=2.0), seed=3
    )
    train(config, tmp_path, target=target, eval_batches=None)
    batch = make_batch(1)
    student = init(jax.random.key(3))
    logits, soft = (
        np.asarray(masked_logits(params, batch), np.float64) for params in (student, target.params)
    )
    p, q = special.softmax(soft / 2, -1), special.softmax(logits / 2, -1)
    hard = -np.take_along_axis(special.log_softmax(logits, -1), batch["targets"][..., None], -1)[
        ..., 0
    ]
    nats = 0.75 * 4 * special.rel_entr(p, q).sum(-1) + 0.25 * hard
    expected = (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    assert lines(tmp_path, "loss")[0][0] == pytest.approx(expected, rel=1e-4)


def test_mixed_precision_keeps_float32_parameters(run, tmp_path):
    workdir, _ = run
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16", num_steps=4)
    result = train(config, tmp_path)
    floating = [x for x in jax.tree.leaves(result.state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floating} == {jnp.dtype(jnp.float32)}
    found, exact = (np.array(lines(path, "loss"))[:4] for path in (tmp_path, workdir))
    np.testing.assert_allclose(found, exact, rtol=0.02)
    assert np.any(found != exact)


def test_remat_changes_memory_not_numbers(run, tmp_path):
    train(dataclasses.replace(CONFIG, remat=True), tmp_path)
    np.testing.assert_allclose(lines(tmp_path, "loss"), lines(run[0], "loss"), rtol=1e-5)


def test_other_config_or_data_in_the_same_directory_is_refused(run):
    workdir, _ = run
    before = sorted(path.name for path in workdir.iterdir())
    changed = dataclasses.replace(CONFIG, model=MODEL.replace(mlp_dim=64))
    with pytest.raises(InputError, match=r"another config: model.mlp_dim is 32 there and 64 here"):
        train(changed, workdir)
    with pytest.raises(InputError, match="another config: identity is None there"):
        train(CONFIG, workdir, identity={"dataset": "other"})
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_full_disk_while_writing_metrics_is_named(tmp_path, monkeypatch):
    def full(self, step, scalars):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(metric_writers.JsonLinesWriter, "write_scalars", full)
    with pytest.raises(InputError, match=f"cannot write metrics in {tmp_path}: No space left"):
        train(CONFIG, tmp_path)


class Ending(Batches):
    def __next__(self):
        if self._position == 2:
            raise StopIteration
        return super().__next__()


def test_batches_that_do_not_fit_are_named(tmp_path):
    def spoiled(**changes):
        class Spoiled(Batches):
            def __next__(self):
                return super().__next__() | changes

        return Spoiled()

    wide = np.zeros((B, T + 1), np.int32)
    large = np.full((B, T), V, np.int32)
    cases = {
        r"batch.tokens: shape \(4, 13\) must be \(4, 12\)": spoiled(tokens=wide),
        "batch.tokens: id 32 is out of range; model.vocab_size is 32": spoiled(tokens=large),
        "batch.targets: id -1 is out of range": spoiled(targets=large - V - 1),
        "batches: ended after 2 of 6 steps": Ending(),
    }
    for index, (message, batches) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            language_model.train(
                CONFIG, train_batches=batches, eval_batches=None, workdir=tmp_path / str(index)
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps: 0 must be at least 1"),
        ({"sequence_length": 13}, "sequence_length: 13 exceeds model.max_position 12"),
        ({"compute_dtype": "bfloat"}, "compute_dtype: 'bfloat' .*did you mean 'bfloat16'"),
        ({"mesh": (3, 1)}, "batch_size: 4 must be a multiple of the 3 devices"),
    ],
)
def test_configs_that_cannot_be_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_models_and_targets_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InputError, match=r"model.causal: False is not for this pipeline"):
        train(dataclasses.replace(CONFIG, model=MODEL.replace(causal=False)), tmp_path)
    other = MODEL.replace(vocab_size=64)
    distilled = dataclasses.replace(CONFIG, distillation=Distillation())
    with pytest.raises(InputError, match=r"vocab_size 64 differs from model.vocab_size 32"):
        train(distilled, tmp_path, target=Target(other, {}))
    with pytest.raises(InputError, match="distillation: needs a target model"):
        train(distilled, tmp_path)
    with pytest.raises(InputError, match="mesh: 4x4 needs 16 devices"):
        train(dataclasses.replace(CONFIG, mesh=(4, 4)), tmp_path)
    with pytest.raises(InputError, match=r"distillation.weight: 1.5 must be between 0 and 1"):
        Distillation(weight=1.5)
    assert not any(tmp_path.iterdir())
