"""Records of the greedy oracle against a naive loop; training of filters on them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from decoding import generation, methods, stopping
from decoding.sampling import SamplingConfig
from decoding.unmasking import greedy_oracle, learned_filter
from experiments import method_parts
from models import hf_checkpoint
from models.errors import InputError
from models.tokenizer import Tokenizer
from tests.decoding import masked, tiny
from tests.models import random_models
from training import tokenizers as tokenizer_training
from training import unmask_filter, unmask_records
from training.unmask_filter import FilterRecipe, FilterTraining, Source
from training.unmask_records import Records

BLOCK, NEW = 8, 24
PROMPTS = tiny.PROMPTS[:6]  # two batches of four
SHORT = FilterTraining(
    depth=1, num_steps=60, learning_rate=0.3, log_every=10, eval_every=20, checkpoint_every=20
)


@functools.cache
def collected() -> Records:
    return unmask_records.collect(
        masked.CONFIG,
        masked.params()["target"],
        PROMPTS,
        block_length=BLOCK,
        new_tokens=NEW,
        batch_size=4,
    )


def naive_oracle(prompt, final):
    """Section 2.5 for one row: (step, confidences, correct, masked) of every round."""
    canvas, model = np.array([*prompt, *[masked.MASK] * NEW]), masked.Reference()
    found = []
    for start in range(len(prompt), len(canvas), BLOCK):
        block, last, step = slice(start, start + BLOCK), None, 0
        while (canvas[block] == masked.MASK).any():
            law = masked.softmax(model(canvas, 0, len(canvas)))[block]
            said = law.argmax(axis=1)
            masks = canvas[block] == masked.MASK
            right = said == final[block]
            found.append((step, law.max(axis=1), right, masks))
            write = masks if last is not None and (said == last).all() else masks & right
            canvas[block] = np.where(write, final[block], canvas[block])
            last, step = said, step + 1
    assert (canvas == final).all()
    return found


def test_records_are_those_of_a_naive_oracle():
    records = collected()
    assert sorted(set(records.prompt)) == list(range(6))
    for number, prompt in enumerate(PROMPTS):
        final, _ = masked.unmask(prompt, lambda among, sure, step, size: [
            max(among, key=sure.__getitem__)
        ])  # fmt: skip
        expected = naive_oracle(prompt, np.array(final))
        mine = records.of(records.prompt == number)
        assert mine.step.tolist() == [step for step, *_ in expected]
        for field, at in (("confidence", 1), ("correct", 2), ("masked", 3)):
            np.testing.assert_allclose(
                getattr(mine, field), [entry[at] for entry in expected], atol=1e-5
            )
    steps = unmask_records.steps_per_block(records)
    assert steps.sum() == len(records.step) and len(steps) == 6 * 3
    assert 1 < steps.mean() < BLOCK


def test_the_oracle_writes_the_reference_whatever_it_is():
    """Even one that the model would never write: then every block gets stuck."""
    method = greedy_oracle.method(masked.CONFIG, BLOCK, NEW)
    stop, rows = stopping.StopConfig(NEW), PROMPTS[:4]
    reference = np.random.default_rng(0).integers(0, 60, (4, 64))
    params = {**masked.params(), greedy_oracle.ROLE: reference}
    found = generation.generate(params, rows, method, stop)
    for row, text in zip(found, reference):
        start = len(row.prompt_ids)
        assert row.token_ids == text[start : start + NEW].tolist()
        assert row.stats["target_calls"] <= 2 * NEW
        assert row.stats[greedy_oracle.STUCK] > 0


@functools.cache
def synthetic() -> Records:
    """Position i is final when its own confidence is above a bound of its own."""
    rng = np.random.default_rng(0)
    confidence = rng.random((400, BLOCK)).astype(np.float32)
    correct = confidence > np.linspace(0.2, 0.8, BLOCK)
    prompt = np.repeat(np.arange(100, dtype=np.int32), 4)
    masks = rng.random(correct.shape) < 0.7
    return Records(confidence, correct, masks, np.zeros(400, np.int32), prompt)


def test_splits_and_quality():
    records = synthetic()
    confidence, correct = records.confidence, records.correct
    parts = unmask_filter.split(records, "prompt", 0)
    assert [len(parts[name].step) for name in unmask_filter.SPLITS] == [320, 40, 40]
    assert not set(parts["train"].prompt) & set(parts["test"].prompt)
    by_record = unmask_filter.split(records, "record", 0)
    assert [len(by_record[name].step) for name in unmask_filter.SPLITS] == [320, 40, 40]
    assert set(by_record["train"].prompt) & set(by_record["test"].prompt)

    plain = unmask_filter.quality(records.confidence, records)
    masks = records.masked
    assert plain["final"] == pytest.approx(correct[masks].mean())
    half = plain["thresholds"][0]
    sure = (confidence > 0.5) & masks
    assert half["precision"] == pytest.approx(correct[sure].mean())
    assert half["recall"] == pytest.approx((sure & correct).sum() / (masks & correct).sum())
    assert sum(entry["count"] for entry in plain["bins"]) == masks.sum()
    entry = plain["bins"][3]
    inside = masks & (confidence >= 0.3) & (confidence < 0.4)
    assert entry["final"] == pytest.approx(correct[inside].mean())
    perfect = unmask_filter.quality(correct.astype(np.float32), records)
    assert perfect["calibration_error"] == 0 and perfect["average_precision"] == 1
    order = np.argsort(-confidence[masks])
    hits = correct[masks][order]
    places = np.flatnonzero(hits)
    expected = np.mean([hits[: place + 1].mean() for place in places])
    assert plain["average_precision"] == pytest.approx(expected)
    assert all(t["precision"] == t["recall"] == 1 for t in perfect["thresholds"])


def test_training_learns_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    records = synthetic()
    whole = unmask_filter.train(SHORT, records, workdir=tmp_path / "whole")
    lines = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    test = unmask_filter.split(records, "record", 0)["validation"]
    assert whole.metrics["eval_loss"] == pytest.approx(
        float(unmask_filter.loss(whole.state.params, test.confidence, test.correct)), abs=1e-6
    )
    # It tells positions apart, which no threshold on confidence can.
    held_out = unmask_filter.split(records, "record", 0)["test"]
    score = jax.nn.sigmoid(learned_filter.apply(whole.state.params, held_out.confidence))
    learned, plain = (
        unmask_filter.quality(np.asarray(values), held_out)["thresholds"][0]
        for values in (score, held_out.confidence)
    )
    assert learned["precision"] > plain["precision"] and learned["recall"] > plain["recall"]
    calls = iter(range(30))

    def killed(self):
        next(calls)

    with monkeypatch.context() as patch:
        patch.setattr(unmask_filter._FullBatch, "__next__", killed)
        with pytest.raises(InputError, match="batches: ended after 30 of 60 steps"):
            unmask_filter.train(SHORT, records, workdir=tmp_path / "killed")
    resumed = unmask_filter.train(SHORT, records, workdir=tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
    with pytest.raises(InputError, match="num_steps"):
        changed = dataclasses.replace(SHORT, num_steps=61)
        unmask_filter.train(changed, records, workdir=tmp_path / "killed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny masked diffusion model with a tokeniser of bytes and its own special tokens."""
    directory = tmp_path_factory.mktemp("unmask") / "target"
    tokenizer_directory = directory.parent / "tokenizer"
    trained = tokenizer_training.train_bpe(["a few words"], 280, ("<|endoftext|>", "<|mask|>"))
    tokenizer_training.save(trained, tokenizer_directory)
    config = masked.CONFIG.replace(
        vocab_size=trained.get_vocab_size(),
        num_heads=4,
        num_kv_heads=4,
        eos_token_ids=(trained.token_to_id("<|endoftext|>"),),
        mask_token_id=trained.token_to_id("<|mask|>"),
    )
    params = random_models.params(config)
    hf_checkpoint.save(directory, config, params, tokenizer_from=tokenizer_directory)
    return directory


