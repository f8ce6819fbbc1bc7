"""Token editing measured: exact answers over tokens per call, repairs, edits by call.

A comparison of methods (`experiments/comparison.py`) with four further measurements. Models are
`config.models`: 'target' was trained to edit, 'masked' was not. Where they are given, 'own' learned
from its own errors beside random ones, and 'reinforced' is the target after EBPO.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from decoding import generation
from decoding.loop import Method
from decoding.sampling import SamplingConfig
from decoding.stopping import StopConfig
from decoding.unmasking import editing
from decoding.unmasking.block_causal import block_causal
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.method import unmasking
from decoding.unmasking.selectors import Selector
from experiments import comparison, results
from experiments.comparison import Models, Prompts
from models import masks, transformer
from models.config import TransformerConfig

NEVER = 1.0  # an edit threshold that no probability exceeds


@functools.cache
def adjustable(config: TransformerConfig, block_length: int) -> Method:
    """LLaDA2.1 at temperature 0 with its thresholds among the parameters.

    `params['thresholds']` is float32 [2], masks' and edits': a sweep compiles once.
    """
    schedule = Schedule(block_length, absolute=True)
    selector = Selector(
        lambda params, view, prediction, memory: editing.joint(
            view, prediction, memory, *params["thresholds"], max_post_steps=16
        ),
        editing.no_calls,
        edits=True,
        counters=editing.COUNTERS,
        roles=("thresholds",),
    )
    policy = block_causal(config, schedule)
    return unmasking("llada21", config, SamplingConfig(), schedule, selector, policy, filtered=True)


def point(
    models: Models,
    role: str,
    held_out: Prompts,
    stop: StopConfig,
    block_length: int,
    mask_threshold: float,
    edit_threshold: float,
) -> dict[str, float]:
    """Quality and work of one model at one pair of thresholds, all prompts in one batch.

    Tokens count up to the first end of text; commit passes and calls on full blocks count.
    """
    params = {
        "target": models.params[role],
        "thresholds": jnp.array([mask_threshold, edit_threshold], jnp.float32),
    }
    method = adjustable(models.configs[role], block_length)
    rows = generation.generate(params, held_out.ids, method, stop)
    total = generation.total_stats(rows)
    assert held_out.answers is not None
    return {
        "mask_threshold": mask_threshold,
        "edit_threshold": edit_threshold,
        "exact_match": comparison.exact_match(models, rows, held_out.answers),
        "tokens_per_call": total["tokens_per_target_call"],
        "edits_per_100_tokens": 100 * total["edits"] / total["tokens_emitted"],
        "budget_exits": total["budget_exits"],
    }


def edits_by_call(
    models: Models, role: str, held_out: Prompts, stop: StopConfig, block_length: int
) -> tuple[np.ndarray, float]:
    """When edits happen, in S mode.

    Returns:
      Edits by number of the call in its block, float [n], a block; and the share of edits that
      fell into the first half of the calls of their block.
    """
    method = adjustable(models.configs[role], block_length)
    params = {"target": models.params[role], "thresholds": jnp.array([0.5, 0.0])}
    state, slots = generation.begin(params, held_out.ids, method, stop)
    calls: dict[tuple[int, int], list[int]] = {}  # edits of each call, by row and block
    edits = np.asarray(state.stats.extra["edits"])
    while (active := np.asarray(state.active)).any():
        # Calls that only write a cache are not counted there.
        blocks, before = np.asarray(state.inner.block), np.asarray(state.inner.calls)
        state, slots = generation.advance(params, state, slots, method, stop, rounds=1)
        predicted = active & (np.asarray(state.inner.calls) > before)
        now = np.asarray(state.stats.extra["edits"])
        for row in np.flatnonzero(predicted):
            calls.setdefault((int(row), int(blocks[row])), []).append(int(now[row] - edits[row]))
        edits = now
    longest = max(map(len, calls.values()))
    mean = np.array([sum(c[k] for c in calls.values() if len(c) > k) for k in range(longest)])
    early = sum(sum(c[: len(c) // 2]) + len(c) % 2 * c[len(c) // 2] / 2 for c in calls.values())
    return mean / len(calls), float(early / max(mean.sum(), 1))


def repairs(
    config: TransformerConfig,
    params: Any,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    block_length: int,
    seed: int,
) -> dict[str, float]:
    """What one call makes of right texts with one wrong answer token each.

    Args:
      config, params: the model.
      texts: token ids of prompts and answers.
      block_length: of the model.
      seed: of the places and the wrong tokens, which are uniform.

    Returns:
      `repaired`: share of wrong tokens that are predicted right; `found`: share that are predicted
      otherwise than they are; `needless`: share of right tokens of right texts that would be
      overwritten (edit threshold 0), `needless_sure` with an edit threshold of 0.5.
    """
    rng = np.random.default_rng(seed)
    T = -(-max(len(p) + len(a) for p, a in texts) // block_length) * block_length
    assert config.mask_token_id is not None
    clean = np.full((len(texts), T), config.eos_token_ids[0], np.int32)
    answer = np.zeros(clean.shape, bool)
    where = np.zeros(len(texts), int)
    for row, (prompt, rest) in enumerate(texts):
        ids = [*prompt, *rest]
        clean[row, : len(ids)], answer[row, len(prompt) : len(ids)] = ids, True
        where[row] = rng.integers(len(prompt), len(ids))
    rows = np.arange(len(texts))
    wrong = clean.copy()
    choices = np.setdiff1d(np.arange(config.vocab_size), [config.mask_token_id])
    wrong[rows, where] = [rng.choice(choices[choices != token]) for token in clean[rows, where]]

    @jax.jit
    def predict(tokens: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
        index = jnp.arange(T)
        mask = jnp.broadcast_to(
            masks.block_diffusion(index[None], index, block_length), (len(texts), T, T)
        )
        hidden = transformer.apply(config, params, tokens, mask=mask, with_logits=False).hidden
        logits = transformer.unembed(config, params, hidden)
        logits = jnp.where(jnp.arange(config.vocab_size) == config.mask_token_id, -jnp.inf, logits)
        return logits.argmax(axis=-1), jax.nn.softmax(logits).max(axis=-1)

    mended = np.asarray(predict(wrong)[0])[rows, where]
    said, sure = map(np.asarray, predict(clean))
    differs = answer & (said != clean)
    return {
        "repaired": float((mended == clean[rows, where]).mean()),
        "found": float((mended != wrong[rows, where]).mean()),
        "needless": float(differs.sum() / answer.sum()),
        "needless_sure": float((differs & (sure > 0.5)).sum() / answer.sum()),
    }


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs what `config` describes; see `experiments/configs/llada21.py`."""
    begin = time.perf_counter()
    found = comparison.run(config, workdir)
    models = comparison.load_models(config)
    held_out = comparison.held_out_prompts(config, models.tokenizer)
    assert held_out.answers is not None
    stop = generation.stop_config(models.configs["target"], config.decode.max_new_tokens)
    block = config.editing.block_length
    curves = {
        role: [
            point(models, role, held_out, stop, block, mask, edit)
            for edit in config.editing.edit_thresholds
            for mask in config.editing.mask_thresholds
        ]
        for role in config.models
    }
    texts = [
        (ids, models.tokenizer.encode(answer))
        for ids, answer in zip(held_out.ids, held_out.answers, strict=True)
    ]
    mended = {
        role: repairs(models.configs[role], models.params[role], texts, block, config.seed)
        for role in config.models
    }
    by_call, early = edits_by_call(models, "target", held_out, stop, block)
    found["thresholds"], found["repairs"] = curves, mended
    found["figures"] |= {
        "exact answers over tokens per call": _curves(curves),
        "edits by call": {
            "title": "Edits by call of a block (S mode)",
            "x_label": "call of the block",
            "y_label": "edits a block",
            "series": [
                {"label": "target", "x": list(range(1, len(by_call) + 1)), "y": by_call.tolist()}
            ],
        },
    }
    found["claims"] += [*_claims(curves, mended), *_by_mode(found["runs"])]
    found["claims"].append(
        results.at_least("edits in the first half of a block's calls", early, 0.5)
    )
    return found | {"seconds": time.perf_counter() - begin}


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    series = []
    for role, points in curves.items():
        for edit in dict.fromkeys(p["edit_threshold"] for p in points):
            mine = [p for p in points if p["edit_threshold"] == edit]
            series.append(
                {
                    "label": f"{role}, " + ("no edits" if edit == NEVER else f"edits > {edit:g}"),
                    "x": [p["tokens_per_call"] for p in mine],
                    "y": [p["exact_match"] for p in mine],
                }
            )
    return {
        "title": "Exact answers over tokens per call",
        "x_label": "tokens per call, commit and post passes included",
        "y_label": "exact answers",
        "series": series,
    }


