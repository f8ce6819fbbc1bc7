"""Learn Your Tokens: word-pooled tokenisation for language modelling (arXiv 2310.11628).

    python -m experiments.run --workdir=runs/learn_your_tokens
        --config=experiments/configs/learn_your_tokens.py:offline
    python -m experiments.sweep --workdir=runs/learn_your_tokens_sweep
        --config=experiments/configs/learn_your_tokens.py:offline

Words are pooled into p vectors, read by a causal Transformer, and written unit by unit; beside
models of the same units as a stream, with as many parameters, and a closed vocabulary of words. A
prediction is right when all units of the word and its end are. Published: over 300 % relative gain
in accuracy over sub-words and characters, 30 times on rare words; the tables were not at hand.

The default preset has the hyperparameters of the authors' code (d = 512, 8 layers, p = 4, AdamW at
a constant 1e-4, batch 2, 192 words) for text files of your own; published baselines
have no positions, which is the line `byte, no positions`. `:offline` is docstrings of the standard
library, lower-cased, all punctuation spaced, words of at most 12 bytes, 200 thousand parameters and
400 steps: minutes on one core. `:characters` is the same for characters beside bytes.

Contexts are as many bytes as the pooled models' words have on average (equal bytes), or as many
units as these have words (equal units), as published.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.next_word import claim

NEVER, RARE = "accuracy: never", "accuracy: 1-9"


def get_config(preset: str = "") -> ConfigDict:
    """Pooled and flat models on one text."""
    config = ConfigDict()
    config.name = "learn_your_tokens"
    config.experiment = "next_word"
    config.seed = 0
    config.text = ConfigDict(
        {
            "dataset": "text_files",
            "options": {"files": "data/wikitext-2/*.txt"},
            "form": {"lower_case": False, "punctuation": "-{}:,;.!'?", "max_bytes": 20},
        }
    )
    config.sizes = ConfigDict(
        {
            "width": 512, "layers": 2, "heads": 8,
            "backbone_width": 512, "backbone_layers": 8, "backbone_heads": 8,
            "blocks": "gpt",
        }
    )  # fmt: skip
    config.training = ConfigDict(
        {
            "vocab_size": 50_257, "context_words": 192, "num_steps": 270_000, "batch_size": 2,
            "eval_rows": 256, "eval_every": 5000,
            "optimizer": {
                "kind": "adamw", "learning_rate": 1e-4, "warmup_steps": 0, "final_fraction": 1.0,
            },
        }
    )  # fmt: skip
    config.models = _models({"num_prefix": 4}, layers=12)
    config.examples = ConfigDict(
        {
            # Buckets of words: never in training, up to 9 times, up to 99 times, more.
            "bounds": (0, 9, 99),
            "sizes": (400, 400, 400, 1600),
            "context_words": 90,
            "room_words": 300,
            "equal_units": ("byte", "byte, no positions", "sub"),
            "batch_size": 50,
            "temperature": 0.0,
        }
    )
    config.noise = ConfigDict({"kinds": ("swap", "replace", "delete"), "rate": 0.1})
    config.timing = ConfigDict({"batch_size": 16, "repeats": 5})
    config.claims = ()
    if preset in ("offline", "characters"):
        _offline(config)
    if preset == "characters":
        _characters(config)
    return config


def _models(pooled: dict[str, Any], layers: int, word_layers: int = 8) -> ConfigDict:
    """The first line is what times are compared with; baselines have the pooled parts' layers."""
    flat = {"num_prefix": 0, "backbone_layers": layers}
    return ConfigDict(
        {
            "byte": {"units": "byte", "sizes": flat},
            "eByte": {"units": "byte", "sizes": pooled},
            "eSub": {"units": "subword", "sizes": pooled},
            "sub": {"units": "joined_subword", "sizes": flat},
            "word": {"units": "word", "sizes": {"num_prefix": 0, "backbone_layers": word_layers}},
            "byte, no positions": {"units": "byte", "sizes": {**flat, "positions": False}},
        }
    )


