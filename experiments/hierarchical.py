"""Models of words beside a model of tokens: equal text, equal work, noise, scripts, a new domain.

`config.models` are hierarchical models and one model of byte-level tokens, whose work a byte is
made that of the first; all are trained here on the same bytes. See `experiments/configs/hat.py`.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding import generation, methods, stopping
from decoding.sampling import SamplingConfig
from experiments import plots, results
from models import files, hierarchical, words
from models.config import TransformerConfig
from models.errors import InputError
from models.hierarchical import HierarchicalConfig
from models.word_tokenizer import WordTokenizer
from training import compute, text_models, text_noise, text_scores
from training.datasets import registry
from training.optimizers import OptimizerConfig
from training.text_models import TextModel
from training.text_scores import Passage, TextScores

WORDS, TOKENS = "HAT", "BPE"


class Trained(NamedTuple):
    """A model, where it lies and what its training left."""

    config: HierarchicalConfig | TransformerConfig
    params: Any
    directory: Path
    summary: dict[str, Any]


class Setting(NamedTuple):
    """What every measurement begins with."""

    config: ConfigDict
    cache: Path
    texts: dict[str, list[str]]
    identity: str
    tokenizer: Path
    models: dict[str, Trained]
    passages: list[Passage]


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains the models and measures what `config` asks for."""
    begin = time.perf_counter()
    setting = prepare(config)
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
        print(_text(found.table), flush=True)
    if figures:
        plots.write_png(plots.panels(list(figures.values())), workdir / "charts.png")
    return {
        "models": [{"role": name, **model.summary} for name, model in setting.models.items()],
        "runs": [],
        "samples": [],
        "tables": tables,
        "figures": figures,
        "claims": claims,
        "measured": measured,
        "seconds": time.perf_counter() - begin,
    }


class Found(NamedTuple):
    """What a measurement gives to the results."""

    values: Any
    table: dict[str, Any]
    figures: dict[str, Any]
    claims: list[results.Claim]


def prepare(config: ConfigDict) -> Setting:
    """Texts, tokeniser, trained models and the passages that they are measured on."""
    cache = files.cache_root()
    texts, identity = _texts(config.data, cache)
    tokenizer = text_models.ensure_tokenizer(
        texts["train"], config.tokens.vocab_size, identity, cache
    )
    rule, cap = config.words.rule, config.words.max_word
    passages = text_scores.passages_of(
        texts["test"], rule=rule, max_word=cap, num_words=config.passages.words,
        limit=config.passages.count, context=config.passages.context,
    )  # fmt: skip
    setting = Setting(config, cache, texts, identity, tokenizer, {}, passages)
    first = _hierarchical(config, {})
    models = {WORDS: _train(setting, "hat", first)}
    for name, changes in config.variants.items():
        models[name] = _train(setting, f"hat_{_slug(name)}", _hierarchical(config, changes))
    models[TOKENS] = _train(setting, "hat_bpe", matched_tokens(setting, first))
    return setting._replace(models=models)


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def _texts(data: ConfigDict, cache: Path) -> tuple[dict[str, list[str]], str]:
    options = data.builder_options.to_dict()
    found: dict[str, list[str]] = {}
    identity = ""
    for split in ("train", "validation", "test"):
        examples = registry.load(data.dataset, split, data_dir=cache / "datasets", **options)
        identity = examples.full_name
        found[split] = [example["text"] for example in examples]
    found["test"] = [*found["test"], *found["validation"]] if data.join_held_out else found["test"]
    return found, identity


def _hierarchical(config: ConfigDict, changes: Mapping[str, Any]) -> HierarchicalConfig:
    return hierarchical.hat(**{**config.words.to_dict(), **dict(changes)})


def _recipe(setting: Setting, model: Any, **more: Any) -> TextModel:
    options = setting.config.training.to_dict()
    optimizer = OptimizerConfig(**options.pop("optimizer"))
    return TextModel(**{"model": model, "optimizer": optimizer, **options, **more})


def _train(setting: Setting, name: str, model: Any) -> Trained:
    is_tokens = isinstance(model, TransformerConfig)
    directory = text_models.ensure(
        name,
        _recipe(setting, model),
        setting.texts["train"],
        setting.texts["validation"],
        identity=setting.identity,
        cache=setting.cache,
        tokenizer=setting.tokenizer if is_tokens else None,
    )
    return _open(directory)


def _open(directory: Path) -> Trained:
    config, params = text_models.load(directory)
    summary = json.loads((directory / text_models.SUMMARY_FILE).read_text(encoding="utf-8"))
    return Trained(config, params, directory, summary)


