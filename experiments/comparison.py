"""The decoding comparison: several methods on one target, side by side.

Trains what is missing, decodes held-out prompts with every method at every temperature, checks
losslessness, and returns what `experiments.report` draws.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.generation import Row
from decoding.loop import Method, ModelParams
from decoding.sampling import SamplingConfig
from experiments import (
    accelerated_streams,
    acceptance,
    calibration,
    exact_chains,
    expert_prefetch,
    feature_heads,
    fine_tuned_models,
    guess_accuracy,
    information,
    layer_costs,
    lexical_unit_statistics,
    loading,
    lossless,
    oracle_bound,
    prompt_accuracy,
    prompt_tree_size,
    records,
    text_quality,
    timing,
    trained_parts,
    unmasking_observations,
    unmasking_trace,
)
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.tokenizer import Tokenizer
from training import base_models, corpus_stores, trigrams
from training.datasets import registry

# Further measurements that a config may ask for: (config, model configs, parameters, prompts) ->
# (what a report draws, claims).
ANALYSES = {
    "acceptance": acceptance.measure,
    "calibration": calibration.measure,
    "exact chains": exact_chains.measure,
    "feature errors": feature_heads.measure_errors,
    "feature heads": feature_heads.measure,
    "five guesses": guess_accuracy.measure_five,
    "expert loading": expert_prefetch.measure,
    "exits": accelerated_streams.measure_exits,
    "greedy oracle": oracle_bound.measure,
    "guesses": guess_accuracy.measure,
    "lexical units": lexical_unit_statistics.measure,
    "time over layers": layer_costs.measure,
    "information": information.measure,
    "layers ahead": accelerated_streams.measure_agreement,
    "likeness": accelerated_streams.measure_similarity,
    "prompt tokens": prompt_accuracy.measure,
    "prompt tree size": prompt_tree_size.measure,
    "prompt tree states": prompt_tree_size.measure_states,
    "chosen masks": unmasking_observations.measure_ranks,
    "far masks": unmasking_observations.measure_far_masks,
    "ages of keys and values": unmasking_observations.measure_ages,
    "surprise": unmasking_observations.measure_surprise,
}
# What a report shows of a base model's training.
_SUMMARY = ("eval_loss", "eval_bits_per_byte", "tokens", "seconds", "curve", "evaluations")


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of a comparison, by role, and the target's tokeniser."""

    configs: Mapping[str, TransformerConfig]
    params: ModelParams
    tokenizer: Tokenizer
    summaries: list[dict[str, Any]]