def _claims(
    curves: Mapping[str, Sequence[Mapping[str, float]]], mended: Mapping[str, Mapping[str, float]]
) -> list[results.Claim]:
    """What the paper says of editing, at the lowest mask threshold unless said otherwise."""
    at = {
        role: {(p["mask_threshold"], p["edit_threshold"]): p for p in points}
        for role, points in curves.items()
    }
    low = min(mask for mask, _ in at["target"])
    edits = sorted(edit for _, edit in at["target"] if edit != NEVER)
    claims = []
    plain = at["target"][low, NEVER]
    for edit in dict.fromkeys(edits):
        edited = at["target"][low, edit]
        name = f"mask threshold {low:g}, edits above {edit:g} over none"
        claims += [
            results.at_least(
                f"{name}: exact answers gained", edited["exact_match"] - plain["exact_match"], 0.05
            ),
            results.at_least(
                f"{name}: ratio of tokens per call",
                edited["tokens_per_call"] / plain["tokens_per_call"],
                0.75,
            ),
        ]
    lost = [
        at["masked"][mask, NEVER]["exact_match"] - at["masked"][mask, edits[0]]["exact_match"]
        for mask in dict.fromkeys(mask for mask, _ in at["masked"])
    ]
    claims.append(
        results.at_least(
            f"model that did not learn to edit: exact answers lost by edits above {edits[0]:g}, "
            "mean over mask thresholds",
            float(np.mean(lost)),
            0.01,
        )
    )
    claims += [
        results.at_least("wrong tokens repaired by one call", mended["target"]["repaired"], 0.8),
        results.at_least(
            "the same, over the model that did not learn to edit",
            mended["target"]["repaired"] - mended["masked"]["repaired"],
            0.2,
        ),
    ]
    if "own" in at:
        for mask in (low, 0.5):
            own, other = at["own"][mask, edits[0]], at["target"][mask, edits[0]]
            name = f"trained on its own errors too, mask threshold {mask:g}"
            claims += [
                results.at_least(
                    f"{name}: edits saved per 100 tokens",
                    other["edits_per_100_tokens"] - own["edits_per_100_tokens"],
                    0.0,
                ),
                results.at_least(
                    f"{name}: exact answers gained", own["exact_match"] - other["exact_match"], 0.0
                ),
            ]
    if "reinforced" in at:
        before, after = at["target"][0.5, 0.0], at["reinforced"][0.5, 0.0]
        claims += [
            results.at_least(
                "reinforced, S mode: exact answers gained",
                after["exact_match"] - before["exact_match"],
                0.0,
            ),
            results.at_least(
                "reinforced, S mode: ratio of tokens per call",
                after["tokens_per_call"] / before["tokens_per_call"],
                1.0,
            ),
        ]
    return claims


def _by_mode(records: Sequence[Mapping[str, Any]]) -> list[results.Claim]:
    """S is fastest and Q most accurate; multi-block editing is slower and more accurate."""
    runs = {record["label"]: record for record in records}
    faster = (("S", "Q"), ("Q", "LLaDA2.0"), ("S", "S + multi-block"), ("Q", "Q + multi-block"))
    better = (
        ("Q", "LLaDA2.0"),
        ("LLaDA2.0", "S"),
        ("S + multi-block", "S"),
        ("Q + multi-block", "Q"),
    )
    claims = [
        results.at_least(
            f"tokens per call, {a} over {b}",
            runs[a]["tokens_per_target_call"] / runs[b]["tokens_per_target_call"],
            1.0,
        )
        for a, b in faster
        if a in runs and b in runs
    ]
    return claims + [
        results.at_least(
            f"exact answers, {a} less {b}", runs[a]["exact_match"] - runs[b]["exact_match"], 0.0
        )
        for a, b in better
        if a in runs and b in runs
    ]
