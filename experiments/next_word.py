"""Next-word prediction by word-pooled models and by models of the same units as a stream.

`config.models` are trained on the same text and measured on the same held-out words: accuracy by
writing the word, by how often training text has it; accuracy of units; bits a byte; what noise in
the context costs; and what a word of context costs. See `experiments/configs/learn_your_tokens.py`.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding import generation
from experiments import next_word_costs, plots, results
from experiments import next_word_scores as scoring
from experiments.next_word_costs import Arm
from experiments.next_word_scores import Buckets, Model
from models import files
from models.errors import InputError, check_choice
from models.hierarchical import HierarchicalConfig
from models.word_pooling import Sizes
from models.word_units import NormalForm
from training import losses, next_word_models, optimizers
from training.next_word_models import Recipe, Text

EQUAL_BYTES, EQUAL_UNITS = "equal bytes", "equal units"


def recipe(config: ConfigDict, role: str) -> Recipe:
    """The recipe of one of `config.models`: what all share, and its own fields.

    Raises:
      InputError: an unknown role or field.
    """
    check_choice("config.models", role, config.models)
    try:
        text = config.text.to_dict()
        text |= {"form": NormalForm(**text["form"]), "options": dict(text["options"])}
        shared = config.training.to_dict()
        optimizer = optimizers.from_fields(**shared.pop("optimizer"))
        mine = config.models[role].to_dict()
        sizes = Sizes(**{**config.sizes.to_dict(), **mine.pop("sizes", {})})
        fields = {**shared, **mine, "sizes": sizes, "optimizer": optimizer}
        return Recipe(Text(**text), seed=config.seed, **fields)
    except TypeError as error:
        raise InputError(f"config.models: {role}: {error}") from None


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains what is missing and measures what `config` describes."""
    begin = time.perf_counter()
    cache = files.cache_root()
    recipes = {role: recipe(config, role) for role in config.models}
    first = next(iter(recipes.values()))
    texts = {split: next_word_models.documents(first.text, split, cache) for split in _SPLITS}
    buckets = _examples(config, texts)
    models: dict[str, Model] = {}
    summaries = []
    for role, chosen in recipes.items():
        directory = next_word_models.ensure(chosen)
        models[role] = Model(*next_word_models.load(directory))
        summary = next_word_models.summary(directory)
        summaries.append(
            {"role": role, "source": directory.name, "parameters": summary["num_params"], **summary}
        )
    arms = _arms(config, models, texts["train"])
    records, values = [], {}
    for arm in arms:
        logging.info("measuring %s", arm.label)
        values[arm.label], rows = measure(config, arm, models[arm.role], buckets)
        records.append(_record(config, arm, models[arm.role], values[arm.label], rows))
    cost = next_word_costs.costs(config, arms, models)
    for record in records:
        label = record["label"]
        values[label] |= cost[label]
        record["speedup"] = cost[arms[0].label]["milliseconds"] / cost[label]["milliseconds"]
        record["seconds"] = [cost[label]["milliseconds"] / 1e3]
        record["tokens_per_second"] = 1e3 / cost[label]["milliseconds"]
    charts = _figures(config, buckets, values)
    plots.write_png(plots.panels(list(charts.values())), workdir / "charts.png")
    tables = _tables(config, buckets, values)
    for table in tables:
        print(as_text(table), flush=True)
    return {
        "models": summaries,
        "runs": records,
        "samples": [],
        "tables": tables,
        "figures": charts,
        "claims": claims_of(config.claims, values),
        "values": values,
        "buckets": {
            name: {"examples": len(part), "share": share}
            for name, part, share in zip(*buckets, strict=True)
        },
        "text": _text_figures(config, recipes, texts),
        "seconds": time.perf_counter() - begin,
    }


_SPLITS = ("train", "eval")


def _examples(config: ConfigDict, texts: Mapping[str, Any]) -> Buckets:
    options = config.examples
    return scoring.choose(
        texts["eval"],
        scoring.word_counts(texts["train"]),
        bounds=options.bounds,
        sizes=options.sizes,
        context_words=options.room_words,
        seed=config.seed,
    )


