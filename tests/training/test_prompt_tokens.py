"""Prompt tokens: what they see, what they learn, a target that stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import prompt_tokens, transformer
from models.prompt_tokens import PromptTokensConfig
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import prompt_tokens as training
from training import target_features
from training.prompt_tokens import Objective

PROMPTS = PromptTokensConfig(distances=3, ensemble=2)
TARGET = jax.jit(lambda key: transformer.init(MODEL, key))(jax.random.key(5))
PARAMS = prompt_tokens.init(PROMPTS, MODEL, jax.random.key(0))
LONG = MODEL.replace(max_position=32)


def ahead(params, batch, cut, config=PROMPTS):
    placed = {name: jnp.asarray(value) for name, value in batch.items()}
    return training.ahead(config, LONG, params, TARGET, placed, jnp.asarray(cut))


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
