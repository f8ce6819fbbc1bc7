"""Learn2PD: a learned filter decides what to write, and foreseen ends of text cut the canvas.

'Learnable Parallel Decoding' for diffusion language models, arXiv 2509.25188. Not lossless.
"""

from collections.abc import Mapping
from typing import Any

from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.unmasking import llada
from decoding.unmasking.canvas import Schedule
from decoding.unmasking.end_of_text import cut_at_end_of_text
from decoding.unmasking.learned_filter import ROLE, learned_filter
from decoding.unmasking.method import unmasking

FILTER = "filter"


def _build(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    config = configs["target"]
    schedule = Schedule(options["block_length"])
    if options["rule"] == FILTER:
        selector = learned_filter(options["filter_threshold"], options["block_length"])
    else:
        selector = llada.rule(options)
    eotp = options["eotp"]
    return unmasking(
        "learn2pd",
        config,
        sampling,
        schedule,
        selector,
        llada.policy(config, schedule, options, everywhere=eotp),
        cut=cut_at_end_of_text(config.eos_token_ids) if eotp else None,
        early_stop=options["early_stop"],
    )


SPEC = MethodSpec(
    "masked diffusion; a learned filter tells which predictions are final; canvases are cut early",
    ("target",),
    {
        **llada.SHARED,
        "filter_threshold": Option(
            0.96, "filter: least probability of being final (tau) that is written", minimum=0.0
        ),
        "eotp": Option(True, "cut the canvas where an end of text is foreseen"),
        **llada.RULE,
        "rule": Option(
            FILTER,
            "which tokens a step writes; quota is end-of-text prediction alone",
            choices=(FILTER, *llada.RULES),
        ),
    },
    _build,
    bidirectional=True,
    parts=(ROLE,),
    parts_with=("rule", FILTER),
)
