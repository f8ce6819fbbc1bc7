"""Byte2Word: words from their bytes by cross-attention, sub-words at the output (arXiv 2211.12677).

    python -m experiments.run --workdir=runs/byte2word
        --config=experiments/configs/byte2word.py:offline
    python -m experiments.sweep --workdir=runs/byte2word_sweep
        --config=experiments/configs/byte2word.py:offline

Only the paper's abstract could be read: a cross-attention network makes one vector a word from its
bytes, words are predicted by their sub-words, the input has about a tenth of BERT's embedding
parameters, and the model is on par with BERT. Everything else here is a choice of this project.

Both models, Byte2Word and a BERT over sub-words of the same steps, rows and backbone, are
pre-trained on hidden words and fine-tuned on labelled texts. `:offline` does so in minutes on
docstrings and CLDR names. The default is BERT-base's sizes on Wikipedia and GLUE as tfds has
prepared them on this machine; other text is a matter of `--config.corpora`, local files of
the dataset 'text_files'.
"""

from typing import Any

from ml_collections import ConfigDict

from models.errors import check_choice

PRESETS = ("", "offline")

PACKAGES = (
    "asyncio", "distutils", "email", "http", "idlelib", "importlib", "lib2to3", "logging",
    "tkinter", "unittest", "xml",
)  # fmt: skip
LATIN = (
    "cs", "da", "de", "en", "es", "fi", "fr", "hr", "hu", "id", "it", "lt", "nl", "pl", "pt", "ro",
    "sk", "sv", "tr", "vi",
)  # fmt: skip
HELD_OUT = {
    "other Latin": ("af", "ca", "et", "is", "lv", "nb", "sl", "sw"),
    "Cyrillic": ("bg", "ru", "uk", "kk"),
    "Greek": ("el",),
    "Arabic": ("ar", "fa", "ur"),
    "Hebrew": ("he",),
    "Devanagari": ("hi", "mr"),
    "Thai": ("th",),
    "Georgian": ("ka",),
    "Armenian": ("hy",),
    "Hangul": ("ko",),
    "Han": ("zh", "ja"),
}

_SECTION = {
    "source": "sections",
    "rows": {"num_words": 32, "num_tokens": 80},
    "options": {"packages": PACKAGES},
}


def get_config(preset: str = "") -> ConfigDict:
    """Byte2Word and BERT; `preset` is '' or 'offline'."""
    check_choice("preset", preset, PRESETS)
    config = ConfigDict()
    config.name = "byte2word" + (f" {preset}" if preset else "")
    config.experiment = "word_encoding"
    config.seed = 0
    config.corpora = ConfigDict(
        {"wikipedia": {"dataset": "wikipedia/20230601.en", "eval_split": "train[-1%:]"}}
    )
    config.corpora.wikipedia.train_split = "train[:-1%]"
    # Fields of training.word_models.Pretraining that all models share.
    config.pretraining = ConfigDict(
        {"vocab_size": 30_522, "layers": 12, "width": 768, "heads": 12, "eval_rows": 4096}
    )
    config.mask_rate = 0.15
    # 17 bytes are a flag and 16 of text.
    config.rows = ConfigDict({"num_words": 320, "width": 17, "num_slots": 6, "num_tokens": 512})
    config.run = _run(1_000_000, 256, 1e-4, warmup=10_000, every=5000)
    config.models = ConfigDict(_models())
    # Those that are fine-tuned.
    config.classifiers = ("byte2word", "bert")
    # '' for none.
    config.generation = ConfigDict(
        {"role": "causal", "prompts": 8, "prompt_words": 12, "max_bytes": 200}
    )
    config.tasks = ConfigDict({"sst2": _glue("glue/sst2", "sentence", 2)})
    config.task_run = _run(6000, 32, 2e-5, warmup=600, every=500)
    # Texts of a split that are measured at most, evenly spaced; 0 for all.
    config.evaluation = ConfigDict({"batch_size": 128, "texts": 0})
    config.noise = ConfigDict(
        {
            "rates": (0.0, 0.1, 0.2, 0.3, 0.4),
            "kinds": ("replace", "delete", "insert", "swap"),
            "tasks": ("sst2",),
        }
    )
    config.repeats = 3
    if preset:
        _offline(config)
    return config


