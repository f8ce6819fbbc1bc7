"""M2R2: a second residual stream that is ahead of the model's own (arXiv 2502.02040).

    python -m experiments.run --config=experiments/configs/m2r2.py:offline --workdir=runs/m2r2
    python -m experiments.sweep --config=experiments/configs/m2r2.py:offline --workdir=runs/m2r2s

Three uses of one stream: leaving the model early, at fixed gates and where a router says so, beside
leaving with the model's own stream at as many layers; drafting for the layers above, beside
Kangaroo; and loading experts ahead of time, by a model's own routing and simulated memory. The
default preset is for a 7B of your own; the paper's body could not be read, so that its settings
(J = 4, aim at the last layer, ranks D / 16 and D / 8) are inferred. `:offline` is an embedded model
of 8 layers on Python code, whose adapters train in a few minutes, and one of 16 experts; `:slots`
has sentences that say what is given, of which early exits leave something that can be scored.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.config_parts import (
    SLOT_ANSWERS,
    accelerator,
    claim,
    comparison,
    exit_adapter,
    method,
    on_slot_sentences,
)
from models.errors import check_choice

PRESETS = ("", "offline", "slots")
AIM, SLOWER = "to the last layer", "rate 2"
# What leaves the model: label, its part, the stream that is read.
_STREAMS = (("M2R2", AIM, "accelerated"), ("own stream", "", "slow"))
DRAFTS = 6
# Of models this small; the default is for wide ones.
_ROUTER = 16
_RECIPE: dict[str, object] = {"num_steps": 400}


def get_config(preset: str = "") -> ConfigDict:
    """Early exit, self-speculation and experts."""
    check_choice("preset", preset, PRESETS)
    config = comparison("m2r2")
    if not preset:
        config.models = ConfigDict({"target": "checkpoints/vicuna-7b-v1.3"})
        config.data.update(dataset="jsonl_prompts", prompt_field="question", num_prompts=80)
        config.data.builder_options = ConfigDict({"path": "data/mt_bench.jsonl"})
        config.decode.update(temperatures=(0.0,), max_new_tokens=1024, stop_at_eos=True)
        text: dict[str, Any] = {
            "dataset": "text_files", "dataset_options": {"files": "data/sharegpt/*.txt"},
            "sequence_length": 2048, "batch_size": 4, "num_steps": 20_000,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 500, "weight_decay": 0.0},
        }  # fmt: skip
        config.parts = ConfigDict({AIM: accelerator(recipe=text, intervals=4)})
        config.decode.methods = (
            method("plain", "autoregressive"),
            method("prompt lookup", "prompt_lookup"),
            _speculation("self-speculation"),
            _exit("exit, ARLA 0.9", router="arla", threshold=0.9),
        )
        return config
    if preset == "slots":
        return _slots(config)
    config.models = ConfigDict({"target": "code_deep"})
    config.data.num_prompts = 12
    config.parts = ConfigDict(
        {
            AIM: accelerator(recipe=_RECIPE, intervals=4, router_width=_ROUTER),
            SLOWER: accelerator(recipe=_RECIPE, intervals=4, rate=2.0, router_width=_ROUTER),
            "exit 2, attention": exit_adapter(2, num_steps=600),
        }
    )
    config.decode.methods = (
        method("plain", "autoregressive"),
        method(
            "Kangaroo", "kangaroo", part="exit 2, attention", exit_layer=2, num_draft=DRAFTS,
            threshold=0.6,
        ),
        _speculation("self-speculation"),
        _speculation("self-speculation, rate 2", part=SLOWER),
        _speculation("self-speculation, own stream", part="", stream="slow"),
        *_fixed_exits(),
        *(_exit(f"ARLA {theta:g}", router="arla", threshold=theta) for theta in (0.5, 0.7, 0.9)),
        _exit("ARLA 0.7, exact keys", router="arla", threshold=0.7, keys="exact"),
        *(
            _exit(f"confidence {theta:g}, own stream", part="", stream="slow",
                  router="confidence", threshold=theta)
            for theta in (0.5, 0.7, 0.9)
        ),
    )  # fmt: skip
    config.streams = ConfigDict({"aimed at the last layer": AIM, "rate 2": SLOWER})
    config.experts = ConfigDict(
        {
            "model": "code_experts",
            "accelerator": {"intervals": 1, "rate": 2.0, "max_lead": 4, "router_width": 0},
            "objective": {"gate": 0.0, "route": 1.0, "router": 0.0},
            "recipe": {"num_steps": 300, "sequence_length": 128},
            "share": 0.25,
            "extra": 0,
            "ratios": (0.25, 0.5, 1.0, 2.0, 4.0),
            "new_tokens": 64,
        }
    )
    config.analyses = ("layers ahead", "likeness", "exits", "expert loading")
    calls: dict[str, Any] = {"metric": "tokens_per_target_call", "temperature": 0.0}
    same: dict[str, Any] = {"metric": "agreement", "temperature": 0.0}
    config.claims = (
        claim("self-speculation", at_least=1.2, **calls),
        claim("self-speculation", at_least=1.0, over="self-speculation, own stream", **calls),
        claim("self-speculation", at_least=1.0, over="self-speculation, rate 2", **calls),
        claim("self-speculation", at_least=1.0, over="Kangaroo", **calls),
        *_ahead(),
        claim("ARLA 0.9", at_least=0.9, **same),
    )
    return config


def _slots(config: ConfigDict) -> ConfigDict:
    """The same streams at equal layers, and drafts, on text that the model knows."""
    config.models = ConfigDict({"target": "slots_deep"})
    on_slot_sentences(config, num_prompts=24)
    config.decode.temperatures = (0.0,)
    config.quality = ConfigDict({"own_choices": False, "judge": "target"})
    recipe = {**_RECIPE, **SLOT_ANSWERS, "sequence_length": 128, "eval_batches": 4}
    config.parts = ConfigDict({AIM: accelerator(recipe=recipe, intervals=4, router_width=_ROUTER)})
    config.decode.methods = (
        method("plain", "autoregressive"),
        _speculation("self-speculation"),
        _speculation("self-speculation, own stream", part="", stream="slow"),
        *_fixed_exits(),
        *(_exit(f"ARLA {theta:g}", router="arla", threshold=theta) for theta in (0.7, 0.9)),
        *(
            _exit(f"confidence {theta:g}, {name}", part=part, stream=stream, router="confidence",
                  threshold=theta)
            for theta in (0.7, 0.9)
            for name, part, stream in _STREAMS
        ),
    )  # fmt: skip
    zero: dict[str, Any] = {"temperature": 0.0}
    config.claims = (
        claim(
            "self-speculation", "tokens_per_target_call", 1.0, over="self-speculation, own stream",
            **zero,
        ),
        *_ahead(),
        *(
            claim(f"{n} layers, M2R2", "rouge_l", 1.0, over=f"{n} layers, own stream", **zero)
            for n in (2, 4, 6)
        ),
    )  # fmt: skip
    return config


def _fixed_exits() -> tuple[ConfigDict, ...]:
    return tuple(
        _exit(
            f"{2 * gate} layers, {name}", part=part, stream=stream, router="fixed", exit_gate=gate
        )
        for gate in (1, 2, 3)
        for name, part, stream in _STREAMS
    )


def _ahead() -> tuple[ConfigDict, ...]:
    """At as many layers the accelerated stream keeps more of plain decoding's text."""
    return tuple(
        claim(
            f"{n} layers, M2R2", "agreement", 1.0, temperature=0.0, over=f"{n} layers, own stream"
        )
        for n in (2, 4, 6)
    )


