"""Draft-and-verify methods around a tree of sampled drafts, as users choose them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative.drafting import Drafter
from decoding.speculative.dynamic_tree import greedy_tree_drafter, threshold_tree_drafter
from decoding.speculative.method import speculative
from decoding.speculative.rules import RULES
from decoding.speculative.sampled_tree import tree_drafter
from decoding.speculative.sources import Source, model_source, ngram_source
from models.errors import InputError

# Temperature of sampled drafts for a target at temperature 0, where the target's own would give
# the same draft again and again.
_GREEDY_DRAFT_TEMPERATURE = 0.6

_SHARED = {
    "source": Option(
        "model",
        "draft distributions: the draft model's, or n-gram counts of the text so far",
        choices=("model", "ngram"),
    ),
    "draft_temperature": Option(
        0.0, "of the drafts; 0 for the target's, or 0.6 where that is 0", minimum=0.0
    ),
}


def _rule(default: str) -> Option:
    return Option(default, "verification rule; exact_match at temperature 0", choices=tuple(RULES))


def _source(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Source:
    temperature = options["draft_temperature"] or sampling.temperature
    drafting = dataclasses.replace(sampling, temperature=temperature or _GREEDY_DRAFT_TEMPERATURE)
    if options["source"] == "ngram":
        return ngram_source(configs["target"].vocab_size, drafting)
    return model_source(configs["draft"], drafting)


def _compose(
    name: str,
    configs: Configs,
    drafter: Drafter,
    sampling: SamplingConfig,
    options: Mapping[str, Any],
) -> Method:
    # At temperature 0 every lossless rule is one: keep the draft that equals the arg-max.
    rule = "exact_match" if sampling.greedy else options["rule"]
    return speculative(name, configs["target"], drafter, rule, sampling)


def _branching(text: str, vocab_size: int) -> tuple[int, ...]:
    """Nodes of each level of a tree written as children a node and level, such as 3-2-1."""
    try:
        children = [int(part) for part in text.split("-")]
    except ValueError:
        children = [0]
    if min(children) < 1 or max(children) > vocab_size:
        raise InputError(
            f"branching: {text!r} must be numbers from 1 to {vocab_size} joined by '-', "
            "for example 3-2-1"
        )
    widths = [1]
    for number in children:
        widths.append(widths[-1] * number)
    return tuple(widths[1:])


def _spectr(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    drafter = tree_drafter(
        _source(configs, sampling, options),
        "independent",
        (options["num_sequences"],) * options["length"],
        configs["target"].eos_token_ids,
        options["layout"] == "merged",
    )
    return _compose("spectr", configs, drafter, sampling, options)


def _rsd_c(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    drafter = tree_drafter(
        _source(configs, sampling, options),
        "without_replacement",
        _branching(options["branching"], configs["target"].vocab_size),
        configs["target"].eos_token_ids,
    )
    return _compose("rsd_c", configs, drafter, sampling, options)


def _rsd_s(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    first = min(options["width"], configs["target"].vocab_size)
    drafter = tree_drafter(
        _source(configs, sampling, options),
        "stochastic_beam",
        (first, *(options["width"],) * (options["depth"] - 1)),
        configs["target"].eos_token_ids,
    )
    return _compose("rsd_s", configs, drafter, sampling, options)


def _dyspec(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    source = _source(configs, sampling, options)
    budget, eos_ids = options["budget"], configs["target"].eos_token_ids
    if options["construction"] == "heap":
        drafter = greedy_tree_drafter(
            source, budget, options["max_depth"], options["layer_width"], eos_ids
        )
    else:
        threshold = options["threshold"] or 1.0 / budget
        drafter = threshold_tree_drafter(
            source, budget, threshold, options["max_depth"], options["layer_width"], eos_ids
        )
    return _compose("dyspec", configs, drafter, sampling, options)


def _top_tree(configs: Configs, sampling: SamplingConfig, options: Mapping[str, Any]) -> Method:
    drafter = tree_drafter(
        _source(configs, sampling, options),
        "most_likely",
        _branching(options["branching"], configs["target"].vocab_size),
        configs["target"].eos_token_ids,
    )
    return _compose("top_tree", configs, drafter, sampling, options)


_BOTH = ("target", "draft")
_MODEL_FREE = ("source", "ngram")

SPECS: dict[str, MethodSpec] = {
    "spectr": MethodSpec(
        "K sampled draft sequences; K-SEQ optimal-transport verification (lossless)",
        _BOTH,
        {
            "num_sequences": Option(8, "K, sequences drafted a round", minimum=1),
            "length": Option(8, "L, tokens of each", minimum=1),
            "layout": Option(
                "merged",
                "whether sequences share the nodes of a common prefix",
                choices=("merged", "separate"),
            ),
            "rule": _rule("k_seq"),
            **_SHARED,
        },
        _spectr,
        _MODEL_FREE,
    ),
    "rsd_c": MethodSpec(
        "tree of constant branching, siblings without replacement; recursive rejection (lossless)",
        _BOTH,
        {
            "branching": Option("2-2-2", "children of a node at each depth"),
            "rule": _rule("recursive_rejection"),
            **_SHARED,
        },
        _rsd_c,
        _MODEL_FREE,
    ),
    "rsd_s": MethodSpec(
        "tree by stochastic beam search; recursive rejection (lossless)",
        _BOTH,
        {
            "width": Option(4, "W, most nodes of a level", minimum=1),
            "depth": Option(4, "L, levels", minimum=1),
            "rule": _rule("recursive_rejection"),
            **_SHARED,
        },
        _rsd_s,
        _MODEL_FREE,
    ),
    "dyspec": MethodSpec(
        "tree grown where the draft model is sure; recursive rejection (lossless)",
        _BOTH,
        {
            "budget": Option(64, "most nodes of a tree", minimum=1),
            "construction": Option(
                "threshold",
                "a draft call a layer (threshold) or a node (heap)",
                choices=("threshold", "heap"),
            ),
            "threshold": Option(0.0, "least value of a place; 0 for 1 / budget", minimum=0.0),
            "max_depth": Option(16, "deepest node", minimum=1),
            "layer_width": Option(32, "most nodes of a layer and children of a node", minimum=1),
            "rule": _rule("recursive_rejection"),
            **_SHARED,
        },
        _dyspec,
        _MODEL_FREE,
    ),
    "top_tree": MethodSpec(
        "tree of the draft model's most likely tokens; verified exactly (lossless)",
        _BOTH,
        {
            "branching": Option("4-2-1-1", "children of a node at each depth"),
            "rule": _rule("exact_match"),
            **_SHARED,
        },
        _top_tree,
        _MODEL_FREE,
    ),
}
