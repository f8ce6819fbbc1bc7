"""Models of words beside a model of tokens: equal text, equal work, noise, scripts, a new domain.

The config's models are hierarchical ones and one of byte-level tokens, whose work a byte is
made that of the first; all are trained here on the same bytes. See `experiments/configs/hat.py`.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding import generation, methods, stopping
from decoding.sampling import SamplingConfig
from experiments import hierarchical_parts as parts
from experiments import plots, results
from experiments.hierarchical_parts import TOKENS, WORDS, Found, Setting
from models import words
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from models.word_tokenizer import WordTokenizer
from training import compute, text_models, text_noise
from training.datasets import registry


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains the models and measures what `config` asks for."""
    begin = time.perf_counter()
    setting = parts.prepare(config)
    tables: list[Any] = []
    figures: dict[str, Any] = {}
    claims: list[results.Claim] = []
    measured: dict[str, Any] = {}
    for name in config.measurements:
        if name not in MEASUREMENTS:
            raise InputError(
                f"config.measurements: {name!r} is not known; allowed: {', '.join(MEASUREMENTS)}"
            )
        logging.info("measuring %s", name)
        found = MEASUREMENTS[name](setting)
        measured[name] = found.values
        tables.append(found.table)
        figures |= found.figures
        claims += found.claims
        print(text(found.table), flush=True)
    if figures:
        plots.write_png(
            plots.panels(list(figures.values()), own_legends=True), workdir / "charts.png"
        )
    return {
        "models": [parts.described(name, model) for name, model in setting.models.items()],
        "runs": [],
        "samples": [],
        "tables": tables,
        "figures": figures,
        "claims": claims,
        "measured": measured,
        "seconds": time.perf_counter() - begin,
    }


def compare(setting: Setting) -> Found:
    """Section 7 (a), (b), (c) and (f): every model on the same held-out words."""
    values: dict[str, dict[str, float]] = {}
    for name, model in setting.models.items():
        found = parts.score(setting, model, setting.passages).report()
        size = model.summary["bytes_per_position"]
        found["operations_a_byte"] = parts.work(setting, model.config, size)
        found["parameters"] = model.summary["num_params"]
        found["slots_a_kilobyte"] = 1024 / found["bytes_per_position"]
        values[name] = found
    base, other = values[WORDS], values[TOKENS]
    ratio = lambda field: base[field] / other[field]  # noqa: E731
    claims = [
        parts.at_most("HAT over BPE: work a byte, distance from 1",
                      abs(ratio("operations_a_byte") - 1), 0.05),
        parts.at_most("HAT over BPE: bits a byte, at equal work", ratio("bits_per_byte"), 1.05),
        parts.at_most("HAT over BPE: cache slots a kilobyte", ratio("slots_a_kilobyte"), 1.0),
    ]  # fmt: skip
    if (fixed := values.get("fixed chunks")) is not None:
        claims.append(
            results.at_least("word accuracy: HAT less its split into fixed chunks",
                             base["word_accuracy"] - fixed["word_accuracy"], 0.01)
        )  # fmt: skip
    if (large := values.get("large decoder")) is not None:
        gained = {
            field: large[field] / base[field] - 1 for field in ("byte_accuracy", "word_accuracy")
        }
        claims.append(
            results.at_least("large decoder: gain in byte accuracy less that in word accuracy",
                             gained["byte_accuracy"] - gained["word_accuracy"], 0.0)
        )  # fmt: skip
    columns = (
        "parameters", "operations_a_byte", "bits_per_byte", "word_accuracy", "byte_accuracy",
        "bytes_per_position", "slots_a_kilobyte",
    )  # fmt: skip
    return Found(values, parts.table("Held-out text", "model", columns, values), {}, claims)


