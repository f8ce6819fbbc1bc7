"""LookUp and Permutation: what a text model makes of symbols that it must take as they come.

Huang et al., arXiv 2305.16349, section 4.3. Numbers of rows and demonstrations are not published: 3
to 8 rows and 4 demonstrations here. A task is text: nothing was trained on it.

    LookUp        k->3\\n w->a\\n w->          the value that stood behind the key
    Permutation   abc->ca\\n xyz->zx\\n ... pqr->   the same selection in the same order
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from models.errors import check_choice
from models.random_embeddings import LexinvariantConfig

ARROW, END_OF_LINE = "->", "\n"
SYMBOLS = ("uniform", "by frequency")


class Task(NamedTuple):
    """Prompts and their answers, as token ids; all answers have one length.

    Attributes:
      prompts: token ids of each example.
      answers: int32 [N, A].
    """

    prompts: list[list[int]]
    answers: np.ndarray


def weights(symbols: str, counts: np.ndarray, excluded: Sequence[int]) -> np.ndarray:
    """Probabilities of drawing each token.

    Args:
      symbols: a name of `SYMBOLS`.
      counts: int [V], how often each token occurs in text.
      excluded: tokens that are never drawn: those of separators and end of text.
    """
    check_choice("symbols", symbols, SYMBOLS)
    found = np.ones(len(counts)) if symbols == "uniform" else counts.astype(float) + 1e-3
    found[list(excluded)] = 0
    return found / found.sum()


def look_up(
    encode: Callable[[str], list[int]],
    probabilities: np.ndarray,
    count: int,
    *,
    seed: int = 0,
    rows: tuple[int, int] = (3, 8),
) -> Task:
    """`count` examples of LookUp: lines `K->V` of different symbols, then `K->` again.

    Args:
      encode: text to token ids, for the separators.
      probabilities: [V] of drawing each token.
      count: examples.
      seed: of the draws.
      rows: fewest and most lines.
    """
    rng = np.random.default_rng(seed)
    arrow, end = encode(ARROW), encode(END_OF_LINE)
    prompts, answers = [], []
    for _ in range(count):
        lines = int(rng.integers(rows[0], rows[1] + 1))
        drawn = _different(rng, probabilities, 2 * lines).reshape(lines, 2)
        asked = int(rng.integers(lines))
        prompt: list[int] = []
        for key, value in drawn.tolist():
            prompt += [key, *arrow, value, *end]
        prompts.append([*prompt, int(drawn[asked, 0]), *arrow])
        answers.append([int(drawn[asked, 1])])
    return Task(prompts, np.array(answers, np.int32))


def permutation(
    encode: Callable[[str], list[int]],
    probabilities: np.ndarray,
    count: int,
    *,
    seed: int = 0,
    demonstrations: int = 4,
    inputs: int = 3,
    outputs: int = 2,
) -> Task:
    """`count` examples of Permutation: `demonstrations` lines, then an input alone.

    Every line has `inputs` different symbols and `outputs` of them, at the same places in the same
    order in all lines of an example. Other arguments as `look_up`.
    """
    rng = np.random.default_rng(seed)
    arrow, end = encode(ARROW), encode(END_OF_LINE)
    prompts, answers = [], []
    for _ in range(count):
        chosen = rng.permutation(inputs)[:outputs]
        prompt: list[int] = []
        for _ in range(demonstrations):
            given = _different(rng, probabilities, inputs)
            prompt += [*given.tolist(), *arrow, *given[chosen].tolist(), *end]
        given = _different(rng, probabilities, inputs)
        prompts.append([*prompt, *given.tolist(), *arrow])
        answers.append(given[chosen].tolist())
    return Task(prompts, np.array(answers, np.int32))


TASKS: dict[str, Callable[..., Task]] = {"LookUp": look_up, "Permutation": permutation}


def accuracy(
    config: LexinvariantConfig, params: Any, task: Task, *, batch_size: int, seed: int = 0
) -> float:
    """Share of answer tokens that greedy decoding gives, one draw of the table an example."""
    method = methods.build("lexinvariant", {"target": config}, SamplingConfig())
    stop = generation.stop_config(config, task.answers.shape[1], eos_ids=())
    right = 0
    for first in range(0, len(task.prompts), batch_size):
        # One size for all batches, for which the loop is compiled once.
        ids = [i % len(task.prompts) for i in range(first, first + batch_size)]
        prompts = [task.prompts[i] for i in ids]
        rows = generation.generate(
            {"target": params}, prompts, method, stop, seed=seed, row_ids=ids
        )
        kept = min(batch_size, len(task.prompts) - first)
        said = np.array([row.token_ids for row in rows[:kept]])
        right += int((said == task.answers[ids[:kept]]).sum())
    return right / task.answers.size


def _different(rng: np.random.Generator, probabilities: np.ndarray, count: int) -> np.ndarray:
    return rng.choice(len(probabilities), count, replace=False, p=probabilities)
