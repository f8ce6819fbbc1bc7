"""Token Recycling: drafts from the target's own runners-up (arXiv 2408.08696).

    python -m experiments.run --workdir=runs/token_recycling
        --config=experiments/configs/token_recycling.py:offline
    python -m experiments.sweep --workdir=runs/token_recycling_sweep
        --config=experiments/configs/token_recycling.py:offline

Compares the method with plain decoding and with prompt lookup: with an empty table for each prompt
(cold), the same after reading the prompt, and with one table for all prompts (hot), as published.
The default preset has the published settings (k = 8, 80 nodes, temperature 0, up to 1024 tokens;
Vicuna-7B on Spec-Bench: 2.70 tokens per target call) for a checkpoint and a file of prompts of your
own; `:offline` is the embedded code model.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method


def get_config(preset: str = "") -> ConfigDict:
    """Cold and hot tables at temperature 0."""
    config = comparison("token_recycling")
    del config.models.draft
    if preset != "offline":
        config.models.target = "checkpoints/vicuna-7b-v1.3"
        config.data.update(dataset="jsonl_prompts", num_prompts=80, prompt_tokens=32)
        config.data.builder_options = ConfigDict({"path": "data/spec_bench.jsonl"})
        config.data.text_field = "prompt"
        config.decode.max_new_tokens = 1024
    config.decode.temperatures = (0.0,)
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("prompt lookup", "prompt_lookup"),
        method("TR cold", "token_recycling"),
        method("TR cold + prompt", "token_recycling", update_from_prompt=True),
        method("TR hot", "token_recycling", hot=True),
    )
    config.claims = (
        claim("TR hot", "tokens_per_target_call", 1.5, temperature=0.0),
        claim("TR hot", "tokens_per_target_call", 1.0, temperature=0.0, over="TR cold"),
        claim("TR cold", "tokens_per_target_call", 1.0, temperature=0.0, over="plain"),
    )
    return config


def sweep() -> list[dict[str, object]]:
    """Hot or cold, updates from all nodes or accepted ones, over successors and over nodes.

    Over k the tree keeps its 80 nodes and is grown from ranks below k: the published tree needs
    no more than 8.
    """
    settings: dict[str, dict[str, Any]] = {
        f"80 nodes, k={k}": {"template": "nodes80", "k": k} for k in (2, 4, 8, 16)
    }
    settings |= {f"{nodes} nodes, k=8": {"template": f"nodes{nodes}"} for nodes in (20, 40, 160)}
    settings["published tree"] = {}
    return [
        {
            "decode.methods": _variants(**options),
            "data.prompt_tokens": 121,  # one size of cache, and so one compilation, a method
            "data.num_prompts": 4,
            "decode.max_new_tokens": 64,
            "decode.repeats": 1,
            "analyses": (),
            "claims": (),
            "name": name,
        }
        for name, options in settings.items()
    ]


def _variants(**options: Any) -> tuple[ConfigDict, ...]:
    accepted = {"update": "accepted", **options}
    return (
        method("plain", "autoregressive"),
        method("TR cold", "token_recycling", **options),
        method("TR hot", "token_recycling", hot=True, **options),
        method("TR hot, accepted nodes", "token_recycling", hot=True, **accepted),
    )
