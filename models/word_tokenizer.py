"""Text as the stream of bytes that a hierarchical model reads and writes, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from models import words
from models.errors import InputError
from models.hierarchical import HierarchicalConfig


class WordTokenizer:
    """UTF-8 bytes with the end of each word among them; used as `models.tokenizer.Tokenizer` is.

    Attributes:
      vocab_size: 256.
      bos_id: None.
      eos_ids: the end of a document.

    Args:
      config: a model of bytes.

    Raises:
      InputError: a model of other units, whose text only its own code knows.
    """

    def __init__(self, config: HierarchicalConfig):
        if config.units != "bytes":
            raise InputError(
                f"tokenizer: the model's units are {config.units!r}, not bytes; pass ids with "
                "--prompt_ids"
            )
        self._config = config
        self._ends = (config.word_end, config.document_end)
        self.vocab_size = config.vocab_size
        self.bos_id = None
        self.eos_ids = config.eos_token_ids

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The bytes of the text's words by the model's rule, each word but the last closed.

        The last word is open even where the rule would end it: the model says whether it goes on.
        """
        del add_special_tokens
        pieces = words.split(text, self._config.rule, self._config.max_word)
        ids = [unit for piece in pieces for unit in (*piece, self._config.word_end)]
        return ids[:-1]

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text; ends of words and documents have none, bytes that are not UTF-8 become U+FFFD.

        A character that two words share, as cut words may, is whole again.
        """
        del skip_special_tokens
        return bytes(i for i in ids if i not in self._ends).decode("utf-8", errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Always an InputError: these models have no templates."""
        raise InputError("chat template: the checkpoint has none; pass a plain prompt")
