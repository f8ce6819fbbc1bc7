"""Lexical units of a model on code and on prose, over the confidence that cuts them (LUD)."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from decoding.loop import ModelParams
from experiments import fine_tuned_models, loading, results
from models import masks, transformer
from models.config import TransformerConfig
from training import base_models, batches
from training.datasets import registry
from training.lexical_units import confident_tokens, unit_lengths

DOMAINS = {"code": "stdlib_code", "prose": "stdlib_docstrings"}
CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_ROWS, _TOKENS, _BATCHES = 8, 256, 4
WINDOW = 5


def measure(
    config: ConfigDict,
    configs: Mapping[str, TransformerConfig],
    params: ModelParams,
    prompts: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], list[results.Claim]]:
    """Share of held-out tokens that stand in units of the model `before`, and claims on it."""
    del prompts
    source = fine_tuned_models.source_of(config.models.before)
    if source in base_models.RECIPES:
        source = str(base_models.ensure(source))
    tokenizer = loading.load_tokenizer(source, configs["before"])
    shares = {}
    for domain, dataset in DOMAINS.items():
        documents = batches.TokenizedDocuments(registry.load(dataset, "test"), tokenizer)
        rows = list(batches.eval_batches(documents, batch_size=_ROWS, seq_len=_TOKENS))
        chosen = rows[:: max(1, len(rows) // _BATCHES)][:_BATCHES]
        shares[domain] = unit_shares(configs["before"], params["before"], chosen)
    figure = {
        "title": f"Tokens in units of at most {WINDOW} ({Path(source).name.split('-')[0]})",
        "x_label": "confidence that a token of a unit had",
        "y_label": "share of held-out tokens",
        "series": [
            {"label": domain, "x": list(CONFIDENCES), "y": values}
            for domain, values in shares.items()
        ],
    }
    code, prose = shares["code"], shares["prose"]
    falls = min(a - b for a, b in itertools.pairwise(code))
    at = CONFIDENCES.index(0.9)
    claims = [
        results.at_least("units grow fewer with confidence: least fall of their share", falls, 0),
        results.at_least("tokens in units at 0.9, code over prose",
                         code[at] / max(prose[at], 1e-9), 1.0),
    ]  # fmt: skip
    return figure, claims


def unit_shares(
    config: TransformerConfig, params: Any, rows: Sequence[Mapping[str, np.ndarray]]
) -> list[float]:
    """Share of tokens that stand in units, for each of `CONFIDENCES`."""

    @jax.jit
    def count(params: Any, batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        logits = transformer.apply(
            config, params, batch["tokens"], positions=batch["positions"],
            mask=masks.packed_causal(batch["segment_ids"]),
        ).logits  # fmt: skip
        assert logits is not None
        return [
            unit_lengths(confident_tokens(logits, batch, least), WINDOW).sum()
            for least in CONFIDENCES
        ]

    counts = np.sum([jax.device_get(count(params, dict(batch))) for batch in rows], axis=0)
    total = sum(float(batch["loss_mask"].sum()) for batch in rows)
    return [float(value) for value in counts / total]
