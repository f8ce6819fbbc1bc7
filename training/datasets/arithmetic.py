"""Arithmetic problems with worked steps and an answer that a program can check."""

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity

# Printed between the question, each step and the answer.
DELIMITER = "\n\n"
# Draws in a row that were all seen before, after which a level counts as used up.
_MAX_DRAWS = 300
_ANSWER_OR_QUESTION = re.compile(
    r"^Answer:[ \t]*(?P<answer>-?[0-9]{1,1000})[ \t]*$|^Question:", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Level:
    """A difficulty.

    Attributes:
      steps: operations in an expression, each worked in a step of its own.
      digits: digits of the longest operand; a right factor always has one.
      operators: drawn from uniformly.
      columns: a sum of two numbers of just `digits` digits, worked digit by digit from the right
        as `left+right+carry=sum`, each sum of two digits. Every step needs few earlier tokens,
        which small models learn soon.
    """

    steps: int
    digits: int
    operators: str
    columns: bool = False


LEVELS = {
    1: Level(steps=1, digits=2, operators="+-"),
    2: Level(steps=2, digits=2, operators="+-"),
    3: Level(steps=2, digits=2, operators="+-*"),
    4: Level(steps=3, digits=3, operators="+-*"),
    5: Level(steps=5, digits=3, operators="+-*"),
    6: Level(steps=3, digits=3, operators="+", columns=True),
    7: Level(steps=4, digits=4, operators="+", columns=True),
    8: Level(steps=5, digits=5, operators="+", columns=True),
    9: Level(steps=6, digits=6, operators="+", columns=True),
}


def extract_answer(text: str) -> str | None:
    """The final answer in `text`: its last `Answer:` line, or None when it has none.

    `text` is a solution, with or without its question. A model may run on and pose itself
    another question: a question that follows an answer, and what comes after it, is not read.
    """
    answer = None
    for line in _ANSWER_OR_QUESTION.finditer(text):
        if line["answer"]:
            answer = line["answer"]
        elif answer is not None:
            break
    return answer


def check_answer(text: str, answer: str) -> bool:
    """Whether the final answer in `text` is the integer `answer`, however it is written."""
    found = extract_answer(text)
    return found is not None and int(found) == int(answer)


def make_problem(rng: random.Random, level: int) -> dict[str, Any]:
    """A problem of `level`: {question, solution, text, answer, level}.

    `text` is `question + solution`; `question` ends with the blank line that a solution
    follows, and `answer` is a decimal integer. Multiplication binds tighter, as in Python.
    """
    spec = LEVELS[level]
    if spec.columns:
        operators = ["+"]
        operands = [rng.randint(10 ** (spec.digits - 1), 10**spec.digits - 1) for _ in range(2)]
        steps, answer = _work_columns(*operands)
    else:
        operators = [rng.choice(spec.operators) for _ in range(spec.steps)]
        operands = [_operand(rng, spec.digits)]
        operands += [
            rng.randint(2, 9) if op == "*" else _operand(rng, spec.digits) for op in operators
        ]
        steps, answer = _work(operands, operators)
    question = f"Question: {_expression(operands, operators)}{DELIMITER}"
    solution = DELIMITER.join([*steps, f"Answer: {answer}\n"])
    return {
        "question": question,
        "solution": solution,
        "text": question + solution,
        "answer": str(answer),
        "level": level,
    }


def generate(size: int, levels: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """`size` different problems, the levels in turn; deterministic in its arguments.

    Raises:
      InputError: a level has too few different problems for its share of `size`.
    """
    rngs = {level: random.Random(f"{seed}/{level}") for level in levels}
    seen: set[str] = set()
    for index in range(size):
        level = levels[index % len(levels)]
        yield _unseen_problem(rngs[level], level, seen, size)


class Arithmetic(tfds.core.GeneratorBasedBuilder):
    """Arithmetic with worked steps; splits 90/5/5 by a hash of the question, so disjoint.

    Options:
      size: number of problems over all splits.
      levels: difficulties, keys of `LEVELS`, in equal shares; 6 to 9 are sums by columns.
      seed: of the generator.

    Examples: see `make_problem`.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(
        self,
        *,
        size: int = 20_000,
        levels: Sequence[int] = (1, 2, 3, 4, 5),
        seed: int = 0,
        data_dir: str | None = None,
    ):
        if size < 1:
            raise InputError(f"size: {size} must be at least 1")
        if not levels or not set(levels) <= set(LEVELS):
            raise InputError(f"levels: {list(levels)} must be some of {list(LEVELS)}")
        self._size, self._levels, self._seed = size, sorted(set(levels)), seed
        options = {"size": size, "levels": self._levels, "seed": seed}
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        text = {name: tfds.features.Text() for name in ("text", "question", "solution", "answer")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Arithmetic problems with worked steps and a checkable answer.",
            features=tfds.features.FeaturesDict({**text, "level": np.int32}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        problems = generate(self._size, self._levels, self._seed)
        groups = identity.group((identity.split_of(p["question"]), p) for p in problems)
        return {split: self._generate_examples(group) for split, group in groups.items()}

    def _generate_examples(self, problems: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(problems)


def _operand(rng: random.Random, digits: int) -> int:
    # Every number of digits is as likely, or small numbers would be rare.
    count = rng.randint(1, digits)
    return rng.randint(0 if count == 1 else 10 ** (count - 1), 10**count - 1)


def _expression(operands: Sequence[int], operators: Sequence[str]) -> str:
    rest = (f" {op} {value}" for op, value in zip(operators, operands[1:], strict=True))
    return f"{operands[0]}{''.join(rest)}"


def _work(operands: list[int], operators: list[str]) -> tuple[list[str], int]:
    """The steps, products first and then from the left, and the value."""
    operands, operators = list(operands), list(operators)
    steps: list[str] = []
    while operators:
        at = operators.index("*") if "*" in operators else 0
        left, op, right = operands[at], operators.pop(at), operands.pop(at + 1)
        operands[at] = {"+": left + right, "-": left - right, "*": left * right}[op]
        step = f"{left} {op} {right} = {operands[at]}"
        if operators:
            step += f", leaving {_expression(operands, operators)}"
        steps.append(f"Step {len(steps) + 1}: {step}")
    return steps, operands[0]


def _work_columns(left: int, right: int) -> tuple[list[str], int]:
    """The sum of each column from the right, and the value; as many digits in both numbers."""
    steps: list[str] = []
    carry = 0
    for a, b in zip(reversed(str(left)), reversed(str(right)), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return steps, left + right


def _unseen_problem(rng: random.Random, level: int, seen: set[str], size: int) -> dict[str, Any]:
    for _ in range(_MAX_DRAWS):
        problem = make_problem(rng, level)
        if problem["question"] not in seen:
            seen.add(problem["question"])
            return problem
    raise InputError(
        f"size: {size} is more than level {level} has different problems for; "
        f"ask for fewer or add higher levels"
    )
