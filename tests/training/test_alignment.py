"""Alignment: the target's answers, and a draft that learns them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from models import hf_checkpoint
from models.config import TransformerConfig
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import alignment, base_models, batches, language_model
from training.language_model import Target, TrainConfig
from training.optimizers import OptimizerConfig

# Bytes, and an end.
MODEL = TransformerConfig(
    vocab_size=257,
    embed_dim=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_position=64,
    tie_embeddings=True,
    eos_token_ids=(256,),
)
DRAFT = MODEL.replace(embed_dim=16, head_dim=8, mlp_dim=32)
TOKENIZER = Tokenizer(None, MODEL)
# Each question has two answers, equally right.
WORDS = {
    "ant=": ("tiny", "small"), "cow=": ("heavy", "big"), "fox=": ("red", "clever"),
    "owl=": ("wise", "quiet"), "pig=": ("pink", "fat"), "rat=": ("grey", "fast"),
}  # fmt: skip
QUESTIONS = list(WORDS)
EXAMPLES = [
    {"question": question, "solution": f"{word}\n"}
    for question, words in WORDS.items()
    for word in words
] * 20


@pytest.fixture(scope="module", autouse=True)
def small_packing():
    """Few rows are packed at a time: the documents here are a few bytes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_PACKING_TOKENS", 2**10)
        yield


def config(model: TransformerConfig, steps: int, **more) -> TrainConfig:
    return TrainConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=more.pop("learning_rate", 0.01), warmup_steps=10),
        num_steps=steps,
        batch_size=4,
        sequence_length=64,
        eval_every=1000,
        checkpoint_every=more.pop("checkpoint_every", 1000),
        **more,
    )


@functools.cache
def documents() -> batches.TokenizedDocuments:
    return batches.TokenizedDocuments(EXAMPLES, TOKENIZER, loss_on="response")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, small_packing):
    """A target and a draft that both learned from the ambiguous text itself."""
    trained = {}
    for seed, (role, model) in enumerate((("target", MODEL), ("draft", DRAFT))):
        run = language_model.train(
            config(model, 150, seed=seed),
            train_batches=batches.train_batches(documents(), batch_size=4, seq_len=64, seed=seed),
            eval_batches=None,
            workdir=tmp_path_factory.mktemp(role),
        )
        trained[role] = jax.device_get(run.state.params)
    return trained


def decode(params, name, **options):
    method = methods.build(name, {"target": MODEL, "draft": DRAFT}, SamplingConfig(), options)
    prompts = [TOKENIZER.encode(question) for question in QUESTIONS]
    return generation.generate(params, prompts, method, generation.stop_config(MODEL, 12))


def texts(rows):
    return [TOKENIZER.decode(row.token_ids) for row in rows]


def answers(pair, path, questions=QUESTIONS, batch_size=4, max_new_tokens=12):
    return alignment.answers(
        Target(MODEL, pair["target"]), TOKENIZER, questions, path,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
    )  # fmt: skip


def align(pair, workdir, steps=100, **more):
    return alignment.align(
        config(DRAFT, steps, **more),
        pair["draft"],
        Target(MODEL, pair["target"]),
        TOKENIZER,
        {"train": QUESTIONS * 40, "validation": QUESTIONS[:2]},
        workdir=workdir,
        max_new_tokens=12,
        batch_size=60,
    )


# --- Answers --------------------------------------------------------------------------------------


def test_answers_are_the_targets_greedy_continuations(pair, tmp_path):
    found = answers(pair, tmp_path / "work" / "answers.jsonl")
    assert [answer["question"] for answer in found] == QUESTIONS
    assert [answer["solution"] for answer in found] == texts(decode(pair, "autoregressive"))
    for answer in found:  # it has learned both answers, and says one of them
        assert answer["solution"].strip() in WORDS[answer["question"]]


def test_answers_without_an_end_are_left_out(pair, tmp_path):
    whole = answers(pair, tmp_path / "whole")
    found = answers(pair, tmp_path / "cut", max_new_tokens=5)
    # The line end and the end of text are tokens too.
    assert found == [answer for answer in whole if len(answer["solution"]) <= 4]
    assert 0 < len(found) < len(whole)
    with pytest.raises(InputError, match="max_new_tokens: none of 6 answers came to an end in 1"):
        answers(pair, tmp_path / "none", max_new_tokens=1)


def test_answering_goes_on_where_it_was_killed(pair, tmp_path, monkeypatch):
    whole = answers(pair, tmp_path / "whole", batch_size=2)
    original, asked = generation.generate, []

    def killed(params, prompts, *rest):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return original(params, prompts, *rest)

    monkeypatch.setattr(generation, "generate", killed)
    path = tmp_path / "answers"
    with pytest.raises(KeyboardInterrupt):
        answers(pair, path, batch_size=2)
    text = path.read_text()
    assert text.count("\n") == 4
    path.write_text(text[:-10])  # the last line was cut off while it was written
    monkeypatch.setattr(generation, "generate", original)
    assert answers(pair, path, batch_size=2) == whole
    assert path.read_text() == (tmp_path / "whole").read_text()
    monkeypatch.setattr(generation, "generate", killed)  # nothing is asked again
    assert answers(pair, path, batch_size=2) == whole


