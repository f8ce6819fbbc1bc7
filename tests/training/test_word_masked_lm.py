"""Pre-training on words: what is hidden, what predictions see, memory, and that it learns."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cross_attention_words as caw
from models import masked_words, subword_heads, transformer
from models.errors import InputError
from tests.training import tiny_words
from training import fitting, word_masked_lm, word_rows
from training.optimizers import OptimizerConfig
from training.word_masked_lm import Objective

MASKED, CAUSAL = Objective(), Objective("causal")


@functools.partial(jax.jit, static_argnums=0)
def corrupt(objective: Objective, key: Any, batch: Any) -> Any:
    return word_masked_lm.corrupt(objective, key, batch, tiny_words.pieces().vocab_size)


def test_what_is_hidden() -> None:
    batch = tiny_words.batch()
    real = batch["special"] == caw.WORD
    B, N = real.shape
    counts = np.zeros(3)
    for seed in range(200):
        places, chosen, corruption = jax.device_get(corrupt(MASKED, jax.random.key(seed), batch))
        assert places.shape == (B, round(0.15 * N))
        wanted = np.minimum(np.maximum(np.round(0.15 * real.sum(1)), 1), real.sum(1))
        np.testing.assert_array_equal(chosen.sum(1), wanted)
        inside = np.zeros((B, N), bool)
        for row in range(B):
            inside[row, places[row][chosen[row]]] = True
        assert not (inside & ~real).any()  # special words and padding are never chosen
        assert not ((corruption.masked | corruption.replaced) & ~inside).any()
        assert not (corruption.masked & corruption.replaced).any()
        assert real.reshape(-1)[corruption.source[corruption.replaced]].all()
        counts += inside.sum(), corruption.masked.sum(), corruption.replaced.sum()
    assert counts[1] / counts[0] == pytest.approx(0.8, abs=0.04)
    assert counts[2] / counts[0] == pytest.approx(0.1, abs=0.04)


def test_predictions_are_the_heads_of_gathered_words() -> None:
    """Against reading one row at a time and asking the head for one word."""
    batch, (reader, params) = tiny_words.batch(), tiny_words.model("words")
    config = tiny_words.config("words")
    places, chosen, corruption = corrupt(MASKED, jax.random.key(0), batch)
    found = jax.jit(reader.predict)(params, batch, corruption, places)
    host, places, chosen = jax.device_get((corruption, places, chosen))
    row, k = np.argwhere(chosen)[-1]
    symbols, lengths = batch["symbols"][row].copy(), batch["lengths"][row].copy()
    special = np.where(host.masked[row], caw.MASK, batch["special"][row])
    flat = batch["symbols"].reshape(-1, symbols.shape[1]), batch["lengths"].reshape(-1)
    for i in np.flatnonzero(host.replaced[row]):
        symbols[i], lengths[i] = flat[0][host.source[row, i]], flat[1][host.source[row, i]]
    hidden, _ = caw.apply(config.model, params, symbols[None], lengths[None], special[None])
    at = places[row, k]
    expected, right = subword_heads.score(
        config.head, params["head"], hidden[:, at],
        batch["pieces"][row, at][None], batch["counts"][row, at][None],
    )  # fmt: skip
    np.testing.assert_allclose(found.log_probs[row, k], expected[0], atol=1e-4)
    np.testing.assert_array_equal(found.right[row, k], right[0])


@pytest.mark.parametrize("reads", masked_words.READS)
def test_a_hidden_word_is_not_seen(reads: str) -> None:
    """Predictions do not change with the word itself: masked, or (causal) not there yet."""
    batch = tiny_words.batch()
    other = {name: value.copy() for name, value in batch.items()}
    N, V = batch["special"].shape[1], tiny_words.pieces().vocab_size
    for causal in (False, True):
        reader, params = tiny_words.model(reads, causal)
        predict = jax.jit(reader.predict)
        places = np.full((len(batch["special"]), 1), 4)
        corruption = None
        if not causal:
            nothing = np.zeros(batch["special"].shape, bool)
            masked = nothing.copy()
            masked[:, 4] = batch["special"][:, 4] == caw.WORD
            zeros = np.zeros(nothing.shape, np.int32)
            corruption = masked_words.Corruption(
                masked, nothing, zeros, np.zeros_like(batch["tokens"])
            )
        before = predict(params, batch, corruption, places)
        changed = slice(4, N if causal else 5)
        other["symbols"][:, changed] = 66
        inside = (batch["words"] >= 4) & (batch["words"] < (N if causal else 5))
        other["tokens"] = np.where(inside, 7 % V, batch["tokens"])
        after = predict(params, other, corruption, places)
        real = batch["special"][:, 4] == caw.WORD
        slots = 1 if causal and reads == "subwords" else None  # later pieces see those before
        np.testing.assert_allclose(
            after.log_probs[real][:, :, :slots], before.log_probs[real][:, :, :slots], atol=1e-5
        )


def test_memory_of_the_loss() -> None:
    """It follows the hidden words, their slots and V; nothing is of all words times V."""
    batch, V = tiny_words.batch(), tiny_words.pieces().vocab_size
    reader, params = tiny_words.model("words")
    config = run_config("words", 1)
    loss = lambda p, b: word_masked_lm.loss_fn(  # noqa: E731
        config, MASKED, reader, V, p, b, jnp.zeros((), jnp.int32), None
    )[0]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, batch)
    B, N = batch["special"].shape
    K, J = round(0.15 * N), tiny_words.SHAPE.num_slots

    def shapes(jaxpr: Any) -> set:
        found = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
        for eqn in jaxpr.eqns:
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    found |= shapes(value.jaxpr)
        return found

    wide = {shape for shape in shapes(jaxpr.jaxpr) if V + 1 in shape}
    assert (B * K, J, V + 1) in wide
    assert max(int(np.prod(shape)) for shape in wide) == B * K * J * (V + 1)
    assert B * N * (V + 1) > B * K * J * (V + 1) / J  # what is avoided is larger, slot for slot


def run_config(reads: str, steps: int, causal: bool = False) -> fitting.TrainConfig:
    return fitting.TrainConfig(
        tiny_words.config(reads, causal).backbone,
        OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        num_steps=steps,
        batch_size=6,
        sequence_length=12,
        eval_every=steps,
        checkpoint_every=steps,
    )


def test_it_learns_and_ends_are_learned(tmp_path: Path) -> None:
    reader, params = tiny_words.model("words")
    examples = [{"text": text} for text in tiny_words.TEXTS]
    documents = word_rows.WordDocuments(examples, tiny_words.pieces(), tiny_words.SHAPE)
    before = jax.device_get(params["head"]["logits"]["bias"])
    result = word_masked_lm.train(
        run_config("words", 60),
        MASKED,
        reader,
        tiny_words.pieces().vocab_size,
        train_batches=word_rows.train_batches(documents, batch_size=6, window=16),
        eval_batches=[tiny_words.batch()] * 8,  # other words are hidden in each
        workdir=tmp_path,
    )
    uniform = np.log(tiny_words.pieces().vocab_size)
    assert result.metrics["eval_loss"] < 1.5 * uniform  # two or three slots a word
    assert 0 < result.metrics["eval_exact_match"] <= 1
    assert set(result.metrics) == {
        "eval_loss", "eval_bits_per_byte", "eval_exact_match", "eval_exact_match_several",
        "eval_several",
    }  # fmt: skip
    bias = np.asarray(result.state.params["head"]["logits"]["bias"])
    end = tiny_words.config("words").head.end
    assert (bias - before)[end] > 0  # more than any single sub-word
    assert (bias - before).argmax() == end


def test_non_embedding_parameters_are_the_baselines() -> None:
    """Backbones are of one size, whatever is before them."""
    sizes = []
    for reads in masked_words.READS:
        config = tiny_words.config(reads)
        shapes = transformer.param_shapes(config.backbone)
        del shapes["embedder"]
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    assert sizes[0] == sizes[1]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"objective.kind: 'prefix' is not known"):
        Objective("prefix")
    with pytest.raises(InputError, match=r"their sum must be at most 1"):
        Objective(mask_share=0.9, random_share=0.2)
    with pytest.raises(InputError, match=r"model.causal: False is not for the causal objective"):
        word_masked_lm.train(
            run_config("words", 1), CAUSAL, tiny_words.model("words")[0], 10,
            train_batches=iter(()), eval_batches=None, workdir=tmp_path,
        )  # fmt: skip