def matched_tokens(setting: Setting, model: HierarchicalConfig) -> TransformerConfig:
    """A model of tokens whose work a byte is that of a hierarchical one (section 2.6).

    Width and layers are the config's; the feed-forward width is what makes the work equal.
    """
    options, texts = setting.config.tokens, setting.texts["train"]
    backend = text_models.tokenizer_of(setting.tokenizer)
    width, head = options.width, options.head_dim
    base = TransformerConfig(
        vocab_size=backend.get_vocab_size(), embed_dim=width, num_layers=options.layers,
        num_heads=width // head, num_kv_heads=width // head, head_dim=head, mlp_dim=8,
        max_position=4096, tie_embeddings=True,
        eos_token_ids=(text_models.end_of_text(backend),),
    )  # fmt: skip
    goal = _work(setting, model, text_models.bytes_per_position(model, None, texts))
    size = text_models.bytes_per_position(base, backend, texts)
    choices = [base.replace(mlp_dim=mlp) for mlp in range(8, 16 * width, 8)]
    return min(choices, key=lambda choice: abs(_work(setting, choice, size) - goal))


def _work(setting: Setting, model: Any, per_position: float) -> float:
    """Operations of a forward pass, a byte, half a row in sight."""
    context = setting.config.training.row_bytes / 2
    return compute.per_byte(model, bytes_per_position=per_position, context_bytes=context)


def score(setting: Setting, model: Trained, passages: Sequence[Passage]) -> TextScores:
    """A model's measures on passages, words counted by the first model's rule."""
    rule, cap = setting.config.words.rule, setting.config.words.max_word
    batch = setting.config.passages.batch_size
    room = setting.config.passages
    if isinstance(model.config, TransformerConfig):
        return text_scores.score_tokens(
            model.config, model.params, text_models.tokenizer_of(setting.tokenizer), passages,
            rule=rule, max_word=cap, num_tokens=room.tokens, batch_size=batch,
        )  # fmt: skip
    own = (model.config.rule, model.config.max_word) == (rule, cap)
    return text_scores.score_words(
        model.config, model.params, passages, num_words=room.most_words, batch_size=batch,
        counted_by=None if own else (rule, cap),
    )  # fmt: skip


def compare(setting: Setting) -> Found:
    """Section 7 (a), (b), (c) and (f): every model on the same held-out words."""
    values: dict[str, dict[str, float]] = {}
    for name, model in setting.models.items():
        found = score(setting, model, setting.passages).report()
        size = model.summary["bytes_per_position"]
        found["operations_a_byte"] = _work(setting, model.config, size)
        found["parameters"] = model.summary["num_params"]
        found["slots_a_kilobyte"] = 1024 / found["bytes_per_position"]
        values[name] = found
    base, other = values[WORDS], values[TOKENS]
    ratio = lambda field: base[field] / other[field]  # noqa: E731
    claims = [
        at_most("HAT over BPE: work a byte, distance from 1", abs(ratio("operations_a_byte") - 1),
                0.05),
        at_most("HAT over BPE: bits a byte, at equal work", ratio("bits_per_byte"), 1.05),
        at_most("HAT over BPE: cache slots a kilobyte", ratio("slots_a_kilobyte"), 1.0),
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
    return Found(values, _table("Held-out text", "model", columns, values), {}, claims)


def noise(setting: Setting) -> Found:
    """Section 7 (d): context with noise, then clean words to predict."""
    options, names = setting.config.noise, (WORDS, TOKENS)
    clean = {name: score(setting, setting.models[name], setting.passages) for name in names}
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
                found, before = score(setting, setting.models[name], noisy), clean[name]
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
        _line(name, options.curve, [values[label][f"{name} bits added"] for label in curve])
        for name in names
    ]
    chart = _chart(
        f"Contexts with noise ({options.curve_kind})", "share of characters",
        "bits a byte added to clean words", series,
    )  # fmt: skip
    columns = tuple(f"{name} {field}" for field in ("bits added", "words lost") for name in names)
    table = _table("Noise in the context, relative to none", "noise", columns, values)
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
        at_most("other scripts: bytes a BPE token", mean(TOKENS), 1.5),
    ]  # fmt: skip
    series = [
        _line(name, list(values), [row[name] for row in values.values()])
        for name in (WORDS, TOKENS, "word length")
    ]
    chart = _chart("Names in other scripts", "locale", "bytes a position", series)
    columns = (WORDS, TOKENS, "word length")
    return Found(
        values, _table("Bytes a position, names of CLDR", "locale", columns, values),
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
        chosen = _recipe(setting, model.config, **options.training.to_dict())
        is_tokens = name == TOKENS
        directory = text_models.ensure(
            f"{model.directory.name.rpartition('-')[0]}_adapted", chosen, texts["train"],
            texts["validation"], identity=identity, cache=setting.cache, start=model.directory,
            tokenizer=setting.tokenizer if is_tokens else None,
        )  # fmt: skip
        lines = _open(directory).summary["evaluations"]
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
        at_most("new language: bits a byte at equal work, HAT over BPE",
                at(work_a, a) / at(work_b, b), 1.0),
        at_most("new language: bits a byte after equal text, HAT over BPE", a[-1] / b[-1], 1.0),
    ]  # fmt: skip
    chart = _chart(
        "Training goes on with names in " + ", ".join(options.locales),
        "billion operations", "bits a byte", [_line(name, *curves[name]) for name in curves],
    )  # fmt: skip
    columns = tuple(values[WORDS])
    table = _table("Adaptation to another language", "model", columns, values)
    return Found({"curves": curves, **values}, table, {"adaptation": chart}, claims)


