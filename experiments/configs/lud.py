"""LUD: the next tokens taken together while the model is sure of them (arXiv 2405.15208).

    python -m experiments.run --config=experiments/configs/lud.py:offline --workdir=runs/lud
    python -m experiments.sweep --config=experiments/configs/lud.py:offline --workdir=runs/lud_sweep

The target is a copy of `before` that went on learning, its own confident runs of tokens from
placeholders among it; compared are thresholds of confidence, what the copy was trained on, the
repetition control, and the verified form, with plain decoding of the same copy and n-gram lookup.
The default preset trains a LLaMA-13B of your own on text of your own (the paper's settings are not
public: window 5, confidence 0.9, learning rate 2e-5 are this project's); `:offline` is the embedded
model of Python code, which is seldom sure; `:slots` one of sentences that say what is given, which
nearly always is.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import (
    SLOT_ANSWERS,
    claim,
    comparison,
    fine_tuned,
    method,
    on_slot_sentences,
)
from models.errors import check_choice

PRESETS = ("", "offline", "slots")
WINDOW = 5
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.99)
CONFIDENCES = (0.5, 0.9, 0.99)
# What copies learn from.
_CODE: dict[str, Any] = {"num_steps": 200}
_ANSWERS = SLOT_ANSWERS | {"num_steps": 400, "sequence_length": 128, "eval_batches": 4}


def get_config(preset: str = "") -> ConfigDict:
    """Thresholds, trainings and controls."""
    check_choice("preset", preset, PRESETS)
    config = comparison("lud")
    config.quality = ConfigDict({"own_choices": True, "judge": "before"})
    config.decode.update(temperatures=(0.0,), batch_sizes=(1,))
    if not preset:
        config.models = ConfigDict(
            {
                "target": fine_tuned(
                    "lexical_units", "checkpoints/llama-13b", {"window": WINDOW, "pad_id": 2},
                    dataset="text_files", dataset_options={"files": "data/instructions/*.txt"},
                    sequence_length=1024, batch_size=64, num_steps=3000,
                    optimizer={"learning_rate": 2e-5, "warmup_steps": 100},
                ),
                "before": "checkpoints/llama-13b",
            }
        )  # fmt: skip
        config.data.update(dataset="jsonl_prompts", prompt_field="question", num_prompts=160)
        config.data.builder_options = ConfigDict({"path": "data/questions.jsonl"})
        config.decode.update(max_new_tokens=512, stop_at_eos=True)
        config.decode.methods = (
            *_plain(),
            *(_lud(f"threshold {beta:g}", beta, pad_id=2) for beta in THRESHOLDS),
        )
        return config
    if preset == "slots":
        before, text = "slots_deep", _ANSWERS
        on_slot_sentences(config, num_prompts=24)
    else:
        before, text = "code_deep", _CODE
        config.data.update(num_prompts=12, prompt_tokens=48)
        config.decode.max_new_tokens = 64
    config.models = ConfigDict(
        {
            "target": copy(before, text),
            "before": before,
            "units": copy(before, text, at_units=1.0),
            "anywhere": copy(before, text, at_units=0.0),
        }
    )
    config.decode.methods = (
        *_plain(),
        method("plain, before", "autoregressive", role="before"),
        *(_lud(f"threshold {beta:g}", beta) for beta in THRESHOLDS),
        _lud("no repetition control", 0.5, repetition_control=False),
        _lud("first token not asked", 0.5, first_too=False),
        _lud("untrained placeholders", 0.5, role="before"),
        _lud("trained at units alone", 0.5, role="units"),
        _lud("trained anywhere alone", 0.5, role="anywhere"),
        method("verified", "lud", window=WINDOW, verify=True),
    )
    config.analyses = () if preset == "slots" else ("lexical units",)
    calls, own = "tokens_per_target_call", "own_choices"
    zero: dict[str, Any] = {"temperature": 0.0}
    config.claims = (
        # Published: a quarter to a third fewer calls, on text that the model knows.
        claim("threshold 0.9", calls, 1.33 if preset == "slots" else 1.05, **zero),
        claim("threshold 0.5", calls, 1.0, over="threshold 0.9", **zero),
        claim("threshold 0.9", own, 1.0, over="threshold 0.5", **zero),
        claim("threshold 0.9", own, 0.97, **zero),
        # The text is as good under the model before training: its loss at most 5% higher.
        claim("plain", "judged_loss", 0.95, over="threshold 0.9", **zero),
        claim("threshold 0.5", calls, 1.1, over="untrained placeholders", **zero),
        claim("threshold 0.5", own, 1.0, over="trained at units alone", **zero),
        claim("verified", calls, 1.05, **zero),
        claim("threshold 0.9", "speedup", 1.0, **zero),
    )
    return config


def copy(start: str, text: dict[str, Any], **units: Any) -> ConfigDict:
    """An embedded model after further training with placeholders on text of its own kind."""
    settings = {"window": WINDOW, "pad_id": 0, **units}
    optimizer = {"kind": "muon", "learning_rate": 1e-3, "warmup_steps": 20}
    return fine_tuned("lexical_units", start, settings, batch_size=4, optimizer=optimizer, **text)


def _plain() -> tuple[ConfigDict, ...]:
    return method("plain", "autoregressive"), method("prompt lookup", "prompt_lookup")


def _lud(label: str, beta: float, role: str = "target", **options: Any) -> ConfigDict:
    return method(label, "lud", role=role, window=WINDOW, threshold=beta, **options)


def sweep() -> list[dict[str, object]]:
    """The confidence that cuts units, units with their heads; and prose in the place of code."""

    def setting(name: str, target: ConfigDict, **more: object) -> dict[str, object]:
        return {
            "name": name,
            "models": ConfigDict({"target": target, "before": "code_deep"}),
            "decode.repeats": 1,
            "claims": (),
            "analyses": (),
            "decode.methods": (
                method("plain", "autoregressive"),
                *(_lud(f"threshold {beta:g}", beta) for beta in THRESHOLDS),
            ),
            **more,
        }

    return [
        *(
            setting(f"units of {alpha:g}", copy("code_deep", _CODE, confidence=alpha))
            for alpha in CONFIDENCES
        ),
        setting("headed units of 0.9", copy("code_deep", _CODE, headed=True)),
        setting("prose", copy("code_deep", _CODE), **{"data.dataset": "stdlib_docstrings"}),
    ]
