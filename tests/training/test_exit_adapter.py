"""Kangaroo's adapter: its loss, a target that stays as it is, what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models import exit_adapter, hf_checkpoint, transformer
from models.errors import InputError
from models.exit_adapter import ExitAdapterConfig
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import exit_adapter as adapter_training
from training import loop, target_features
from training import tokenizers as tokenizer_training
from training.target_features import PartRecipe

ADAPTER = ExitAdapterConfig(exit_layer=1)
TARGET = jax.jit(lambda key: transformer.init(MODEL, key))(jax.random.key(5))


def train(workdir, **more):
    config = dataclasses.replace(CONFIG, **more.pop("config", {}))
    return target_features.train(
        config,
        adapter_training.part(ADAPTER),
        TARGET,
        train_batches=Batches(more.pop("before", lambda step: None)),
        eval_batches=[make_batch(1000), make_batch(1001)],
        workdir=workdir,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    before = jax.tree.map(np.asarray, TARGET)
    result = train(workdir, config={"num_steps": 12})
    jax.tree.map(np.testing.assert_array_equal, before, TARGET)
    return workdir, result


def reference(params, batch):
    """Loss and acceptance, each packed segment alone in a row."""
    nats, kept, count = 0.0, 0.0, 0.0
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            tokens = jnp.asarray(batch["tokens"][row, at])[None]
            index = jnp.arange(len(at))[None]
            out = transformer.apply(MODEL, TARGET, tokens, collect=(1,))
            hidden, _ = exit_adapter.apply(
                MODEL, params, out.collected[0], positions=index,
                mask=jnp.tri(len(at), dtype=bool)[None],
            )  # fmt: skip
            log_q = special.log_softmax(
                np.asarray(transformer.unembed(MODEL, TARGET, hidden), np.float64)[0], -1
            )
            p = special.softmax(np.asarray(out.logits, np.float64)[0], -1)
            mask = batch["loss_mask"][row, at]
            nats -= ((p * log_q).sum(-1) * mask).sum()
            kept += (np.minimum(p, np.exp(log_q)).sum(-1) * mask).sum()
            count += mask.sum()
    return nats / count, kept / count


def test_the_loss_is_soft_cross_entropy_at_the_same_position(run):
    workdir, _ = run
    params = exit_adapter.init(ADAPTER, MODEL, jax.random.key(CONFIG.seed))
    loss, acceptance = reference(params, make_batch(1))
    assert lines(workdir, "loss", "acceptance")[0] == pytest.approx([loss, acceptance], rel=1e-4)


def test_training_brings_the_adapter_nearer_to_its_target(run):
    workdir, result = run
    losses = [loss for (loss,) in lines(workdir, "eval_loss")]
    assert losses[-1] < losses[0]
    held_out = [reference(result.state.params, make_batch(seed)) for seed in (1000, 1001)]
    tokens = [make_batch(seed)["loss_mask"].sum() for seed in (1000, 1001)]
    loss, acceptance = np.average(held_out, axis=0, weights=tokens)
    assert result.metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert result.metrics["eval_acceptance"] == pytest.approx(acceptance, rel=1e-4)
    # The target itself has the least loss there is: its entropy.
    assert losses[-1] > 0 and 0 < acceptance < 1


def test_a_run_that_was_stopped_goes_on_to_the_same_end(run, tmp_path):
    _, whole = run

    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config={"num_steps": 12}, before=stop)
    result = train(tmp_path, config={"num_steps": 12})
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, result.state.params)
    assert isinstance(result, loop.Result)


def test_an_adapter_is_trained_once_and_kept(tmp_path):
    text = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(40)]
    backend = tokenizer_training.train_bpe(text, 300)
    tokenizer_training.save(backend, tmp_path / "tokenizer")
    model = MODEL.replace(vocab_size=backend.get_vocab_size(), max_position=64, eos_token_ids=(0,))
    params = jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0))
    hf_checkpoint.save(tmp_path / "target", model, params, tokenizer_from=tmp_path / "tokenizer")
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        (source / f"m{number}.py").write_text(text[number % 40] * 4)
    recipe = PartRecipe(
        str(tmp_path / "target"), dataset_options={"root": str(source)}, num_steps=3,
        batch_size=2, sequence_length=32, eval_batches=1,
    )  # fmt: skip

    def ensure(adapter):
        part = adapter_training.part(adapter)
        return target_features.ensure(recipe, part, cache_dir=tmp_path / "cache")

    first = ensure(ADAPTER)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert ensure(ADAPTER) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    config, found = exit_adapter.load(first, model)
    assert config == ADAPTER and "attention" in found
    other = ExitAdapterConfig(1, "norm")
    assert ensure(other) != first


def test_a_bidirectional_target_is_refused(tmp_path):
    with pytest.raises(InputError, match="causal"):
        train(tmp_path, config={"model": MODEL.replace(causal=False)})
