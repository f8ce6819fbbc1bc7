"""LLaDA2.1: token editing in block diffusion language models (arXiv 2602.08676).

    python -m experiments.run --workdir=runs/llada21
        --config=experiments/configs/llada21.py:offline
    python -m experiments.sweep --workdir=runs/llada21_sweep
        --config=experiments/configs/llada21.py:offline

Compares the speedy and the quality mode (S, Q) and LLaDA2.0's sampler with one token a call, and
the thresholds of masks and edits on models that learned to edit and that did not. The default
preset has the published settings (blocks of 32, at most 16 calls on a full block, temperature 0;
S: 0.5 and 0, Q: 0.7 and 0.5; published, mean of 33 tasks, LLaDA2.1-flash: S 72.34 at 5.93 tokens
a call, Q 73.54 at 3.64, LLaDA2.0-flash 72.43 at 3.08) for checkpoints and problems of your own;
`:offline` is the embedded models of column sums with blocks of 16.

Tokens per call count up to the first end of text (the paper does not say); commit passes and calls
on full blocks count as calls.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import comparison, method
from experiments.token_editing import NEVER


def get_config(preset: str = "") -> ConfigDict:
    """Modes, and thresholds of masks and edits."""
    config = comparison("llada21")
    config.experiment = "token_editing"
    offline = preset == "offline"
    config.models = ConfigDict(
        {"target": "arithmetic_edit_mdlm", "masked": "arithmetic_block_mdlm"}
        if offline
        else {"target": "checkpoints/llada2.1", "masked": "checkpoints/llada2.0"}
    )
    config.data.update(
        dataset="arithmetic", num_prompts=64, prompt_field="question", answer_field="solution"
    )
    if not offline:
        config.data.update(dataset="jsonl_prompts", split="train", num_prompts=200)
        config.data.builder_options = ConfigDict({"path": "data/problems.jsonl"})
    block = 16 if offline else 32
    config.editing = ConfigDict(
        {
            "block_length": block,
            "mask_thresholds": (0.3, 0.5, 0.7, 0.9, 0.95),
            "edit_thresholds": (NEVER, 0.0, 0.5, 0.9),
        }
    )
    config.decode.update(
        temperatures=(0.0,),
        batch_sizes=(8,),
        max_new_tokens=96 if offline else 16384,
        stop_at_eos=True,
        repeats=1,
        methods=modes(block),
    )
    return config


def modes(block: int, **options: Any) -> tuple[ConfigDict, ...]:
    """The published modes with blocks of `block` tokens, and what they are compared with."""

    def editing(label: str, mode: str, role: str = "target", **more: Any) -> ConfigDict:
        given = {"mode": mode, "block_length": block, **options, **more}
        return method(label, "llada21", role=role, **given)

    plain: dict[str, Any] = {"block_length": block}
    return (
        method("one token a call", "llada2", role="masked", mask_threshold=1.0, **plain),
        method("LLaDA2.0", "llada2", role="masked", **plain),
        method("LLaDA2.0 rule", "llada2", **plain),
        editing("Q", "Q"),
        editing("S", "S"),
        editing("S without edits", "S", edit_threshold=NEVER),
        editing("Q + multi-block", "Q", revisit=2),
        editing("S + multi-block", "S", revisit=2),
        editing("S, not trained to edit", "S", role="masked"),
    )


def sweep() -> list[dict[str, object]]:
    """Calls on full blocks, multi-block editing with and without a wider mask, the penalty."""
    settings: dict[str, dict[str, Any]] = {
        f"post steps {steps}": {"max_post_steps": steps} for steps in (0, 2, 5, 16)
    }
    settings |= {
        "penalty 2": {"penalty": 2.0},
        "all blocks again": {"revisit": 100},
        "all blocks again, not widened": {"revisit": 100, "widen": False},
    }
    offline = 16
    return [
        {
            "experiment": "comparison",
            "decode.methods": tuple(
                method(mode, "llada21", mode=mode, block_length=offline, **options)
                for mode in ("S", "Q")
            ),
            "name": name,
        }
        for name, options in settings.items()
    ]
