"""Lexinvariant models measured: loss by position, keys of ciphers, symbols in context.

Huang et al., arXiv 2305.16349. Three parts, each left out where the config names no model for it:

- a language of few symbols, whose best lexinvariant model p' is computed exactly;
- text by characters: perplexity over context, and LookUp and Permutation;
- a probe that reads the key of a substitution cipher.

Every figure is under one draw of the table a sequence, unless `config.draws` says otherwise.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import cipher_keys, lexinvariant_language, plots, results, symbol_tasks
from experiments.lexinvariant_measures import (
    Model,
    Table,
    curve,
    load_model,
    nats_by_position,
    smooth,
)
from models import decipher_probe, files
from models.random_embeddings import LexinvariantConfig
from models.tokenizer import Tokenizer
from training import lexinvariant_models, symbol_data


def texts(config: ConfigDict, found: dict[str, Any]) -> None:
    """Text by characters: perplexity over context, tasks and keys, a corpus at a time."""
    curves, rows_of_tasks, gaps = [], [], {}
    cache = files.cache_root()
    for entry in config.texts:
        overrides = dict(config.overrides)
        data = lexinvariant_models.recipe(entry.lexinvariant, overrides).data
        models = {
            role: load_model(entry[role], f"{entry.label}, {role}", overrides)
            for role in ("lexinvariant", "standard", "semi")
            if entry[role]
        }
        found["models"] += [model.summary for model in models.values()]
        some = models["lexinvariant"].config
        rows = symbol_data.held_out_rows(
            data, some, cache, rows=config.context.rows, length=config.context.length + 1
        )
        given = {
            "draws": config.draws, "batch_size": config.context.batch_size, "seed": config.seed,
        }  # fmt: skip
        nats = {role: nats_by_position(m, rows, **given) for role, m in models.items()}
        for role, values in nats.items():
            x, y = smooth(values.mean(axis=0), config.context.window)
            curves.append((f"{entry.label}, {role}", x, np.exp(y)))
        gaps[entry.label] = {
            role: smooth(values.mean(axis=0), config.context.window)[1]
            for role, values in nats.items()
        }
        logging.info("tasks of %s", entry.label)
        rows_of_tasks += _tasks(config, entry.label, models, rows)
        found["claims"] += _text_claims(entry.label, nats, some, config.context.window)
        if entry.probe:
            _probe(config, entry, models["lexinvariant"], rows, found)
    title = f"Perplexity over context, mean of {config.context.window} positions"
    found["figures"]["perplexity"] = curve(title, "perplexity a character", curves)
    found["tables"].append(_gap_table(gaps))
    kinds = [
        f"{task}, {symbols}" for task in symbol_tasks.TASKS for symbols in symbol_tasks.SYMBOLS
    ]
    found["tables"].append(
        Table(
            f"Answer tokens right, {config.tasks.examples} examples each",
            ["text", "model", *kinds],
            rows_of_tasks,
        )
    )
    found["figures"]["tasks"] = {
        "title": "Symbols in context", "x_label": "task, symbols", "y_label": "answer tokens right",
        "form": "bars",
        "series": [{"label": f"{label}, {role}", "x": kinds, "y": values}
                   for label, role, *values in rows_of_tasks],
    }  # fmt: skip
    found["claims"] += _task_claims(rows_of_tasks)
    if len(gaps) > 1:
        found["claims"].append(_faster(gaps, *[entry.label for entry in config.texts][:2]))


def _text_claims(
    label: str, nats: Mapping[str, np.ndarray], model: LexinvariantConfig, window: int
) -> list[results.Claim]:
    own = nats["lexinvariant"]
    first, last = own[:, 0].mean(), own[:, -window:].mean()
    claims = [
        results.at_most(
            f"{label}: distance of the loss after one symbol from ln V, in nats",
            abs(float(first - np.log(len(model.free_ids)))),
            0.5,
        ),
        results.at_least(
            f"{label}: nats that the loss falls over the context", float(first - last), 0.5
        ),
    ]
    if "standard" in nats:
        early = nats["standard"][:, window : 2 * window].mean()
        late = nats["standard"][:, -window:].mean()
        claims.append(
            results.at_least(
                f"{label}: the same beyond the first {window} symbols, over the standard model's",
                float((own[:, window : 2 * window].mean() - last) - (early - late)),
                0.0,
            )
        )
    return claims


def _gap_table(gaps: Mapping[str, Mapping[str, np.ndarray]]) -> Table:
    """Perplexity in the first and last window, and how many times the standard model's it is."""
    rows = []
    for label, curves in gaps.items():
        for role, values in curves.items():
            base = curves.get("standard", values)
            rows.append([
                label, role, *(float(np.exp(v[i])) for v in (values,) for i in (0, -1)),
                *(float(np.exp(values[i] - base[i])) for i in (0, -1)),
            ])  # fmt: skip
    columns = ["text", "model", "first window", "last window", "of standard, first", "last"]
    return Table("Perplexity a character", columns, rows)


def _faster(gaps: Mapping[str, Mapping[str, np.ndarray]], prose: str, code: str) -> results.Claim:
    fall = {k: v["lexinvariant"][0] - v["lexinvariant"][-1] for k, v in gaps.items()}
    return results.at_least(
        f"nats that the loss falls from the first to the last window, {code} less {prose}",
        float(fall[code] - fall[prose]),
        0.0,
    )


