"""Window-Diffusion: windowed pruning and phase-level caches for masked diffusion (2601.20332).

    python -m experiments.run --workdir=runs/window_diffusion
        --config=experiments/configs/window_diffusion.py:offline
    python -m experiments.sweep --workdir=runs/window_diffusion_sweep
        --config=experiments/configs/window_diffusion.py:offline

Compares it with the whole canvas in every step and with Fast-dLLM's prefix and dual caches, leaves
out its parts one by one, and measures the three observations it rests on. The default preset has
the published settings (A = 16, W = 64, R = 32, one token a step, 256 tokens, temperature 0;
published: GSM8K 68.46 with LLaDA-8B-Base, up to 99x faster in all, of which some 6.6x by pruning
and caching and some 15x by adaptive length) for a checkpoint and problems of your own. For a Dream
checkpoint use `variant=dream`, `shifted=True`, `window_tokens=128`. `:offline` is the embedded
model of column sums, `:code` that of Python code, with windows as long as their canvases ask for.

All methods run a fixed number of steps, as published: texts are cut at their end afterwards.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method

_OBSERVATIONS = ("chosen masks", "far masks", "ages of keys and values", "surprise")
PLAIN = "whole canvas"
WINDOW = "window"


def get_config(preset: str = "") -> ConfigDict:
    """The method, its baselines and its parts at temperature 0."""
    config = comparison("window_diffusion")
    config.models = ConfigDict({"target": "checkpoints/llada-8b-base"})
    config.data.update(prompt_field="question", answer_field="answer", num_prompts=24)
    config.decode.update(
        temperatures=(0.0,), batch_sizes=(8,), repeats=2, stop_at_eos=True, methods=_methods()
    )
    config.analyses = _OBSERVATIONS
    config.claims = (
        claim(WINDOW, "speedup", 1.5, temperature=0.0, batch_size=8),
        claim(WINDOW, "agreement", 0.9, temperature=0.0, batch_size=8),
    )
    if preset == "offline":
        config.models.target = "arithmetic_mdlm"
        config.data.update(dataset="arithmetic", answer_field="solution")
        config.data.builder_options = ConfigDict({"size": 30_000, "levels": (7,)})
        config.decode.max_new_tokens = 96
    elif preset == "code":
        config.models.target = "code_mdlm"
        config.data.update(prompt_field="", answer_field="", num_prompts=8, prompt_tokens=64)
        config.decode.update(max_new_tokens=192, stop_at_eos=False, repeats=1)
    else:
        config.data.update(dataset="jsonl_prompts", split="train", num_prompts=200)
        config.data.builder_options = ConfigDict({"path": "data/problems.jsonl"})
        config.decode.max_new_tokens = 256
    return config


def _fixed(label: str, name: str, **options: Any) -> ConfigDict:
    """A method that takes all its steps."""
    return method(label, name, early_stop=False, **options)


def _window(label: str, **options: Any) -> ConfigDict:
    return _fixed(label, "window_diffusion", **options)


def _methods() -> tuple[ConfigDict, ...]:
    return (
        _fixed(PLAIN, "llada", block_length=0),
        _fixed("prefix cache", "llada", cache="prefix"),
        _fixed("dual cache", "llada", cache="dual"),
        _window(WINDOW),
        _window("window, adaptive length", adaptive_length=True),
        _window("no buffer", buffer=False),
        _window("no far field", window_tokens=0),
        _window("no refresh, no far field", window_tokens=0, refresh_cycle=0),
        _window("active masks fixed, R = 16", slide=False, refresh_cycle=16),
        _window("decoded tokens not again", recompute_decoded=False),
    )


def sweep() -> list[dict[str, object]]:
    """Over A, W and R, and over the generated length, up to canvases of 1024 positions.

    W is at least A + R where there is a far field. Models need not have been trained on long
    canvases for their times.
    """
    axes: dict[str, list[ConfigDict]] = {
        "A": [_window(f"A = {a}", active_tokens=a) for a in (4, 8, 16, 32)],
        "W": [
            _window(f"W = {w}, R = 8", active_tokens=8, window_tokens=w, refresh_cycle=8)
            for w in (16, 32, 64, 0)
        ],
        "R": [_window(f"R = {r}", refresh_cycle=r) for r in (1, 4, 8, 16, 32)],
    }
    plain = _fixed(PLAIN, "llada", block_length=0)
    found: list[dict[str, object]] = [
        {
            "decode.methods": (plain, *entries),
            "decode.repeats": 1,
            "analyses": ("surprise",),
            "claims": (),
            "name": name,
        }
        for name, entries in axes.items()
    ]
    for length in (64, 192, 448, 960):
        found.append(
            {
                "decode.methods": (
                    plain,
                    _fixed("dual cache", "llada", cache="dual"),
                    _window(WINDOW),
                    _window("window, adaptive length", adaptive_length=True),
                ),
                "decode.max_new_tokens": length,
                "decode.batch_sizes": (1,),
                "decode.repeats": 1,
                "data.num_prompts": 1,
                "analyses": (),
                "claims": (),
                "name": f"{length} tokens",
            }
        )
    return found
