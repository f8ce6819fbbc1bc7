"""Readers of words measured: Byte2Word beside BERT, pre-trained and fine-tuned alike.

Hidden words, labelled texts clean and under noise, scripts that were never seen, typos, the size
and speed of the input, and writing. See `experiments/configs/byte2word.py`.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from experiments import plots, results, word_measures, word_recipes
from models import cross_attention_words as caw
from models import files, masked_words, spaced_words
from models.cross_attention_words import WordEncoderConfig, WordModelConfig
from training import word_models
from training.word_models import Task

_BERT_ROWS = 30_522
_QUALITY = (
    "eval_loss", "eval_bits_per_byte", "eval_exact_match", "eval_exact_match_several",
)  # fmt: skip


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs what `config` describes; trains what is missing.

    Returns:
      Beside what every experiment records: `pretrained` (by role: held-out quality and sizes),
      `tasks` (by task and role: accuracies), `noise`, `vectors`, `input` and `writing`.
    """
    begin = time.perf_counter()
    cache = files.cache_root()
    directories = {}
    for role in config.models:
        logging.info("pre-training %s", role)
        recipe = word_recipes.pretraining(config, role)
        directories[role] = word_models.ensure(recipe, cache_dir=cache)
    found: dict[str, Any] = {
        "models": [_model(role, directory) for role, directory in directories.items()],
        "pretrained": {role: _pretrained(directory) for role, directory in directories.items()},
        "runs": [],
        "samples": [],
    }
    tasks = {name: word_recipes.task(config, name, cache) for name in config.tasks}
    found["tasks"], found["noise"] = _classify(config, directories, tasks, cache)
    texts = [text for name in config.noise.tasks for text in tasks[name].texts["test"]]
    found["vectors"], found["input"] = _vectors(config, directories, texts)
    found["overlong"] = vars(spaced_words.count_overlong(texts, config.rows.width - 1))
    if role := config.generation.role:
        found["writing"] = word_measures.writing(
            directories[role],
            texts,
            count=config.generation.prompts,
            prompt_words=config.generation.prompt_words,
            max_bytes=config.generation.max_bytes,
            seed=config.seed,
        )
    found["figures"] = _figures(found)
    found["claims"] = claims(found)
    found["scores"] = _scores(found)
    found["tables"] = _tables(found)
    plots.write_png(plots.panels(list(found["figures"].values())), workdir / "curves.png")
    return found | {"seconds": time.perf_counter() - begin}


def _model(role: str, directory: Path) -> dict[str, Any]:
    _, params = masked_words.load(directory)
    summary = word_models.summary(directory)
    kept = ("seconds", "curve", "evaluations", "counts", *_QUALITY, "eval_several")
    return {
        "role": role,
        "source": directory.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **{name: summary[name] for name in kept},
    }


def _pretrained(directory: Path) -> dict[str, Any]:
    config, params = masked_words.load(directory)
    summary = word_models.summary(directory)
    sizes = word_measures.input_params(config, params)
    quality = {name.removeprefix("eval_"): summary[name] for name in _QUALITY}
    return {"reads": config.reads, **quality, **sizes}