def _tasks(
    config: ConfigDict, label: str, models: Mapping[str, Model], rows: np.ndarray
) -> list[list[Any]]:
    """A line a model: accuracy of each task with each way of drawing symbols."""
    found = []
    for role, model in models.items():
        tokenizer = Tokenizer.from_directory(model.directory, model.config)
        separators = tokenizer.encode(symbol_tasks.ARROW + symbol_tasks.END_OF_LINE + " ")
        excluded = [*separators, *model.config.fixed_ids]
        counts = np.bincount(rows.ravel(), minlength=model.config.vocab_size)
        line: list[Any] = [label, role]
        for make in symbol_tasks.TASKS.values():
            for symbols in symbol_tasks.SYMBOLS:
                task = make(
                    tokenizer.encode, symbol_tasks.weights(symbols, counts, excluded),
                    config.tasks.examples, seed=config.seed,
                )  # fmt: skip
                line.append(symbol_tasks.accuracy(
                    model.config, model.params, task, batch_size=config.tasks.batch_size,
                    seed=config.seed,
                ))  # fmt: skip
        found.append(line)
    return found


def _task_claims(rows: Sequence[Sequence[Any]]) -> list[results.Claim]:
    by = {(label, role): values for label, role, *values in rows}
    claims = []
    for label in dict.fromkeys(label for label, _ in by):
        if (label, "standard") not in by:
            continue
        own, base = by[label, "lexinvariant"], by[label, "standard"]
        for number, task in enumerate(symbol_tasks.TASKS):
            uniform, frequent = (own[2 * number + i] - base[2 * number + i] for i in (0, 1))
            claims.append(results.at_least(
                f"{label}: {task} with uniform symbols, lexinvariant less standard", uniform, 0.05
            ))  # fmt: skip
            claims.append(results.at_least(
                f"{label}: {task}, how much nearer they are with symbols by frequency",
                uniform - frequent, 0.01,
            ))  # fmt: skip
    return claims


def _probe(
    config: ConfigDict, entry: ConfigDict, model: Model, rows: np.ndarray, found: dict[str, Any]
) -> None:
    """Key precision by window, votes of many sequences under one key, and soft entries."""
    overrides = {f"model_of.{field}": value for field, value in config.overrides}
    overrides |= dict(config.probe.overrides)
    directory = lexinvariant_models.ensure(entry.probe, overrides=overrides)
    _, probe = decipher_probe.load(directory)
    rng, settings = np.random.default_rng(config.seed), config.probe
    plain = rows[:, :-1]
    tokenizer = Tokenizer.from_directory(model.directory, model.config)
    letters = tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    keys = cipher_keys.random_keys(rng, model.config, len(plain))
    cipher = cipher_keys.encrypt(plain, keys)
    given = {"batch_size": config.context.batch_size, "seed": config.seed}
    log_probs_of = cipher_keys.read(model.config, model.params, probe, cipher, **given)
    said, W = log_probs_of.argmax(axis=2), settings.window
    starts = np.unique(np.linspace(0, plain.shape[1] - W, settings.windows).astype(int))
    measured = {
        int(s): cipher_keys.precision(said[:, s : s + W], cipher[:, s : s + W], keys, letters)
        for s in starts
    }
    means = {s: float(np.nanmean(values)) for s, values in measured.items()}
    shared = np.tile(cipher_keys.random_keys(rng, model.config, 1), (len(plain), 1))
    together = cipher_keys.encrypt(plain, shared)
    voted = cipher_keys.read(model.config, model.params, probe, together, **given).argmax(axis=2)
    pooled = cipher_keys.precision(
        voted[None, :, -W:].reshape(1, -1),
        together[None, :, -W:].reshape(1, -1),
        shared[:1],
        letters,
    )[0]
    last = slice(-settings.soft_window, None)
    soft = {
        t: cipher_keys.soft_entries(log_probs_of[:, last], cipher[:, last], keys, letters, t)
        for t in settings.temperatures
    }
    accuracy = (said == plain).mean(axis=0)
    majority = np.bincount(plain.ravel()).max() / plain.size
    found["figures"]["key precision"] = curve(
        f"Key entries of letters that are right, windows of {W}", "precision",
        [("one sequence", list(means), list(means.values())),
         (f"{len(plain)} sequences of one key", [max(means)], [float(pooled)])],
    ) | {"x_label": "window start"}  # fmt: skip
    late = float(accuracy[-W:].mean())
    found["tables"].append(Table("Probe", ["measure", "value"], [
        *([f"key precision, window from {s}", value] for s, value in means.items()),
        [f"key precision, last windows of {len(plain)} sequences of one key", float(pooled)],
        ["tokens deciphered, first ten positions", float(accuracy[:10].mean())],
        ["tokens deciphered, last window", late],
        ["share of the most frequent token", float(majority)],
        *([f"mean probability of the right entry, temperature {t:g}", v] for t, v in soft.items()),
    ]))  # fmt: skip
    found["claims"] += [
        results.at_least(
            f"{entry.label}: key precision of the last window less that of the first",
            means[max(means)] - means[min(means)], 0.05,
        ),
        results.at_least(
            f"{entry.label}: tokens deciphered in the last window over the most frequent token",
            late / float(majority), 1.05,
        ),
        results.at_least(
            f"{entry.label}: key precision of many sequences of one key (published 99.6%)",
            float(pooled), 0.9,
        ),
    ]  # fmt: skip


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the experiment that `config` describes; see `experiments/configs/lexinvariant.py`."""
    begin = time.perf_counter()
    found: dict[str, Any] = {
        "models": [], "runs": [], "samples": [], "claims": [], "figures": {}, "tables": [],
        "draws": config.draws,
    }  # fmt: skip
    if config.language.lexinvariant:
        lexinvariant_language.measure(config, found)
    if config.texts:
        texts(config, found)
    found["tables"] = [table._asdict() for table in found["tables"]]
    for name, spec in found["figures"].items():
        plots.write_png(plots.lines(spec), workdir / f"{name.replace(' ', '_')}.png")
    return found | {"seconds": time.perf_counter() - begin}
