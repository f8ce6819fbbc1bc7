"""A vocabulary of tens of thousands of predicted tokens: its index, and decoding with it."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from decoding import generation, methods
from decoding.autoregressive import autoregressive
from decoding.dynamic_vocabulary import inverted_lists, merged_prompts, merging, providers
from decoding.generation import Row
from decoding.sampling import SamplingConfig
from decoding.stopping import StopConfig
from experiments import merged_scoring, records, results, timing, vocabulary_search
from experiments.dynamic_parts import Setting
from models import token_tables, transformer
from models.config import TransformerConfig
from models.errors import check_choice
from training import ann_index, large_vocabulary


class Large(NamedTuple):
    """The model with its large vocabulary.

    Attributes:
      config, params: the model.
      tokens: strings by id.
      sizes: int32 [V], bytes.
      encode: text -> ids.
    """

    config: TransformerConfig
    params: Any
    tokens: tuple[str, ...]
    sizes: np.ndarray
    encode: Callable[[str], list[int]]


def measure(
    setting: Setting, config: ConfigDict, workdir: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Extends the vocabulary, predicts its tables, searches them, and decodes with them.

    The exported model and its index stay in `workdir`, for `experiments.generate`.

    Returns:
      What was measured, and a line of the results for each way of decoding.
    """
    how = config.vocabulary
    check_choice("config.vocabulary.provider", how.provider, setting.providers)
    provider = setting.providers[how.provider]
    tokens = large_vocabulary.extend(
        setting.source, setting.texts(config.data.train_split), how.size
    )
    begin = time.perf_counter()
    model, params = large_vocabulary.export(
        workdir / "large", setting.model, setting.params, setting.source, tokens, provider,
        chunk=how.chunk,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    sizes = np.asarray(large_vocabulary.token_bytes(setting.source, tokens), np.int32)
    backend = large_vocabulary.longest_prefix(setting.source, tokens)
    params = jax.device_put(params)
    large = Large(model, params, tokens, sizes, lambda text: backend.encode(text).ids)
    texts = held_out_texts(setting, config)
    measured: dict[str, Any] = {
        "size": len(tokens),
        "export_seconds": seconds,
        "loss": losses_by_vocabulary(setting, config, large, texts),
    }
    queries = hidden_states(large, texts, how.queries)
    rows = np.asarray(token_tables.tables(model, params).output, np.float32)
    measured["search"] = {
        metric: vocabulary_search.by_size(
            rows, queries, how.sizes if metric == how.metric else how.sizes[:1], k=how.k,
            probes=how.probes, timed_probes=how.timed_probes, batch=how.batch_size,
            repeats=how.repeats, metric=metric, seed=config.seed,
        )
        for metric in inverted_lists.METRICS
    }  # fmt: skip
    shape, index = ann_index.build(
        rows, sizes, lists=int(4 * len(rows) ** 0.5), metric=how.metric, seed=config.seed
    )
    inverted_lists.save(workdir / "index", shape, index)
    runs = decode(setting, config, large, index, texts)
    measured["bytes_per_second"] = {line["label"]: line["bytes_per_second"] for line in runs}
    return measured, runs


def held_out_texts(setting: Setting, config: ConfigDict) -> list[str]:
    """Stretches of held-out text of `vocabulary.text_tokens` of the model's own tokens."""
    how = config.vocabulary
    held_out = merged_scoring.windows(
        setting.texts(config.data.splits[0]), setting.source, context=how.text_tokens, ending=1,
        count=how.texts, seed=config.seed + 2,
    )  # fmt: skip
    own = providers.vocabulary(setting.source)
    return [setting.source.decode([own[t] for t in row]) for row in held_out.contexts]


def losses_by_vocabulary(
    setting: Setting, config: ConfigDict, large: Large, texts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Bits per byte, and bytes a token, of the same text in the model's own and in many tokens."""
    how = config.vocabulary
    end = setting.model.eos_token_ids[0]

    def line(model: TransformerConfig, params: Any, rows: list[list[int]], sizes: Any) -> Any:
        width = 1 + max(map(len, rows))
        ended = [[end, *row] for row in rows]
        return {
            "bits_per_byte": merged_scoring.text_bits_per_byte(
                model, params, ended, sizes, width=-(-width // 16) * 16
            ),
            "bytes_per_token": sum(len(t.encode()) for t in texts) / sum(map(len, rows)),
        }

    own = [setting.source.encode(text) for text in texts]
    mine = [large.encode(text) for text in texts]
    found = {"own": line(setting.model, setting.params, own, setting.source.token_bytes)}
    for name, provider in setting.providers.items():
        params = large.params
        if name != how.provider:
            tables = providers.in_chunks(provider, large.tokens, how.chunk)
            params = token_tables.with_tables(setting.params, tables)
        found[f"large, {name}"] = line(large.config, params, mine, large.sizes)
    return found


def hidden_states(large: Large, texts: Sequence[str], count: int) -> np.ndarray:
    """Final hidden states [count, D] in the middle of texts: the queries of decoding."""
    rows = [large.encode(text) for text in texts]
    width = min(map(len, rows))
    ids = jnp.array([row[:width] for row in rows], jnp.int32)
    hidden = transformer.apply(large.config, large.params, ids, with_logits=False).hidden
    flat = np.asarray(hidden, np.float32)[:, width // 2 :].reshape(-1, large.config.embed_dim)
    return flat[np.random.default_rng(0).permutation(len(flat))[:count]]


def decode(
    setting: Setting, config: ConfigDict, large: Large, index: Any, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Continues the same prompts in the model's own tokens and in the large vocabulary.

    Speed-ups are in bytes a second, over the model's own tokens.
    """
    how, sampling = config.decode, SamplingConfig(temperature=config.decode.temperature)
    prompts = list(texts)[: how.num_prompts]
    own = [setting.source.encode(text) for text in prompts]
    mine = [large.encode(text) for text in prompts]
    stop, short = StopConfig(how.own_tokens), StopConfig(how.large_tokens)
    cache = setting.cache(config.vocabulary.provider, 10_000)()
    merged = merging.merge(
        [[setting.source.tokens[i] for i in row] for row in own], None, setting.valid
    )
    shorter = merged_prompts.prompt_ids(cache, merged.tokens, setting.model.vocab_size)
    models = {"target": setting.params, merged_prompts.ROLE: cache.table}
    huge = {"target": large.params, inverted_lists.ROLE: jax.device_put(index)}
    arms: dict[str, tuple[Any, Any, list[list[int]], StopConfig, np.ndarray]] = {
        "own tokens": (
            autoregressive(setting.model, sampling), models, own, stop, setting.source.token_bytes
        ),
        "own tokens, merged prompts": (
            merged_prompts.merged_prompts(setting.model, sampling), models, shorter, stop,
            setting.source.token_bytes,
        ),
        "large vocabulary, all rows": (
            _ann(large, sampling, config, search="exact"), huge, mine, short, large.sizes
        ),
    }  # fmt: skip
    for probes in how.probes:
        arms[f"large vocabulary, {probes} probes"] = (
            _ann(large, sampling, config, probes=probes), huge, mine, short, large.sizes
        )  # fmt: skip
    runs = {
        label: (
            lambda method=method, params=params, rows=rows, stop=stop: generation.generate(
                params, rows, method, stop, seed=config.seed
            )
        )
        for label, (method, params, rows, stop, _) in arms.items()
    }
    measured = timing.side_by_side(runs, how.repeats)
    lines = [_line(label, measured, arms[label][4], how, prompts, arms[label][2]) for label in arms]
    for line in lines:
        line["speedup"] = line["bytes_per_second"] / lines[0]["bytes_per_second"]
        logging.info(
            "%s: %.0f bytes/s, %.2f tokens a byte", line["label"], line["bytes_per_second"],
            line["tokens_per_byte"],
        )  # fmt: skip
    return lines


def _ann(large: Large, sampling: SamplingConfig, config: ConfigDict, **options: Any) -> Any:
    chosen = {"k": config.vocabulary.k, **options}
    return methods.build("ann_vocabulary", {"target": large.config}, sampling, chosen)


def _line(
    label: str,
    measured: Mapping[str, Any],
    sizes: np.ndarray,
    how: ConfigDict,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """A line of the results; agreement is with exact decoding of the same vocabulary."""
    entry = ConfigDict({"method": label, "options": {}})
    family = "large vocabulary, all rows" if label.startswith("large") else "own tokens"
    mine, reference = measured[label], measured[family]
    found = records.record(entry, label, how.temperature, len(prompts), mine, reference)
    rows: list[Row] = mine["result"]
    written = int(sum(sizes[token] for row in rows for token in row.token_ids))
    tokens = sum(len(row.token_ids) for row in rows)
    found |= {
        "keeps_law": label == family,
        "bytes": written,
        "bytes_per_second": written / mine["median"],
        "tokens_per_byte": tokens / written,
        "prompt_tokens": sum(map(len, ids)) / len(ids),
        "lossless": {"check": f"as {family}: {found['agreement']:.0%} of tokens"},
    }
    return found


def summarise(
    found: Mapping[str, Any], config: ConfigDict
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Charts of recall over probes and of time over |V|, and what is claimed of them."""
    how = config.vocabulary
    series = [
        {
            "label": f"{metric}: {name}",
            "x": [p["probes"] for p in found["search"][metric][0]["recall"]],
            "y": [p[field] for p in found["search"][metric][0]["recall"]],
        }
        for metric in inverted_lists.METRICS
        for field, name in (("recall", "arg-max found"), ("mass", f"share of top-{how.k} mass"))
    ]
    recall_chart = {
        "title": f"Search among {found['search'][how.metric][0]['size']:,} tokens",
        "x_label": "lists searched", "y_label": "of exhaustive search", "x_scale": "log",
        "series": series,
    }  # fmt: skip
    by_size = found["search"][how.metric]
    time_chart = {
        "title": f"Choosing a token ({how.batch_size} rows, {how.timed_probes} lists)",
        "x_label": "tokens of the vocabulary", "y_label": "milliseconds",
        "x_scale": "log", "y_scale": "log",
        "series": [
            {
                "label": label,
                "x": [entry["size"] for entry in by_size],
                "y": [1000 * entry["seconds"][label] for entry in by_size],
            }
            for label in ("exhaustive", "index")
        ],
    }  # fmt: skip
    first, last = by_size[0], by_size[-1]
    growth = last["size"] / first["size"]
    slower = last["seconds"]["index"] / first["seconds"]["index"]
    claims = []
    for metric in inverted_lists.METRICS:
        lines = found["search"][metric][0]["recall"]
        at = next((p for p in lines if p["probes"] >= how.timed_probes), lines[-1])
        claims.append(
            results.at_least(
                f"search by {metric}: recall of the arg-max with {at['probes']} lists "
                f"({at['compared']:.1%} of the rows)", at["recall"], 0.9,
            )
        )  # fmt: skip
    claims += [
        results.at_least(
            f"search: |V| grows {growth:.0f} times, time of a step {slower:.1f} times: ratio",
            growth / slower, 1.0,
        ),
        results.at_least(
            f"search: time of exhaustive scoring over that of the index, |V| = {last['size']:,}",
            last["seconds"]["exhaustive"] / last["seconds"]["index"], 1.0,
        ),
        results.at_least(
            "large vocabulary: bytes a token over those of the model's own",
            found["loss"][f"large, {how.provider}"]["bytes_per_token"]
            / found["loss"]["own"]["bytes_per_token"], 1.0,
        ),
        *(
            results.at_least(
                f"decoding: bytes a second, {label} over own tokens",
                rate / found["bytes_per_second"]["own tokens"], 1.0,
            )
            for label, rate in found["bytes_per_second"].items() if label != "own tokens"
        ),
    ]  # fmt: skip
    return {"search": recall_chart, "time of a step": time_chart}, claims
