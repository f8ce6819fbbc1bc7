"""Data of lexinvariant models: text by characters or tokens, and rows of an enumerable language."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from models.config import TransformerConfig
from models.errors import InputError
from models.permutation_mixture import MarkovLanguage
from models.tokenizer import FILES as TOKENIZER_FILES
from models.tokenizer import Tokenizer
from training import batches, image_batches, loop
from training import tokenizers as tokenizer_training
from training.batches import Batch
from training.datasets import registry
from training.tokenizers import END_OF_TEXT

# Name: characters, and whether text is read in lower case.
CHARACTERS = {
    "lower64": (tokenizer_training.LOWER_CASE_64, True),
    "ascii": (tokenizer_training.ASCII, False),
}


@dataclasses.dataclass(frozen=True)
class TextData:
    """Documents, read by characters or by a tokeniser of one's own.

    Attributes:
      dataset: as `training.datasets.registry.load` takes it.
      options: of the dataset's builder.
      train_split, eval_split: in tfds' notation.
      tokens: 'lower64' (64 characters, in lower case), 'ascii' (128), or the directory of a
        tokeniser. End of text is added to characters and has a learned vector in every model.
      text_field: the feature with the text.
      data_dir: where a public dataset is prepared; None for tfds' default. (Our own are kept in
        the cache.)
    """

    dataset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "validation"
    tokens: str = "lower64"
    text_field: str = "text"
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class LanguageData:
    """Rows of a language whose best lexinvariant model is known.

    Attributes:
      language: the language.
      rows: to train on; as many again as an evaluation reads are held out.
    """

    language: MarkovLanguage = dataclasses.field(default_factory=MarkovLanguage)
    rows: int = 200_000


class LanguageRows(Sequence[dict[str, np.ndarray]]):
    """Rows int [N, T + 1] as a source of tokens and targets [T], all of which count."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tokens, targets = self._rows[index, :-1], self._rows[index, 1:]
        ones = np.ones(tokens.shape, np.int32)
        return {
            "tokens": tokens, "targets": targets, "loss_mask": ones.astype(np.float32),
            "target_bytes": ones,
        }  # fmt: skip


def tokenizer_of(data: TextData) -> tokenizers.Tokenizer:
    """The tokeniser of text; errors as those of the library for a directory of one's own."""
    if data.tokens in CHARACTERS:
        symbols, lower_case = CHARACTERS[data.tokens]
        return tokenizer_training.characters(symbols, lower_case=lower_case)
    return tokenizers.Tokenizer.from_file(str(pathlib.Path(data.tokens) / "tokenizer.json"))


def save_tokenizer(data: TextData, directory: pathlib.Path) -> None:
    """Writes the tokeniser's files into a model's directory."""
    if data.tokens in CHARACTERS:
        tokenizer_training.save(tokenizer_of(data), directory)
        return
    for name in TOKENIZER_FILES:
        if (source := pathlib.Path(data.tokens) / name).is_file():
            shutil.copy(source, directory / name)


def vocabulary(data: TextData | LanguageData) -> tuple[int, tuple[int, ...]]:
    """The number of tokens, and the ids that end a text."""
    if isinstance(data, LanguageData):
        return data.language.num_symbols, ()
    backend = tokenizer_of(data)
    end = backend.token_to_id(END_OF_TEXT)
    return backend.get_vocab_size(), () if end is None else (end,)


def examples(data: TextData, split: str, cache: pathlib.Path) -> registry.Examples:
    """The documents of one split."""
    folder = data.data_dir
    if data.dataset in registry.BUILDERS:
        folder = str(cache / "datasets")
    return registry.load(
        data.dataset, split, data_dir=folder, text_field=data.text_field, **dict(data.options)
    )


def identity(data: TextData | LanguageData, cache: pathlib.Path) -> str:
    """What the content is, beside the fields of `data`."""
    if isinstance(data, LanguageData):
        return ""
    return examples(data, data.train_split, cache).full_name


def load_batches(
    data: TextData | LanguageData,
    model: TransformerConfig,
    cache: pathlib.Path,
    *,
    rows: int,
    tokens: int,
    seed: int,
    count: int,
) -> tuple[loop.Batches, list[Batch]]:
    """Batches to train on without end and `count` held-out ones, as `lexinvariant.train` takes.

    Args:
      data: where they come from.
      model: gives end of text.
      cache: where our own datasets are kept.
      rows, tokens: of a batch [B, T].
      seed: of the order.
      count: held-out batches, evenly spaced over their split.
    """
    if isinstance(data, LanguageData):
        language = data.language
        train = LanguageRows(language.sample(data.rows, tokens + 1, seed=1))
        held_out = LanguageRows(language.sample(count * rows, tokens + 1, seed=2))
        return (
            image_batches.train_batches([(train, rows)], seed=seed),
            list(image_batches.in_order(held_out, rows)),
        )
    tokenizer = Tokenizer(tokenizer_of(data), model)
    documents = {
        split: batches.TokenizedDocuments(examples(data, split, cache), tokenizer)
        for split in (data.train_split, data.eval_split)
    }
    packed = list(batches.eval_batches(documents[data.eval_split], batch_size=rows, seq_len=tokens))
    train_batches = batches.train_batches(
        documents[data.train_split], batch_size=rows, seq_len=tokens, seed=seed
    )
    return train_batches, packed[:: max(1, len(packed) // count)][:count]


def held_out_rows(
    data: TextData, model: TransformerConfig, cache: pathlib.Path, *, rows: int, length: int
) -> np.ndarray:
    """Int32 [rows, length]: stretches of held-out documents, none across two, evenly spaced."""
    tokenizer = Tokenizer(tokenizer_of(data), model)
    found = []
    for example in examples(data, data.eval_split, cache):
        ids = np.array(tokenizer.encode(example["text"]), np.int32)
        found += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if len(found) < rows:
        raise InputError(f"rows: {rows} of {length} tokens; {data.eval_split} has {len(found)}")
    return np.stack([found[i * len(found) // rows] for i in range(rows)])