def load_models(config: ConfigDict) -> Models:
    """Loads every role of `config.models`.

    A model is a checkpoint directory, `random:SIZE`, the name of a base model, or a copy that is
    fine-tuned (`config_parts.fine_tuned`); the last two are trained if no run on this machine has
    done so.
    """
    sources: dict[str, str] = {}
    summaries = []
    for role, model in config.models.items():
        summary: dict[str, Any] = {"role": role, "source": fine_tuned_models.describe(model)}
        source = sources[role] = fine_tuned_models.source_of(model)
        if source in base_models.RECIPES:
            sources[role] = str(base_models.ensure(source))
        if source in base_models.RECIPES or source is not model:
            trained = json.loads((Path(sources[role]) / base_models.SUMMARY_FILE).read_text())
            summary |= {name: trained[name] for name in _SUMMARY if name in trained}
        summaries.append(summary)
    loading.check_vocabularies(sources)
    configs, params = loading.load_models(sources)
    for summary in summaries:
        summary["parameters"] = configs[summary["role"]].num_params()
    tokenizer = loading.load_tokenizer(sources["target"], configs["target"])
    return Models(configs, params, tokenizer, summaries)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is continued.

    Attributes:
      ids: token ids of each prompt.
      answers: the text that each one should be continued with; None where the data has none.
    """

    ids: list[list[int]]
    answers: list[str] | None


def held_out_prompts(config: ConfigDict, tokenizer: Tokenizer) -> Prompts:
    """Prompts from documents that no model was trained on.

    With `config.data.prompt_field` a prompt is that field of a document, and `answer_field` its
    answer; else it is a window of `config.data.prompt_tokens` tokens of a document.
    """
    data = config.data
    documents = registry.load(
        data.dataset, data.split, text_field=data.get("text_field"), **data.builder_options
    )
    order = np.random.default_rng(config.seed)
    chosen = order.permutation(len(documents))
    if field := data.get("prompt_field"):
        rows = [documents[int(index)] for index in chosen[: data.num_prompts]]
        if len(rows) < data.num_prompts:
            raise InputError(
                f"data.num_prompts: {data.num_prompts} wanted, {data.dataset}/{data.split} has "
                f"{len(rows)}"
            )
        answers = [row[data.answer_field] for row in rows] if data.get("answer_field") else None
        return Prompts([tokenizer.encode_prompt(row[field]) for row in rows], answers)
    prompts: list[list[int]] = []
    for index in chosen:
        ids = tokenizer.encode(documents[int(index)]["text"])
        if len(ids) > 2 * data.prompt_tokens:
            first = int(order.integers(0, len(ids) - data.prompt_tokens))
            prompts.append(ids[first : first + data.prompt_tokens])
        if len(prompts) == data.num_prompts:
            return Prompts(prompts, None)
    raise InputError(
        f"data.num_prompts: {data.num_prompts} wanted, {len(prompts)} documents of "
        f"{data.dataset}/{data.split} are longer than {2 * data.prompt_tokens} tokens"
    )


def corpus_store(config: ConfigDict, tokenizer: Tokenizer) -> Any:
    """The tri-gram store of `config.corpus`, as a `HotStart.value`; None where no method asks.

    It is counted from another split of the dataset that the prompts come from, or from another
    dataset.
    """
    if not any(entry.get("corpus") for entry in config.decode.methods):
        return None
    corpus = config.corpus
    source = corpus if corpus.dataset else config.data
    if not corpus.dataset and corpus.split == config.data.split:
        raise InputError(f"corpus.split: {corpus.split!r} is what the prompts are from")
    directory = corpus_stores.ensure(
        source.dataset,
        tokenizer,
        split=corpus.split,
        text_field=source.get("text_field") or None,
        builder_options=source.builder_options.to_dict(),
        slots=corpus.slots,
        top=corpus.top,
    )
    return trigrams.load(directory / trigrams.STORE_FILE)


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the comparison that `config` describes; see `experiments/configs/quickstart.py`."""
    begin = time.perf_counter()
    models = load_models(config)
    held_out = held_out_prompts(config, models.tokenizer)
    prompts = held_out.ids
    store = corpus_store(config, models.tokenizer)
    parts = trained_parts.load(config, models.configs)
    # Rows of equal length make the fairest times; answers end where they end.
    ends = None if config.decode.get("stop_at_eos") else ()
    stop = generation.stop_config(models.configs["target"], config.decode.max_new_tokens, ends)
    entries = prompt_tree_size.resolve(config, models.configs, models.params)
    lines: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for temperature in config.decode.temperatures:
        sampling = SamplingConfig(
            temperature=temperature, top_k=config.decode.top_k, top_p=config.decode.top_p
        )
        built = {
            label: methods.build(
                entry.method, _as_target(models.configs, entry), sampling, entry.options.to_dict()
            )
            for label, entry in entries.items()
        }
        params = {
            label: _as_target(models.params, entry) | parts.get(entry.get("part"), {})
            for label, entry in entries.items()
        }
        for batch_size in config.decode.batch_sizes:
            runs = {
                label: functools.partial(
                    timing.decode_all,
                    params[label],
                    prompts,
                    method,
                    stop,
                    batch_size=batch_size,
                    seed=config.seed,
                    hot=entries[label].get("hot", False),
                    memory=store if entries[label].get("corpus") else None,
                )
                for label, method in built.items()
            }
            where = f"temperature {temperature:g}, batch {batch_size}"
            measured = timing.side_by_side(runs, config.decode.repeats, label=where)
            baseline = measured[config.decode.methods[0].label]
            for label, entry in entries.items():
                line = records.record(
                    entry, label, temperature, batch_size, measured[label], baseline
                )
                line["keeps_law"] = built[label].lossless
                if held_out.answers is not None:
                    line["exact_match"] = exact_match(
                        models, measured[label]["result"], held_out.answers
                    )
                if quality := config.get("quality"):
                    line |= text_quality.measure(
                        quality, models.configs, models.params, models.tokenizer,
                        entry, measured[label]["result"], held_out.answers,
                    )  # fmt: skip
                lines.append(line)
            if batch_size == config.decode.batch_sizes[0]:
                texts = {label: entry["result"][0].token_ids for label, entry in measured.items()}
                sample = _samples(models.tokenizer, prompts[0], temperature, texts)
                sample["traces"] = {
                    label: unmasking_trace.record(
                        params[label], prompts[0], method, stop,
                        models.tokenizer, seed=config.seed,
                    )
                    for label, method in built.items()
                    if method.canvas is not None and config.decode.get("traces", True)
                }  # fmt: skip
                samples.append(sample)
        checks = check_lossless(config, models, params, prompts, sampling, built, lines)
        for line in lines:
            if line["temperature"] == temperature:
                line["lossless"] = checks[line["label"]]
    found: dict[str, Any] = {
        "models": models.summaries,
        "runs": lines,
        "samples": samples,
        "claims": records.claims(config, lines),
        "figures": text_quality.figures(lines, models.configs) if config.get("quality") else {},
    }
    for name in config.get("analyses", ()):
        check_choice("config.analyses", name, ANALYSES)
        figure, claims = ANALYSES[name](config, models.configs, models.params, prompts)
        found["figures"][name] = figure
        found["claims"] += claims
    return found | {"seconds": time.perf_counter() - begin}