def test_answers_to_other_prompts_are_not_taken(pair, tmp_path):
    answers(pair, tmp_path / "answers")
    with pytest.raises(InputError, match="answers to other prompts"):
        answers(pair, tmp_path / "answers", questions=QUESTIONS[::-1])


# --- Fine-tuning ----------------------------------------------------------------------------------


def test_alignment_lowers_fallbacks_and_raises_agreement(pair, tmp_path):
    run = align(pair, tmp_path)
    aligned = {**pair, "draft": run.state.params}
    plain = texts(decode(pair, "autoregressive"))

    def measure(params, **options):
        rows = decode(params, "bild", **options)
        total = generation.total_stats(rows)
        agree = np.mean([a == b for a, b in zip(texts(rows), plain, strict=True)])
        return total["fallbacks"] / total["tokens_emitted"], agree

    before, after = (measure(params, fallback=0.75) for params in (pair, aligned))
    assert after[0] < before[0] / 2
    # Without the large model's say the unaligned draft takes the other answer now and then.
    before, after = (measure(params, fallback=0.0, rollback="inf") for params in (pair, aligned))
    assert before[1] < 1 == after[1]
    assert run.metrics["eval_loss"] < 0.1


def test_fine_tuning_begins_with_the_given_parameters(pair, tmp_path):
    run = align(pair, tmp_path, steps=1, learning_rate=1e-12)
    for found, given in zip(
        jax.tree.leaves(run.state.params), jax.tree.leaves(pair["draft"]), strict=True
    ):
        np.testing.assert_allclose(found, given, atol=1e-9)
    assert run.step == 1


def test_fine_tuning_that_was_killed_goes_on(pair, tmp_path, monkeypatch):
    whole = align(pair, tmp_path / "whole", steps=4, checkpoint_every=2)
    original = language_model.put
    count = []

    def killed(*args):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(language_model, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        align(pair, tmp_path / "killed", steps=4, checkpoint_every=2)
    again = align(pair, tmp_path / "killed", steps=4, checkpoint_every=2)
    # Three steps and the killed one; steps three and four again, then an evaluation.
    assert len(count) == 7
    for found, expected in zip(
        jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


# --- As a named model -----------------------------------------------------------------------------

TINY = {
    "dataset_options": {"size": 400, "max_digits": 4},
    "vocab_size": 280,
    "eval_batches": 1,
    "train.num_steps": 2,
    "train.batch_size": 4,
    "train.sequence_length": 64,
    "train.model.num_layers": 1,
    "train.model.embed_dim": 16,
    "train.model.num_heads": 2,
    "train.model.num_kv_heads": 2,
    "train.model.head_dim": 8,
    "train.model.mlp_dim": 32,
}


def test_an_aligned_draft_is_a_named_model(tmp_path, monkeypatch):
    asked = {}

    def spelled(target, tokenizer, questions, path, **_):
        asked[path.name] = list(questions)
        return [{"question": question, "solution": " one\n"} for question in questions]

    monkeypatch.setattr(alignment, "answers", spelled)
    overrides = {f"{role}.{field}": v for role in ("draft", "target") for field, v in TINY.items()}
    overrides |= {"target.train.model.embed_dim": 32}
    overrides |= {k: v for k, v in TINY.items() if not k.startswith("train.model")}
    made = base_models.ensure(
        "numbers_draft_aligned", cache_dir=tmp_path, overrides={**overrides, "num_prompts": 300}
    )
    summary = json.loads((made / base_models.SUMMARY_FILE).read_text())
    parents = {role: tmp_path / "models" / summary[role] for role in ("draft", "target")}
    assert parents["draft"].name.startswith("numbers_draft-")
    assert parents["target"].name.startswith("numbers_target-")
    assert len(asked["answers_train.jsonl"]) == 300
    assert not set(asked["answers_train.jsonl"]) & set(asked["answers_validation.jsonl"])
    model, params = hf_checkpoint.load(made)
    draft, start = hf_checkpoint.load(parents["draft"])
    assert model == draft
    assert model.embed_dim == 16
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
    ]
    assert 0 < max(moved) < 0.1  # two steps from where the draft was
    files = [path / "tokenizer.json" for path in (made, *parents.values())]
    assert len({file.read_bytes() for file in files}) == 1


def test_the_recipes_of_the_numbers_fit_together():
    aligned = base_models.RECIPES["numbers_draft_aligned"]
    assert isinstance(aligned, base_models.AlignedModel)
    for parent in aligned.parents.values():
        other = base_models.RECIPES[parent]
        assert (other.dataset, other.vocab_size) == (aligned.dataset, aligned.vocab_size)
        assert dataclasses.asdict(other)["dataset_options"] == aligned.dataset_options