def _arms(config: ConfigDict, models: Mapping[str, Model], train: Any) -> list[Arm]:
    """Each model with its contexts: so many words, as many bytes as these, or as many units."""
    words = config.examples.context_words
    arms = []
    for role, model in models.items():
        units = next_word_models.mean_units(model.units, train)
        if model.is_pooled or model.units.kind == "word":
            arms.append(Arm(role, role, words, units))
            continue
        longest = round(words * units)
        arms.append(Arm(f"{role}, {EQUAL_BYTES}", role, longest, units))
        if role in config.examples.equal_units:
            arms.append(Arm(f"{role}, {EQUAL_UNITS}", role, words, units))
    return arms


def _room(config: ConfigDict, model: Model) -> int:
    """Units of a word at most, its end aside."""
    return 0 if model.units.kind == "word" else int(config.text.form.max_bytes)


def measure(
    config: ConfigDict, arm: Arm, model: Model, buckets: Buckets
) -> tuple[dict[str, float], list[generation.Row]]:
    """What a model predicts with a context: figures by name, and what it wrote."""
    room = _room(config, model)
    batch_size = config.examples.batch_size
    _check_room(model, arm, room)
    examples = buckets.flat
    rows = scoring.generated(
        model, examples, context=arm.context, max_word=room, batch_size=batch_size,
        temperature=config.examples.temperature, seed=config.seed,
    )  # fmt: skip
    right = scoring.right_words(model, examples, rows)
    score = functools.partial(
        scoring.scores, model, context=arm.context, max_word=room, batch_size=batch_size
    )
    clean = score(examples)
    found = {
        "word accuracy": buckets.mean(right),
        **{
            f"accuracy: {name}": value
            for name, value in zip(buckets.names, buckets.means(right), strict=True)
        },
        "unit accuracy": buckets.mean(clean.hits) / buckets.mean(clean.units),
        "as teacher-forced": float((right == clean.right).mean()),
    }
    if model.units.kind != "word":  # whose surprise is not that of the text
        nats, size = buckets.mean(clean.nats), buckets.mean(clean.bytes)
        found["bits per byte"] = losses.bits_per_byte(nats, size)
    for kind in config.noise.kinds:
        changed = score(scoring.noisy(examples, kind, config.noise.rate, config.seed))
        found[f"noise: {kind}"] = buckets.mean(changed.right)
    found |= {"parameters": float(model.config.num_params())}
    return found, rows


def _check_room(model: Model, arm: Arm, room: int) -> None:
    """Learned positions end with the rows of training; others go on for the length of a word."""
    architecture = model.config
    if isinstance(architecture, HierarchicalConfig):
        parts: tuple[tuple[Any, int], ...] = (
            (architecture.backbone, arm.context * architecture.num_prefix),
        )
    else:
        parts = ((architecture, arm.context + room + 1),)
    for part, needed in parts:
        if part.positions == "learned" and needed > part.max_position:
            raise InputError(
                f"config.examples.context_words: {needed} positions are needed; {arm.role} was "
                f"trained on {part.max_position}"
            )


def _record(
    config: ConfigDict,
    arm: Arm,
    model: Model,
    found: Mapping[str, float],
    rows: Sequence[generation.Row],
) -> dict[str, Any]:
    """One line of the results, but for its times."""
    total = generation.total_stats(rows)
    return {
        "label": arm.label,
        "method": "hat" if model.is_pooled else "autoregressive",
        "options": {"context": arm.context},
        "temperature": config.examples.temperature,
        "batch_size": config.examples.batch_size,
        "tokens_per_target_call": total["tokens_per_target_call"],
        "acceptance_by_depth": [],
        "exact_match": found["word accuracy"],
        "role": "target",
        "keeps_law": False,
        "rows": len(rows),
        "agreement": found["as teacher-forced"],
        "lossless": {"check": "right words as the teacher-forced model has them"},
        "stats": {name: total[name] for name in ("tokens_emitted", "target_calls", "draft_calls")},
    }


def claim(
    text: str,
    label: str,
    metric: str,
    over: str = "",
    *,
    over_metric: str = "",
    times: float = 1.0,
    at_least: float | None = None,
    at_most: float | None = None,
) -> ConfigDict:
    """An entry of `config.claims`: a figure of one line is at least that of another.

    Args:
      text: the claim in words.
      label, metric: of the figure.
      over, over_metric: of the one that it is compared with; the same metric where none is given.
      times: what the other is multiplied by.
      at_least, at_most: a number to compare with where there is no other; `at_most=1` with an
        other turns the claim round.
    """
    return ConfigDict(
        {
            "text": text, "label": label, "metric": metric, "over": over,
            "over_metric": over_metric or metric, "times": times,
            "at_least": -1.0 if at_least is None else at_least,
            "at_most": -1.0 if at_most is None else at_most,
        }
    )  # fmt: skip