def _models() -> dict[str, dict[str, Any]]:
    """Roles: what they read, the head, the objective, steps and options of the word encoder."""
    return {
        "byte2word": {"reads": "words", "head": "parallel"},
        "byte2word A": {"reads": "words", "head": "autoregressive"},
        "bert": {"reads": "subwords"},
        "causal": {
            "reads": "words",
            "head": "autoregressive",
            "objective": "causal",
            "positions": "rope",
            "num_steps": 1_000_000,
        },
    }


def _run(steps: int, batch: int, rate: float, *, warmup: int, every: int) -> ConfigDict:
    """Fields of training.word_models.RunSizes; linear decay is not there: a cosine to a tenth."""
    optimizer = {"learning_rate": rate, "warmup_steps": warmup, "weight_decay": 0.01}
    return ConfigDict(
        {
            "num_steps": steps,
            "batch_size": batch,
            "optimizer": {**optimizer, "beta2": 0.999},
            "eval_every": every,
            "checkpoint_every": every,
        }
    )


def _glue(dataset: str, field: str, classes: int) -> dict[str, Any]:
    # GLUE's test labels are not public.
    return {
        "source": "labelled",
        "rows": {"num_words": 128, "num_tokens": 256},
        "options": {
            "dataset": dataset,
            "text_field": field,
            "label_field": "label",
            "num_classes": classes,
            "splits": {"train": "train", "validation": "train[-1%:]", "test": "validation"},
        },
    }


def _offline(config: ConfigDict) -> None:
    config.corpora = ConfigDict(
        {
            "docstrings": {"dataset": "stdlib_docstrings"},
            "names": {"dataset": "cldr", "options": {"locales": LATIN}, "group_by": "locale"},
        }
    )
    # Rotary positions and more hidden words for both models: within so few steps learned positions
    # and 15 % stay at the frequencies of words, whatever reads them.
    config.pretraining.update(
        vocab_size=1000, layers=3, width=96, heads=4, positions="rope", eval_rows=512
    )
    config.mask_rate = 0.3
    config.rows.update(num_words=48, num_tokens=112)
    config.run = _run(1200, 16, 2e-3, warmup=100, every=400)
    # Head A is a setting of the sweep; writing is shown, not measured, after this few steps.
    del config.models["byte2word A"]
    config.models.causal.num_steps = 100
    config.tasks = ConfigDict(
        {
            "section": _SECTION,
            "kind": {
                "source": "names",
                "rows": {"num_words": 12, "num_tokens": 48},
                "options": {"label": "kind", "locales": LATIN, "held_out": HELD_OUT},
            },
        }
    )
    config.task_run = _run(250, 32, 1e-3, warmup=25, every=250)
    config.noise.tasks = ("section",)
    config.evaluation.texts = 500


def sweep() -> list[dict[str, Any]]:
    """How bytes become a vector, with and without positions; the head; the longest word.

    Every setting is trained as the offline preset is; the first one is its model.
    """
    settings: dict[str, dict[str, Any]] = {
        "one query": {},
        "12 heads": {"encoder": {"num_heads": 12}},
        "network": {"encoder": {"mlp_dim": 384}},
        "mean as query": {"encoder": {"pooling": "mean_query"}},
        "mean of bytes": {"encoder": {"pooling": "mean"}},
        "no positions": {"encoder": {"positions": False}},
        "four queries": {"encoder": {"num_queries": 4}},
        "head A": {"head": "autoregressive"},
        "8 bytes": {"width": 9},
        "24 bytes": {"width": 25},
    }
    found = []
    for name, options in settings.items():
        width = options.pop("width", 17)
        model = {"reads": "words", "head": "parallel", **options}
        found.append(
            {
                "name": name,
                "models": ConfigDict({"byte2word": model}),
                "classifiers": ("byte2word",),
                "tasks": ConfigDict({"section": _SECTION}),
                "rows.width": width,
                "generation.role": "",
            }
        )
    return found