def generate(setting: Setting) -> Found:
    """Calls and time of continuations: words, words with drafts inside them, tokens."""
    options = setting.config.generation
    backend = text_models.tokenizer_of(setting.tokenizer)
    prompts = [p.context for p in setting.passages[: options.prompts]]
    lines = [
        (WORDS, WORDS, "hat", {}),
        ("HAT with drafts", WORDS, "hat", {"draft": "ngram", "num_draft": options.num_draft}),
        (TOKENS, TOKENS, "autoregressive", {}),
    ]
    values: dict[str, dict[str, float]] = {}
    texts: dict[str, list[list[int]]] = {}
    for label, role, name, extra in lines:
        model = setting.models[role]
        method = methods.build(name, {"target": model.config}, SamplingConfig(), extra)
        if isinstance(model.config, HierarchicalConfig):
            tokenizer: Any = WordTokenizer(model.config)
            ids = [tokenizer.encode(text) for text in prompts]
        else:
            tokenizer = backend
            ids = [backend.encode(text).ids for text in prompts]
        stop = stopping.StopConfig(options.new_tokens)  # no end of text: all write as much
        seconds = []
        for _ in range(options.repeats + 1):
            begin = time.perf_counter()
            rows = generation.generate({"target": model.params}, ids, method, stop)
            seconds.append(time.perf_counter() - begin)
        total = generation.total_stats(rows)
        written = sum(len(tokenizer.decode(row.token_ids).encode()) for row in rows)
        texts[label] = [row.token_ids for row in rows]
        small = total.get("decoder_calls", 0)
        values[label] = {
            "backbone calls a byte": total["target_calls"] / written,
            "decoder calls a byte": small / written,
            "bytes a second": written / float(np.median(seconds[1:])),
        }
    same = texts[WORDS] == texts["HAT with drafts"]
    claims = [
        results.at_least("drafts inside words change no text", float(same), 1.0),
        results.at_least(
            "decoder calls saved by drafts inside words",
            1 - values["HAT with drafts"]["decoder calls a byte"]
            / values[WORDS]["decoder calls a byte"], 0.0,
        ),
        at_most("backbone calls a byte, HAT over BPE",
                values[WORDS]["backbone calls a byte"] / values[TOKENS]["backbone calls a byte"],
                1.0),
    ]  # fmt: skip
    columns = tuple(values[WORDS])
    return Found(values, _table("Continuations", "method", columns, values), {}, claims)


MEASUREMENTS = {
    "compare": compare,
    "noise": noise,
    "scripts": scripts,
    "adaptation": adapt,
    "generation": generate,
}


def at_most(name: str, measured: float, bound: float) -> results.Claim:
    """A claim that holds when `measured` <= `bound`."""
    return results.Claim(name, float(measured), f"<= {bound:g}", bool(measured <= bound))


def _line(label: str, x: Sequence[Any], y: Sequence[float]) -> dict[str, Any]:
    return {"label": label, "x": list(x), "y": list(y)}


def _chart(title: str, x: str, y: str, series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"title": title, "x_label": x, "y_label": y, "series": list(series)}


def _table(
    title: str, first: str, columns: Sequence[str], values: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """A table of the report: a row for each entry."""
    return {
        "title": title,
        "columns": [first, *(name.replace("_", " ") for name in columns)],
        "rows": [[label, *(row[name] for name in columns)] for label, row in values.items()],
    }


def _text(table: Mapping[str, Any]) -> str:
    """A table as Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"])]
    lines += [
        [f"{value:.4g}" if isinstance(value, int | float) else value for value in row]
        for row in table["rows"]
    ]
    return f"{table['title']}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