def test_filters_are_made_once_and_given_to_the_method(checkpoint, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{i} and {i + 1}"}) for i in range(12)]
    prompts.write_text("\n".join(lines) + "\n")
    source = Source("jsonl_prompts", {"path": str(prompts)}, "prompt", "test", 12)
    recipe = FilterRecipe(str(checkpoint), (source,), NEW, BLOCK, SHORT)
    directory = unmask_filter.ensure(recipe, cache_dir=tmp_path / "cache")
    summary = json.loads((directory / unmask_filter.SUMMARY_FILE).read_text())
    assert summary["num_records"] > 12 and 1 < summary["oracle_steps_per_block"] <= BLOCK + 1
    assert set(summary["filter"]) == set(summary["confidence"])
    config, params = learned_filter.load(directory)
    assert config == learned_filter.FilterConfig(BLOCK, 1)
    # Nothing is collected or trained again; a filter of another depth reuses the records.
    monkeypatch.setattr(unmask_records, "collect", None)
    assert unmask_filter.ensure(recipe, cache_dir=tmp_path / "cache") == directory
    deeper = dataclasses.replace(recipe, training=dataclasses.replace(SHORT, depth=4))
    other = unmask_filter.ensure(deeper, cache_dir=tmp_path / "cache")
    assert learned_filter.load(other)[0].depth == 4

    loaded = method_parts.load_method_params("learn2pd", directory, False, {"block_length": BLOCK})
    jax.tree.map(np.testing.assert_array_equal, loaded["filter"], params)
    target_config, target = hf_checkpoint.load(checkpoint)
    ids = Tokenizer.from_directory(checkpoint, target_config).encode_prompt("3 and 4")
    method = methods.build(
        "learn2pd", {"target": target_config}, SamplingConfig(temperature=0.0),
        {"block_length": BLOCK, "eotp": False},
    )  # fmt: skip
    stop = stopping.StopConfig(NEW)
    found = generation.generate({"target": target, **loaded}, [ids], method, stop)
    assert len(found[0].token_ids) == NEW


def test_random_parts_and_none():
    found = method_parts.load_method_params("learn2pd", None, True, {"block_length": 8})
    assert found["filter"]["layer_1"]["kernel"].shape == (8, 8)
    assert method_parts.load_method_params("learn2pd", None, False, {"rule": "quota"}) == {}
    for directory, untrained in ((None, False), ("parts", True)):
        with pytest.raises(InputError, match=r"method learn2pd has trained parts \(filter\): give"):
            method_parts.load_method_params("learn2pd", directory, untrained)


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="new_tokens: 20 must be a multiple of block_length, 8"):
        unmask_records.collect(
            masked.CONFIG, masked.params()["target"], PROMPTS, block_length=8, new_tokens=20
        )
    with pytest.raises(InputError, match="records: 6 leave none for the test split"):
        few = collected().of(np.arange(6))
        unmask_filter.train(SHORT, few, workdir=tmp_path)
    with pytest.raises(InputError, match="split_by: 'row' is not known"):
        FilterTraining(split_by="row")
    (tmp_path / "records").write_text("{}")
    with pytest.raises(InputError, match=r"records: .* cannot be read"):
        unmask_records.load(tmp_path / "records")
