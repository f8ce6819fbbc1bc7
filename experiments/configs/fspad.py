"""FSPAD: a head on the target's features drafts, with feature sampling and partial alignment.

    python -m experiments.run --config=experiments/configs/fspad.py:offline --workdir=runs/fspad
    python -m experiments.sweep --config=experiments/configs/fspad.py:offline --workdir=runs/fs

Compares EAGLE-2's head (arXiv 2406.16858), one of FSPAD's size, feature sampling and partial
alignment alone, and both (arXiv 2408.15562), on one dynamic tree; then FSPAD on a static tree and a
chain, a draft model and n-gram lookup. The default preset has the published tree and EAGLE's
training (800,000 steps at 3e-5) for a Vicuna-7B and text of your own; `:offline` is an embedded
model of 8 layers on Python code, whose heads train in two minutes each. The sweep repeats
the heads with other seeds, and with other weights of the loss on tokens.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, feature_head, method
from models.errors import check_choice

PRESETS = ("", "offline")
# By label: how a head differs from EAGLE's.
HEADS: dict[str, dict[str, Any]] = {
    "EAGLE-2": {},
    "EAGLE-2, FSPAD's size": {"fusion": "mlp"},
    "feature sampling": {"fusion": "product"},
    "partial alignment": {"alignment": "heads"},
    "FSPAD": {"fusion": "product", "alignment": "heads"},
}
# One node less than EAGLE-1's static tree has.
_TREE: dict[str, Any] = {"width": 6, "depth": 4, "num_draft": 24}
_STEPS = 400


def get_config(preset: str = "") -> ConfigDict:
    """Heads on one tree, and trees of one head."""
    check_choice("preset", preset, PRESETS)
    config = comparison("fspad")
    if not preset:
        config.models = ConfigDict({"target": "checkpoints/vicuna-7b-v1.3"})
        config.data.update(dataset="jsonl_prompts", prompt_field="question", num_prompts=480)
        config.data.builder_options = ConfigDict({"path": "data/spec_bench.jsonl"})
        config.decode.update(max_new_tokens=1024, stop_at_eos=True)
        text: dict[str, Any] = {
            "dataset": "text_files", "dataset_options": {"files": "data/sharegpt/*.txt"},
            "sequence_length": 2048, "batch_size": 4, "num_steps": 800_000,
            "optimizer": {"learning_rate": 3e-5, "warmup_steps": 2000, "weight_decay": 0.0},
        }  # fmt: skip
        config.parts = _parts(4096, **text)
        config.decode.methods = (
            method("plain", "autoregressive"),
            method("prompt lookup", "prompt_lookup"),
            *(_head(name) for name in HEADS),
        )
        config.claims = _claims()
        return config
    config.models.target = "code_deep"
    config.parts = _parts(128, num_steps=_STEPS)
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("prompt lookup", "prompt_lookup"),
        method("draft model", "speculative_sampling", num_draft=4),
        *(_head(name, **_TREE) for name in HEADS),
        _head("FSPAD", "FSPAD, static tree", tree="static", depth=4),
        _head("FSPAD", "FSPAD, chain", tree="chain", depth=4),
    )
    config.decode.repeats = 1
    config.analyses = ("feature heads", "feature errors")
    config.claims = _claims() + tuple(
        claim(better, "tokens_per_target_call", 1.0, temperature=temperature, over=worse)
        for temperature in config.decode.temperatures
        for better, worse in (
            ("FSPAD", "FSPAD, static tree"),
            ("FSPAD, static tree", "FSPAD, chain"),
        )
    )
    return config


def _parts(
    target_width: int, seed: int = 0, token_weight: float = 0.1, **recipe: Any
) -> ConfigDict:
    """Heads by name; the plain network of 'FSPAD's size' has as many parameters as both paths."""
    width = 2 * target_width
    sizes = {"product": width, "mlp": width + target_width // 3}
    recipe = {**recipe, "seed": seed}
    return ConfigDict(
        {
            name: feature_head(
                {"token_weight": token_weight},
                recipe,
                **({"width": sizes[head["fusion"]]} if "fusion" in head else {}),
                **head,
            )
            for name, head in HEADS.items()
        }
    )


def _head(part: str, label: str = "", **options: Any) -> ConfigDict:
    return method(label or part, "fspad" if part == "FSPAD" else "eagle2", part=part, **options)


def _claims() -> tuple[ConfigDict, ...]:
    """More tokens a call than EAGLE's head, its wider one, and each addition alone."""
    calls = "tokens_per_target_call"
    return tuple(
        claim(better, calls, 1.0, temperature=temperature, over=worse)
        for temperature in (0.0, 1.0)
        for better, worse in (
            ("FSPAD", "EAGLE-2"),
            ("FSPAD", "EAGLE-2, FSPAD's size"),
            ("feature sampling", "EAGLE-2"),
            ("partial alignment", "EAGLE-2"),
            ("FSPAD", "feature sampling"),
            ("FSPAD", "partial alignment"),
            ("EAGLE-2", "prompt lookup"),
        )
    )


def sweep() -> list[dict[str, object]]:
    """Other seeds of the heads, on more prompts; then EAGLE's head with other losses."""
    fixed: dict[str, object] = {
        "decode.repeats": 1, "lossless.samples": 0, "analyses": (), "claims": (),
        "data.num_prompts": 12,
    }  # fmt: skip
    heads = (method("plain", "autoregressive"), *(_head(name, **_TREE) for name in HEADS))
    seeds = [
        {
            "name": f"seed {seed}",
            "parts": _parts(128, seed, num_steps=_STEPS),
            "decode.methods": heads,
            **fixed,
        }
        for seed in (0, 1, 2)
    ]
    weights = [
        {
            "name": f"token loss x {weight:g}",
            "parts": _parts(128, 0, weight, num_steps=_STEPS),
            "decode.methods": (
                heads[0],
                *(_head(name, **_TREE) for name in ("EAGLE-2", "partial alignment")),
            ),
            **fixed,
        }
        for weight in (0.5, 1.0)
    ]
    return seeds + weights
