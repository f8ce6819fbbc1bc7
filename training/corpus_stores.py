"""Tri-gram stores of a dataset: counted once, kept by a hash of all that determines them."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from decoding.speculative import trigram
from models import files
from models.tokenizer import Tokenizer
from training import artifacts, batches, checkpoints, trigrams
from training.datasets import registry

# Part of every hash. Raise it when a change of code changes what is counted.
CODE_VERSION = 1
# Slots of a store of a few hundred thousand pairs; see `trigrams.build`.
SLOTS = 2**19


def ensure(
    dataset: str,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    text_field: str | None = None,
    builder_options: Mapping[str, Any] | None = None,
    slots: int = SLOTS,
    top: int = trigram.CORPUS_WIDTH,
    cache_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """The directory of a dataset's store, which is counted first if it is not there yet.

    Args:
      dataset: as `registry.load`, like `split`, `text_field` and `builder_options`.
      tokenizer: the target's, whose tokens are counted.
      slots: S, see `trigrams.build`, like `top`.
      cache_dir: where datasets and stores are kept; None for `files.cache_root()`.

    Returns:
      A directory with `trigrams.STORE_FILE`, for `trigrams.load`, and a `store.json` that says
      what was counted.

    Raises:
      InputError: what `registry.load` or `trigrams.build` raise.
    """
    cache = pathlib.Path(cache_dir) if cache_dir else files.cache_root()
    own: dict[str, Any] = {"data_dir": cache / "datasets"} if dataset in registry.BUILDERS else {}
    examples = registry.load(
        dataset, split, text_field=text_field, **own, **dict(builder_options or {})
    )
    identity = {
        "data": examples.full_name,
        "split": split,
        "text_field": text_field,
        "tokenizer": tokenizer.fingerprint,
        "slots": slots,
        "top": top,
        "code_version": CODE_VERSION,
    }

    def make(work: pathlib.Path, result: pathlib.Path) -> None:
        del work
        documents = batches.TokenizedDocuments(examples, tokenizer)
        numbers = range(len(documents))
        store = trigrams.build((documents[i]["tokens"] for i in numbers), slots=slots, top=top)
        with checkpoints.disk_errors("cannot write the store", result):
            result.mkdir(parents=True)
            trigrams.save(result / trigrams.STORE_FILE, store)
            checkpoints.write_json(result / "store.json", identity)

    name = f"{pathlib.Path(dataset).name}-{artifacts.digest(identity)}"
    return artifacts.cached(cache / "stores" / name, make)
