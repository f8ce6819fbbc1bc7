"""Kangaroo: the target's first layers draft, the others verify (arXiv 2404.18911).

    python -m experiments.run --config=experiments/configs/kangaroo.py:offline --workdir=runs/k
    python -m experiments.sweep --config=experiments/configs/kangaroo.py:offline --workdir=runs/ks

Compares exit layers, thresholds of the second exit, kinds of adapters, and a tree, with plain
decoding and n-gram lookup. The default preset has the published settings for a Vicuna-7B of your
own (exit after 2 of 32 layers, at most 6 drafts, threshold 0.6) and trains its adapter on text of
your own as published (AdamW, learning rate 5e-5); `:offline` is an embedded model of 8 layers on
Python code, whose adapters train in a minute or two each; `:slots` one of sentences that say what
is given, text that the model knows far better, at more exits.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import (
    SLOT_ANSWERS,
    claim,
    comparison,
    exit_adapter,
    method,
    on_slot_sentences,
)
from models.errors import check_choice

PRESETS = ("", "offline", "slots")
DRAFTS = 6
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
LAYERS = (1, 2, 4)
KINDS = ("attention_mlp", "mlp", "norm")
_NAMES = {"attention_mlp": "attention and MLP", "mlp": "MLP", "norm": "norm alone"}


def get_config(preset: str = "") -> ConfigDict:
    """Exit layers, thresholds and adapters."""
    check_choice("preset", preset, PRESETS)
    config = comparison("kangaroo")
    if not preset:
        config.models = ConfigDict({"target": "checkpoints/vicuna-7b-v1.3"})
        config.data.update(dataset="jsonl_prompts", prompt_field="question", num_prompts=480)
        config.data.builder_options = ConfigDict({"path": "data/spec_bench.jsonl"})
        config.decode.update(temperatures=(0.0,), max_new_tokens=1024, stop_at_eos=True)
        text: dict[str, Any] = {
            "dataset": "text_files", "dataset_options": {"files": "data/sharegpt/*.txt"},
            "sequence_length": 2048, "batch_size": 4, "num_steps": 800_000,
            "optimizer": {"learning_rate": 5e-5, "warmup_steps": 2000, "weight_decay": 0.01},
        }  # fmt: skip
        config.parts = ConfigDict({_part(2): exit_adapter(2, **text)})
        config.decode.methods = (
            method("plain", "autoregressive"),
            method("prompt lookup", "prompt_lookup"),
            _kangaroo("Kangaroo", 2),
        )
        return config
    if preset == "slots":
        return _slots(config)
    config.models = ConfigDict({"target": "code_deep"})
    config.parts = ConfigDict(
        {
            **{_part(layer): exit_adapter(layer, num_steps=600) for layer in LAYERS},
            **{_part(2, kind): exit_adapter(2, kind, num_steps=600) for kind in KINDS},
        }
    )
    config.decode.methods = _methods(LAYERS, KINDS)
    zero: dict[str, Any] = {"temperature": 0.0}
    calls = "tokens_per_target_call"
    config.claims = (
        claim("exit 2", calls, 1.3, **zero),
        claim("exit 2", calls, 1.0, over="exit 1", **zero),
        claim("exit 4", calls, 1.0, over="exit 2", **zero),
        claim("threshold 0", calls, 1.0, over="exit 2", **zero),
        claim("exit 2", calls, 1.0, over="threshold 0.9", **zero),
        claim("tree", calls, 1.0, over="exit 2", **zero),
        claim("exit 2", calls, 1.0, over=_NAMES["mlp"], **zero),
        claim("exit 2", calls, 1.1, over=_NAMES["norm"], **zero),
        claim("exit 2", "speedup", 1.0, **zero),
    )
    return config


def _methods(layers: Sequence[int], kinds: Sequence[str] = ()) -> tuple[ConfigDict, ...]:
    """Exits, thresholds, kinds of adapters and a tree, beside plain decoding and lookup."""
    return (
        method("plain", "autoregressive"),
        method("prompt lookup", "prompt_lookup"),
        *(_kangaroo(f"exit {layer}", layer) for layer in layers),
        *(_kangaroo(f"threshold {eta:g}", 2, eta) for eta in THRESHOLDS if eta != 0.6),
        *(_kangaroo(_NAMES[kind], 2, kind=kind) for kind in kinds),
        # Four nodes a level; a path is followed while it is likelier than one in ten.
        _kangaroo("tree", 2, 0.1, width=4, num_draft=4),
    )


def _slots(config: ConfigDict) -> ConfigDict:
    """Exits and thresholds on text that is nearly sure: what is accepted no longer decides."""
    layers = (1, 2, 3, 4, 6)
    config.models = ConfigDict({"target": "slots_deep"})
    on_slot_sentences(config, num_prompts=24)
    config.decode.temperatures = (0.0,)
    text = SLOT_ANSWERS | {"sequence_length": 128, "num_steps": 400, "eval_batches": 4}
    config.parts = ConfigDict({_part(layer): exit_adapter(layer, **text) for layer in layers})
    config.decode.methods = _methods(layers)
    zero: dict[str, Any] = {"temperature": 0.0}
    calls, layers_run = "tokens_per_target_call", "layers_per_token"
    config.claims = (
        claim("exit 2", calls, 1.3, **zero),
        claim("exit 6", calls, 1.0, over="exit 1", **zero),
        # An exit in between runs fewer layers than both ends, and so does a threshold.
        *(claim(f"exit {end}", layers_run, 1.0, over="exit 2", **zero) for end in (1, 6)),
        *(claim(f"threshold {eta}", layers_run, 1.0, over="exit 2", **zero) for eta in (0, 0.9)),
        claim("exit 2", "speedup", 1.0, **zero),
    )
    return config


def _part(layer: int, kind: str = "attention") -> str:
    return f"exit {layer}, {kind}"


def _kangaroo(
    label: str, layer: int, eta: float = 0.6, kind: str = "attention", **more: Any
) -> ConfigDict:
    options: dict[str, Any] = {"exit_layer": layer, "num_draft": DRAFTS, "threshold": eta, **more}
    return method(label, "kangaroo", part=_part(layer, kind), **options)


def sweep() -> list[dict[str, object]]:
    """The grid of thresholds and most drafts, for each exit layer."""
    return [
        {
            "name": f"exit {layer}, {most} drafts",
            "decode.temperatures": (0.0,),
            "decode.repeats": 1,
            "lossless.samples": 0,
            "claims": (),
            "decode.methods": (
                method("plain", "autoregressive"),
                *(
                    method(
                        f"threshold {eta:g}", "kangaroo", part=_part(layer), exit_layer=layer,
                        num_draft=most, threshold=eta,
                    )
                    for eta in THRESHOLDS
                ),
            ),
        }
        for layer in LAYERS
        for most in (2, 6)
    ]  # fmt: skip
