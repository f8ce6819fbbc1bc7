"""EAGLE-2 and FSPAD as users choose them: a head on features, and the tree around it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from decoding.loop import Method
from decoding.method_spec import Configs, MethodSpec, Option
from decoding.sampling import SamplingConfig
from decoding.speculative.drafting import Drafter
from decoding.speculative.feature_source import feature_source
from decoding.speculative.medusa import TREE_25, paths_of
from decoding.speculative.method import speculative
from decoding.speculative.reranked_tree import grown_nodes, reranked_tree_drafter
from decoding.speculative.sampled_tree import tree_drafter
from decoding.speculative.template import from_paths
from decoding.speculative.template_tree import template_tree_drafter
from models.config import TransformerConfig
from models.feature_head import ROLE


def _drafter(
    config: TransformerConfig, sampling: SamplingConfig, options: Mapping[str, Any]
) -> Drafter:
    # What ranks candidates are the head's own probabilities, not the sharper ones of a low
    # temperature.
    drafting = dataclasses.replace(sampling, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    if options["tree"] == "chain":
        levels = options["depth"] + 1
        source = feature_source(config, drafting, levels, levels + 1)
        return tree_drafter(source, "most_likely", (1,) * levels, config.eos_token_ids)
    if options["tree"] == "static":
        template = from_paths(paths_of(TREE_25, options["depth"] + 1))
        source = feature_source(config, drafting, template.max_depth, template.num_nodes)
        return template_tree_drafter(source, template, config.eos_token_ids)
    width, depth = min(options["width"], config.vocab_size), options["depth"]
    source = feature_source(config, drafting, depth + 1, grown_nodes(width, depth))
    return reranked_tree_drafter(source, width, depth, options["num_draft"], config.eos_token_ids)


def _build(name: str, configs: Configs, sampling: SamplingConfig, options: Any) -> Method:
    target = configs["target"]
    return speculative(name, target, _drafter(target, sampling, options), "exact_match", sampling)


_OPTIONS = {
    "tree": Option(
        "dynamic",
        "grown and reranked by confidence, EAGLE-1's of 25 nodes, or a chain of likeliest tokens",
        choices=("dynamic", "static", "chain"),
    ),
    "width": Option(10, "nodes asked a level, and children each", minimum=1),
    "depth": Option(5, "levels of nodes asked", minimum=1),
    "num_draft": Option(59, "nodes put up a round", minimum=1),
}

SPECS = {
    name: MethodSpec(summary, ("target",), _OPTIONS, functools.partial(_build, name), parts=(ROLE,))
    for name, summary in (
        ("eagle2", "a head on the target's features drafts a tree that follows it (lossless)"),
        ("fspad", "EAGLE-2 with feature sampling and partial alignment (lossless)"),
    )
}
