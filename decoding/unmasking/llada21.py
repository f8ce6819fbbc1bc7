"""LLaDA2.0 and LLaDA2.1 as users choose them (arXiv 2512.15745, 2602.08676)."""

from collections.abc import Mapping
from typing import Any

from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.unmasking.block_causal import block_causal
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.editing import anti_stutter, joint_threshold
from decoding.unmasking.method import unmasking
from decoding.unmasking.policies import whole_canvas
from models.errors import InputError

# (mask threshold, edit threshold) of the model card, and of the published code by itself.
MODES = {"S": (0.5, 0.0), "Q": (0.7, 0.5), "custom": (0.95, 0.9)}
_OF_THE_MODE = -1.0

_BLOCKS: dict[str, Option] = {
    "block_length": Option(32, "tokens of a block, the model's own", minimum=1),
    "num_to_transfer": Option(1, "masks that a call fills at least", minimum=1),
    "cache": Option(
        "blocks",
        "exact keys and values of finished blocks, or everything anew in each call",
        choices=("blocks", "none"),
    ),
    "early_stop": Option(True, "stop when an end of text is settled"),
}
_EDITING: dict[str, Option] = {
    "mode": Option("Q", "thresholds: S speedy, Q quality", choices=tuple(MODES)),
    "mask_threshold": Option(
        _OF_THE_MODE, "masks are filled above this probability; -1: the mode's", minimum=-1
    ),
    "edit_threshold": Option(
        _OF_THE_MODE,
        "tokens are overwritten above this probability; 1: never; -1: the mode's",
        minimum=-1,
    ),
    "max_post_steps": Option(16, "calls on a block without masks, at most", minimum=0),
    "revisit": Option(
        0, "multi-block editing: finished blocks that are edited again; 0 for none", minimum=0
    ),
    "widen": Option(True, "multi-block editing: blocks see those after them"),
    "penalty": Option(0.0, "taken off the logit of the token to the left", minimum=0),
}


def _build(
    name: str, configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    config = configs["target"]
    thresholds = [
        default if options[key] == _OF_THE_MODE else options[key]
        for key, default in zip(
            ("mask_threshold", "edit_threshold"), MODES[options["mode"]], strict=True
        )
    ]
    schedule = Schedule(options["block_length"], absolute=True)
    revisit = options["revisit"]
    if options["cache"] == "blocks":
        policy = block_causal(config, schedule, revisit=revisit, widen=options["widen"])
    elif revisit:
        raise InputError(f"revisit: {revisit} needs cache=blocks; given: {options['cache']}")
    else:
        policy = whole_canvas(config, block_causal=schedule.block_length)
    selector = joint_threshold(
        *thresholds,
        max_post_steps=options["max_post_steps"],
        num_to_transfer=options["num_to_transfer"],
        earlier=revisit > 0,
    )
    return unmasking(
        name,
        config,
        sampling,
        schedule,
        selector,
        policy,
        early_stop=options["early_stop"],
        filtered=True,
        revisable=revisit,
        adjust=anti_stutter(schedule, options["penalty"]) if options["penalty"] else None,
    )


def _build_llada21(
    configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    return _build("llada21", configs, sampling, options)


def _build_llada2(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    never = {name: option.default for name, option in _EDITING.items()}
    never |= {"edit_threshold": 1.0, "max_post_steps": 0}
    return _build("llada2", configs, sampling, never | dict(options))


SPECS: dict[str, MethodSpec] = {
    "llada2": MethodSpec(
        "block diffusion with exact block caches and a threshold (LLaDA2.0)",
        ("target",),
        {
            "mask_threshold": Option(0.95, "masks are filled above this probability", minimum=0),
            **_BLOCKS,
        },
        _build_llada2,
        bidirectional=True,
    ),
    "llada21": MethodSpec(
        "block diffusion that overwrites its own tokens (LLaDA2.1)",
        ("target",),
        {**_EDITING, **_BLOCKS},
        _build_llada21,
        bidirectional=True,
    ),
}
