"""Prompt tokens: what they see, what they learn, a target that stays as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models import prompt_tokens, sizes, transformer
from models.prompt_tokens import PromptTokensConfig
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import branches, prompt_marginals, target_features
from training import prompt_tokens as training
from training.prompt_tokens import Objective

PROMPTS = PromptTokensConfig(distances=3, ensemble=2)
TARGET = jax.jit(lambda key: transformer.init(MODEL, key))(jax.random.key(5))
PARAMS = prompt_tokens.init(PROMPTS, MODEL, jax.random.key(0))
LONG = MODEL.replace(max_position=32)
T = make_batch(3)["tokens"].shape[1]


def ahead(params, batch, cut, config=PROMPTS):
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    return _ahead(config, params, placed, jnp.asarray(cut))


@functools.partial(jax.jit, static_argnums=0)
def _ahead(config, params, batch, cut):
    return training.ahead(config, LONG, params, TARGET, batch, cut)


def test_a_copy_says_what_it_says_alone_behind_its_prefix():
    batch = make_batch(3)
    cut = np.array([[2, 7], [4, 9], [0, 6], [3, 10]])
    found = ahead(PARAMS, batch, cut)
    for row in range(2):
        for c in range(2):
            at = np.flatnonzero(batch["segment_ids"][row] == batch["segment_ids"][row, cut[row, c]])
            at = at[at <= cut[row, c]]
            text = transformer.token_embeddings(
                MODEL, TARGET, jnp.asarray(batch["tokens"][row, at])[None]
            )
            for member in range(2):
                soft = PARAMS["embedding"][member::2][None]
                logits = transformer.apply(
                    LONG, TARGET, jnp.concatenate([text, soft], axis=1)
                ).logits[0, -3:]
                mine = logits if member == 0 else mine + logits  # noqa: F821
            np.testing.assert_allclose(found[row, c], mine / 2, atol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def compute(objective, features, batch, key):
    return training.loss(PROMPTS, objective, LONG, PARAMS, features, batch, TARGET, key)


@jax.jit
def all_logits(tokens):
    return transformer.apply(LONG, TARGET, tokens[None]).logits[0]


def greedy(text, steps):
    """Logits in the target's own continuation, the whole text again for every token: [steps, V]."""
    found = []
    for _ in range(steps + 1):
        padded = np.zeros(T + 4, np.int32)
        padded[: len(text)] = text
        logits = np.asarray(all_logits(padded)[len(text) - 1], np.float64)
        found.append(logits)
        text = [*text, int(logits.argmax())]
    return np.stack(found[1:])


@pytest.mark.parametrize("prompt", [0, 6])
def test_the_loss_is_the_decayed_divergence_from_the_targets_greedy_continuation(prompt):
    batch, objective = make_batch(3), Objective(cuts=2)
    batch["loss_mask"][:, :prompt] = 0  # nothing is asked there, but at the end of a document
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    features = jax.jit(target_features.features, static_argnums=(0, 3))(LONG, TARGET, placed, ())
    key = jax.random.key(4)
    cut = np.asarray(jax.random.randint(key, (len(batch["tokens"]), 2), 0, T))
    said = np.asarray(ahead(PARAMS, batch, cut), np.float64)
    nats, agreed = [], []
    for row in range(len(cut)):
        for c, at in enumerate(cut[row]):
            segment = batch["segment_ids"][row]
            ends = at + 1 == T or segment[at + 1] != segment[at]
            if not segment[at] or (at < prompt and not ends):
                continue
            before = np.flatnonzero((segment == segment[at]) & (np.arange(T) <= at))
            wanted = greedy(batch["tokens"][row, before].tolist(), 3)
            log_p = special.log_softmax(wanted, axis=-1)
            log_q = special.log_softmax(said[row, c], axis=-1)
            nats.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
            agreed.append(wanted.argmax(-1) == said[row, c].argmax(-1))
    loss, metrics = compute(objective, features, placed, key)
    weights = np.array([1, 0.8, 0.64]) / 3
    assert float(loss) == pytest.approx(float(np.mean(nats, axis=0) @ weights), rel=1e-4)
    assert float(metrics["agreement_3"]) == pytest.approx(np.mean(agreed, axis=0)[2])


def test_targets_from_data_are_what_the_target_says_further_on_in_the_document():
    batch, objective = make_batch(3), Objective(cuts=2, targets="data")
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    features = jax.jit(target_features.features, static_argnums=(0, 3))(LONG, TARGET, placed, ())
    key = jax.random.key(4)
    cut = np.asarray(jax.random.randint(key, (len(batch["tokens"]), 2), 0, T))
    said = np.asarray(ahead(PARAMS, batch, cut), np.float64)
    wanted = np.asarray(transformer.unembed(LONG, TARGET, features.hidden), np.float64)
    total = 0.0
    for k in (1, 2, 3):
        nats = []
        for row in range(len(cut)):
            segment = batch["segment_ids"][row]
            for c, at in enumerate(cut[row]):
                if at + k >= T or not batch["loss_mask"][row, at + k]:
                    continue
                if segment[at] and segment[at] == segment[at + k]:
                    log_p = special.log_softmax(wanted[row, at + k])
                    log_q = special.log_softmax(said[row, c, k - 1])
                    nats.append((np.exp(log_p) * (log_p - log_q)).sum())
        total += 0.8 ** (k - 1) * np.mean(nats) / 3
    loss, _ = compute(objective, features, placed, key)
    assert float(loss) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        ("ensemble", {2: (0, 2), 3: (1, 3), 5: (1, 3, 5)}),
        ("decoder", {2: (0, 1, 2), 3: (0, 1, 2, 3), 5: (0, 1, 2, 3, 4, 5)}),
        ("independent", {2: (2,), 3: (3,), 5: (5,)}),
    ],
)
def test_each_embedding_sees_what_its_mask_says(mask, seen):
    """Which embeddings change what each one says, by changing them in turn."""
    batch = {name: jnp.asarray(value) for name, value in make_batch(3).items()}
    cut, own = jnp.full((4, 1), 6), PARAMS["embedding"]

    @jax.jit
    def said(embedding):
        return branches.hidden(LONG, TARGET, batch, cut, embedding, 2, mask)[1]

    before = said(own)
    moved = [
        np.abs(np.asarray(said(own.at[i].add(1.0)) - before)).max(axis=(0, 1, 3)) > 1e-4
        for i in range(6)
    ]
    for i, by in seen.items():
        assert tuple(np.flatnonzero([row[i] for row in moved])) == by