def claims_of(
    wanted: Sequence[ConfigDict], values: Mapping[str, Mapping[str, float]]
) -> list[results.Claim]:
    """The claims with what was measured; those of lines that were left out are left out.

    Raises:
      InputError: an unknown metric.
    """
    found = []
    for entry in wanted:
        if entry.label not in values or (entry.over and entry.over not in values):
            continue
        check_choice("config.claims: metric", entry.metric, values[entry.label])
        measured = values[entry.label][entry.metric]
        text, below = f"{entry.text}: {entry.metric} of {entry.label}", entry.at_most >= 0
        if entry.over:
            check_choice("config.claims: over_metric", entry.over_metric, values[entry.over])
            bound = entry.times * values[entry.over][entry.over_metric]
            text += f" against {entry.times:g} times that of {entry.over}"
        else:
            bound = entry.at_most if below else entry.at_least
        # Nothing is at least four times nothing, but that shows nothing.
        held = measured <= bound if below else measured >= bound and measured > 0
        sign = "<=" if below else ">="
        found.append(results.Claim(text, float(measured), f"{sign} {bound:.4g}", bool(held)))
    return found


_COST_COLUMNS = (
    "positions", "attention", "operations", "padded operations", "milliseconds", "parameters",
)  # fmt: skip


def _tables(
    config: ConfigDict, buckets: Buckets, values: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    quality = ["word accuracy", *(f"accuracy: {name}" for name in buckets.names)]
    quality += ["unit accuracy", "bits per byte", "as teacher-forced"]
    noise = ["word accuracy", *(f"noise: {kind}" for kind in config.noise.kinds)]
    return [
        _table("The next word", quality, values),
        _table(f"The next word after {config.noise.rate:.0%} noise in the context", noise, values),
        _table("Cost of a word of context", _COST_COLUMNS, values),
    ]


def _table(
    title: str, columns: Sequence[str], values: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    rows = [[label, *(row.get(name, "-") for name in columns)] for label, row in values.items()]
    return {"title": title, "columns": ["model", *columns], "rows": rows}


def as_text(table: Mapping[str, Any]) -> str:
    """A table as Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"])]
    lines += [
        [f"{value:.4g}" if isinstance(value, int | float) else value for value in row]
        for row in table["rows"]
    ]
    return f"{table['title']}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(
    config: ConfigDict, buckets: Buckets, values: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Accuracy by frequency, under noise, and over the time that a word of context takes."""

    def series(names: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"label": label, "x": list(labels), "y": [row[name] for name in names]}
            for label, row in values.items()
        ]

    kinds = list(config.noise.kinds)
    by_bucket = [f"accuracy: {name}" for name in buckets.names]
    charts: dict[str, Any] = {
        "accuracy by frequency": {
            "title": "Next words, by frequency in training",
            "x_label": "occurrences in training",
            "y_label": "right words",
            "series": series(by_bucket, buckets.names),
        },
        "accuracy over time": {
            "title": "Next words over the time to read",
            "x_label": "milliseconds a word of context",
            "y_label": "right words",
            "series": [
                {"label": label, "x": [row["milliseconds"]], "y": [row["word accuracy"]]}
                for label, row in values.items()
            ],
        },
    }
    if kinds:
        charts["noise"] = {
            "title": f"{config.noise.rate:.0%} of the context's characters changed",
            "x_label": "noise",
            "y_label": "right words",
            "series": series(
                ["word accuracy", *(f"noise: {kind}" for kind in kinds)], ["none", *kinds]
            ),
        }
    return charts


def _text_figures(
    config: ConfigDict, recipes: Mapping[str, Recipe], texts: Mapping[str, Any]
) -> dict[str, Any]:
    """Words of the text, how many kinds of them, and how many had to be cut."""
    form = next(iter(recipes.values())).text.form
    found: dict[str, Any] = {"max_bytes": form.max_bytes}
    for split, documents in texts.items():
        words = [word for document in documents for word in document["text"].split()]
        found[split] = {
            "documents": len(documents),
            "words": len(words),
            "kinds": len(set(words)),
            "bytes a word": float(np.mean([len(word.encode()) for word in words])),
            "at the longest": float(np.mean([len(w.encode()) == form.max_bytes for w in words])),
        }
    return found
