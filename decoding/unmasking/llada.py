"""Masked-diffusion decoding as users choose it: LLaDA's sampler and Fast-dLLM's rules and caches.

Nie et al., LLaDA, arXiv 2502.09992; Wu et al., Fast-dLLM, arXiv 2505.22618. The options that all
unmasking systems share, and how they become a schedule and a cache policy, are here too.
"""

from collections.abc import Mapping
from typing import Any

from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.unmasking import selectors
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.method import unmasking
from decoding.unmasking.policies import Policy, block_cache, whole_canvas
from decoding.unmasking.selectors import Selector
from models.config import TransformerConfig
from models.errors import InputError

CACHES = ("none", "prefix", "dual")
RULES = ("quota", "threshold", "factor")

# Options of every method that works block by block on a bidirectional model.
SHARED: dict[str, Option] = {
    "block_length": Option(32, "tokens of a block; 0 for the whole canvas", minimum=0),
    "cache": Option(
        "none", "keys and values that are not computed again inside a block", choices=CACHES
    ),
    "shifted": Option(False, "logits at position i predict token i + 1 (Dream)"),
    "early_stop": Option(True, "stop when an end of text is settled; the text is the same without"),
}
RULE: dict[str, Option] = {
    "rule": Option("quota", "which tokens a step writes", choices=RULES),
    "steps": Option(0, "quota: calls a block; 0 for one token a call", minimum=0),
    "ranking": Option("confidence", "quota: which tokens come first", choices=selectors.RANKINGS),
    "threshold": Option(0.9, "threshold: least probability that is written", minimum=0.0),
    "factor": Option(1.0, "factor: bound on (n + 1)(1 - p_n)", minimum=0.0),
}


def policy(
    config: TransformerConfig,
    schedule: Schedule,
    options: Mapping[str, Any],
    *,
    everywhere: bool = False,
    guidance: float = 0.0,
) -> Policy:
    """The cache policy that the options `cache` and `shifted` name."""
    if options["cache"] == "none":
        return whole_canvas(config, shifted=options["shifted"], guidance=guidance)
    if guidance:
        raise InputError(f"guidance: {guidance:g} needs cache=none; given: {options['cache']}")
    return block_cache(
        config, schedule, options["cache"], shifted=options["shifted"], everywhere=everywhere
    )


def rule(options: Mapping[str, Any]) -> Selector:
    """The selector that the options of `RULE` name."""
    if options["rule"] == "threshold":
        return selectors.threshold(options["threshold"])
    if options["rule"] == "factor":
        return selectors.factor(options["factor"])
    # With as many steps as a block has positions, or more, each step writes one token.
    return selectors.quota(
        options["steps"] or options["block_length"] or 1 << 20, options["ranking"]
    )


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    schedule = Schedule(options["block_length"])
    return unmasking(
        "llada",
        config,
        sampling,
        schedule,
        rule(options),
        policy(config, schedule, options, guidance=options["guidance"]),
        early_stop=options["early_stop"],
    )


SPECS: dict[str, MethodSpec] = {
    "llada": MethodSpec(
        "masked diffusion, block by block; fixed steps, threshold or factor rule; block caches",
        ("target",),
        {
            **SHARED,
            **RULE,
            "guidance": Option(
                0.0, "strength of guidance by the canvas without its prompt; 0 for none", minimum=0
            ),
        },
        _build,
        bidirectional=True,
    ),
}
