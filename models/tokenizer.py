"""Text to token ids and back, and chat templates, from a checkpoint's own files.

`tokenizer.json` is read with the `tokenizers` library. A checkpoint without any tokeniser, such
as a small model trained on bytes, has UTF-8 bytes for tokens: ids 0-255 are the bytes.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from models.config import TransformerConfig
from models.errors import InputError
from models.safetensors_io import one_line, read_json

# Everything that makes up a tokeniser, to be copied along with weights.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Tokenisers that only transformers can turn into a tokenizer.json.
_UNCONVERTED = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


class Tokenizer:
    """A checkpoint's tokeniser. Make one with `from_directory`.

    Attributes:
      vocab_size: number of tokens that it knows; the model's embedding may have more rows.
      bos_id: the beginning-of-sequence token, None when there is none.
      eos_ids: the tokens that end generation; empty when the checkpoint names none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        config: TransformerConfig,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wraps a `tokenizers.Tokenizer`, or bytes when `backend` is None.

        Args:
          backend: the tokeniser; its own padding and truncation are switched off.
          config: gives the special ids, and the ids that the model has embeddings for.
          chat_template: jinja2 source.
          special_tokens: name (`bos_token`, ...) to text, as templates see them.
        """
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        elif config.vocab_size < 256:
            raise InputError(
                f"tokenizer: the checkpoint has no tokenizer.json, and vocab_size "
                f"{config.vocab_size} is too small for bytes (256); pass ids with --prompt_ids"
            )
        self._backend = backend
        self._rows = config.vocab_size
        self._special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        self.vocab_size = 256 if backend is None else backend.get_vocab_size()
        self.eos_ids = config.eos_token_ids
        self.bos_id = config.bos_token_id
        if self.bos_id is None and backend is not None and "bos_token" in self._special_tokens:
            self.bos_id = backend.token_to_id(self._special_tokens["bos_token"])

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], config: TransformerConfig
    ) -> "Tokenizer":
        """The tokeniser of a checkpoint directory.

        Raises:
          InputError: a corrupt `tokenizer.json`, `tokenizer_config.json` or set of named
            templates; a tokeniser in a format that must be converted first; no tokeniser and
            fewer than 256 tokens in the model.
        """
        directory = Path(directory)
        backend = None
        if (path := directory / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exception
                raise InputError(f"{path}: corrupt tokenizer ({one_line(error)})") from error
        elif found := [name for name in _UNCONVERTED if (directory / name).is_file()]:
            raise InputError(
                f"{directory}: {found[0]} without tokenizer.json; write one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        settings: dict[str, Any] = {}
        if (path := directory / "tokenizer_config.json").is_file():
            settings = read_json(path)
        template = _default_template(settings.get("chat_template"), path)
        if (path := directory / "chat_template.jinja").is_file():
            template = path.read_text(encoding="utf-8")
        return cls(
            backend, config, chat_template=template, special_tokens=_special_tokens(settings)
        )

    @property
    def fingerprint(self) -> str:
        """A hash of what determines the ids of a text, special ones aside."""
        text = "bytes" if self._backend is None else self._backend.to_str()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, with what the checkpoint adds around one (BOS) if asked for.

        Raises InputError when the model has no embedding for one of them.
        """
        if self._backend is None:
            return list(text.encode("utf-8", errors="replace"))
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if ids and max(ids) >= self._rows:
            raise InputError(
                f"prompt: token {self._backend.id_to_token(max(ids))!r} has id {max(ids)}; the "
                f"model's vocab_size is {self._rows}"
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, beginning as the checkpoint was trained (usually with BOS)."""
        return self.encode(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Ids beyond the vocabulary, as padded embeddings have, are left out.
        """
        if self._backend is None:
            return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")
        known = [int(i) for i in ids if i >= 0]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; encode it without adding special tokens.

        Args:
          messages: objects with `role` and `content`, in order.
          add_generation_prompt: end where the assistant's answer begins.

        Raises:
          InputError: there is no template; messages of another form; the template is malformed,
            fails, refuses the conversation, or tries to leave its sandbox.
        """
        if self._chat_template is None:
            raise InputError("chat template: the checkpoint has none; pass a plain prompt")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise InputError(f"messages: {message!r} must be an object with role and content")
        try:
            return (
                _environment()
                .from_string(self._chat_template)
                .render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special_tokens,
                )
            )
        except Exception as error:  # whatever a template from elsewhere makes Python raise
            raise InputError(f"chat template: {one_line(error)}") from error


def _default_template(value: Any, path: Path) -> str | None:
    """`chat_template`: one source, or a list of named ones, of which 'default' is used."""
    if value is None or isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        raise InputError(
            f"{path}: chat_template must be a string or a list of objects with name and template"
        ) from None
    if not isinstance(named.get("default"), str):
        raise InputError(
            f"{path}: chat_template has no 'default'; it has {', '.join(map(repr, named))}"
        )
    return named["default"]


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; each is a string, or an object with the string in `content`."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What chat templates are written for, as transformers defines it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """jinja2's own filter escapes HTML, which a model has not seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
