"""Alignment: the target's answers, and a draft that learns them."""

import contextlib
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
from training import alignment, base_models, batches, checkpoints, language_model
from training.language_model import Target, TrainConfig
from training.optimizers import OptimizerConfig

# Bytes, and an end. One architecture and one length for all runs: they are compiled once.
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


def config(seed: int) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=10),
        num_steps=100,
        batch_size=4,
        sequence_length=64,
        checkpoint_every=50,
        keep_checkpoints=3,
        seed=seed,
    )


@functools.cache
def documents() -> batches.TokenizedDocuments:
    return batches.TokenizedDocuments(EXAMPLES, TOKENIZER, loss_on="response")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, small_packing):
    """A target and a draft that both learned from the ambiguous text itself."""
    trained = {}
    for seed, role in enumerate(("target", "draft")):
        run = language_model.train(
            config(seed),
            train_batches=batches.train_batches(documents(), batch_size=4, seq_len=64, seed=seed),
            eval_batches=None,
            workdir=tmp_path_factory.mktemp(role),
        )
        trained[role] = jax.device_get(run.state.params)
    return trained


def decode(params, name, **options):
    method = methods.build(name, {"target": MODEL, "draft": MODEL}, SamplingConfig(), options)
    prompts = [TOKENIZER.encode(question) for question in QUESTIONS]
    return generation.generate(params, prompts, method, generation.stop_config(MODEL, 12))


def texts(rows):
    return [TOKENIZER.decode(row.token_ids) for row in rows]


def answers(pair, path, questions=QUESTIONS, batch_size=6, max_new_tokens=12):
    return alignment.answers(
        Target(MODEL, pair["target"]), TOKENIZER, questions, path,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
    )  # fmt: skip


def align(pair, workdir):
    return alignment.align(
        config(seed=0),
        pair["draft"],
        Target(MODEL, pair["target"]),
        TOKENIZER,
        {"train": QUESTIONS * 40, "validation": QUESTIONS},
        workdir=workdir,
        max_new_tokens=12,
        batch_size=6,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("aligned")


@pytest.fixture(scope="module")
def aligned(pair, workdir):
    """The run that fine-tuned the pair's draft."""
    return align(pair, workdir)


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
    long = next(answer["question"] for answer in whole if answer not in found)
    with pytest.raises(InputError, match="max_new_tokens: none of 6 answers came to an end in 5"):
        answers(pair, tmp_path / "none", questions=[long] * 6, max_new_tokens=5)


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


def test_alignment_lowers_fallbacks_and_raises_agreement(pair, aligned):
    plain = texts(decode(pair, "autoregressive"))

    def measure(draft):
        """Fallbacks a token, and the share of answers that are the target's without its help."""
        total = generation.total_stats(decode({**pair, "draft": draft}, "bild", fallback=0.75))
        alone = texts(decode({"target": draft}, "autoregressive"))
        agree = [a == b for a, b in zip(alone, plain, strict=True)]
        return total["fallbacks"] / total["tokens_emitted"], np.mean(agree)

    before, after = measure(pair["draft"]), measure(aligned.state.params)
    assert after[0] < before[0] / 2
    assert before[1] < 1 == after[1]
    assert aligned.metrics["eval_loss"] < 0.1


def assert_same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fine_tuning_begins_with_the_drafts_parameters(pair, aligned, workdir):
    with contextlib.closing(checkpoints.Checkpointer(workdir, keep_last=3)) as checkpointer:
        assert checkpointer.steps == [0, 50, 100]
        begin = checkpointer.restore(jax.eval_shape(lambda: aligned.state), step=0)
    assert_same(begin.state.params, pair["draft"])
    assert begin.state.step == 0


def test_fine_tuning_that_was_killed_goes_on(pair, aligned, tmp_path, monkeypatch):
    original, count = language_model.put, []

    def killed(*args):
        count.append(1)
        if len(count) == 60:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(language_model, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        align(pair, tmp_path)
    assert_same(align(pair, tmp_path).state, aligned.state)
    assert len(count) == 60 + 50 + 1  # from step 51 on, and an evaluation


# --- As a named model -----------------------------------------------------------------------------

TINY = {
    "dataset_options": {"size": 400, "max_digits": 4},
    "vocab_size": 280,
    "eval_batches": 1,
    "train.num_steps": 2,
    "train.optimizer.learning_rate": 2e-3,
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
