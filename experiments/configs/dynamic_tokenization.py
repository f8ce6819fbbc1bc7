"""Dynamic tokenisation: merged batches, rows on the fly, huge vocabularies (arXiv 2411.18553).

    python -m experiments.run --config=experiments/configs/dynamic_tokenization.py:offline \
        --workdir=runs/dynamic_tokenization
    python -m experiments.sweep --config=experiments/configs/dynamic_tokenization.py:offline \
        --workdir=runs/dynamic_tokenization_sweep

The default preset has the published settings, for a decoder and its hypernetwork (a directory of
`training.hypernetwork_recipes`): a vocabulary of a million tokens, 2,000 lists of which 250 are
searched, 20 candidates, adapters of rank 128. (The paper trains its adapters on XLM-R, an encoder;
here they are trained on the decoder.) `:offline` is a model of 1 million parameters on the
standard library's source: **small scale**, a vocabulary of 32,768 tokens, synthetic rows beyond
them, minutes of training. `:averages` is the same without a hypernetwork: means of constituents'
rows alone. `:encoder` trains adapters on a bidirectional model, as the paper does.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import zett
from models.errors import check_choice

PRESETS = ("", "offline", "averages", "encoder")

_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_LOCALES = (
    "en", "de", "fr", "es", "pl", "fi", "tr", "vi", "sw", "ru", "el", "ar", "hi", "th", "ja", "zh",
    "ko", "am", "ka",
)  # fmt: skip


def get_config(preset: str = "") -> ConfigDict:
    """What is measured, at the published scale or offline."""
    check_choice("preset", preset, PRESETS)
    config = ConfigDict()
    config.name = "dynamic_tokenization"
    config.experiment = "dynamic_tokenization"
    config.seed = 0
    config.base = "checkpoints/mistral-7b-v0.1"
    config.pre_tokenization = "gpt2"
    config.hypernetwork = ConfigDict({"directory": "checkpoints/zett-mistral-7b", "max_surface": 7})
    config.hypernetwork.recipe = ConfigDict()
    config.boundary = "pretokens"
    config.data = ConfigDict(
        {
            "dataset": "stdlib_code", "builder_options": {}, "train_split": "train",
            "splits": ("test", "validation"), "without": ("encodings/", "pydoc_data/"),
        }
    )  # fmt: skip
    config.measurements = ("merge curves", "contexts", "own tokens", "languages", "adapters")
    config.curve = ConfigDict({"batch_sizes": (1, 8, 32), "windows": 128, "tokens": 128})
    config.curve.shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    config.contexts = ConfigDict(
        {
            "tokens": 4000, "ending": 96, "windows": 512, "batch_size": 32, "choices": 4,
            "shares": _SHARES, "capacity": 5000,
        }
    )  # fmt: skip
    config.languages = ConfigDict({"locales": _LOCALES, "names_a_row": 8, "budget": 200})
    config.adapters = _adapters(
        lora={"rank": 128, "alpha": 256.0, "dropout": 0.3},
        optimizer={"learning_rate": 1e-4, "weight_decay": 0.0},
        num_steps=187_500,  # 15 epochs of 400,000 in batches of 32
        tokens=128,
        side="left",
        pooling="last",
    )
    config.vocabulary = ConfigDict(
        {
            "size": 1_000_000, "chunk": 5000, "provider": "hypernetwork", "k": 20,
            "metric": "cosine", "probes": (1, 2, 4, 8, 16, 32, 64, 125, 250, 1000),
            "timed_probes": 250, "sizes": (1_000_000,), "queries": 512, "batch_size": 8,
            "repeats": 10, "texts": 64, "text_tokens": 128,
        }
    )  # fmt: skip
    config.decode = ConfigDict(
        {
            "num_prompts": 8, "own_tokens": 1024, "large_tokens": 1024, "temperature": 0.0,
            "probes": (250, 1000), "repeats": 3,
        }
    )  # fmt: skip
    if preset:
        _offline(config)
    if preset in ("averages", "encoder"):
        config.hypernetwork.recipe = ConfigDict()
        config.vocabulary.provider = "fvt"
    if preset == "encoder":
        config.base = "code_encoder"
        config.measurements = ("adapters",)
        config.vocabulary.size = 0
        config.adapters.side = "right"
    return config


def _adapters(**more: Any) -> ConfigDict:
    """Arms: no merges, half of what can be merged, and any share; and both kinds of rows."""
    arms = [
        {"label": f"{kind}, {name}", "provider": provider, "kind": law, "share": share}
        for provider, name in (("hypernetwork", "hypernetwork"), ("fvt", "FVT"))
        for kind, law, share in (
            ("trained without merges", "fixed", 0.0), ("trained at a half", "fixed", 0.5),
            ("trained at any", "uniform", 0.0),
        )
    ]  # fmt: skip
    made, mean = "hypernetwork", "FVT"
    return ConfigDict(
        {
            "packages": ("asyncio", "distutils", "idlelib", "multiprocessing", "tkinter", "xml"),
            "characters": 160, "train_passages": 400, "test_passages": 96, "batch_size": 32,
            "curve_batches": 8, "shares": _SHARES, "bins": 30, "full": 5000,
            "capacity": 10_000, "evaluation_capacity": 5000, "arms": tuple(map(ConfigDict, arms)),
            "flatter": tuple(
                (f"trained at any, {name}", f"trained {other}, {name}")
                for name in ("hypernetwork", "FVT") for other in ("without merges", "at a half")
            ),
            "better_at_word_level": ((f"trained at any, {made}", f"trained at any, {mean}"),),
            "keeps": (f"trained at any, {made}", f"trained at any, {mean}"), **more,
        }
    )  # fmt: skip


def _offline(config: ConfigDict) -> None:
    """Minutes on one core."""
    small = zett.get_config("offline")
    config.base, config.pre_tokenization = small.base, small.pre_tokenization
    recipe = small.hypernetwork.recipe
    recipe.training.update(identity_steps=200, steps=500, warmup_steps=50)
    config.hypernetwork.update(directory="", max_surface=0, recipe=recipe)
    config.contexts.update(tokens=96, ending=32, windows=160)
    config.adapters = _adapters(
        lora={"rank": 16, "alpha": 32.0, "dropout": 0.1},
        optimizer={"learning_rate": 3e-3, "weight_decay": 0.0, "warmup_steps": 10},
        num_steps=150,
        tokens=64,
        side="left",
        pooling="mean",
    )
    config.vocabulary.update(
        size=32_768, probes=(1, 2, 4, 8, 16, 32, 64, 128), timed_probes=64, metric="inner",
        sizes=(32_768, 65_536, 131_072, 262_144), queries=256, text_tokens=96,
    )  # fmt: skip
    # Half of what can be merged is trained at with averages alone.
    config.adapters.arms = tuple(
        arm for arm in config.adapters.arms if (arm.provider, arm.share) != ("hypernetwork", 0.5)
    )
    config.decode.update(own_tokens=96, large_tokens=48, probes=(16, 64, 128))


def sweep() -> list[dict[str, object]]:
    """Candidates of a step and the metric of the search, decoding with the large vocabulary."""
    quiet: dict[str, object] = {"measurements": (), "vocabulary.sizes": (32_768,)}
    return [
        {
            **quiet,
            "name": f"{metric}, k = {k}",
            "vocabulary.metric": metric,
            "vocabulary.k": k,
            "decode.probes": (1, 4, 16, 64),
            "decode.repeats": 2,
        }
        for metric, k in (("cosine", 5), ("cosine", 20), ("cosine", 80), ("inner", 20))
    ]
