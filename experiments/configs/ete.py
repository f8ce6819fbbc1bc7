"""ETE: explore, then exploit ('From Bits to Rounds', arXiv 2511.21103).

    python -m experiments.run --config=experiments/configs/ete.py:offline --workdir=runs/ete
    python -m experiments.sweep --config=experiments/configs/ete.py:offline --workdir=runs/ete_sweep

Compares rules that write only sure tokens with ones that open further blocks, explore uncertain
tokens, or both, with and without looking ahead, and measures what each round carries. The paper's
settings and numbers are not public: the default preset is LLaDA-8B-Instruct with our defaults on
problems of your own; published is only that fewer rounds are needed than by confidence alone.
`:offline` is the embedded model of sums, `:code` that of Python code.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method

PLAIN = "one token a step"
ETE = "ETE"


def get_config(preset: str = "") -> ConfigDict:
    """The rules at temperature 0."""
    config = comparison("ete")
    config.models = ConfigDict({"target": "checkpoints/llada-8b-instruct"})
    config.decode.update(temperatures=(0.0,), batch_sizes=(8,), repeats=1, stop_at_eos=True)
    block = 32
    if preset == "offline":
        config.models.target, block = "arithmetic_mdlm", 16
        config.data.update(
            dataset="arithmetic", prompt_field="question", answer_field="solution", num_prompts=24,
            builder_options={"size": 30_000, "levels": (7,)},
        )  # fmt: skip
        config.decode.max_new_tokens = 96
    elif preset == "code":
        config.models.target = "code_mdlm"
        block = 16
        config.data.update(num_prompts=16, prompt_tokens=48)
        config.decode.update(max_new_tokens=64, stop_at_eos=False)
    else:
        config.data.update(
            dataset="jsonl_prompts", split="test", prompt_field="prompt", num_prompts=256,
            builder_options={"path": "data/gsm8k.jsonl"},
        )  # fmt: skip
        config.decode.max_new_tokens = 256
    config.decode.methods = _methods(block)
    config.analyses = ("information", "exact chains")
    where: dict[str, Any] = {"temperature": 0.0, "batch_size": 8}
    config.claims = (
        *(
            claim(ETE, "tokens_per_target_call", 1.0, over=other, **where)
            for other in ("threshold 0.9", "factor 0.9", "blocks ahead", "exploring")
        ),
        claim("ETE, looking ahead", "tokens_per_target_call", 1.0, over=ETE, **where),
    )
    if preset == "offline":
        config.claims += (claim(ETE, "exact_match", 0.98, over="threshold 0.9", **where),)
    return config


def _ete(label: str, block: int, **options: Any) -> ConfigDict:
    return method(label, "ete", block_length=block, **options)


def _rule(block: int, rule: str, value: float) -> ConfigDict:
    options: dict[str, Any] = {"rule": rule, rule: value, "block_length": block}
    return method(f"{rule} {value:g}", "llada", **options)


def _methods(block: int) -> tuple[ConfigDict, ...]:
    return (
        method(PLAIN, "llada", block_length=block),
        _rule(block, "threshold", 0.7),
        _rule(block, "threshold", 0.9),
        _rule(block, "factor", 0.9),
        _ete("blocks ahead", block, explore="never"),
        _ete("exploring", block, horizon=0),
        _ete(ETE, block),
        _ete("ETE by factor", block, rule="factor"),
        _ete("ETE, looking ahead", block, candidates=4),
        _ete("ETE, prefix cache", block, cache="prefix"),
        _ete("control: random", block, score="random"),
        _ete("control: most confident", block, score="confident"),
    )


def sweep() -> list[dict[str, object]]:
    """For `:offline`: score, schedule, k, horizon, open ratio, error budget, threshold, guard."""
    block = 16
    plain = method(PLAIN, "llada", block_length=block)
    values: dict[str, tuple[Any, ...]] = {
        "score": ("frontier", "entropy", "margin", "leftmost", "random", "confident"),
        "explore": ("starved", "alternate", "every", "never"),
        "per_block": (1, 2, 4),
        "horizon": (0, 1, 2, 4),
        "open_ratio": (0.25, 0.5, 0.75),
        "error_budget": (0.0, 0.5, 2.0, 8.0),
        "threshold": (0.7, 0.8, 0.9, 0.95, 0.99),
        "eos_guard": (True, False),
    }
    return [
        {
            "decode.methods": (
                plain, *(_ete(f"{option} {value}", block, **{option: value}) for value in tried),
            ),
            "decode.repeats": 1,
            "analyses": (),
            "claims": (),
            "name": option,
        }
        for option, tried in values.items()
    ]  # fmt: skip
