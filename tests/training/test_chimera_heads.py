"""Chimera's heads: what they are trained to say, by what they may see, and that nothing leaks."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy import special

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from models import chimera_heads, transformer
from models.chimera_heads import ChimeraConfig, ChimeraHeads
from models.errors import InputError
from tests.decoding.chimera_reference import Encoder
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import chimera_heads as training
from training import target_features
from training.chimera_heads import Objective

TARGET = jax.jit(lambda key: transformer.init(MODEL, key))(jax.random.key(5))
HEADS = ChimeraConfig(3)
OBJECTIVE = Objective(distillation=0.5, state_weight=0.1)
STEPS = 30


def train(workdir, before=lambda step: None):
    return target_features.train(
        dataclasses.replace(CONFIG, num_steps=STEPS, eval_every=10, checkpoint_every=10),
        training.part(HEADS, OBJECTIVE),
        TARGET,
        train_batches=Batches(before),
        eval_batches=[make_batch(1000)],
        workdir=workdir,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    before = jax.tree.map(np.asarray, TARGET)
    result = train(workdir)
    jax.tree.map(np.testing.assert_array_equal, before, TARGET)
    return workdir, result


@functools.cache
def features():
    return jax.jit(lambda batch: target_features.features(MODEL, TARGET, batch, ()))


def noisy(config):
    params = chimera_heads.init(config, MODEL, jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def segments_of(batch):
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            yield row, np.flatnonzero(batch["segment_ids"][row] == segment)


@functools.cache
def steps(config, reads="drafted"):
    """Jitted: (parameters, features, batch) -> what each step says."""
    return jax.jit(
        functools.partial(training.forward, config, Objective(reads=reads), MODEL),
    )


# --- What is computed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config,reads",
    [(HEADS, "drafted"), (ChimeraConfig(3, draft_states=False), "text")],
    ids=["drafted", "text"],
)
def test_all_positions_at_once_are_drafting_after_each(config, reads):
    batch, params = make_batch(3), noisy(config)
    found = steps(config, reads)(params, features()(batch), batch, TARGET)
    found = [tuple(np.asarray(x) for x in step) for step in found]
    reference = Encoder(MODEL, TARGET, ChimeraHeads(config, params))
    hidden = np.asarray(features()(batch).hidden)
    for row, at in list(segments_of(batch))[:5]:
        text = batch["tokens"][row, at].tolist()
        for i in range(len(at) - 1):
            drafts = text[i + 2 : i + 4]
            if reads == "drafted":
                drafts = [int(found[k][0][row, at[i]].argmax()) for k in range(2)]
            wanted = reference.draft(text[: i + 2], hidden[row, at[: i + 1]], drafts)
            for k, (logits, z) in enumerate(wanted):
                np.testing.assert_allclose(found[k][0][row, at[i]], logits, atol=2e-5)
                np.testing.assert_allclose(found[k][1][row, at[i]], z, atol=2e-5)


def test_no_token_is_seen_before_it_is_known():
    """Step k after x_0 .. x_{i+1} depends on these alone, and on k more where it reads the text;
    and on nothing of another segment."""
    T, params, rng = 12, noisy(HEADS), np.random.default_rng(0)
    tokens, index = rng.integers(0, MODEL.vocab_size, T + 1), np.arange(T)

    def changed(reads, segments, j):
        """Which places say something else at each step when x_j is another token: [K, T]."""
        said = []
        for shift in (0, 1):
            other = tokens.copy()
            other[j] = (tokens[j] + shift) % MODEL.vocab_size
            one = {
                "tokens": other[:T], "targets": other[1:], "segment_ids": segments,
                "positions": index - 7 * (segments == 2),
            }  # fmt: skip
            one = {name: np.asarray(x, np.int32)[None] for name, x in one.items()}
            found = steps(HEADS, reads)(params, features()(one), one, TARGET)
            said.append(np.stack([logits[0] for logits, _ in found]))
        return np.abs(said[1] - said[0]).max(axis=-1) > 1e-6

    for reads in ("drafted", "text"):
        for j in range(T + 1):
            found = changed(reads, np.ones(T, int), j)
            for k in range(HEADS.heads):
                known = index + 1 + (k if reads == "text" else 0) >= j
                inside = index + k < T
                np.testing.assert_array_equal(found[k][inside], known[inside])
    segments = np.where(index < 7, 1, 2)
    assert not changed("drafted", segments, 3)[:, 7:].any()
    assert not changed("drafted", segments, 9)[:, :7].any()


def reference_metrics(params, batch):
    """Loss, top-1 and top-5 shares of each head, and mean squared distance of Z."""
    reference = Encoder(MODEL, TARGET, ChimeraHeads(HEADS, params))
    K = HEADS.heads
    loss, right, top5, apart, count = (np.zeros(K) for _ in range(5))
    found = steps(HEADS)(params, features()(batch), batch, TARGET)
    every = np.asarray(features()(batch).hidden, np.float64)
    for row, at in segments_of(batch):
        hidden = every[row, at]
        teacher = hidden @ np.asarray(TARGET["embedder"]["embedding"], np.float64).T
        text = [*batch["tokens"][row, at].tolist()]
        for i in range(len(at) - 1):
            drafts = [int(np.asarray(found[k][0])[row, at[i]].argmax()) for k in range(K - 1)]
            steps_ = reference.draft(text[: i + 2], hidden[: i + 1], drafts)
            for k, (logits, z) in enumerate(steps_):
                there = i + k + 1
                if there >= len(at) or not batch["loss_mask"][row, at[there]]:
                    continue
                label = batch["targets"][row, at[there]]
                log_q = special.log_softmax(logits)
                log_p = special.log_softmax(teacher[there])
                divergence = (np.exp(log_p) * (log_p - log_q)).sum()
                loss[k] += 0.5 * divergence - 0.5 * log_q[label]
                right[k] += logits.argmax() == label
                top5[k] += label in np.argsort(-logits)[:5]
                apart[k] += ((z - hidden[there]) ** 2).mean()
                count[k] += 1
    total = (loss / count).mean() + 0.1 * (apart / count).mean()
    return total, right / count, top5 / count, (apart / count).mean()


def test_the_loss_is_distillation_next_tokens_and_distance(run):
    workdir, _ = run
    params = chimera_heads.init(HEADS, MODEL, jax.random.key(CONFIG.seed))
    loss, right, top5, apart = reference_metrics(params, make_batch(1))
    names = ("loss", "agreement_2", "top5_0", "state_distance")
    wanted = [loss, right[2], top5[0], apart]
    assert lines(workdir, *names)[0] == pytest.approx(wanted, rel=1e-4)


# --- What is learned ---------------------------------------------------------------------------


def test_training_helps_and_both_encoders_matter(run):
    workdir, result = run
    losses = [loss for (loss,) in lines(workdir, "eval_loss")]
    assert losses[-1] < losses[0]
    batch, params = make_batch(1000), result.state.params
    measure = jax.jit(lambda p, f, b: training.loss(HEADS, OBJECTIVE, MODEL, p, f, b, TARGET, None))
    found = features()(batch)
    loss, metrics = measure(params, found, batch)
    assert float(loss) == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
    zero = jax.tree.map(np.zeros_like, params["trigram"])
    alone = found.replace(mask=np.zeros_like(found.mask))  # neither states nor trigrams before
    for worse, fewer in (
        measure({**params, "trigram": zero}, found, batch),
        measure(params, alone, batch),
    ):
        assert worse > loss and fewer["agreement_0"] < metrics["agreement_0"]


def test_heads_that_were_trained_keep_the_text(run):
    _, result = run
    model = MODEL.replace(max_position=64)
    prompts = [[1, 2, 3, 4], [9], [20, 21, 22, 23, 24, 25]]
    stop = generation.stop_config(model, 16, ())
    params = {"target": TARGET, "chimera_heads": ChimeraHeads(HEADS, result.state.params)}
    texts = [
        [
            row.token_ids
            for row in generation.generate(
                params, prompts,
                methods.build(name, {"target": model}, SamplingConfig(), options), stop,
            )
        ]
        for name, options in (
            ("autoregressive", {}),
            ("chimera", {"heads": 3, "tree": "0 1 00 000"}),
        )
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_run_that_was_stopped_goes_on_to_the_same_end(run, tmp_path):
    _, whole = run

    def stop(step):
        if step == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop)
    result = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, result.state.params)


def test_later_steps_do_not_train_the_encoder_through_earlier_ones_unless_told_to():
    heads = ChimeraConfig(2)
    batch, params = make_batch(3), noisy(heads)
    found = features()(batch)

    def of_last(detach):
        objective = Objective(detach=detach, reads="text")

        def last(params):
            steps = training.forward(heads, objective, MODEL, params, found, batch, TARGET)
            return steps[-1][0].sum()

        return jax.grad(last)(params)["context"]["mlp"]["down"]["kernel"]

    assert float(np.abs(of_last(False) - of_last(True)).max()) > 1e-6


def test_objectives_are_checked():
    for field, value in (("distillation", 1.5), ("state_weight", -1.0), ("reads", "both")):
        with pytest.raises(InputError, match=rf"objective\.{field}"):
            Objective(**{field: value})
