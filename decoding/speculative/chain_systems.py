"""Draft-and-verify methods around a chain, as users choose them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from decoding import randomness
from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative.draft_model import model_drafter
from decoding.speculative.method import speculative
from decoding.speculative.ngram import ngram_drafter
from models.errors import InputError


def _build_prompt_lookup(
    configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    if options["min_ngram"] > options["max_ngram"]:
        raise InputError(
            f"min_ngram: {options['min_ngram']} must be at most max_ngram {options['max_ngram']}"
        )
    drafter = ngram_drafter(options["num_draft"], options["max_ngram"], options["min_ngram"])
    return speculative("prompt_lookup", configs["target"], drafter, "exact_match", sampling)


def _build_speculative_sampling(
    configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Method:
    # At temperature 0 both rules are one: keep the draft that equals the target's arg-max.
    rule = "exact_match" if sampling.greedy else options["rule"]
    drafting = sampling
    if not sampling.greedy and options["draft_temperature"] > 0:
        drafting = dataclasses.replace(sampling, temperature=options["draft_temperature"])
    purpose = randomness.SAMPLE if rule == "exact_match" else randomness.DRAFT
    drafter = model_drafter(configs["draft"], options["num_draft"], drafting, purpose)
    return speculative("speculative_sampling", configs["target"], drafter, rule, sampling)


_NUM_DRAFT = Option(5, "tokens drafted a round", minimum=1)

SPECS: dict[str, MethodSpec] = {
    "prompt_lookup": MethodSpec(
        "drafts what followed the last n-gram earlier in the row; verified exactly (lossless)",
        ("target",),
        {
            "num_draft": _NUM_DRAFT,
            "max_ngram": Option(3, "longest suffix looked up", minimum=1),
            "min_ngram": Option(1, "shortest suffix looked up", minimum=1),
        },
        _build_prompt_lookup,
    ),
    "speculative_sampling": MethodSpec(
        "a draft model drafts a chain; rejection sampling keeps the target's law (lossless)",
        ("target", "draft"),
        {
            "num_draft": _NUM_DRAFT,
            "draft_temperature": Option(0.0, "of the draft; 0 for the target's", minimum=0.0),
            "rule": Option(
                "speculative_sampling",
                "verification rule; exact_match gives plain decoding's own tokens",
                choices=("speculative_sampling", "exact_match"),
            ),
        },
        _build_speculative_sampling,
    ),
}
