"""What a text that a method wrote is worth: own choices, loss under another model, ROUGE-L.

For methods that are not lossless, beside their speed. `config.quality` says which of these a
comparison measures. Where answers are known, so is the loss that a method's model has on them with
the layers that the method would run.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import methods
from decoding.generation import Row
from decoding.skip_decode import schedule
from models import transformer
from models.config import TransformerConfig
from models.layer_skipping import SkipSchedule, gated
from models.tokenizer import Tokenizer

PLACES = 5
# What is charted, with its name.
MEASURES = {
    "own_choices": "share of the model's own choices",
    "judged_loss": "loss under the judge",
    "exact_match": "share of exact answers",
    "rouge_l": "ROUGE-L",
    "answer_loss": "loss on the answers",
}
_WIDTH = 64  # texts are padded to a multiple of this, so that little is compiled


def measure(
    quality: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    entry: ConfigDict,
    rows: Sequence[Row],
    answers: Sequence[str] | None,
) -> dict[str, Any]:
    """Figures of the rows that a method wrote.

    Args:
      quality: `own_choices`: whether to count tokens that the method's model would have chosen
        itself, given the text before them; `judge`: role of the model that texts are judged by, or
        ''.
      configs, params: models by role.
      tokenizer: theirs.
      entry: of `config.decode.methods`.
      rows: what it wrote.
      answers: what it should have written; None where that is not known.

    Returns:
      `own_choices`: share of tokens; `span_choices`: the same of tokens that were not the first
      of a call, which alone can be others, where there are any; `judged_loss`: nats a token under
      the judge. With answers: `rouge_l`, mean over rows; and for plain decoding and schedules of
      layers `answer_loss`, nats a token, and `answer_loss_by_place`, means over `PLACES` of equal
      length.
    """
    found: dict[str, Any] = {}
    role = entry.get("role") or "target"
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
        if (budget := layers_of(entry, configs[role])) is not None:
            right = [
                Row(row.prompt_ids, [*tokenizer.encode(answer), *ends[:1]], "", {})
                for row, answer in zip(rows, answers, strict=True)
            ]
            nats = [of_row["nats"] for of_row in read(configs[role], params[role], right, budget)]
            found["answer_loss"] = float(np.concatenate(nats).mean())
            parts = [np.array_split(of_row, PLACES) for of_row in nats]
            found["answer_loss_by_place"] = [
                float(np.concatenate([part[i] for part in parts]).mean()) for i in range(PLACES)
            ]
    return found


def layers_of(entry: ConfigDict, config: TransformerConfig) -> SkipSchedule | None:
    """The layers that a method runs, if they follow from the place alone."""
    if entry.method == "autoregressive":
        return SkipSchedule(config.num_layers, config.num_layers, 1, warmup=0)
    if entry.method == "skip_decode":
        return schedule(config, methods.parse_options("skip_decode", entry.options.to_dict()))
    return None


def figures(
    lines: Sequence[Mapping[str, Any]], configs: Mapping[str, TransformerConfig]
) -> dict[str, dict[str, Any]]:
    """Charts of quality over layers a token, or over tokens a call, and of loss over the answer.

    A series a family of methods: those whose labels are the same up to a comma.
    """
    first = [line for line in lines if line["batch_size"] == lines[0]["batch_size"]]
    layered = any("layers_per_token" in line for line in first)
    axis = "layers a token" if layered else "tokens a call"

    def place(line: Mapping[str, Any]) -> float:
        if not layered:
            return float(line["tokens_per_target_call"])
        return float(line.get("layers_per_token", configs[line["role"]].num_layers))

    found = {}
    for field, name in MEASURES.items():
        mine = [line for line in first if field in line]
        series = []
        for family in dict.fromkeys(line["label"].split(",")[0] for line in mine):
            points = sorted(
                (place(line), line[field]) for line in mine if line["label"].split(",")[0] == family
            )
            x, y = zip(*points, strict=True)
            series.append({"label": family, "x": list(x), "y": list(y)})
        if series:
            title = f"{name.capitalize()} over {axis}"
            found[field.replace("_", " ")] = {
                "title": title, "x_label": axis, "y_label": name, "series": series,
            }  # fmt: skip
    placed = [line for line in first if "answer_loss_by_place" in line][:1]
    if placed:
        y = placed[0]["answer_loss_by_place"]
        found["loss by place"] = {
            "title": f"Loss along the answer ({placed[0]['label']})",
            "x_label": f"part of the answer, in {PLACES}", "y_label": "nats a token",
            "series": [{"label": placed[0]["label"], "x": list(range(1, PLACES + 1)), "y": y}],
        }  # fmt: skip
    return found


def read(
    config: TransformerConfig,
    params: Any,
    rows: Sequence[Row],
    budget: SkipSchedule | None = None,
) -> list[dict[str, Any]]:
    """How a model reads each row's new tokens: `chosen` bool [n], its likeliest; `nats` [n].

    `budget` is the layers that each token runs; None for all.
    """
    texts = [[*row.prompt_ids, *row.token_ids] for row in rows]
    width = -(-max(map(len, texts)) // _WIDTH) * _WIDTH
    tokens = np.zeros((len(texts), width), np.int32)
    for b, text in enumerate(texts):
        tokens[b, : len(text)] = text
    prompts = np.array([len(row.prompt_ids) for row in rows])
    chosen, nats = map(np.asarray, _read(config, params, tokens, prompts, budget))
    found = []
    for b, row in enumerate(rows):
        first = len(row.prompt_ids) - 1
        new = slice(first, first + len(row.token_ids))
        found.append({"chosen": chosen[b, new], "nats": nats[b, new]})
    return found


@functools.partial(jax.jit, static_argnames=("config", "budget"))
def _read(
    config: TransformerConfig,
    params: Any,
    tokens: jnp.ndarray,
    prompts: jnp.ndarray,
    budget: SkipSchedule | None,
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Of tokens [B, T]: whether each but the first is the likeliest, and its -log p; [B, T - 1]."""
    if budget is None:
        logits = transformer.apply(config, params, tokens).logits
    else:
        generated = jnp.arange(tokens.shape[1]) - (prompts[:, None] - 1)
        logits = gated(config, params, tokens, generated, budget)
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
