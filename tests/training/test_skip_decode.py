"""Fine-tuning for SkipDecode: what is trained is what is evaluated and decoded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.layer_skipping import SkipSchedule, gated
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import skip_decode

DEEP = MODEL.replace(num_layers=4)
SCHEDULE = SkipSchedule(3, 2, span=4)
START = jax.jit(lambda key: transformer.init(DEEP, key))(jax.random.key(1))


def train(workdir, **more):
    config = dataclasses.replace(CONFIG, model=DEEP, num_steps=6)
    return skip_decode.train(
        config,
        SCHEDULE,
        initial_params=START,
        train_batches=Batches(more.get("before", lambda step: None)),
        eval_batches=[make_batch(1000)],
        workdir=workdir,
        prompt_tokens=2,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(workdir)


def reference(params, batch):
    """Each segment alone, its tokens numbered from the end of a prompt of two."""
    nats = count = 0.0
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            tokens = jnp.asarray(batch["tokens"][row, at])[None]
            number = jnp.arange(len(at))[None] - 1
            logits = gated(DEEP, params, tokens, number, SCHEDULE)[0]
            mask = batch["loss_mask"][row, at]
            log_p = jax.nn.log_softmax(logits)
            picked = log_p[np.arange(len(at)), batch["targets"][row, at]]
            nats -= float((picked * mask).sum())
            count += mask.sum()
    return nats / count


def test_the_loss_is_that_of_the_gated_forward(run):
    workdir, result = run
    assert lines(workdir, "loss")[0][0] == pytest.approx(reference(START, make_batch(1)), rel=1e-4)
    found = reference(result.state.params, make_batch(1000))
    assert result.metrics["eval_loss"] == pytest.approx(found, rel=1e-4)
    losses = [loss for (loss,) in lines(workdir, "eval_loss")]
    assert losses[-1] < reference(START, make_batch(1000))


def test_a_run_that_was_stopped_goes_on_to_the_same_end(run, tmp_path):
    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, before=stop)
    again = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run[1].state.params, again.state.params)


def test_tokens_are_numbered_from_the_end_of_the_prompt():
    batch = {
        "positions": jnp.array([[0, 1, 2, 3, 4, 0, 1, 2]]),
        "loss_mask": jnp.array([[0, 0, 1, 1, 0, 0, 1, 1]]),
    }
    assert skip_decode.generated(batch, None).tolist() == [[-1, -1, 0, 1, 1, -1, 0, 1]]
    assert skip_decode.generated(batch, 2).tolist() == [[-1, 0, 1, 2, 3, -1, 0, 1]]