def noise(setting: Setting) -> Found:
    """Section 7 (d): context with noise, then clean words to predict."""
    options, names = setting.config.noise, (WORDS, TOKENS)
    clean = {name: parts.score(setting, setting.models[name], setting.passages) for name in names}
    values: dict[str, dict[str, float]] = {}
    for kind in options.kinds:
        for rate in options.curve if kind == options.curve_kind else (options.rates[kind],):
            rng = np.random.default_rng(setting.config.seed)
            noisy = [
                dataclasses.replace(p, context=text_noise.perturb(p.context, kind, rate, rng))
                for p in setting.passages
            ]
            row = {}
            for name in names:
                found, before = parts.score(setting, setting.models[name], noisy), clean[name]
                row[f"{name} bits added"] = found.nats / before.nats - 1
                row[f"{name} words lost"] = 1 - found.right_words / before.right_words
            values[f"{kind} {rate:g}"] = row
    claims = []
    for label in [f"{kind} {options.rates[kind]:g}" for kind in options.kinds]:
        row = values[label]
        for field in ("bits added", "words lost"):
            less = row[f"{TOKENS} {field}"] - row[f"{WORDS} {field}"]
            claims.append(results.at_least(f"{label}: {field}, BPE less HAT", less, 0.0))
    curve = [f"{options.curve_kind} {rate:g}" for rate in options.curve]
    series = [
        parts.line(name, options.curve, [values[label][f"{name} bits added"] for label in curve])
        for name in names
    ]
    chart = parts.chart(
        f"Contexts with noise ({options.curve_kind})", "share of characters",
        "share of bits added to clean words", series,
    )  # fmt: skip
    columns = tuple(f"{name} {field}" for field in ("bits added", "words lost") for name in names)
    table = parts.table("Noise in the context, relative to none", "noise", columns, values)
    return Found(values, table, {"noise": chart}, claims)


def scripts(setting: Setting) -> Found:
    """Section 7 (e): bytes a position of names in other scripts, no training."""
    options = setting.config.scripts
    backend = text_models.tokenizer_of(setting.tokenizer)
    values: dict[str, dict[str, float]] = {}
    for locale in options.locales:
        names = [
            example["text"]
            for example in registry.load(
                "cldr", "test", data_dir=setting.cache / "datasets", locales=[locale]
            )
        ]
        text = ["\n".join(names)]
        row = {
            name: text_models.bytes_per_position(setting.models[name].config, backend, text)
            for name in (WORDS, TOKENS)
        }
        row["word length"] = len(text[0].encode()) / len(
            words.split(text[0], setting.config.words.rule, 1 << 20)
        )
        values[locale] = row
    others = [row for locale, row in values.items() if locale != options.locales[0]]
    mean = lambda name: float(np.mean([row[name] for row in others]))  # noqa: E731
    claims = [
        results.at_least("other scripts: bytes a HAT position over the word length",
                         mean(WORDS) / mean("word length"), 0.8),
        parts.at_most("other scripts: bytes a BPE token", mean(TOKENS), 1.5),
    ]  # fmt: skip
    series = [
        parts.line(name, list(values), [row[name] for row in values.values()])
        for name in (WORDS, TOKENS, "word length")
    ]
    chart = parts.chart("Names in other scripts", "locale", "bytes a position", series)
    columns = (WORDS, TOKENS, "word length")
    return Found(
        values, parts.table("Bytes a position, names of CLDR", "locale", columns, values),
        {"scripts": chart}, claims,
    )  # fmt: skip


def adapt(setting: Setting) -> Found:
    """Training goes on with another language; bits a byte over the work that it took."""
    options = setting.config.adaptation
    backend = text_models.tokenizer_of(setting.tokenizer)
    texts: dict[str, list[str]] = {}
    identity = ""
    for split in ("train", "validation"):
        examples = registry.load(
            "cldr", split, data_dir=setting.cache / "datasets", locales=list(options.locales)
        )
        identity = examples.full_name
        names = [example["text"] for example in examples]
        texts[split] = [
            "\n".join(names[i : i + options.names]) for i in range(0, len(names), options.names)
        ]
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name in (WORDS, TOKENS):
        model = setting.models[name]
        chosen = parts.recipe(setting, model.config, **options.training.to_dict())
        is_tokens = name == TOKENS
        directory = text_models.ensure(
            f"{model.directory.name.rpartition('-')[0]}_adapted", chosen, texts["train"],
            texts["validation"], identity=identity, cache=setting.cache, start=model.directory,
            tokenizer=setting.tokenizer if is_tokens else None,
        )  # fmt: skip
        lines = parts.read(directory).summary["evaluations"]
        size = text_models.bytes_per_position(model.config, backend, texts["train"])
        work = 3 * chosen.batch_size * chosen.row_bytes * compute.per_byte(
            model.config, bytes_per_position=size, context_bytes=chosen.row_bytes / 2
        )  # fmt: skip
        steps = [line["step"] for line in lines]
        losses = [line["eval_bits_per_byte"] for line in lines]
        curves[name] = ([step * work / 1e9 for step in steps], losses)
    (work_a, a), (work_b, b) = curves[WORDS], curves[TOKENS]
    budget = min(work_a[-1], work_b[-1])
    at = lambda work, loss: float(np.interp(budget, work, loss))  # noqa: E731
    values = {
        name: {
            "first bits a byte": loss[0], "last bits a byte": loss[-1],
            "bits a byte at equal work": at(work, loss), "billion operations": work[-1],
        }
        for name, (work, loss) in curves.items()
    }  # fmt: skip
    claims = [
        parts.at_most("new language: bits a byte at equal work, HAT over BPE",
                      at(work_a, a) / at(work_b, b), 1.0),
        parts.at_most("new language: bits a byte after equal text, HAT over BPE",
                      a[-1] / b[-1], 1.0),
    ]  # fmt: skip
    chart = parts.chart(
        "Training goes on with names in " + ", ".join(options.locales),
        "billion operations", "bits a byte", [parts.line(name, *curves[name]) for name in curves],
    )  # fmt: skip
    columns = tuple(values[WORDS])
    table = parts.table("Adaptation to another language", "model", columns, values)
    return Found({"curves": curves, **values}, table, {"adaptation": chart}, claims)


