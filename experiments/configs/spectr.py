"""SpecTr: several draft sequences, verified by optimal transport (arXiv 2310.15141).

    python -m experiments.run --config=experiments/configs/spectr.py:offline --workdir=runs/spectr
    python -m experiments.sweep --config=experiments/configs/spectr.py:offline --workdir=runs/s

The default preset has the published settings (K = 8, L = 8, temperature 1, LM1B prompts) for a
pair of checkpoints of your own; `:offline` is the embedded code pair, minutes on two cores.
"""

from ml_collections import ConfigDict

from experiments.config_parts import claim, comparison, method


def get_config(preset: str = "") -> ConfigDict:
    """SpecTr against plain decoding, one draft, and multi-round rejection."""
    config = comparison("spectr")
    offline = preset == "offline"
    length = 4 if offline else 8
    config.decode.temperatures = (0.6, 1.0) if offline else (1.0,)
    if not offline:
        config.models.target, config.models.draft = "checkpoints/target", "checkpoints/draft"
        config.data.update(dataset="lm1b", num_prompts=1000)
        config.decode.top_p = 1.0
    config.decode.methods = (
        method("plain", "autoregressive"),
        method("one draft", "speculative_sampling", num_draft=length),
        *(_spectr(f"K-SEQ, K={k}", k, length) for k in (2, 4, 8)),
        method("multi-round, K=8", "spectr", num_sequences=8, length=length, rule="multi_round"),
    )
    config.analyses = ("acceptance",)
    config.claims = tuple(
        claim(f"K-SEQ, K={k}", "tokens_per_target_call", 1.0, temperature=1.0, over=other)
        for k, other in ((2, "one draft"), (4, "K-SEQ, K=2"), (8, "K-SEQ, K=4"))
    )
    return config


def _spectr(label: str, num_sequences: int, length: int) -> ConfigDict:
    return method(label, "spectr", num_sequences=num_sequences, length=length)


def sweep() -> list[dict[str, object]]:
    """Block efficiency over the number of drafts K and their length L, on more tokens."""
    return [
        {
            "decode.methods": (
                method("plain", "autoregressive"),
                *(_spectr(f"K={k}", k, length) for k in (1, 2, 4, 8)),
            ),
            "data.num_prompts": 12,
            "decode.temperatures": (1.0,),
            "decode.repeats": 1,
            "lossless.samples": 0,
            "analyses": (),
            "claims": (),
            "name": f"L={length}",
        }
        for length in (2, 4, 8)
    ]
