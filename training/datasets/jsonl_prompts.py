"""Prompts and chats from JSON Lines files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from models.errors import InputError
from training.datasets import identity


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a JSONL file, in order; blank lines are skipped.

    Each line is an object with exactly one of `prompt` (non-empty text) and `messages` (a
    chat: a non-empty list of {"role", "content"} texts), and optionally `id` (text or integer).
    Other fields are kept as they are.

    Returns:
      One dict a prompt, with `id` as text (the line number when the line has none).

    Raises:
      InputError: naming the file and line, for what is not as above, an `id` that occurs
        twice, a file that is missing, is not UTF-8 or holds no prompt.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"prompts file {str(path)!r}: {error.strerror}") from None
    prompts = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, number)
            if prompt["id"] in seen:
                raise InputError(f"id: {prompt['id']!r} is also on line {seen[prompt['id']]}")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        seen[prompt["id"]] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"prompts file {str(path)!r} holds no prompt")
    return prompts


class JsonlPrompts(tfds.core.GeneratorBasedBuilder):
    """The prompts of a JSONL file, all in the split 'test' and in the file's order.

    Options:
      path: the file; see `read_prompts` for its fields.

    Examples:
      id: text; prompt: text, empty for a chat; messages: a chat as JSON, else empty.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def __init__(self, *, path: str, data_dir: str | None = None):
        self._prompts = read_prompts(path)
        options = {"content": identity.digest_files([("", Path(path))])}
        super().__init__(data_dir=data_dir, config=identity.builder_config(options))

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts from a JSON Lines file.",
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in ("id", "prompt", "messages")}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"test": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, prompt in enumerate(self._prompts):
            messages = prompt.get("messages")
            yield (
                index,
                {
                    "id": prompt["id"],
                    "prompt": prompt.get("prompt", ""),
                    "messages": json.dumps(messages, ensure_ascii=False) if messages else "",
                },
            )


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(record, dict):
        raise InputError(f"a JSON object is needed, not {type(record).__name__}")
    if ("prompt" in record) == ("messages" in record):
        raise InputError("exactly one of the fields 'prompt' and 'messages' is needed")
    if "prompt" in record:
        _check_text("prompt", record["prompt"])
    else:
        _check_messages(record["messages"])
    name = record.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"id: {name!r} must be text or an integer")
    return {**record, "id": str(name)}


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{field}: text is needed, not {type(value).__name__}")
    if not value:
        raise InputError(f"{field}: '' is empty")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: a non-empty list is needed")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"messages[{index}]: an object with role and content is needed")
        _check_text(f"messages[{index}].role", message.get("role"))
        if not isinstance(message.get("content"), str):
            raise InputError(f"messages[{index}].content: text is needed")