def _as_target(models: Mapping[str, Any], entry: ConfigDict) -> dict[str, Any]:
    """Models by role, with the one that a method decodes with as its target."""
    role = entry.get("role") or "target"
    check_choice("role", role, models)
    return {**models, "target": models[role]}


def exact_match(models: Models, rows: Sequence[Row], answers: Sequence[str]) -> float:
    """Share of rows whose text, its end token aside, is the answer."""
    ends = models.configs["target"].eos_token_ids
    return records.exact_match(models.tokenizer, ends, rows, answers)


def check_lossless(
    config: ConfigDict,
    models: Models,
    params: Mapping[str, ModelParams],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    built: Mapping[str, Method],
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """By label: how losslessness was checked at this temperature, and whether it held.

    `params` are those that each method decodes with, its trained parts among them, by label.
    A method that decodes with another model than the target promises nothing about the target.

    Rows equal to the baseline's, token for token, are the strongest evidence and the only one at
    temperature 0. A method that samples differently is compared with the exact distribution of
    two tokens by a chi-square test. A method that does not promise the target's distribution is
    not tested: its agreement with the baseline is reported, and no 'held'. With
    `config.lossless.samples` 0 nothing is sampled for a test, as in the settings of a sweep.
    """
    checks: dict[str, dict[str, Any]] = {}
    others = {entry.label: entry.get("role") or "target" for entry in config.decode.methods}
    for label, method in built.items():
        mine = [
            r for r in lines if r["label"] == label and r["temperature"] == sampling.temperature
        ]
        identical = all(r["identical_rows"] == r["rows"] for r in mine)
        role = others.get(label, "target")
        if not method.lossless or role != "target":
            shared = min(r["agreement"] for r in mine)
            why = f"the {role} model alone" if method.lossless else "not lossless by design"
            checks[label] = {"check": f"{why}; {shared:.0%} of tokens agree"}
            continue
        if identical or sampling.greedy:
            checks[label] = {"check": "token-identical to plain decoding", "held": identical}
            continue
        if not config.lossless.samples:
            checks[label] = {"check": "not tested in this run"}
            continue
        test = lossless.chi_square(
            method, params[label], models.configs["target"], prompts[0], sampling,
            samples=config.lossless.samples, batch_size=config.lossless.batch_size,
            seed=config.seed,
        )  # fmt: skip
        checks[label] = {
            "check": "chi-square of two tokens against the exact distribution",
            "held": test["p_value"] > records.P_VALUE,
            **test,
        }
        logging.info("%s: %s", label, checks[label])
    return checks


def _samples(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    temperature: float,
    texts: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "prompt": tokenizer.decode(list(prompt)),
        "texts": {label: tokenizer.decode(list(ids)) for label, ids in texts.items()},
    }
