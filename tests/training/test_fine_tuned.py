"""Fine-tuned copies: made once, named by what they are made from, read like any checkpoint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import comparison, fine_tuned_models
from experiments.config_parts import comparison as comparison_config
from experiments.config_parts import fine_tuned, method
from models import files, hf_checkpoint, transformer
from models.errors import InputError
from tests.training.test_language_model import CONFIG, MODEL, make_batch
from training import base_models, early_exit, losses

DEEP = MODEL.replace(num_layers=3)


def test_every_layer_learns_with_its_weight():
    """The loss against each layer's own, its head applied by hand."""
    config = dataclasses.replace(CONFIG, model=DEEP)
    params = jax.jit(lambda key: transformer.init(DEEP, key))(jax.random.key(3))
    batch = {name: jnp.asarray(value) for name, value in make_batch(2).items()}
    total, metrics = early_exit.loss_fn(config, params, batch, jnp.int32(0), None)
    wanted = []
    for layers in (1, 2, 3):
        kept = {k: v for k, v in params.items() if k not in {f"layers_{i}" for i in (1, 2)}}
        kept |= {f"layers_{i}": params[f"layers_{i}"] for i in range(layers)}
        out = transformer.apply(
            DEEP.replace(num_layers=layers), kept, batch["tokens"], positions=batch["positions"],
            mask=early_exit.masks.packed_causal(batch["segment_ids"]),
        )  # fmt: skip
        nats = losses.cross_entropy(out.logits, batch["targets"])
        wanted.append(float(losses.masked_mean(nats, batch["loss_mask"])))
    assert float(metrics["last_loss"]) == pytest.approx(wanted[-1], rel=1e-4)
    assert float(total) == pytest.approx((wanted[0] + 2 * wanted[1] + 3 * wanted[2]) / 6, rel=1e-4)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A cache of its own with the embedded model of smoke runs in it."""
    cache = tmp_path_factory.mktemp("cache")
    overrides = {
        "train.num_steps": 1, "train.eval_every": 1, "train.batch_size": 1,
        "train.sequence_length": 32, "eval_batches": 1, "train.model.num_layers": 2,
        "train.model.embed_dim": 64, "train.model.num_heads": 2, "train.model.num_kv_heads": 2,
        "train.model.head_dim": 32, "train.model.mlp_dim": 32,
    }  # fmt: skip
    return cache, base_models.ensure("tiny_target", cache_dir=cache, overrides=overrides)


def entry(directory, **more):
    recipe = {
        "num_steps": 2, "batch_size": 2, "sequence_length": 32, "eval_batches": 1,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}, **more,
    }  # fmt: skip
    settings = {"window": 3, "branches": 2}
    return fine_tuned("lexical_units", str(directory), settings, **recipe)


def test_a_comparison_names_a_copy_as_any_other_model(start, monkeypatch):
    cache, directory = start
    monkeypatch.setattr(files, "cache_root", lambda: cache)
    config = comparison_config("copies")
    config.models = {"target": entry(directory), "before": str(directory)}
    config.data.update(num_prompts=2, prompt_tokens=16)
    config.decode.update(temperatures=(0.0,), repeats=1, max_new_tokens=8)
    config.quality = {"own_choices": True, "judge": "before"}
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("before", "autoregressive", role="before"),
        method("units", "lud", window=3, threshold=0.0, pad_id=0),
    )
    found = comparison.run(config, cache)
    copy = next(model for model in found["models"] if model["role"] == "target")
    assert copy["source"] == f"{directory}, lexical_units" and copy["eval_loss"] > 0
    runs = {run["label"]: run for run in found["runs"]}
    assert runs["plain"]["own_choices"] == runs["before"]["own_choices"] == 1
    assert "span_choices" not in runs["plain"] and runs["units"]["span_choices"] < 1
    assert runs["units"]["tokens_per_target_call"] > 1
    assert all(run["judged_loss"] > 0 for run in runs.values())

    # Made once; the original is as it was; other settings or another text make another copy.
    made = fine_tuned_models.source_of(config.models.target)
    summary = json.loads((cache / "models" / made / base_models.SUMMARY_FILE).read_text())
    assert summary["settings"]["window"] == 3 and summary["eval_text_loss"] > 0
    (before, old), (after, new) = hf_checkpoint.load(directory), hf_checkpoint.load(made)
    assert before == after
    assert not np.array_equal(old["final_norm"]["scale"], new["final_norm"]["scale"])
    other = fine_tuned_models.source_of(entry(directory, num_steps=1))
    assert other != made and fine_tuned_models.source_of(entry(directory)) == made


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "unknown"}, "kind: 'unknown'"),
        ({"kind": "lexical_units", "settings": {"windows": 3}, "start": "x"}, "windows"),
        ({"kind": "lexical_units"}, "start"),
    ],
)
def test_bad_entries_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        fine_tuned_models.source_of(model)
