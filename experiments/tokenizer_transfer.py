"""Tokeniser transfer measured: bits per byte of a model with tokenisers that it never had.

Tables by a hypernetwork and by heuristics, over target tokenisers; the source tokeniser given back;
training that goes on from each start; a fine-tuned variant that takes the tables over; a BPE as a
Unigram; a bidirectional model. See `experiments/configs/zett.py`.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments import results, transfer_parts, transfer_training
from experiments.transfer_parts import COPIES, HYPERNETWORK, Setting
from models import byte_level, files, token_tables
from models import hypernetwork as network
from models.errors import InputError, check_choice
from training import (
    hypernetwork_losses,
    hypernetwork_recipes,
    tokenizer_transfer,
    unigramify,
)

_SUMMARY = ("eval_loss", "eval_bits_per_byte", "seconds", "curve", "evaluations")


Found = dict[str, Any]


def targets(setting: Setting) -> Found:
    """Section 6.8: every arm on every target, beside the model with its own tokeniser."""
    original = setting.measure(setting.base)
    arms = (*setting.config.heuristics, HYPERNETWORK, COPIES)
    rows: list[dict[str, Any]] = []
    for label, form in setting.forms.items():
        surfaces = tokenizer_transfer.surfaces_of(setting.base, form, setting.hypernetwork[0])
        for arm in arms:
            begin = time.perf_counter()
            swapped = setting.swap(form, arm)
            np.asarray(swapped.params["embedder"]["embedding"])
            seconds = time.perf_counter() - begin
            found = setting.measure(swapped)
            rows.append(
                {
                    "target": label,
                    "arm": arm,
                    "bits_per_byte": found.bits_per_byte,
                    "gap": found.bits_per_byte - original.bits_per_byte,
                    "tokens_per_byte": found.tokens_per_byte,
                    "vocab_size": form.vocab_size,
                    "overlap": int((byte_level.overlap(setting.base.form, form) >= 0).sum()),
                    "truncated": surfaces.num_truncated,
                    "seconds": seconds,
                }
            )
            logging.info("%s, %s: %.3f bits a byte", label, arm, found.bits_per_byte)
    score = {(row["target"], row["arm"]): row["bits_per_byte"] for row in rows}
    first = next(iter(setting.forms))
    claims = [
        results.at_least(f"{first}: bits a byte of {worse} less those of {better}",
                         score[first, worse] - score[first, better], 0.0)
        for better, worse in (
            (HYPERNETWORK, "fvt"), ("fvt", "lexical"), ("lexical", "random"),
            (HYPERNETWORK, "focus"), (HYPERNETWORK, "ofa"),
        )
        if better in arms and worse in arms
    ]  # fmt: skip
    worst = max(setting.forms, key=lambda label: score[label, HYPERNETWORK])
    if "bytes" in setting.forms:
        claims.append(
            results.Claim(
                "bytes are the worst target of the hypernetwork",
                score["bytes", HYPERNETWORK],
                "largest",
                worst == "bytes",
            )
        )
    largest = max(setting.forms, key=lambda label: setting.forms[label].vocab_size)
    shorter = next(row["tokens_per_byte"] for row in rows if row["target"] == largest)
    claims.append(
        results.at_least(
            f"{largest}: sequences are shorter than the source's, share",
            1 - shorter / original.tokens_per_byte,
            0.0,
        )
    )
    series = [
        {
            "label": arm,
            "x": list(setting.forms),
            "y": [score[label, arm] for label in setting.forms],
        }
        for arm in arms
    ]
    series.append(
        {
            "label": "own tokeniser",
            "x": list(setting.forms),
            "y": [original.bits_per_byte] * len(setting.forms),
        }
    )
    figure = {
        "title": "Zero-shot loss with tokenisers never seen",
        "x_label": "target tokeniser",
        "y_label": "bits a byte",
        "series": series,
    }
    return {
        "original": original._asdict(),
        "rows": rows,
        "claims": claims,
        "figures": {"zero-shot": figure},
    }


def source_again(setting: Setting) -> Found:
    """Section 6.4: the source tokeniser itself, through the hypernetwork."""
    base = setting.base
    form = dataclasses.replace(base.form)
    own, swapped = setting.measure(base), setting.swap(form, HYPERNETWORK)
    found = setting.measure(swapped)
    ordinary = np.flatnonzero(~base.form.is_special)
    chosen = jnp.asarray(ordinary[ordinary < base.form.num_original])
    rows = [token_tables.split(base.config, m.source[chosen]) for m in (swapped, base)]
    cosine = float(hypernetwork_losses.cosine(rows[0], rows[1]))
    ratio = found.bits_per_byte / own.bits_per_byte
    at_most = results.Claim(
        "the source tokeniser through the hypernetwork: bits a byte over the model's own",
        ratio, "<= 1.05", ratio <= 1.05,
    )  # fmt: skip
    return {
        "bits_per_byte": found.bits_per_byte,
        "cosine": cosine,
        "claims": [
            results.at_least("cosine of predicted rows of source tokens to their own", cosine, 0.9),
            at_most,
        ],
        "figures": {},
    }


def as_unigram(setting: Setting) -> Found:
    """Section 2.7: a BPE rewritten as a Unigram, and how many words it cuts as before."""
    how, data = setting.config.unigramify, setting.config.data
    options = data.dataset_options.to_dict()
    texts = transfer_parts.some_texts(data.dataset, data.train_split, options, how.documents)
    begin = time.perf_counter()
    form = setting.form(how.target)
    found = unigramify.unigramify(form, texts, max_words=how.max_words)
    share = results.at_least(
        f"{how.target} as a Unigram: words cut as before, by frequency", found.identical, 0.95
    )
    return {
        "identical": found.identical,
        "words": found.words,
        "seconds": time.perf_counter() - begin,
        "claims": [share],
        "figures": {},
    }


def encoder(setting: Setting) -> Found:
    """The heuristics on a bidirectional model with one table: bits a byte of hidden tokens."""
    how = setting.config.encoder
    directory = hypernetwork_recipes.resolve(how.base, files.cache_root())
    base = hypernetwork_recipes.load_base(directory, setting.config.pre_tokenization)
    rows = [{"target": "own tokeniser", "arm": "-", **setting.measure(base)._asdict()}]
    for entry in setting.config.targets:
        if entry.label in how.targets:
            form = tokenizer_transfer.target_form(base, transfer_parts.target_tokenizer(entry))
            for arm in setting.config.heuristics:
                found = setting.measure(setting.swap(form, arm, base))
                rows.append({"target": entry.label, "arm": arm, **found._asdict()})
    score = {(row["target"], row["arm"]): float(row["bits_per_byte"]) for row in rows}
    first = how.targets[0]
    claims = [
        results.at_least(
            f"bidirectional, {first}: bits a byte of random rows less FVT's",
            score[first, "random"] - score[first, "fvt"],
            0.0,
        )
    ]
    return {"rows": rows, "claims": claims, "figures": {}}


MEASUREMENTS: dict[str, Callable[[Setting], Found]] = {
    "targets": targets,
    "identity": source_again,
    "n-shot": transfer_training.n_shot,
    "variant": transfer_training.variant,
    "unigramify": as_unigram,
    "encoder": encoder,
}


def load_setting(config: ConfigDict, workdir: Path) -> tuple[Setting, list[dict[str, Any]]]:
    """Models, tokenisers and texts, trained where they are missing; and what a report shows."""
    cache = files.cache_root()
    directory = hypernetwork_recipes.resolve(config.base, cache)
    base = hypernetwork_recipes.load_base(directory, config.pre_tokenization)
    place = Path(config.hypernetwork.directory) if config.hypernetwork.directory else None
    if place is None:
        place = hypernetwork_recipes.ensure(transfer_parts.hypernetwork_recipe(config))
    trained = network.load(place)
    summaries = []
    for role, where, source in (
        ("base", directory, config.base),
        (HYPERNETWORK, place, str(config.hypernetwork.directory) or "trained here"),
    ):
        summary: dict[str, Any] = {"role": role, "source": source}
        if (path := where / hypernetwork_recipes.SUMMARY_FILE).is_file():
            told = json.loads(path.read_text())
            summary |= {name: told[name] for name in _SUMMARY if name in told}
        summaries.append(summary)
    summaries[0]["parameters"] = base.config.num_params()
    summaries[1]["parameters"] = _size(trained[1])
    forms = {
        entry.label: tokenizer_transfer.target_form(base, transfer_parts.target_tokenizer(entry))
        for entry in config.targets
    }
    data = config.data
    options = data.dataset_options.to_dict()
    texts = transfer_parts.windows(
        data.dataset, data.split, options, count=data.windows, characters=data.characters,
        seed=config.seed,
    )  # fmt: skip
    auxiliary = transfer_parts.some_texts(
        data.dataset, data.train_split, options, data.auxiliary_documents
    )
    setting = Setting(config, workdir, base, trained, place.name, forms, texts, auxiliary)
    return setting, summaries


def _size(params: Any) -> int:
    if not isinstance(params, Mapping):
        return int(np.size(params))
    return sum(map(_size, params.values()))


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the measurements that `config` asks for; see `experiments/configs/zett.py`."""
    begin = time.perf_counter()
    for name in config.measurements:
        check_choice("config.measurements", name, MEASUREMENTS)
    if not config.targets:
        raise InputError("config.targets: none; at least one tokeniser is needed")
    setting, summaries = load_setting(config, workdir)
    measured: dict[str, Found] = {}
    claims: list[results.Claim] = []
    figures: Found = {}
    for name in config.measurements:
        logging.info("measuring: %s", name)
        found = MEASUREMENTS[name](setting)
        claims += found.pop("claims")
        figures |= found.pop("figures")
        measured[name] = found
    return {
        "models": summaries,
        "runs": [],
        "samples": [],
        "claims": claims,
        "figures": figures,
        "measured": measured,
        "tables": _reported(measured),
        "scores": _scores(measured),
        "seconds": time.perf_counter() - begin,
    }


def _scores(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a sweep compares."""
    scores: dict[str, dict[str, float]] = {}
    rows = measured.get("targets", {}).get("rows", [])
    scores["bits a byte, hypernetwork"] = {
        row["target"]: row["bits_per_byte"] for row in rows if row["arm"] == HYPERNETWORK
    }
    if "identity" in measured:
        again = measured["identity"]
        scores["bits a byte, hypernetwork"]["source again"] = again["bits_per_byte"]
        scores["cosine to the source's rows"] = {"source again": again["cosine"]}
    return scores


def _reported(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of a report."""
    tables = []
    for name, found in measured.items():
        rows = found.get("rows")
        if rows:
            columns = list(rows[0])
            cells = [[row[column] for column in columns] for row in rows]
        else:
            flat = {k: v for k, v in found.items() if isinstance(v, int | float)}
            flat |= found.get("bits_per_byte", {}) if name == "variant" else {}
            columns, cells = list(flat), [list(flat.values())]
        named = [column.replace("_", " ") for column in columns]
        tables.append({"title": name.capitalize(), "columns": named, "rows": cells})
    return tables
