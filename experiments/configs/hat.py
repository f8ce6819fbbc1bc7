"""HAT: a byte encoder, a backbone over words and a byte decoder (arXiv 2501.10322).

    python -m experiments.run --config=experiments/configs/hat.py:offline --workdir=runs/hat
    python -m experiments.sweep --config=experiments/configs/hat.py:offline --workdir=runs/hat_sweep

The default preset has the published sizes of the 1B models and a baseline of 64k tokens and equal
work a byte, for text files of your own; the optimiser is ours where the paper's is not known. The
`:offline` preset is a model of a few hundred thousand parameters on docstrings of the standard
library: a quarter of an hour on one core, and far too small to say anything about the published
scale. `:longer` trains HAT and the baseline alone for more than three times as long.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
    """Models, text and what is measured."""
    config = ConfigDict()
    config.name = "hat"
    config.experiment = "hierarchical"
    config.seed = 0
    config.data = ConfigDict(
        {
            "dataset": "text_files",
            "builder_options": {"files": "data/**/*.txt"},
            "join_held_out": False,
        }
    )
    # Section 3, 1B: 18 layers of 2304, encoder and decoder of 3 layers and 6 heads.
    config.words = ConfigDict(
        {
            "width": 768, "layers": 3, "backbone_width": 2304, "backbone_layers": 18,
            "head_dim": 128, "max_word": 100, "max_words": 4096, "rule": "whitespace",
        }
    )  # fmt: skip
    config.variants = ConfigDict()
    config.tokens = ConfigDict({"vocab_size": 65_536, "width": 2048, "layers": 16, "head_dim": 128})
    config.training = ConfigDict(
        {
            "num_steps": 100_000, "batch_size": 256, "row_bytes": 16_384, "eval_every": 1000,
            "eval_batches": 16, "seed": 0,
            "optimizer": {"learning_rate": 3e-4, "warmup_steps": 500, "weight_decay": 0.1},
        }
    )  # fmt: skip
    config.passages = ConfigDict(
        {
            "words": 512,
            "context": 256,
            "count": 1000,
            "batch_size": 16,
            "most_words": 1024,
            "tokens": 4096,
        }
    )
    config.measurements = ("compare", "noise", "scripts", "adaptation", "generation")
    config.noise = ConfigDict(
        {
            "kinds": ("permute", "replace", "delete", "insert", "upper"),
            "rates": {"permute": 0.1, "replace": 0.1, "delete": 0.1, "insert": 0.1, "upper": 1.0},
            "curve_kind": "replace", "curve": (0.02, 0.05, 0.1, 0.2, 0.4),
        }
    )  # fmt: skip
    config.scripts = ConfigDict(
        {"locales": ("en", "de", "vi", "tr", "ru", "el", "ar", "hi", "th", "ka", "ko", "ja", "zh")}
    )
    config.adaptation = ConfigDict({"locales": ("ru", "uk", "bg", "el"), "names": 24})
    config.adaptation.training = ConfigDict({"num_steps": 2000, "eval_every": 200})
    config.generation = ConfigDict({"prompts": 8, "new_tokens": 256, "num_draft": 4, "repeats": 3})
    if preset in ("offline", "longer"):
        _offline(config)
    if preset == "longer":
        config.training.num_steps = 5000
        config.variants = ConfigDict()
        config.measurements = ("compare", "noise")
    return config


def _offline(config: ConfigDict) -> None:
    config.data.update(dataset="stdlib_docstrings", join_held_out=True)
    config.data.builder_options = ConfigDict()
    config.words.update(
        width=48, layers=1, backbone_width=96, backbone_layers=3, head_dim=16, max_word=12,
        rule="unicode",
    )  # fmt: skip
    config.variants = ConfigDict(
        {
            "fixed chunks": {"rule": "fixed", "max_word": 8},
            "large decoder": {"decoder_width": 64, "decoder_layers": 2},
        }
    )
    config.tokens.update(vocab_size=1024, width=96, layers=3, head_dim=16)
    config.training.update(
        num_steps=1500, batch_size=8, row_bytes=256, eval_every=100, eval_batches=4
    )
    config.training.optimizer = ConfigDict(
        {
            "kind": "muon", "learning_rate": 2e-2, "warmup_steps": 20, "weight_decay": 0.05,
            "beta2": 0.98,
        }
    )  # fmt: skip
    config.passages.update(words=64, context=32, count=40, batch_size=8, most_words=112, tokens=256)
    config.adaptation.training.update(num_steps=120, eval_every=20)
    config.generation.update(new_tokens=96, repeats=2)


def sweep() -> list[dict[str, Any]]:
    """The splitting rule and the sizes of words."""
    return [
        {"name": f"{rule}, at most {cap} bytes", "words.rule": rule, "words.max_word": cap,
         "variants": ConfigDict(), "measurements": ("compare", "noise"), "training.num_steps": 500,
         "passages.tokens": 384}
        for rule, cap in (("unicode", 8), ("unicode", 16), ("whitespace", 16))
    ]  # fmt: skip
