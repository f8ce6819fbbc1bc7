"""ADED: drafts searched in a tri-gram store that learns while it decodes (arXiv 2407.12021).

    python -m experiments.run --config=experiments/configs/aded.py:offline --workdir=runs/aded
    python -m experiments.sweep --config=experiments/configs/aded.py:offline --workdir=runs/aded_s

Compares drafters that need no model: prompt look-up, Token Recycling, and the tri-gram store, which
begins with a corpus' counts (or empty), with and without updates, searched by PUCT or greedily. All
that learn carry what they learned from one prompt to the next. The default preset has the published
settings (Vicuna-7B, MT-Bench, 1024 new tokens, a store of conversations) for files of your own;
`:offline` is the embedded code model, its store counted from the code it was trained on.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method


def get_config(preset: str = "") -> ConfigDict:
    """Drafters without a model, at temperature 0."""
    config = comparison("aded")
    config.models = ConfigDict({"target": "code_target"})
    config.decode.temperatures = (0.0,)
    if preset != "offline":
        config.models.target = "checkpoints/vicuna-7b-v1.3"
        # Lines {"prompt": "..."}; a prompt is `prompt_tokens` tokens out of one of them.
        config.data.update(
            dataset="jsonl_prompts",
            text_field="prompt",
            builder_options={"path": "data/mt_bench.jsonl"},
            num_prompts=80,
            prompt_tokens=32,
        )
        config.corpus.update(
            dataset="jsonl_prompts",
            split="test",  # the only one of a file of lines
            text_field="prompt",
            builder_options={"path": "data/ultrachat.jsonl"},
        )
        config.decode.max_new_tokens = 1024
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("prompt look-up", "prompt_lookup", num_draft=10, max_ngram=3),
        method("Token Recycling", "token_recycling", hot=True),
        method("ADED, empty store", "aded", hot=True),
        method("ADED, no update", "aded", corpus=True, update=False),
        method(
            "ADED, no update, best-first", "aded", corpus=True, update=False, search="best_first"
        ),
        method("ADED, best-first", "aded", corpus=True, hot=True, search="best_first"),
        method("ADED", "aded", corpus=True, hot=True),
        method("ADED, value as in code", "aded", corpus=True, hot=True, value="code"),
    )
    config.claims = (
        claim("ADED, no update", "tokens_per_target_call", 1.5, temperature=0.0),
        *(
            claim("ADED", "tokens_per_target_call", 1.0, temperature=0.0, over=other)
            for other in ("ADED, no update", "ADED, empty store", "ADED, best-first")
        ),
    )
    return config


# The published value of each option is the first.
_ABLATION: dict[str, tuple[Any, ...]] = {
    "iterations": (150, 10, 50, 500),
    "delta": (0.04, 0.0, 0.01, 0.2),
    "c1": (32.0, 1.814),
}


def sweep() -> list[dict[str, object]]:
    """The published settings, and each option alone at other values."""
    published: dict[str, Any] = {option: values[0] for option, values in _ABLATION.items()}
    settings = [("published", published)]
    for option, values in _ABLATION.items():
        settings += [(f"{option} {v:g}", {**published, option: v}) for v in values[1:]]
    return [
        {
            "decode.methods": (
                method("plain", "autoregressive"),
                method("ADED", "aded", corpus=True, hot=True, **options),
            ),
            "data.prompt_tokens": 121,  # one size of cache, and so one compilation, a method
            "decode.max_new_tokens": 64,
            "decode.repeats": 1,
            "claims": (),
            "name": name,
        }
        for name, options in settings
    ]
