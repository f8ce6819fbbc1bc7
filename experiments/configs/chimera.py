"""Chimera: heads that see all tokens, verified and drafted (arXiv 2402.15758).

    python -m experiments.run --config=experiments/configs/chimera.py:offline --workdir=runs/chimera
    python -m experiments.sweep --config=experiments/configs/chimera.py:offline --workdir=runs/cs

Compares Chimera with Medusa's heads, which see nothing of what was drafted, in the published tree
and in a chain, and with itself without the trigram encoder, the full-context encoder or the
residual; with n-gram lookup and plain decoding. The default preset has the published heads (four,
each with a matrix of its own), tree and training (two epochs of ShareGPT, learning rate 2e-4) for a
Vicuna-7B and text of your own; `:offline` is an embedded model of 8 layers on Python code, whose
heads share the target's matrix and train in two minutes each. The sweep is over what the heads
learn from.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import chimera_heads, claim, comparison, medusa_heads, method
from models.errors import check_choice

PRESETS = ("", "offline")
# What is left out, by label.
ABLATIONS: dict[str, dict[str, bool]] = {
    "without trigrams": {"trigram": False},
    "without full context": {"context": False},
    "without residual": {"residual": False},
}
# The loss of the published code, the data's next tokens alone. The weights of the paper's, which
# distils too, are not known: `:offline` has `Objective`'s.
PUBLISHED: dict[str, Any] = {"distillation": 0.0, "state_weight": 0.0}
CHAIN = "0 00 000 0000"
_STEPS = 600


def get_config(preset: str = "") -> ConfigDict:
    """Chimera beside Medusa-1, and without each of its parts."""
    check_choice("preset", preset, PRESETS)
    config = comparison("chimera")
    if not preset:
        config.models = ConfigDict({"target": "checkpoints/vicuna-7b-v1.3"})
        config.data.update(dataset="jsonl_prompts", prompt_field="question", num_prompts=80)
        config.data.builder_options = ConfigDict({"path": "data/mt_bench.jsonl"})
        config.decode.update(max_new_tokens=1024, stop_at_eos=True)
        text: dict[str, Any] = {
            "dataset": "text_files", "dataset_options": {"files": "data/sharegpt/*.txt"},
            "sequence_length": 1024, "batch_size": 4, "num_steps": 34_000,
            "optimizer": {
                "learning_rate": 2e-4, "warmup_steps": 42, "weight_decay": 0.0, "accumulate": 8,
            },
        }  # fmt: skip
        config.parts = _parts(PUBLISHED, text, own_head=True)
    else:
        config.models = ConfigDict({"target": "code_deep"})
        text = {"num_steps": _STEPS, "sequence_length": 128}
        config.parts = _parts({}, text)
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("prompt lookup", "prompt_lookup"),
        method("Medusa-1, chain", "medusa", part="Medusa-1", tree=CHAIN),
        method("Medusa-1", "medusa", part="Medusa-1"),
        method("Chimera, chain", "chimera", part="Chimera", tree=CHAIN),
        *(method(name, "chimera", part=name) for name in config.parts if name != "Medusa-1"),
    )
    config.guesses = ConfigDict({"better": "Chimera", "worse": "Medusa-1"})
    config.analyses = ("guesses", "five guesses")
    config.claims = tuple(
        claim(better, "tokens_per_target_call", 1.0, temperature=temperature, over=worse)
        for temperature in config.decode.temperatures
        for better, worse in (
            ("Chimera", "Medusa-1"),
            ("Chimera, chain", "Medusa-1, chain"),
            ("Chimera", "Chimera, chain"),
            *(("Chimera", name) for name in ABLATIONS),
        )
    )
    return config


def _parts(objective: dict[str, Any], recipe: dict[str, Any], **heads: Any) -> ConfigDict:
    """Medusa's heads and Chimera's, whole and without each part, trained on the same."""
    return ConfigDict(
        {
            "Medusa-1": medusa_heads(recipe, **heads),
            "Chimera": chimera_heads(objective, recipe, **heads),
            **{
                name: chimera_heads(objective, recipe, **heads, **without)
                for name, without in ABLATIONS.items()
            },
        }
    )


def sweep() -> list[dict[str, object]]:
    """What the heads learn from: weights of the target's distributions and of its states; their own
    drafts or the data's tokens; whether drafts attend to each other's entries."""
    text: dict[str, Any] = {"num_steps": _STEPS, "sequence_length": 128}
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        **{
            f"distillation {weight:g}, states {distance:g}": (
                {"distillation": weight, "state_weight": distance}, {},
            )
            for weight in (0.0, 1.0)
            for distance in (0.0, 0.1, 1.0)
        },
        "reads the data's tokens": ({"reads": "text"}, {}),
        "trained through drafts": ({"detach": False}, {}),
        "drafts unseen": ({}, {"draft_states": False}),
    }  # fmt: skip
    return [
        {
            "name": name,
            "parts": ConfigDict({"Chimera": chimera_heads(objective, text, **heads)}),
            "decode.temperatures": (0.0,),
            "decode.repeats": 1,
            "lossless.samples": 0,
            "analyses": (),
            "claims": (),
            "decode.methods": (
                method("plain", "autoregressive"),
                method("Chimera", "chimera", part="Chimera"),
            ),
        }
        for name, (objective, heads) in settings.items()
    ]
