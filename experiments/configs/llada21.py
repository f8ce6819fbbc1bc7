"""LLaDA2.1: token editing in block diffusion language models (arXiv 2602.08676).

    python -m experiments.run --workdir=runs/llada21
        --config=experiments/configs/llada21.py:offline
    python -m experiments.run --workdir=runs/llada21_blocks
        --config=experiments/configs/llada21.py:blocks
    python -m experiments.sweep --workdir=runs/llada21_sweep
        --config=experiments/configs/llada21.py:offline

Compares the speedy and the quality mode (S, Q) and LLaDA2.0's sampler with one token a call, and
the thresholds of masks and edits on models that learned to edit and that did not. The default
preset has the published settings (blocks of 32, at most 16 calls on a full block, temperature 0;
S: 0.5 and 0, Q: 0.7 and 0.5; published, mean of 33 tasks, LLaDA2.1-flash: S 72.34 at 5.93 tokens
a call, Q 73.54 at 3.64, LLaDA2.0-flash 72.43 at 3.08) for checkpoints and problems of your own.
`:offline` is the embedded models of column sums with the whole answer in one block, where calls
make mistakes; `:blocks` has blocks of 16, where they make few.

Tokens per call count up to the first end of text (the paper does not say); commit passes and calls
on full blocks count as calls.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import comparison, method
from experiments.token_editing import NEVER

# Block length and models of the embedded presets.
_OFFLINE: dict[str, tuple[int, dict[str, str]]] = {
    "offline": (
        64,
        {
            "target": "arithmetic_wide_edit",
            "masked": "arithmetic_wide_mdlm",
            "own": "arithmetic_wide_self",
            "reinforced": "arithmetic_wide_rl",
        },
    ),
    "blocks": (16, {"target": "arithmetic_edit_mdlm", "masked": "arithmetic_block_mdlm"}),
}


def get_config(preset: str = "") -> ConfigDict:
    """Modes, and thresholds of masks and edits."""
    config = comparison("llada21")
    config.experiment = "token_editing"
    offline = preset in _OFFLINE
    published = {"target": "checkpoints/llada2.1", "masked": "checkpoints/llada2.0"}
    block, models = _OFFLINE.get(preset, (32, published))
    config.models = ConfigDict(models)
    config.data.update(prompt_field="question", answer_field="solution")
    if offline:
        config.data.update(dataset="arithmetic", num_prompts=512)
        config.data.builder_options = ConfigDict({"size": 30_000, "levels": (7,)})
    else:
        config.data.update(dataset="jsonl_prompts", split="train", num_prompts=200)
        config.data.builder_options = ConfigDict({"path": "data/problems.jsonl"})
    config.editing = ConfigDict(
        {
            "block_length": block,
            "mask_thresholds": (0.3, 0.5, 0.7, 0.9, 0.95),
            "edit_thresholds": (NEVER, 0.0, 0.5, 0.9),
        }
    )
    config.decode.update(
        temperatures=(0.0,),
        batch_sizes=(128,) if offline else (1,),
        max_new_tokens=50 if offline else 16384,
        stop_at_eos=True,
        repeats=1,
        methods=modes(block, again=preset != "offline"),
    )
    return config


def modes(block: int, again: bool) -> tuple[ConfigDict, ...]:
    """The published modes with blocks of `block` tokens, and what they are compared with.

    `again` adds multi-block editing, which needs several blocks.
    """

    def editing(label: str, mode: str, **more: Any) -> ConfigDict:
        return method(label, "llada21", mode=mode, block_length=block, **more)

    plain: dict[str, Any] = {"block_length": block}
    found = (
        method("one token a call", "llada2", role="masked", mask_threshold=1.0, **plain),
        method("LLaDA2.0", "llada2", role="masked", **plain),
        editing("Q", "Q"),
        editing("S", "S"),
    )
    if not again:
        return found
    more = (editing(f"{mode} + multi-block", mode, revisit=2) for mode in ("Q", "S"))
    return (*found, *more)


def sweep() -> list[dict[str, object]]:
    """Calls on full blocks at most, masks filled at least, and the penalty on repetition."""
    settings: dict[str, dict[str, Any]] = {
        f"post steps {steps}": {"max_post_steps": steps} for steps in (0, 2, 5, 16)
    }
    settings |= {"penalty 2": {"penalty": 2.0}, "4 masks a call": {"num_to_transfer": 4}}
    block, _ = _OFFLINE["offline"]
    return [
        {
            "experiment": "comparison",
            "decode.methods": tuple(
                method(mode, "llada21", mode=mode, block_length=block, **options)
                for mode in ("S", "Q")
            ),
            "name": name,
        }
        for name, options in settings.items()
    ]
