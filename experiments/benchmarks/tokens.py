"""What a token is, measured: bytes, BPE, words of bytes and pooled words; merging; hypernetworks.

Four models of equal size are trained on the same bytes and compared on the same held-out words:
bits a byte, right words, work and calls a byte, time to write. Beside them what the other ways of
changing tokens cost: merging a batch on the host, and predicting a table of 32k tokens.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from decoding.dynamic_vocabulary import boundaries, merging
from experiments import hierarchical
from experiments import hierarchical_parts as parts
from experiments.configs import hat
from experiments.hierarchical_parts import Setting, Trained
from models import byte_level, files, hypernetwork, token_tables, transformer
from models.config import TransformerConfig
from models.hierarchical import HierarchicalConfig
from training import text_models, text_scores

BYTES, BPE, WORDS, POOLED = "bytes", "BPE", "HAT", "pooled words (p = 4)"
_TABLE = 32_768
_MERGED_BATCH = 32


def config() -> ConfigDict:
    """Text, training and passages of the offline preset of HAT, with room for as many bytes."""
    found = hat.get_config("offline")
    found.passages.tokens = 1024
    return found


def run(repeats: int) -> dict[str, Any]:
    """Trains what is missing and measures all of it.

    Returns:
      `models`: by label what was measured of each; `merging` and `tables`: costs of the others.
    """
    settings = config()
    settings.generation.repeats = repeats
    cache = files.cache_root()
    texts, identity = parts.texts(settings.data, cache)
    passages = text_scores.passages_of(
        texts["test"], rule=settings.words.rule, max_word=settings.words.max_word,
        num_words=settings.passages.words, limit=settings.passages.count,
        context=settings.passages.context,
    )  # fmt: skip
    tokenizers = {
        label: text_models.ensure_tokenizer(texts["train"], size, identity, cache)
        for label, size in ((BYTES, 257), (BPE, settings.tokens.vocab_size))
    }
    setting = Setting(settings, cache, texts, identity, tokenizers[BPE], {}, passages)
    found: dict[str, dict[str, float]] = {}
    for label, model in architectures(setting, tokenizers).items():
        own = setting._replace(tokenizer=tokenizers.get(label, tokenizers[BPE]))
        # HAT itself is the model of HAT's own experiment.
        name = "hat" if label == WORDS else f"tokens_{label.split()[0].lower()}"
        trained = parts.train(own, name, model)
        found[label] = measure(own, trained)
    return {
        "models": found,
        "merging": merge_cost(tokenizers[BPE], texts["test"], repeats),
        "tables": table_cost(repeats),
    }


def architectures(
    setting: Setting, tokenizers: Mapping[str, Path]
) -> dict[str, HierarchicalConfig | TransformerConfig]:
    """Models of as many parameters as HAT has, by label; those of tokens by their inner width."""
    words = parts.architecture(setting.config, {})
    p = 4
    first = words.encoder.vocab_size
    pooled = words.replace(
        encoder=words.encoder.replace(vocab_size=first + p),
        markers=tuple(range(first, first + p)),
        backbone=words.backbone.replace(max_position=words.backbone.max_position * p),
    )
    goal = words.num_params()
    flat = {
        label: parts.flat(setting.config.tokens, text_models.tokenizer_of(directory))
        for label, directory in tokenizers.items()
    }
    matched = {
        label: min(
            (base.replace(mlp_dim=mlp) for mlp in range(8, 16 * base.embed_dim, 8)),
            key=lambda choice: abs(choice.num_params() - goal),
        )
        for label, base in flat.items()
    }
    return {**matched, WORDS: words, POOLED: pooled}


def measure(setting: Setting, model: Trained) -> dict[str, float]:
    """One model on the passages, and writing on from them."""
    found = parts.score(setting, model, setting.passages).report()
    size = model.summary["bytes_per_position"]
    is_words = isinstance(model.config, HierarchicalConfig)
    written, _ = hierarchical.continuations(setting, model, "hat" if is_words else "autoregressive")
    return {
        "parameters": model.summary["num_params"],
        "training megabytes": training_bytes(setting) / 1e6,
        "training seconds": model.summary["seconds"],
        "operations a byte": parts.work(setting, model.config, size),
        **found,
        **written,
    }


def training_bytes(setting: Setting) -> float:
    """Bytes of text that a model was trained on, rows being full."""
    training = setting.config.training
    return training.num_steps * training.batch_size * training.row_bytes


def merge_cost(tokenizer: Path, texts: Sequence[str], repeats: int) -> dict[str, float]:
    """Merging a batch of lines to the level of words: how much shorter, and how long it takes."""
    source = byte_level.normalise(byte_level.read(tokenizer), pre_tokenization="own")
    lines = [line for text in texts for line in text.splitlines() if len(line) > 40]
    batch = [source.backend.encode(line).tokens for line in lines[:_MERGED_BATCH]]
    valid = boundaries.rule("pretokens", source.specials, boundaries.count_pieces(source.backend))
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        merged = merging.merge(batch, None, valid)
        seconds.append(time.perf_counter() - begin)
    whole = merged.lengths
    half = merging.merges_for(whole, whole[-1], 0.5)
    return {
        "sequences": len(batch),
        "tokens": whole[0],
        "merges to words": len(merged.merges),
        "shorter, share": 1 - whole[-1] / whole[0],
        "merges to half of that": half,
        "milliseconds a batch": 1e3 * float(np.median(seconds[1:])),
    }


def table_cost(repeats: int) -> dict[str, float]:
    """Predicting the tables of 32k tokens for a model 128 wide, by a network of random weights."""
    model = TransformerConfig(
        vocab_size=1024, embed_dim=128, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=64,
        mlp_dim=256, max_position=64,
    )  # fmt: skip
    shape = hypernetwork.for_model(model)
    params = hypernetwork.init(shape, jax.random.key(0))
    base = transformer.init(model, jax.random.key(1))
    table = token_tables.joined(token_tables.tables(model, base))
    rng = np.random.default_rng(0)
    surfaces = rng.integers(1, model.vocab_size, (_TABLE, shape.max_surface)).astype(np.int32)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(hypernetwork.predict(shape, params, table, surfaces))
        seconds.append(time.perf_counter() - begin)
    return {
        "tokens": _TABLE,
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(params))),
        "seconds a table": float(np.median(seconds[1:])),
    }


_COLUMNS = (
    "parameters", "training megabytes", "training seconds", "bits_per_byte", "word_accuracy",
    "byte_accuracy", "bytes_per_position", "operations a byte", "backbone calls a byte",
    "decoder calls a byte", "bytes a second",
)  # fmt: skip


def tables(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of what `run` returned, as reports show them."""
    cost = {name: found[name] for name in ("merging", "tables")}
    return [
        parts.table("Models of equal size and equal text", "model", _COLUMNS, found["models"]),
        *(
            {"title": name, "columns": ["", "measured"], "rows": [[k, v] for k, v in row.items()]}
            for name, row in cost.items()
        ),
    ]


def table(found: Mapping[str, Any]) -> str:
    """The same as text."""
    return "\n\n".join(hierarchical.text(one) for one in tables(found))


def charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Loss and right words over the time that a byte takes to write."""
    models: Mapping[str, Mapping[str, float]] = found["models"]
    return [
        {
            "title": title,
            "x_label": "bytes written a second",
            "y_label": title,
            "series": [
                {"label": label, "x": [row["bytes a second"]], "y": [row[field]]}
                for label, row in models.items()
            ],
        }
        for title, field in (("bits a byte", "bits_per_byte"), ("right words", "word_accuracy"))
    ]
