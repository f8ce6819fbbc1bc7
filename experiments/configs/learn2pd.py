"""Learn2PD: a learned filter for unmasking, and end-of-text prediction (arXiv 2509.25188).

    python -m experiments.run --config=experiments/configs/learn2pd.py:offline \
        --workdir=runs/learn2pd
    python -m experiments.sweep --config=experiments/configs/learn2pd.py:offline \
        --workdir=runs/learn2pd_sweep

Compares one token a step, confidence thresholds and the filter, each with and without end-of-text
prediction and block caches. The filter is trained on first use, on what a greedy oracle does with
prompts that are not decoded here. The default preset has the published settings (LLaDA-8B-Instruct,
prompts of FLAN, canvases of 256, blocks of 32, tau 0.96) for files of your own; published at 1024
tokens of GSM8K: 12.2x with the filter, 22.6x with end-of-text prediction too, 57.5x with a dual
cache. `:offline` is the embedded model of sums; its filter learns from sums, and from text that the
model was not trained for. `:code` is that of Python code, which is far less sure of itself.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, learned_filter, method

PLAIN = "one token a step"
FILTER = "filter"
BOTH = "filter, end of text"
_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_TAUS = (0.8, 0.9, 0.96, 0.99)
_DEPTHS = (1, 2, 4)


def get_config(preset: str = "") -> ConfigDict:
    """The filter beside its baselines at temperature 0."""
    config = comparison("learn2pd")
    config.models = ConfigDict({"target": "checkpoints/llada-8b-instruct"})
    config.decode.update(temperatures=(0.0,), batch_sizes=(1,), repeats=2, stop_at_eos=True)
    if preset == "offline":
        config.models.target = "arithmetic_mdlm"
        config.data.update(
            dataset="arithmetic", prompt_field="question", answer_field="solution", num_prompts=24,
            builder_options={"size": 30_000, "levels": (7,)},
        )  # fmt: skip
        config.decode.update(max_new_tokens=96, batch_sizes=(8,))
        block = 16
        sources = (
            {
                "dataset": "arithmetic",
                "num_prompts": 112,
                "options": {"size": 30_000, "levels": (7,)},
            },
            {"dataset": "spelled_numbers", "num_prompts": 16},
        )
        training = {"num_steps": 4000, "split_by": "prompt"}
        config.parts = ConfigDict(
            {
                f"{depth} layers": learned_filter(
                    *sources, new_tokens=96, block_length=block, depth=depth, **training
                )
                for depth in _DEPTHS
            }
        )
    elif preset == "code":
        config.models.target = "code_mdlm"
        config.data.update(num_prompts=16, prompt_tokens=48)
        config.decode.update(max_new_tokens=64, batch_sizes=(8,), repeats=1, stop_at_eos=False)
        block = 16
        source = {
            "dataset": "stdlib_code", "field": "text", "num_prompts": 40, "prompt_tokens": 48,
        }  # fmt: skip
        config.parts = ConfigDict(
            {
                f"{depth} layers": learned_filter(
                    source, new_tokens=64, block_length=block, depth=depth, num_steps=4000,
                    split_by="prompt",
                )
                for depth in _DEPTHS
            }
        )  # fmt: skip
    else:
        # Lines {"prompt": "..."}; published: 40 prompts of each of FLAN's 66 groups of tasks.
        config.data.update(
            dataset="jsonl_prompts", split="test", prompt_field="prompt", num_prompts=1319,
            builder_options={"path": "data/gsm8k.jsonl"},
        )  # fmt: skip
        config.decode.max_new_tokens = 1024
        block = 32
        source = {
            "dataset": "jsonl_prompts", "options": {"path": "data/flan.jsonl"}, "field": "prompt",
            "split": "test", "num_prompts": 2640,
        }  # fmt: skip
        config.parts = ConfigDict(
            {"2 layers": learned_filter(source, new_tokens=256, block_length=block, depth=2)}
        )
    config.decode.methods = _on_code(block) if preset == "code" else _methods(block)
    config.analyses = ("greedy oracle",)
    batch = config.decode.batch_sizes[0]
    where: dict[str, Any] = {"temperature": 0.0, "batch_size": batch}
    config.claims = (
        # Within a point of plain decoding at three times fewer calls.
        claim(FILTER, "tokens_per_target_call", 3.0, over=PLAIN, **where),
        claim(FILTER, "tokens_per_target_call", 1.0, over="threshold 0.9", **where),
        claim(BOTH, "speedup", 1.0, over=FILTER, **where),
        claim(BOTH + ", dual cache", "speedup", 1.0, over=BOTH, **where),
    )
    if preset == "code":  # no text of code ends within its window
        config.claims = (
            claim(FILTER, "tokens_per_target_call", 3.0, over=PLAIN, **where),
            claim(FILTER, "agreement", 1.0, over="threshold 0.9", **where),
            claim(FILTER, "tokens_per_target_call", 1.0, over="threshold 0.9", **where),
        )
    if preset == "offline":
        config.claims += (claim(FILTER, "exact_match", 0.99, over=PLAIN, **where),)
    return config


def _filter(label: str, block: int, depth: int = 2, **options: Any) -> ConfigDict:
    """Learn2PD's method."""
    return method(label, "learn2pd", part=f"{depth} layers", block_length=block, **options)


def _threshold(least: float, block: int) -> ConfigDict:
    label = f"threshold {least:g}"
    return method(label, "llada", rule="threshold", threshold=least, block_length=block)


def _methods(block: int) -> tuple[ConfigDict, ...]:
    return (
        method(PLAIN, "llada", block_length=block),
        *(_threshold(least, block) for least in (0.7, 0.9)),
        _filter(FILTER, block, eotp=False),
        method("end of text", "learn2pd", rule="quota", block_length=block),
        method(
            "threshold 0.9, end of text", "learn2pd", rule="threshold", threshold=0.9,
            block_length=block,
        ),
        _filter(BOTH, block),
        _filter(f"{BOTH}, prefix cache", block, cache="prefix"),
        _filter(f"{BOTH}, dual cache", block, cache="dual"),
    )  # fmt: skip


def _on_code(block: int) -> tuple[ConfigDict, ...]:
    """Single thresholds against tau and layers: quality is agreement with plain decoding."""
    return (
        method(PLAIN, "llada", block_length=block),
        *(_threshold(least, block) for least in _THRESHOLDS),
        *(
            _filter(FILTER if tau == 0.96 else f"tau {tau:g}", block, eotp=False,
                    filter_threshold=tau)
            for tau in _TAUS
        ),
        *(_filter(f"{depth} layers", block, depth, eotp=False) for depth in _DEPTHS if depth != 2),
        _filter(f"{FILTER}, prefix cache", block, eotp=False, cache="prefix"),
        _filter(f"{FILTER}, dual cache", block, eotp=False, cache="dual"),
    )  # fmt: skip


def sweep() -> list[dict[str, object]]:
    """For `:offline`: the length of the canvas, on which cutting it early depends.

    Thresholds, tau and layers are side by side in `:code`; on sums they are all alike.
    """
    block = 16
    return [
        {
            "decode.methods": (
                method(PLAIN, "llada", block_length=block),
                method("end of text", "learn2pd", rule="quota", block_length=block),
                _filter(FILTER, block, eotp=False),
                _filter(BOTH, block),
                _filter(f"{BOTH}, dual cache", block, cache="dual"),
            ),
            "decode.repeats": 1,
            "decode.max_new_tokens": canvas,
            "data.num_prompts": 8,
            "analyses": (),
            "claims": (),
            "name": f"canvas {canvas}",
        }
        for canvas in (64, 128, 256, 512)
    ]
