"""A target of random parameters with a tokeniser, and source files to learn from."""

import pathlib
from typing import Any

import jax

from models import hf_checkpoint, transformer
from tests.training.test_language_model import MODEL
from training import tokenizers as tokenizer_training


def make(directory: pathlib.Path, max_position: int) -> dict[str, Any]:
    """Writes `directory`/target, and returns the recipe of a part that is trained for a step."""
    text = [f"def f{i}(x):\n    return x + {i}\n" * 3 for i in range(40)]
    backend = tokenizer_training.train_bpe(text, 300)
    tokenizer_training.save(backend, directory / "tokenizer")
    model = MODEL.replace(
        vocab_size=backend.get_vocab_size(), max_position=max_position, eos_token_ids=(0,)
    )
    params = jax.jit(lambda key: transformer.init(model, key))(jax.random.key(0))
    hf_checkpoint.save(directory / "target", model, params, tokenizer_from=directory / "tokenizer")
    (directory / "source").mkdir()
    for number in range(60):
        (directory / "source" / f"m{number}.py").write_text(text[number % 40] * 4)
    return {
        "dataset_options": {"root": str(directory / "source")}, "num_steps": 1, "batch_size": 2,
        "sequence_length": 32, "eval_batches": 1,
    }  # fmt: skip
