"""ETE as users choose it: explore, then exploit ('From Bits to Rounds', arXiv 2511.21103).

The paper's own rule and settings are not public; see `explore.Exploration`. Not lossless.
"""

from collections.abc import Mapping
from typing import Any

from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.unmasking import explore, llada
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.explore import Exploration
from decoding.unmasking.look_ahead import look_ahead
from decoding.unmasking.method import unmasking
from models.errors import InputError


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    if not options["block_length"] and options["horizon"]:
        raise InputError(
            f"horizon: {options['horizon']} given with block_length 0, one block; allowed: 0"
        )
    schedule = Schedule(
        options["block_length"], horizon=options["horizon"], open_ratio=options["open_ratio"]
    )
    candidates = options["candidates"]
    how = Exploration(
        rule=options["rule"],
        threshold=options["threshold"],
        factor=options["factor"],
        when=options["explore"],
        score=options["score"],
        per_block=options["per_block"],
        error_budget=options["error_budget"],
        least=options["least"],
        trigger=options["trigger"],
        frontier=options["frontier"],
        guard=options["eos_guard"],
        look_ahead=candidates,
        refresh=options["cache"] == "dual",
    )
    if candidates == 1:
        policy = llada.policy(config, schedule, options)
    else:
        if options["cache"] != "none":
            raise InputError(f"candidates: {candidates} need cache=none; given: {options['cache']}")
        if not sampling.greedy:
            raise InputError(
                f"candidates: {candidates} at temperature {sampling.temperature:g}: the best of "
                "several draws does not follow the model; allowed: 1, or temperature 0"
            )
        policy = look_ahead(
            config,
            candidates,
            options["threshold"],
            options["look_ahead_weight"],
            shifted=options["shifted"],
        )
    return unmasking(
        "ete",
        config,
        sampling,
        schedule,
        explore.explore(how, schedule, config.eos_token_ids),
        policy,
        early_stop=options["early_stop"],
    )


_DEFAULT = Exploration()

SPEC = MethodSpec(
    "masked diffusion; commits sure tokens and explores uncertain ones, blocks ahead included",
    ("target",),
    {
        **llada.SHARED,
        "horizon": Option(2, "blocks beyond the current one that may be open (K)", minimum=0),
        "open_ratio": Option(0.5, "a block opens when so much of the one before is filled"),
        "rule": Option(_DEFAULT.rule, "which tokens are sure", choices=explore.EXPLOIT_RULES),
        "threshold": Option(_DEFAULT.threshold, "threshold: least probability of a sure token"),
        "factor": Option(_DEFAULT.factor, "factor: bound on (n + 1)(1 - p_n), below 1"),
        "explore": Option(_DEFAULT.when, "rounds that explore", choices=explore.WHEN),
        "score": Option(
            _DEFAULT.score, "what is explored first", choices=tuple(explore.SCORES)
        ),
        "per_block": Option(_DEFAULT.per_block, "tokens explored in each open block", minimum=1),
        "error_budget": Option(
            _DEFAULT.error_budget, "nats that a round may lose by independence", minimum=0
        ),
        "least": Option(_DEFAULT.least, "least probability of an explored token"),
        "trigger": Option(
            _DEFAULT.trigger, "starved: fewer sure tokens than this for each open block", minimum=0
        ),
        "frontier": Option(_DEFAULT.frontier, "frontier: masks of a block preferred", minimum=1),
        "eos_guard": Option(_DEFAULT.guard, "no end of text beyond the current block"),
        "candidates": Option(1, "tokens tried by looking ahead; 1 for none (C)", minimum=1),
        "look_ahead_weight": Option(
            0.1, "candidates: weight of a sure token against log q", minimum=0
        ),
    },
    _build,
    bidirectional=True,
)  # fmt: skip
