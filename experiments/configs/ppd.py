"""PPD: trained prompt tokens guess ahead in the call that verifies (arXiv 2405.18628).

    python -m experiments.run --config=experiments/configs/ppd.py:offline --workdir=runs/ppd
    python -m experiments.sweep --config=experiments/configs/ppd.py:offline --workdir=runs/ppd_sweep

Compares prompt tokens in trees of one size (where they serve most, as many at every node, spread at
random), in a chain, and in the size that a latency curve of this machine chooses; one embedding a
token, four, and one that does not see those before it; Medusa's heads and n-gram lookup. The
default preset has the published training (learning rate 0.01, decay 0.8, rows of 1024) and trees
(limit 105) for a Vicuna-7B and text of your own; `:offline` is an embedded model of 8 layers on
Python code, `:slots` one of sentences that say what is given, which can be foretold further ahead.
The sweep is over sizes of trees.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import (
    SLOT_ANSWERS,
    claim,
    comparison,
    medusa_heads,
    method,
    on_slot_sentences,
    prompt_tokens,
)
from models.errors import check_choice

PRESETS = ("", "offline", "slots")
LIMIT = 32  # where shapes of trees are compared
SHAPES = ("dynamic", "uniform", "random", "chain")
LIMITS = (8, 16, 32, 64, 96)
_STEPS = 500


def get_config(preset: str = "") -> ConfigDict:
    """Trees of one size, the chosen size, and other prompt tokens."""
    check_choice("preset", preset, PRESETS)
    config = comparison("ppd")
    training: dict[str, Any] = {"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.0}
    if not preset:
        config.models = ConfigDict({"target": "checkpoints/vicuna-7b-v1.3"})
        config.data.update(dataset="jsonl_prompts", prompt_field="question", num_prompts=80)
        config.data.builder_options = ConfigDict({"path": "data/mt_bench.jsonl"})
        config.decode.update(max_new_tokens=1024, stop_at_eos=True)
        text = {
            "dataset": "text_files", "dataset_options": {"files": "data/sharegpt/*.txt"},
            "sequence_length": 1024, "batch_size": 4, "num_steps": 17_000,
            "optimizer": {**training, "accumulate": 4},
        }  # fmt: skip
        config.parts = ConfigDict({"prompt tokens": prompt_tokens({"cuts": 1}, text)})
        config.decode.methods = (
            method("plain", "autoregressive"),
            method("prompt lookup", "prompt_lookup"),
            *(_ppd(f"PPD, {shape}", limit=105, tree=shape) for shape in SHAPES),
            _ppd("PPD, chosen size", limit=0),
        )
        config.claims = _shapes(0.0)
        config.analyses = ("prompt tokens", "prompt tree size", "prompt tree states")
        return config
    config.models = ConfigDict({"target": "code_deep"})
    # Many cuts in few tokens: a step is a pass over all copies, whatever text is before them.
    text = {
        "num_steps": _STEPS, "sequence_length": 128, "batch_size": 2, "optimizer": training
    }  # fmt: skip
    medusa: dict[str, Any] = {"num_steps": 600, "sequence_length": 128}
    if preset == "slots":
        text, medusa = text | SLOT_ANSWERS, medusa | SLOT_ANSWERS
        config.models.target = "slots_deep"
        on_slot_sentences(config, num_prompts=24)
    many: dict[str, Any] = {"cuts": 32}
    config.parts = ConfigDict(
        {
            "prompt tokens": prompt_tokens(many, text),
            "4 embeddings each": prompt_tokens(many, text, ensemble=4),
            "independent": prompt_tokens(many, text, mask="independent"),
            "Medusa": medusa_heads(medusa),
        }
    )
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("prompt lookup", "prompt_lookup"),
        method("Medusa", "medusa", part="Medusa"),
        *(_ppd(f"PPD, {shape}", limit=LIMIT, tree=shape) for shape in SHAPES),
        _ppd("PPD, chosen size", limit=0),
        _ppd("PPD, 4 embeddings each", "4 embeddings each", limit=LIMIT, ensemble=4),
        _ppd("PPD, independent", "independent", limit=LIMIT, mask="independent"),
    )
    config.decode.update(temperatures=(0.0,), repeats=1)
    config.analyses = ("prompt tokens", "prompt tree size", "prompt tree states")
    config.claims = (
        *_shapes(0.0),
        *(
            claim("PPD, dynamic", "tokens_per_target_call", 1.0, temperature=0.0, over=other)
            for other in ("PPD, independent", "Medusa", "prompt lookup")
        ),
        claim("PPD, dynamic", "tokens_per_target_call", 1.5, temperature=0.0),
        claim("PPD, chosen size", "speedup", 1.0, temperature=0.0),
        claim("PPD, chosen size", "speedup", 0.95, temperature=0.0, over="PPD, dynamic"),
    )
    return config


def _ppd(label: str, part: str = "prompt tokens", **options: Any) -> ConfigDict:
    return method(label, "ppd", part=part, marginals="part", **options)


def _shapes(temperature: float) -> tuple[ConfigDict, ...]:
    """Prompt tokens where they serve most > as many everywhere > a chain; and > at random."""
    return tuple(
        claim(
            f"PPD, {better}", "tokens_per_target_call", 1.0,
            temperature=temperature, over=f"PPD, {worse}",
        )
        for better, worse in (("dynamic", "uniform"), ("dynamic", "random"), ("uniform", "chain"))
    )  # fmt: skip


def sweep() -> list[dict[str, object]]:
    """Sizes of trees, for each way of spreading prompt tokens, on more prompts."""
    return [
        {
            "name": f"limit {limit}",
            "data.num_prompts": 12,
            "decode.temperatures": (0.0,),
            "decode.repeats": 1,
            "lossless.samples": 0,
            "analyses": (),
            "claims": (),
            "decode.methods": (
                method("plain", "autoregressive"),
                *(
                    _ppd(f"PPD, {shape}", limit=limit, tree=shape)
                    for shape in ("dynamic", "uniform", "random")
                ),
            ),
        }
        for limit in LIMITS
    ]
