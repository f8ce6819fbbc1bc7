"""Alignment: a draft model learns to say what its target says (sequence-level distillation).

The target answers training prompts greedily, and the draft is fine-tuned on the answers. Nothing
changes in the target. Kim and Rush, arXiv 1606.07947; for a draft, Kim et al., 'Big Little
Decoder', arXiv 2302.07863.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from decoding import generation
from decoding.autoregressive import autoregressive
from decoding.sampling import SamplingConfig
from models import files
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import batches, checkpoints, language_model, loop, optimizers
from training.language_model import Target, TrainConfig, TrainState

SPLITS = ("train", "validation")


def align(
    config: TrainConfig,
    draft_params: Any,
    target: Target,
    tokenizer: Tokenizer,
    questions: Mapping[str, Sequence[str]],
    *,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    description: str = "align",
) -> loop.Result:
    """Fine-tunes a draft on its target's answers, or goes on where `workdir` left off.

    The loss is -log q of the answers' tokens; the prompts' do not count.

    Args:
      config: of the fine-tuning; `config.model` is the draft's architecture.
      draft_params: where it starts.
      target: the model that answers.
      tokenizer: of both models.
      questions: prompts by split, 'train' and 'validation'.
      workdir: as `language_model.train`; the answers are kept in it too.
      identity: what identifies the target, the draft and the prompts, as JSON can hold it.
      max_new_tokens: of an answer.
      batch_size: prompts that are answered at a time.
      description: in front of the progress bar.

    Returns:
      As `language_model.train`; `eval_loss` is that of the validation answers.

    Raises:
      InputError: as `answers` and `language_model.train`.
      SystemExit: as `language_model.train`.
    """
    workdir = pathlib.Path(workdir)
    rows, tokens = config.batch_size, config.sequence_length
    documents = {}
    for split in SPLITS:
        answered = answers(
            target, tokenizer, questions[split], workdir / f"answers_{split}.jsonl",
            max_new_tokens=max_new_tokens, batch_size=batch_size,
        )  # fmt: skip
        documents[split] = batches.TokenizedDocuments(answered, tokenizer, loss_on="response")
    train_batches = batches.train_batches(
        documents["train"], batch_size=rows, seq_len=tokens, seed=config.seed
    )
    held_out = batches.eval_batches(documents["validation"], batch_size=rows, seq_len=tokens)
    _begin_with(draft_params, config, train_batches, workdir)
    return language_model.train(
        config,
        train_batches=train_batches,
        eval_batches=list(held_out),
        workdir=workdir,
        identity=identity,
        description=description,
    )


def answers(
    target: Target,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    path: str | pathlib.Path,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[dict[str, str]]:
    """The target's greedy continuations, as examples {question, solution} to learn from.

    An answer that does not come to an end in `max_new_tokens` is left out: what is learned would
    end in its middle.

    Args:
      target: the model that answers.
      tokenizer: its tokeniser.
      questions: prompts.
      path: a file that answers are written to as they come; those that it holds are read.
      max_new_tokens: of an answer.
      batch_size: prompts at a time.

    Raises:
      InputError: `path` holds answers to other prompts, or no answer came to an end.
    """
    path = pathlib.Path(path)
    method = autoregressive(target.config, SamplingConfig())
    stop = generation.stop_config(target.config, max_new_tokens)
    found = _read(path, questions)
    with checkpoints.disk_errors("cannot write answers", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the line that a killed run may have left half written.
        files.write_text(path, "".join(json.dumps(answer) + "\n" for answer in found))
    bar = tqdm.tqdm(total=len(questions), initial=len(found), desc="answers", dynamic_ncols=True)
    with bar:
        while len(found) < len(questions):
            asked = questions[len(found) : len(found) + batch_size]
            prompts = [tokenizer.encode_prompt(question) for question in asked]
            rows = generation.generate({"target": target.params}, prompts, method, stop)
            new = [
                {
                    "question": question,
                    "solution": _continuation(tokenizer, row),
                    "ended": row.finish_reason == "eos" or not stop.eos_ids,
                }
                for question, row in zip(asked, rows, strict=True)
            ]
            with checkpoints.disk_errors("cannot write answers", path), path.open("a") as file:
                file.writelines(json.dumps(answer) + "\n" for answer in new)
            found += new
            bar.update(len(new))
    kept = [
        {name: answer[name] for name in ("question", "solution")}
        for answer in found
        if answer["ended"]
    ]
    if not kept:
        raise InputError(
            f"max_new_tokens: none of {len(found)} answers came to an end in {max_new_tokens}"
        )
    return kept


def _read(path: pathlib.Path, questions: Sequence[str]) -> list[dict[str, Any]]:
    """The whole lines of a file of answers, which must be to the first of `questions`."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    if [answer["question"] for answer in found] != list(questions[: len(found)]):
        raise InputError(f"workdir: {path} holds answers to other prompts")
    return found


def _continuation(tokenizer: Tokenizer, row: generation.Row) -> str:
    """What a row adds to its prompt; on its own some tokenisers would drop a leading space."""
    before = tokenizer.decode(row.prompt_ids)
    return tokenizer.decode([*row.prompt_ids, *row.token_ids])[len(before) :]


def _begin_with(
    params: Any, config: TrainConfig, train_batches: loop.Batches, workdir: pathlib.Path
) -> None:
    """Saves `params` as the checkpoint of step 0 that training goes on from, unless it has one."""
    opened = checkpoints.Checkpointer(workdir, keep_last=config.keep_checkpoints)
    with contextlib.closing(opened) as checkpointer:
        if not checkpointer.steps:
            params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
            optimizer = optimizers.create(config.optimizer, config.num_steps)
            state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
            position = {"batches": train_batches.get_state(), "seconds": 0.0}
            checkpointer.save(0, state, position)
