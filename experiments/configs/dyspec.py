"""DySpec: draft trees that grow where the draft model is sure (arXiv 2410.11744).

    python -m experiments.run --config=experiments/configs/dyspec.py:offline --workdir=runs/dyspec
    python -m experiments.sweep --config=experiments/configs/dyspec.py:offline --workdir=runs/d

Compares the dynamic tree, grown node by node or layer by layer, with fixed trees of the same number
of nodes. The default preset has the published settings (64 nodes, draft temperature 0.6, C4) for
checkpoints of your own; `:offline` is the embedded code pair with 16 nodes.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method

_DRAFT_TEMPERATURE = 0.6
_DRAFT_TEMPERATURES = (0.2, 0.4, 1.0)
# Fixed trees by number of nodes: chain, constant branching, beam (width, depth).
_FIXED = {16: ("4-1-1-1", (4, 4)), 32: ("2-3-2-1", (4, 8)), 64: ("4-3-2-1", (8, 8))}


def get_config(preset: str = "") -> ConfigDict:
    """Dynamic against fixed trees of one size."""
    config = comparison("dyspec")
    offline = preset == "offline"
    config.decode.temperatures = (0.0, 0.6)
    if not offline:
        config.models.target, config.models.draft = "checkpoints/target", "checkpoints/draft"
        config.data.update(dataset="c4/en", num_prompts=1000, prompt_tokens=128)
    config.decode.methods = trees(16 if offline else 64)
    config.analyses = ("calibration",)
    config.claims = tuple(
        claim("DySpec, heap", "tokens_per_target_call", 1.0, temperature=temperature, over=fixed)
        for temperature in config.decode.temperatures
        for fixed in ("chain", "constant branching", "beam")
    )
    return config


def trees(nodes: int, draft_temperature: float = _DRAFT_TEMPERATURE) -> tuple[ConfigDict, ...]:
    """Every tree of `nodes` drafted nodes, after plain decoding."""
    branching, (width, depth) = _FIXED[nodes]
    options: dict[str, Any] = {"draft_temperature": draft_temperature}
    return (
        method("plain", "autoregressive"),
        method("chain", "speculative_sampling", num_draft=nodes, **options),
        method("constant branching", "rsd_c", branching=branching, **options),
        method("beam", "rsd_s", width=width, depth=depth, **options),
        method("DySpec, threshold", "dyspec", budget=nodes, **options),
        method("DySpec, heap", "dyspec", budget=nodes, construction="heap", **options),
    )


def sweep() -> list[dict[str, object]]:
    """Tokens per target call over the node budget, and over the drafts' temperature.

    The drafter's probabilities are the tree's estimate of acceptance: its temperature decides how
    well they foretell it.
    """
    settings = {f"{nodes} nodes": trees(nodes) for nodes in (16, 64)}
    compared = ("plain", "chain", "beam", "DySpec, heap")
    settings |= {
        f"16, draft T={t:g}": tuple(entry for entry in trees(16, t) if entry.label in compared)
        for t in _DRAFT_TEMPERATURES
    }
    return [
        {
            "decode.methods": chosen,
            "data.prompt_tokens": 121,  # one size of cache, and so one compilation, a method
            "decode.max_new_tokens": 64,
            "decode.repeats": 1,
            "lossless.samples": 0,
            "analyses": (),
            "claims": (),
            "name": name,
        }
        for name, chosen in settings.items()
    ]
