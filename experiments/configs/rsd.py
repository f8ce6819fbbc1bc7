"""Recursive speculative decoding: draft trees without replacement (arXiv 2402.14160).

    python -m experiments.run --config=experiments/configs/rsd.py:offline --workdir=runs/rsd
    python -m experiments.sweep --config=experiments/configs/rsd.py:offline --workdir=runs/rsd_sweep

Compares a chain, SpecTr, RSD-C and RSD-S at an equal number of nodes that the target scores. The
default preset is for checkpoints of your own; `:offline` is the embedded code pair.
"""

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method

# Nodes: W x L of SpecTr and RSD-S, branching of RSD-C (section 2.8 of the published settings).
BUDGETS = {
    6: ((3, 2), "2-2"),
    10: ((5, 2), "2-2-1"),
    14: ((2, 7), "2-2-2"),
    30: ((6, 5), "2-2-2-2"),
}


def get_config(preset: str = "") -> ConfigDict:
    """Methods at a budget of 14 nodes."""
    config = comparison("rsd")
    config.decode.temperatures = (0.3, 1.0)
    if preset != "offline":
        config.models.target, config.models.draft = "checkpoints/target", "checkpoints/draft"
        config.data.update(dataset="xsum", num_prompts=1000)
        config.data.text_field = "document"
    config.decode.methods = (method("plain", "autoregressive"), *at_budget(14))
    config.analyses = ("acceptance",)
    config.claims = tuple(
        claim(better, "tokens_per_target_call", 1.0, temperature=1.0, over=worse)
        for better, worse in (("RSD-C", "SpecTr"), ("RSD-S", "RSD-C"), ("RSD-S", "chain"))
    )
    return config


def at_budget(nodes: int) -> tuple[ConfigDict, ...]:
    """Every method with `nodes` drafted nodes a round."""
    (width, depth), branching = BUDGETS[nodes]
    return (
        method("chain", "speculative_sampling", num_draft=nodes),
        method("SpecTr", "spectr", num_sequences=width, length=depth),
        method("RSD-C", "rsd_c", branching=branching),
        method("RSD-S", "rsd_s", width=width, depth=depth),
    )


def sweep() -> list[dict[str, object]]:
    """Tokens per target call at equal budgets, on twice the prompts."""
    return [
        {
            "decode.methods": (method("plain", "autoregressive"), *at_budget(nodes)),
            "data.prompt_tokens": 121,  # one size of cache, and so one compilation, a method
            "data.num_prompts": 12,
            "decode.max_new_tokens": 64,
            "decode.temperatures": (1.0,),
            "decode.repeats": 1,
            "lossless.samples": 0,
            "analyses": (),
            "claims": (),
            "name": f"{nodes} nodes",
        }
        for nodes in BUDGETS
    ]