def _offline(config: ConfigDict) -> None:
    config.text.dataset, config.text.options = "stdlib_docstrings", ConfigDict()
    config.text.form = ConfigDict({"lower_case": True, "punctuation": None, "max_bytes": 12})
    config.sizes.update(
        width=48, layers=1, heads=2, backbone_width=64, backbone_layers=2, backbone_heads=2,
        blocks="llama", num_params=200_000,
    )  # fmt: skip
    config.training.update(
        vocab_size=512, context_words=32, num_steps=400, batch_size=4, eval_rows=64,
        eval_every=200,
    )  # fmt: skip
    config.training.optimizer = ConfigDict(
        {
            "kind": "muon", "learning_rate": 5e-3, "warmup_steps": 50, "weight_decay": 0.05,
            "beta2": 0.98,
        }
    )  # fmt: skip
    models = _models({"num_prefix": 1}, layers=3, word_layers=2)
    models.word.vocab_size = 1000
    models["eByte, p=4"] = ConfigDict({"units": "byte", "sizes": {"num_prefix": 4}})
    config.models = models
    config.examples.update(sizes=(100, 100, 100, 300), context_words=29, room_words=100)
    config.claims = _claims()


def _claims() -> tuple[ConfigDict, ...]:
    accuracy = "word accuracy"
    byte, byte_units = "byte, equal bytes", "byte, equal units"
    bare, sub, sub_units = "byte, no positions, equal units", "sub, equal bytes", "sub, equal units"
    return (
        claim("gain over bytes as published, without positions", "eByte", accuracy, bare, times=4),
        claim("gain over bytes as published, rare words", "eByte", RARE, bare, times=4),
        claim("better than bytes in equal units", "eByte", accuracy, byte_units),
        claim("better than bytes in equal bytes", "eByte", accuracy, byte),
        claim("better than sub-words in equal units", "eByte", accuracy, sub_units),
        claim("better than sub-words in equal bytes", "eByte", accuracy, sub),
        claim("rare words: better than sub-words in equal bytes", "eByte", RARE, sub),
        claim("rare words: better than a closed vocabulary", "eByte", RARE, "word"),
        claim("words never seen are written", "eByte", NEVER, at_least=1e-6),
        claim("a closed vocabulary has none of them", "word", NEVER, at_most=0),
        claim("baselines gain by positions", byte_units, accuracy, bare),
        claim("baselines gain by equal bytes", byte, accuracy, byte_units),
        claim("p = 4 is as good as p = 1", "eByte, p=4", accuracy, "eByte"),
        claim("as many right units as bytes", "eByte", "unit accuracy", byte),
        claim("equal parameters", "eByte", "parameters", byte, times=0.95),
        claim("equal parameters, other side", "eByte", "parameters", byte, times=1.05, at_most=1),
        claim("fewer positions", "eByte", "positions", byte, at_most=1),
        claim("less attention, p = 4", "eByte, p=4", "attention", byte, at_most=1),
        claim("less time a word of context, p = 1", "eByte", "milliseconds", byte, at_most=1),
        claim("less time a word of context, p = 4", "eByte, p=4", "milliseconds", byte, at_most=1),
    )


def _characters(config: ConfigDict) -> None:
    flat = {"num_prefix": 0, "backbone_layers": 3}
    config.models = ConfigDict(
        {
            "byte": {"units": "byte", "sizes": flat},
            "char": {"units": "char", "sizes": flat},
            "eByte": {"units": "byte", "sizes": {"num_prefix": 1}},
            "eChar": {"units": "char", "sizes": {"num_prefix": 1}},
        }
    )
    config.examples.equal_units = ("byte", "char")
    config.claims = tuple(
        claim(f"better than {unit}s in {context}", pooled, "word accuracy", f"{unit}, {context}")
        for unit, pooled in (("char", "eChar"), ("byte", "eByte"))
        for context in ("equal units", "equal bytes")
    )


def sweep() -> list[dict[str, Any]]:
    """Vectors of a word, beside bytes as a stream."""
    flat = {"units": "byte", "sizes": {"num_prefix": 0, "backbone_layers": 3}}
    return [
        {
            "name": f"p={p}",
            "models": ConfigDict(
                {"byte": flat, "eByte": {"units": "byte", "sizes": {"num_prefix": p}}}
            ),
            "claims": (),
        }
        for p in (1, 2, 4)
    ]