def _classify(
    config: ConfigDict, directories: Mapping[str, Path], tasks: Mapping[str, Task], cache: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies of the roles of `config.classifiers` by task, and their noise curves."""
    accuracies: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    sizes = word_recipes.run_sizes(config.task_run, config.seed)
    for name, task in tasks.items():
        for role in config.classifiers:
            logging.info("%s: fine-tuning %s", name, role)
            made = word_models.ensure_classifier(directories[role], task, sizes, cache_dir=cache)
            classifier = word_measures.load_classifier(made)
            batch_size = config.evaluation.batch_size
            found = word_measures.by_split(classifier, task, batch_size, config.evaluation.texts)
            accuracies.setdefault(name, {})[role] = found
            if name in config.noise.tasks:
                curves.setdefault(name, {})[role] = word_measures.noise_curve(
                    classifier,
                    task,
                    rates=config.noise.rates,
                    kinds=config.noise.kinds,
                    seed=config.seed,
                    batch_size=batch_size,
                )
    return accuracies, curves


def _vectors(
    config: ConfigDict, directories: Mapping[str, Path], texts: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Typos, sizes and speed of the first model of words."""
    role = next(role for role in config.classifiers if config.models[role].reads == "words")
    reader, params = masked_words.load(directories[role])
    base = WordModelConfig(caw.bert_backbone(), WordEncoderConfig())
    shapes = jax.eval_shape(lambda: caw.init(base, jax.random.key(0)))
    table = _BERT_ROWS * base.backbone.embed_dim
    return word_measures.typo_distances(reader, params, texts, config.seed), {
        **word_measures.input_speed(reader, params, texts, config.repeats),
        "share_at_bert_base": caw.num_input_params(shapes) / table,
    }


def claims(found: Mapping[str, Any]) -> list[results.Claim]:
    """What the abstract says, and what the choices made here rest on.

    'byte2word' and 'bert' are compared, and the two heads where there is one of each.
    """
    made = [_at_most("input parameters over 30,522 rows, at BERT-base's width",
                     found["input"]["share_at_bert_base"], 0.12)]  # fmt: skip
    made.append(
        _at_most("one typo moves a vector, over another word", found["vectors"]["typo"], 1.0)
    )
    before = found["pretrained"]
    if "bert" in before and "byte2word" in before:
        ratio = before["byte2word"]["bits_per_byte"] / before["bert"]["bits_per_byte"]
        made.append(_at_most("hidden words: bits per byte over BERT's", ratio, 1.05))
        for task, roles in found["tasks"].items():
            gained = roles["byte2word"]["test"]["accuracy"] - roles["bert"]["test"]["accuracy"]
            made.append(results.at_least(f"{task}: accuracy over BERT's, clean", gained, -0.02))
            made += _held_out(task, roles)
        for task, roles in found["noise"].items():
            made += _noise(task, roles)
    if "byte2word A" in before:
        several = (before[role]["exact_match_several"] for role in ("byte2word A", "byte2word"))
        gained = next(several) - next(several)
        made.append(results.at_least("words of several pieces: head A over head P", gained, 0.0))
    for temperature, written in found.get("writing", {}).items():
        steps = written["backbone_steps_per_word"]
        made.append(_at_most(f"backbone steps a word, temperature {temperature}", steps, 1.0))
    return made


def _held_out(task: str, roles: Mapping[str, Any]) -> list[results.Claim]:
    """Splits of other locales, those of scripts that were never seen taken together."""
    scripts = [s for s in roles["bert"] if s not in ("test", "other Latin")]
    if not scripts:
        return []
    total = sum(roles["bert"][s]["texts"] for s in scripts)

    def mean(role: str, field: str) -> float:
        return float(sum(roles[role][s][field] * roles[role][s]["texts"] for s in scripts) / total)

    mine = mean("byte2word", "accuracy")
    blind, theirs = mean("bert", "commonest"), mean("bert", "accuracy")
    name = f"{task}: accuracy on unseen scripts"
    return [
        results.at_least(f"{name}, over the commonest label", mine - blind, 0.05),
        results.at_least(f"{name}, over BERT's", mine - theirs, 0.0),
    ]


def _noise(task: str, roles: Mapping[str, Any]) -> list[results.Claim]:
    """Relative losses of accuracy, Byte2Word's less BERT's."""
    made = []
    clean = {role: curve["accuracy"][0] for role, curve in roles.items()}
    rates = roles["bert"]["rates"]
    for place, rate in enumerate(rates):
        if rate in (0.2, 0.4):
            lost = {role: 1 - roles[role]["accuracy"][place] / clean[role] for role in clean}
            name = f"{task}: relative loss at {rate:.0%} noise less BERT's"
            made.append(_at_most(name, lost["byte2word"] - lost["bert"], 0.0))
    lost = {role: 1 - roles[role]["capitals"] / clean[role] for role in clean}
    name = f"{task}: relative loss in capitals less BERT's"
    return [*made, _at_most(name, lost["byte2word"] - lost["bert"], 0.0)]


def _at_most(name: str, measured: float, bound: float) -> results.Claim:
    return results.Claim(name, float(measured), f"<= {bound:g}", bool(measured <= bound))


def _scores(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a sweep compares: numbers by role."""
    scores: dict[str, dict[str, float]] = {
        name: {role: values[name] for role, values in found["pretrained"].items()}
        for name in ("bits_per_byte", "exact_match", "exact_match_several")
    }
    for task, roles in found["tasks"].items():
        scores[f"{task}: accuracy"] = {r: splits["test"]["accuracy"] for r, splits in roles.items()}
    for task, roles in found["noise"].items():
        scores[f"{task}: accuracy, most noise"] = {r: c["accuracy"][-1] for r, c in roles.items()}
    scores["distance over that of another word"] = {
        name: found["vectors"][name] for name in ("typo", "reversed")
    }
    return scores


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Noise curves a task, and held-out bits per byte over steps."""
    figures = {
        f"noise, {task}": {
            "title": f"{task}: accuracy under noise",
            "x_label": "share of characters changed",
            "y_label": "accuracy",
            "series": [
                {"label": role, "x": curve["rates"], "y": curve["accuracy"]}
                for role, curve in roles.items()
            ],
        }
        for task, roles in found["noise"].items()
    }
    # One legend for all charts: the same roles in the same order.
    shown = next(iter(found["noise"].values()), {model["role"]: None for model in found["models"]})
    by_role = {model["role"]: model for model in found["models"]}
    figures["pre-training"] = {
        "title": "Hidden words, held out",
        "x_label": "step",
        "y_label": "bits per byte",
        "series": [
            {
                "label": role,
                "x": [point["step"] for point in by_role[role]["evaluations"]],
                "y": [point["eval_bits_per_byte"] for point in by_role[role]["evaluations"]],
            }
            for role in shown
        ],
    }
    return figures


def _tables(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    before = next(iter(found["pretrained"].values()))
    tables = [
        {
            "title": "Pre-trained: hidden words (causal: next words)",
            "columns": ["model", *before],
            "rows": [[role, *values.values()] for role, values in found["pretrained"].items()],
        }
    ]
    for task, roles in found["tasks"].items():
        columns = ["split", "texts", "commonest", "single_bytes"]
        splits = next(iter(roles.values()))
        tables.append(
            {
                "title": f"Accuracy: {task}",
                "columns": [*columns, *roles],
                "rows": [
                    [split, *(about[name] for name in columns[1:])]
                    + [roles[role][split]["accuracy"] for role in roles]
                    for split, about in splits.items()
                ],
            }
        )
    for task, roles in found["noise"].items():
        rates = next(iter(roles.values()))["rates"]
        tables.append(
            {
                "title": f"Accuracy under noise: {task}",
                "columns": ["model", *(f"{rate:.0%}" for rate in rates), "CAPITALS"],
                "rows": [
                    [role, *curve["accuracy"], curve["capitals"]] for role, curve in roles.items()
                ],
            }
        )
    for name in ("vectors", "input", "overlong"):
        tables.append(
            {
                "title": name.capitalize(),
                "columns": [*found[name]],
                "rows": [[*found[name].values()]],
            }
        )
    for temperature, written in found.get("writing", {}).items():
        shown = [(s["prompt"], s["text"]) for s in written["samples"]]
        measured = {k: v for k, v in written.items() if k != "samples"}
        tables += [
            {
                "title": f"Writing, temperature {temperature}",
                "columns": [*measured],
                "rows": [[*measured.values()]],
            },
            {
                "title": f"Samples, temperature {temperature}",
                "columns": ["prompt", "continuation"],
                "rows": shown,
            },
        ]
    return tables
