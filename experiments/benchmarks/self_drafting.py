"""Methods in which a model drafts for itself or runs fewer layers, side by side on one target.

Methods, their trained parts and fine-tuned copies are those of the systems' own configs, so that
nothing is trained that a run of a system has trained; SkipDecode alone, whose config is about
another model, gets a copy of this target. Beside tokens and time stands what a machine would pay
that waits for its memory: the weights read for a token, in those of a plain call.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import comparison, trained_parts
from experiments.config_parts import comparison as comparison_config
from experiments.config_parts import method
from experiments.configs import skipdecode
from models.config import TransformerConfig
from models.errors import check_choice

TARGET = "code_deep"
PROMPT_TOKENS, NEW_TOKENS = 48, 64
PLAIN = "plain"
# By label here: the config that a method is from, and its label there.
PICKS: dict[str, tuple[str, str]] = {
    "Kangaroo": ("kangaroo", "exit 2"),
    "EAGLE-2": ("fspad", "EAGLE-2"),
    "FSPAD": ("fspad", "FSPAD"),
    "Medusa-1": ("chimera", "Medusa-1"),
    "Chimera": ("chimera", "Chimera"),
    "PPD": ("ppd", "PPD, dynamic"),
    "M2R2, drafting": ("m2r2", "self-speculation"),
    "M2R2, early exit": ("m2r2", "ARLA 0.9"),
    "LUD": ("lud", "threshold 0.5"),
    "LUD, verified": ("lud", "verified"),
}


def config(labels: Sequence[str] = ()) -> ConfigDict:
    """A comparison of the methods, with the parts and models that they need.

    Args:
      labels: of the methods beside plain decoding; none for all.
    """
    found = comparison_config("self_drafting")
    found.models = ConfigDict({"target": TARGET})
    found.data.update(num_prompts=8, prompt_tokens=PROMPT_TOKENS)
    found.decode.update(max_new_tokens=NEW_TOKENS, batch_sizes=(1, 8), temperatures=(0.0, 1.0))
    entries = {
        "draft model": method("draft model", "speculative_sampling", num_draft=4),
        "Token Recycling": method(
            "Token Recycling", "token_recycling", hot=True, template="nodes8"
        ),
        **{label: _picked(found, label, *pick) for label, pick in PICKS.items()},
        "SkipDecode": _skipping(found),
    }
    for label in labels:
        check_choice("lines", label, (PLAIN, *entries))
    chosen = {k: entry for k, entry in entries.items() if not labels or k in labels}
    found.decode.methods = (method(PLAIN, "autoregressive"), *chosen.values())
    roles = {entry.role for entry in chosen.values()} | {"target"}
    found.models = ConfigDict({role: found.models[role] for role in found.models if role in roles})
    if "draft model" in chosen:
        found.models.draft = "code_draft"
    return found


def _picked(found: ConfigDict, label: str, system: str, theirs: str) -> ConfigDict:
    """A method of a system's config, whose part or model is added to `found` under its own name."""
    own = importlib.import_module(f"experiments.configs.{system}").get_config("offline")
    (entry,) = (entry for entry in own.decode.methods if entry.label == theirs)
    entry = ConfigDict({**entry.to_dict(), "label": label})
    if entry.part:
        name = f"{system}: {entry.part}"
        found.parts[name] = own.parts[entry.part]
        entry.part = name
    model = own.models[entry.role]
    if model != TARGET:
        entry.role = f"{system}_{entry.role}"
        found.models[entry.role] = model
    return entry


def _skipping(found: ConfigDict) -> ConfigDict:
    found.models.skipping = skipdecode.code_copy(PROMPT_TOKENS, NEW_TOKENS)
    options = found.models.skipping.settings.to_dict()
    del options["prompt_tokens"]
    return method("SkipDecode", "skip_decode", role="skipping", **options)


def run(repeats: int, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One record a method, temperature and batch size; see `config` and `cost`."""
    settings = config(labels)
    settings.decode.repeats = repeats
    return measure(settings)


def measure(settings: ConfigDict) -> list[dict[str, Any]]:
    """The comparison's lines, with `layers` and `weights` a token."""
    lines = comparison.run(settings, Path())["runs"]
    models = comparison.load_models(settings)
    parts = trained_parts.load(settings, models.configs)
    entries = {entry.label: entry for entry in settings.decode.methods}
    records = []
    for line in lines:
        part = parts.get(entries[line["label"]].get("part"))
        draft = models.configs.get("draft") if line["method"] == "speculative_sampling" else None
        size = draft.num_params() if draft else sum(leaf.size for leaf in jax.tree.leaves(part))
        target = models.configs[line["role"]]
        records.append(line | cost(line["stats"], target, size, bool(part)))
    return records


def cost(
    stats: Mapping[str, Any], target: TransformerConfig, drafter: int, has_part: bool
) -> dict[str, float]:
    """What a token took, from a run's counters.

    Args:
      stats: of all rows; methods without `layers_run` run all layers in every call.
      target: the model.
      drafter: parameters that a draft call reads beside the target's.
      has_part: whether they are a trained part, which is read at least once a target call.

    Returns:
      `layers`: layers of the target run for a token, a layer counted once a call; `weights`:
      parameters read for a token over those of a plain call, at batch 1.
    """
    L, head = target.num_layers, target.vocab_size * target.embed_dim
    tables = head if target.tie_embeddings else 2 * head
    layer = (target.num_params() - tables) / L
    calls, tokens = stats["target_calls"], stats["tokens_emitted"]
    layers = stats.get("layers_run", L * calls)
    drafts = max(stats["draft_calls"], calls if has_part else 0)
    read = layers * layer + calls * head + drafts * drafter
    return {"layers": layers / tokens, "weights": read / (L * layer + head) / tokens}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| method | T | batch | tokens/call | layers/token | weights/token | speed-up | as plain "
        "| lossless |",
        "| --- |" + " --- |" * 8,
    ]
    for r in records:
        held = r["lossless"].get("held")
        lossless = "by design not" if held is None else ("yes" if held else "**no**")
        lines.append(
            f"| {r['label']} | {r['temperature']:g} | {r['batch_size']} "
            f"| {r['tokens_per_target_call']:.2f} | {r['layers']:.2f} | {r['weights']:.2f} "
            f"| {r['speedup']:.2f}x | {r['agreement']:.0%} | {lossless} |"
        )
    return "\n".join(lines)


def charts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Speed-up that weights promise at batch 1 and the measured one, over tokens a call."""
    charts = []
    for temperature in dict.fromkeys(r["temperature"] for r in records):
        mine = [r for r in records if (r["temperature"], r["batch_size"]) == (temperature, 1)]
        for title, value in (
            ("Promised by weights", lambda r: 1 / r["weights"]),
            ("Measured", lambda r: r["speedup"]),
        ):
            charts.append(
                {
                    "title": f"{title}, temperature {temperature:g}",
                    "x_label": "tokens a target call",
                    "y_label": "speed-up",
                    "series": [
                        {"label": r["label"], "x": [r["tokens_per_target_call"]], "y": [value(r)]}
                        for r in mine
                    ],
                }
            )
    return charts
