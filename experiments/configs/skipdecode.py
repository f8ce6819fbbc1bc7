"""SkipDecode: later tokens by fewer layers, the same for all rows (arXiv 2307.02628).

    python -m experiments.run --config=experiments/configs/skipdecode.py:offline --workdir=runs/skip
    python -m experiments.sweep --config=experiments/configs/skipdecode.py:offline \
        --workdir=runs/skip_sweep

Compares, each with a copy of the model that was fine-tuned for it: SkipDecode's schedules, the same
schedule that leaves early, truncation to the first layers, layers spread evenly (Unified Layer
Skipping), and exits by confidence (CALM-DEC). The default preset has the published schedules of
OPT-6.7B as far as they are known, for a model of your own that was fine-tuned on the task;
`:offline` says meaning representations in sentences, with an embedded model of 8 layers.
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

PRESETS = ("", "offline")
# (max, min) layers of 32 by speed-up, from memory of the paper's table.
PUBLISHED = {2: (22, 11), 3: (14, 8), 4: (10, 6), 5: (8, 5)}
# The same of 8: means of 6, 4, 3 and 2.
SCHEDULES = {"6": (8, 4), "4": (5, 3), "3": (4, 2), "2": (2, 2)}
SPAN = 40  # tokens of a median answer, nearly
THRESHOLDS = (0.2, 0.5, 0.9)


def get_config(preset: str = "") -> ConfigDict:
    """Schedules and baselines at several budgets."""
    check_choice("preset", preset, PRESETS)
    config = comparison("skipdecode")
    config.quality = ConfigDict({"own_choices": False, "judge": "target"})
    config.decode.update(temperatures=(0.0,), batch_sizes=(1, 8), stop_at_eos=True)
    if not preset:
        return _published(config)
    on_slot_sentences(config, num_prompts=48)
    config.decode.repeats = 2
    schedules = {
        **{f"SkipDecode, {n} layers": _schedule(*pair) for n, pair in SCHEDULES.items()},
        "early termination, 4 layers": _schedule(5, 3, place="bottom"),
        "truncation, 4 layers": _schedule(4, 4, place="bottom"),
        "truncation, 2 layers": _schedule(2, 2, place="bottom"),
        "spread, 4 layers": _schedule(4, 4, place="spread"),
    }
    config.models = ConfigDict(
        {
            "target": "slots_deep",
            **{_role(label): copy("skip_decode", s) for label, s in schedules.items()},
            "exits": copy("early_exit"),
        }
    )
    config.decode.methods = (
        method("plain", "autoregressive"),
        *(method(label, "skip_decode", role=_role(label), **s) for label, s in schedules.items()),
        method("not fine-tuned, 4 layers", "skip_decode", **_schedule(5, 3)),
        *(
            method(f"CALM-DEC, {least:g}", "calm", role="exits", threshold=least, span=SPAN)
            for least in THRESHOLDS
        ),
    )
    config.analyses = ("time over layers",)
    config.claims = _claims()
    return config


def _claims() -> tuple[ConfigDict, ...]:
    two, rouge, exact = "SkipDecode, 4 layers", "rouge_l", "exact_match"
    zero: dict[str, Any] = {"temperature": 0.0}
    return (
        # Quality falls slowly to twice the speed, and then faster.
        claim(two, rouge, 0.95, over="plain", **zero),
        claim("SkipDecode, 6 layers", exact, 0.95, over="plain", **zero),
        claim(two, exact, 1.0, over="SkipDecode, 2 layers", **zero),
        # At as many layers.
        claim(two, rouge, 1.0, over="early termination, 4 layers", **zero),
        claim(two, rouge, 1.0, over="truncation, 4 layers", **zero),
        claim(two, rouge, 1.0, over="spread, 4 layers", **zero),
        claim("SkipDecode, 2 layers", rouge, 1.0, over="truncation, 2 layers", **zero),
        claim(two, rouge, 1.0, over="not fine-tuned, 4 layers", **zero),
        claim(two, "speedup", 1.3, **zero),
        claim(two, "speedup", 1.3, batch_size=8, **zero),
        claim("CALM-DEC, 0.5", "layers_per_token", 1.0, over=two, batch_size=8, **zero),
    )


def _published(config: ConfigDict) -> ConfigDict:
    """E2E at four speed-ups; prompts run all layers."""
    start, text = "checkpoints/opt-6.7b-e2e", "data/e2e.jsonl"
    config.data.update(
        dataset="jsonl_prompts", prompt_field="prompt", answer_field="reference", num_prompts=4693
    )
    config.data.builder_options = ConfigDict({"path": text})
    config.decode.update(max_new_tokens=100)
    options: dict[int, dict[str, Any]] = {
        speed_up: {"max_layers": most, "min_layers": least, "span": 100, "warmup": 1}
        for speed_up, (most, least) in PUBLISHED.items()
    }
    recipe: dict[str, Any] = {
        "dataset": "data/e2e_prepared", "loss_on": "response", "sequence_length": 160,
        "batch_size": 64, "num_steps": 3000, "optimizer": {"learning_rate": 2e-5},
    }  # fmt: skip
    config.models = ConfigDict(
        {
            "target": start,
            **{
                f"skip_{speed_up}": fine_tuned("skip_decode", start, settings, **recipe)
                for speed_up, settings in options.items()
            },
            "exits": fine_tuned("early_exit", start, **recipe),
        }
    )
    config.decode.methods = (
        method("plain", "autoregressive"),
        *(
            method(f"SkipDecode, {s}x", "skip_decode", role=f"skip_{s}", **settings)
            for s, settings in options.items()
        ),
        *(
            method(f"CALM-DEC, {least:g}", "calm", role="exits", threshold=least, span=100)
            for least in THRESHOLDS
        ),
    )
    return config


def copy(kind: str, settings: dict[str, Any] | None = None) -> ConfigDict:
    """The embedded model, fine-tuned on the same sentences for what it will run."""
    return fine_tuned(
        kind, "slots_deep", settings, **SLOT_ANSWERS, num_steps=320, batch_size=4,
        sequence_length=128, eval_batches=4,
        optimizer={"kind": "muon", "learning_rate": 2e-3, "warmup_steps": 10},
    )  # fmt: skip


def code_copy(prompt_tokens: int, span: int) -> ConfigDict:
    """Half the layers of the embedded model of code, after prompts of a length."""
    settings = {**_schedule(5, 3), "span": span, "prompt_tokens": prompt_tokens}
    return fine_tuned(
        "skip_decode", "code_deep", settings, num_steps=200, batch_size=4,
        sequence_length=prompt_tokens + span,
        optimizer={"kind": "muon", "learning_rate": 2e-3, "warmup_steps": 10},
    )  # fmt: skip


def _schedule(most: int, least: int, **more: Any) -> dict[str, Any]:
    return {"max_layers": most, "min_layers": least, "span": SPAN, "warmup": 1, **more}


def _role(label: str) -> str:
    return label.replace(", ", "_").replace(" ", "_").lower()


def sweep() -> list[dict[str, object]]:
    """Warm-up layers, and a schedule that falls against one that does not, of equal mean."""
    schedules = {
        **{f"SkipDecode, warm-up {w}": {**_schedule(5, 3), "warmup": w} for w in (0, 1, 2)},
        "constant, 4 layers": _schedule(4, 4),
    }
    return [
        {
            "name": "warm-up and fall",
            "models": ConfigDict(
                {
                    "target": "slots_deep",
                    **{_role(label): copy("skip_decode", s) for label, s in schedules.items()},
                }
            ),
            "decode.batch_sizes": (1,),
            "decode.repeats": 1,
            "claims": (),
            "analyses": (),
            "decode.methods": (
                method("plain", "autoregressive"),
                *(
                    method(label, "skip_decode", role=_role(label), **s)
                    for label, s in schedules.items()
                ),
            ),
        }
    ]
