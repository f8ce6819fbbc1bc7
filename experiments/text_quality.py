"""What a text that a method wrote is worth: own choices, loss under another model, ROUGE-L.

For methods that are not lossless, beside their speed. `config.quality` says which of these a
comparison measures.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding.generation import Row
from models import transformer
from models.config import TransformerConfig
from models.tokenizer import Tokenizer

_WIDTH = 64  # texts are padded to a multiple of this, so that little is compiled


def measure(
    quality: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    role: str,
    rows: Sequence[Row],
    answers: Sequence[str] | None,
) -> dict[str, float]:
    """Figures of the rows that a method wrote.

    Args:
      quality: `own_choices`: whether to count tokens that the method's model would have chosen
        itself, given the text before them; `judge`: role of the model that texts are judged by, or
        ''.
      configs, params: models by role.
      tokenizer: theirs.
      role: of the method's model.
      rows: what it wrote.
      answers: what it should have written; None where that is not known.

    Returns:
      `own_choices`: share of tokens; `span_choices`: the same of tokens that were not the first
      of a call, which alone can be others, where there are any; `judged_loss`: nats a token under
      the judge; `rouge_l`: mean over rows, with answers.
    """
    found: dict[str, float] = {}
    if quality.get("own_choices"):
        chosen = np.concatenate(
            [of_row["chosen"] for of_row in read(configs[role], params[role], rows)]
        )
        found["own_choices"] = float(chosen.mean())
        later = len(chosen) - sum(int(row.stats["target_calls"]) for row in rows)
        if later > 0:
            found["span_choices"] = 1 - float((~chosen).sum()) / later
    if judge := quality.get("judge"):
        nats = [of_row["nats"] for of_row in read(configs[judge], params[judge], rows)]
        found["judged_loss"] = float(np.concatenate(nats).mean())
    if answers is not None:
        ends = configs["target"].eos_token_ids
        texts = [tokenizer.decode([t for t in row.token_ids if t not in ends]) for row in rows]
        scores = [rouge_l(text, answer) for text, answer in zip(texts, answers, strict=True)]
        found["rouge_l"] = float(np.mean(scores))
    return found


def read(config: TransformerConfig, params: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How a model reads each row's new tokens: `chosen` bool [n], its likeliest; `nats` [n]."""
    texts = [[*row.prompt_ids, *row.token_ids] for row in rows]
    width = -(-max(map(len, texts)) // _WIDTH) * _WIDTH
    tokens = np.zeros((len(texts), width), np.int32)
    for b, text in enumerate(texts):
        tokens[b, : len(text)] = text
    chosen, nats = map(np.asarray, _read(config, params, tokens))
    found = []
    for b, row in enumerate(rows):
        first = len(row.prompt_ids) - 1
        new = slice(first, first + len(row.token_ids))
        found.append({"chosen": chosen[b, new], "nats": nats[b, new]})
    return found


@functools.partial(jax.jit, static_argnames="config")
def _read(
    config: TransformerConfig, params: Any, tokens: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Of tokens [B, T]: whether each but the first is the likeliest, and its -log p; [B, T - 1]."""
    logits = transformer.apply(config, params, tokens).logits
    assert logits is not None
    logits, following = logits[:, :-1], tokens[:, 1:]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nats = -jnp.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
    return logits.argmax(axis=-1) == following, nats


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1 (Lin, 2004)."""
    mine, theirs = text.split(), reference.split()
    if not mine or not theirs:
        return float(mine == theirs)
    row = [0] * (len(theirs) + 1)
    for word in mine:
        before = 0
        for j, other in enumerate(theirs):
            above = row[j + 1]
            row[j + 1] = before + 1 if word == other else max(above, row[j])
            before = above
    return 2 * row[-1] / (len(mine) + len(theirs))
