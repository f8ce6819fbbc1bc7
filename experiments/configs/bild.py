"""BiLD: a small model writes while it is sure, the large one repairs (arXiv 2302.07863).

    python -m experiments.run --config=experiments/configs/bild.py:offline --workdir=runs/bild
    python -m experiments.sweep --config=experiments/configs/bild.py:offline --workdir=runs/b

The default preset has the published thresholds of CNN/DailyMail for a pair of checkpoints of your
own. `:offline` spells numbers in English and German with a pair that is trained in minutes on two
cores; `:aligned` is the same with the draft that learned from its target's answers.
"""

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method
from models.errors import check_choice

PRESETS = ("", "offline", "aligned")
FALLBACKS = (0.2, 0.4, 0.6, 0.9, 1.01)
# Text, since JSON has no infinity.
ROLLBACKS = ("0", "2", "6", "10", "inf")


def get_config(preset: str = "") -> ConfigDict:
    """BiLD at several thresholds against plain decoding and lossless speculation."""
    check_choice("preset", preset, PRESETS)
    config = comparison("bild")
    config.decode.temperatures = (0.0,)
    config.decode.stop_at_eos = True
    thresholds: tuple[tuple[float, str], ...]
    if not preset:
        config.models.target, config.models.draft = "checkpoints/target", "checkpoints/draft"
        config.data.update(dataset="cnn_dailymail", prompt_field="article", num_prompts=1000)
        thresholds = ((0.4, "3"), (0.3, "3"), (0.2, "6"))
    else:
        aligned = "_aligned" if preset == "aligned" else ""
        config.models.target, config.models.draft = "numbers_target", f"numbers_draft{aligned}"
        config.data.update(
            dataset="spelled_numbers",
            prompt_field="question",
            answer_field="solution",
            num_prompts=64,
        )
        config.decode.max_new_tokens = 64
        thresholds = ((0.6, "2"), (0.6, "5"), (0.9, "3"), (0.6, "inf"))
        config.claims = (
            claim("every disagreement", "agreement", 1.0, temperature=0.0),
            claim("every disagreement", "tokens_per_target_call", 1.0, temperature=0.0),
            claim(_label(0.6, "2"), "agreement", 0.95, temperature=0.0),
            claim(_label(0.6, "2"), "tokens_per_target_call", 1.5, temperature=0.0),
        )
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("speculative, 5 drafts", "speculative_sampling", num_draft=5),
        method("every disagreement", "bild", fallback=0.6, rollback="0"),
        *(_bild(*pair) for pair in thresholds),
        method("official loop", "bild", loop="official", policy="official", verify_eos=False),
    )
    return config


def _label(fallback: float, rollback: str) -> str:
    return f"BiLD, FB={fallback:g}, RB={rollback}"


def _bild(fallback: float, rollback: str) -> ConfigDict:
    return method(_label(fallback, rollback), "bild", fallback=fallback, rollback=rollback)


def sweep() -> list[dict[str, object]]:
    """The grid of both thresholds: a setting for each fallback, a method for each rollback."""
    return [
        {
            "name": f"FB={fallback:g}",
            "data.num_prompts": 24,
            "decode.repeats": 1,
            "decode.methods": (
                method("plain", "autoregressive"),
                method("small model alone", "autoregressive", role="draft"),
                *(
                    method(f"RB={rollback}", "bild", fallback=fallback, rollback=rollback)
                    for rollback in ROLLBACKS
                ),
            ),
            "claims": (),
        }
        for fallback in FALLBACKS
    ]