def generate(setting: Setting) -> Found:
    """Calls and time of continuations: words, words with drafts inside them, tokens."""
    options = setting.config.generation
    lines = [
        (WORDS, WORDS, "hat", {}),
        ("HAT with drafts", WORDS, "hat", {"draft": "ngram", "num_draft": options.num_draft}),
        (TOKENS, TOKENS, "autoregressive", {}),
    ]
    values: dict[str, dict[str, float]] = {}
    texts: dict[str, list[list[int]]] = {}
    for label, role, name, extra in lines:
        values[label], texts[label] = continuations(setting, setting.models[role], name, extra)
    same = texts[WORDS] == texts["HAT with drafts"]
    claims = [
        results.at_least("drafts inside words change no text", float(same), 1.0),
        results.at_least(
            "decoder calls saved by drafts inside words",
            1 - values["HAT with drafts"]["decoder calls a byte"]
            / values[WORDS]["decoder calls a byte"], 0.0,
        ),
        parts.at_most("backbone calls a byte, HAT over BPE",
                values[WORDS]["backbone calls a byte"] / values[TOKENS]["backbone calls a byte"],
                1.0),
    ]  # fmt: skip
    columns = tuple(values[WORDS])
    return Found(values, parts.table("Continuations", "method", columns, values), {}, claims)


def continuations(
    setting: Setting, model: parts.Trained, method: str, options: Mapping[str, Any] | None = None
) -> tuple[dict[str, float], list[list[int]]]:
    """Calls and time of writing on from the passages' contexts, at temperature 0.

    Args:
      setting: its `config.generation` says how many prompts, tokens and repeats.
      model: of words, or of the tokens of `setting.tokenizer`.
      method: by name, with `options`.

    Returns:
      Measures by name, and the ids of each row.
    """
    sizes = setting.config.generation
    prompts = [p.context for p in setting.passages[: sizes.prompts]]
    built = methods.build(method, {"target": model.config}, SamplingConfig(), options)
    if isinstance(model.config, HierarchicalConfig):
        tokenizer: Any = WordTokenizer(model.config)
        ids = [tokenizer.encode(text) for text in prompts]
    else:
        tokenizer = text_models.tokenizer_of(setting.tokenizer)
        ids = [tokenizer.encode(text).ids for text in prompts]
    stop = stopping.StopConfig(sizes.new_tokens)  # no end of text: all write as much
    seconds = []
    for _ in range(sizes.repeats + 1):
        begin = time.perf_counter()
        rows = generation.generate({"target": model.params}, ids, built, stop)
        seconds.append(time.perf_counter() - begin)
    total = generation.total_stats(rows)
    written = sum(len(tokenizer.decode(row.token_ids).encode()) for row in rows)
    measured = {
        "backbone calls a byte": total["target_calls"] / written,
        "decoder calls a byte": total.get("decoder_calls", 0) / written,
        "bytes a second": written / float(np.median(seconds[1:])),
    }
    return measured, [row.token_ids for row in rows]


MEASUREMENTS = {
    "compare": compare,
    "noise": noise,
    "scripts": scripts,
    "adaptation": adapt,
    "generation": generate,
}


def text(table: Mapping[str, Any]) -> str:
    """A table as Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"])]
    lines += [
        [f"{value:.4g}" if isinstance(value, int | float) else value for value in row]
        for row in table["rows"]
    ]
    return f"{table['title']}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