def _speculation(label: str, part: str = AIM, **options: Any) -> ConfigDict:
    options = {"intervals": 4, "num_draft": DRAFTS, "threshold": 0.6, **options}
    return method(label, "m2r2", part=part, **options)


def _exit(label: str, part: str = AIM, **options: Any) -> ConfigDict:
    return method(label, "m2r2_exit", part=part, **{"intervals": 4, **options})


def sweep() -> list[dict[str, object]]:
    """Rates, ranks, kinds and intervals of the stream, each with drafts and fixed exits."""
    kinds: dict[str, dict[str, Any]] = {
        "aimed at the last layer": {},
        "rate 2": {"rate": 2.0},
        "rate 3": {"rate": 3.0},
        "ranks halved": {"attention_rank": 4, "mlp_rank": 8},
        "ranks doubled": {"attention_rank": 16, "mlp_rank": 32},
        "bottleneck alone": {"kind": "mlp"},
        "going on at gates": {"restart": False},
        "two intervals": {"intervals": 2},
    }
    settings: list[dict[str, object]] = []
    for name, fields in kinds.items():
        intervals = fields.get("intervals", 4)
        restart = fields.get("restart", True)
        own = {"intervals": 4, "router_width": _ROUTER, **fields}
        settings.append(
            {
                "name": name,
                "decode.temperatures": (0.0,),
                "decode.repeats": 1,
                "lossless.samples": 0,
                "claims": (),
                "analyses": (),
                "parts": ConfigDict({name: accelerator(recipe=_RECIPE, **own)}),
                "decode.methods": (
                    method("plain", "autoregressive"),
                    _speculation("self-speculation", part=name, intervals=intervals),
                    *(
                        _exit(f"{gate * 8 // intervals} layers", part=name, intervals=intervals,
                              router="fixed", exit_gate=gate, restart=restart)
                        for gate in range(1, intervals)
                    ),
                ),
            }
        )  # fmt: skip
    return settings