def test_a_prompt_token_weighs_what_the_paper_says():
    llama, small = sizes.get("llama2_7b"), PromptTokensConfig()
    assert small.num_params(llama) == 12_288
    assert 100 * small.num_params(llama) / llama.num_params() == pytest.approx(1.82e-4, rel=2e-3)
    assert sum(map(np.size, jax.tree.leaves(PARAMS))) == PROMPTS.num_params(MODEL)


def test_siblings_do_not_see_each_other_but_what_is_before_matters():
    batch, cut = make_batch(3), np.array([[6]] * 4)
    one = PromptTokensConfig(distances=3, ensemble=1)
    params = prompt_tokens.init(one, MODEL, jax.random.key(0))
    found = ahead(params, batch, cut, one)
    changed = {"embedding": params["embedding"].at[0].add(1.0)}
    other = ahead(changed, batch, cut, one)
    assert float(jnp.abs(other[:, :, 2] - found[:, :, 2]).max()) > 1e-3
    later = ahead({"embedding": params["embedding"].at[2].add(1.0)}, batch, cut, one)
    np.testing.assert_array_equal(later[:, :, :2], found[:, :, :2])
    # Of two embeddings for each distance, the second has no influence on what the first says.
    many = {"embedding": PARAMS["embedding"].at[1].add(5.0)}
    alone = [ahead({"embedding": p["embedding"][0::2]}, batch, cut, one) for p in (PARAMS, many)]
    np.testing.assert_array_equal(alone[0], alone[1])


def train(workdir, **more):
    config = dataclasses.replace(CONFIG, model=LONG, num_steps=12)
    return target_features.train(
        config,
        training.part(PROMPTS, Objective(cuts=4)),
        TARGET,
        train_batches=Batches(more.get("before", lambda step: None)),
        eval_batches=[make_batch(1000), make_batch(1001)],
        workdir=workdir,
    )


def test_only_prompt_tokens_learn_and_a_stopped_run_goes_on(tmp_path):
    before = jax.tree.map(np.asarray, TARGET)
    whole = train(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, before, TARGET)
    assert jax.tree.map(np.shape, whole.state.params) == {"embedding": (6, MODEL.embed_dim)}
    losses = [loss for (loss,) in lines(tmp_path / "whole", "eval_loss")]
    assert losses[-1] < losses[0]
    assert 0 <= whole.metrics["eval_agreement_3"] <= 1

    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", before=stop)
    again = train(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, again.state.params)


def test_prompt_tokens_are_written_read_and_begun_from_tokens(tmp_path):
    prompt_tokens.save(tmp_path / "p", PROMPTS, PARAMS)
    config, found = prompt_tokens.load(tmp_path / "p", MODEL)
    assert config == PROMPTS
    np.testing.assert_array_equal(found["embedding"], PARAMS["embedding"])
    rows = prompt_tokens.from_tokens(PROMPTS, MODEL, TARGET, [3, 4])["embedding"]
    np.testing.assert_array_equal(rows[4], TARGET["embedder"]["embedding"][3])


def test_marginals_count_how_often_each_candidate_is_right():
    texts = np.random.default_rng(0).integers(1, MODEL.vocab_size, (3, 14)).astype(np.int32)
    cut = prompt_marginals.places(5, 14, 3)
    np.testing.assert_array_equal(cut, np.arange(4, 10))
    rank = prompt_marginals.measure(PROMPTS, LONG, PARAMS, TARGET, texts, cut)
    assert rank.shape == (3 * len(cut), 3)
    batch = {
        "tokens": texts,
        "positions": np.broadcast_to(np.arange(14), texts.shape),
        "segment_ids": np.ones_like(texts),
    }
    logits = np.asarray(ahead(PARAMS, batch, np.broadcast_to(cut, (3, len(cut)))))
    counted = np.zeros((3, 4))
    for row in range(3):
        for c, at in enumerate(cut):
            for k in range(3):
                order = np.argsort(-logits[row, c, k], kind="stable").tolist()
                if (place := order.index(texts[row, at + 2 + k])) < 4:
                    counted[k, place] += 1
    found = prompt_marginals.marginals(rank, 4)
    np.testing.assert_allclose(found, counted / rank.shape[0])
    np.testing.assert_allclose(prompt_marginals.top_accuracy(rank, 4), found.sum(axis=1))
