"""ZeTT: zero-shot tokeniser transfer by a hypernetwork (arXiv 2405.07883).

    python -m experiments.run --config=experiments/configs/zett.py:offline --workdir=runs/zett
    python -m experiments.sweep --config=experiments/configs/zett.py:offline \
        --workdir=runs/zett_sweep

Trains a hypernetwork for a frozen language model on tokenisers drawn anew for every batch, gives
the model tokenisers that were never drawn, and compares with tables made without training
(lexical, FVT, FOCUS, OFA), everything in bits per byte. Then training goes on for a little while
from each start; a fine-tuned variant takes the tables over; a BPE is rewritten as a Unigram.

The default preset has the published hyperparameters for a checkpoint and tokenisers in local
directories, and text that tfds has prepared (published: English text and code, weights 14 : 6,
3.3 billion tokens; TPU pods). `:offline` is a model of 1 million parameters with 1024 tokens of
Python code and a few hundred steps: **it shows mechanisms, not the paper's quality**. A transfer
alone is `python -m experiments.transfer_tokenizer`.
"""

from typing import Any

from ml_collections import ConfigDict

from models.errors import check_choice

PRESETS = ("", "offline")


def target(label: str, kind: str, source: str = "", **options: Any) -> ConfigDict:
    """An entry of `config.targets`: a tokeniser that the model is given.

    Args:
      label: as reports show it.
      kind: 'directory' (with a tokenizer.json), 'bpe', 'unigram' or 'bytes'.
      source: the directory, or the dataset that it is trained on.
      options: `vocab_size`, and `dataset_options` of the dataset's builder.
    """
    return ConfigDict(
        {"label": label, "kind": kind, "source": source, "vocab_size": 0, "dataset_options": {}}
        | options
    )


def get_config(preset: str = "") -> ConfigDict:
    """`preset` is '' or 'offline'."""
    check_choice("preset", preset, PRESETS)
    config = ConfigDict()
    config.name = "zett" + (f" {preset}" if preset else "")
    config.experiment = "tokenizer_transfer"
    config.seed = 0
    # A named base model (trained on first use) or a checkpoint directory.
    config.base = "checkpoints/mistral-7b-v0.1"
    config.pre_tokenization = "gpt2"
    # A directory of a trained hypernetwork; empty to train the recipe.
    config.hypernetwork = ConfigDict({"directory": ""})
    config.hypernetwork.recipe = ConfigDict(
        {"dataset": "c4/en:3.1.0", "dataset_options": {}, "network": {"num_heads": 32}}
    )
    config.hypernetwork.recipe.sampler = ConfigDict()  # published values are the defaults
    config.hypernetwork.recipe.training = ConfigDict()
    config.targets = (
        target("GPT-2", "directory", "checkpoints/gpt2"),
        target("StarCoder", "directory", "checkpoints/starcoder"),
    )
    config.heuristics = ("random", "lexical", "fvt", "focus", "ofa")
    # Held-out text, and what auxiliary vectors are counted on.
    config.data = ConfigDict(
        {
            "dataset": "c4/en:3.1.0", "dataset_options": {}, "split": "validation",
            "train_split": "train[:1%]", "windows": 1024, "characters": 2048, "batch_size": 8,
            "auxiliary_documents": 10_000, "auxiliary_rank": 300,
        }
    )  # fmt: skip
    config.n_shot = ConfigDict(
        {
            "target": "GPT-2", "heuristics": ("fvt", "focus"), "steps": 50_000, "batch_size": 32,
            "sequence_length": 512, "rate": 3e-6, "heuristic_rate": 6e-6, "eval_every": 5000,
            "compute_dtype": "bfloat16",
        }
    )  # fmt: skip
    # Fine-tuned variant: a checkpoint, or trained here on `dataset` for `steps`.
    config.variant = ConfigDict(
        {
            "directory": "checkpoints/mistral-7b-instruct", "target": "GPT-2", "shares": (0.0, 0.5),
            "dataset": "", "dataset_options": {}, "steps": 0, "rate": 0.0,
        }
    )  # fmt: skip
    config.unigramify = ConfigDict({"target": "GPT-2", "documents": 10_000, "max_words": 100_000})
    # A bidirectional base, compared over the same targets; empty for none.
    config.encoder = ConfigDict({"base": "", "targets": ()})
    config.measurements = ("targets", "identity", "n-shot", "variant", "unigramify")
    if preset == "offline":
        _offline(config)
    return config


def _offline(config: ConfigDict) -> None:
    config.base = "code_untied"
    config.pre_tokenization = "own"
    config.hypernetwork.recipe = ConfigDict(
        {
            "dataset": "stdlib_code",
            "dataset_options": {},
            "network": {"num_heads": 4, "num_layers": 2},
        }
    )  # fmt: skip
    config.hypernetwork.recipe.sampler = ConfigDict(
        {
            "batch_size": 8, "queue_batches": 16, "characters": 400, "stride": 2,
            "vocab_mean": 768.0, "vocab_min": 768, "vocab_max": 768, "longest_run": 8,
            "noise": True,
        }
    )  # fmt: skip
    config.hypernetwork.recipe.training = ConfigDict(
        {
            "identity_steps": 200, "identity_tokens": 1024, "identity_rate": 3e-3, "steps": 500,
            "learning_rate": 6e-4, "warmup_steps": 50, "sequence_length": 64,
            "compute_dtype": "float32", "auxiliary_weight": 0.5, "eval_batches": 8,
            "log_every": 10, "eval_every": 100,
            "checkpoint_every": 50,
        }
    )  # fmt: skip
    config.targets = (
        target("2k BPE", "bpe", "stdlib_code", vocab_size=2048),
        target("500 Unigram", "unigram", "stdlib_code", vocab_size=500),
        target(
            "1k BPE of names", "bpe", "cldr", vocab_size=1024,
            dataset_options={"locales": ("de", "fr")},
        ),
        target("bytes", "bytes"),
    )  # fmt: skip
    config.data.update(
        dataset="stdlib_code", split="test", train_split="train", windows=32, characters=240,
        batch_size=32, auxiliary_documents=60, auxiliary_rank=64,
    )  # fmt: skip
    config.n_shot.update(
        target="500 Unigram", heuristics=("fvt",), steps=30, batch_size=8, sequence_length=64,
        rate=3e-4, heuristic_rate=3e-4, eval_every=10, compute_dtype="float32",
    )  # fmt: skip
    config.variant.update(
        directory="", target="2k BPE", shares=(0.0, 0.5), dataset="stdlib_docstrings", steps=60,
        rate=1e-3,
    )  # fmt: skip
    config.unigramify.update(target="2k BPE", documents=40, max_words=3000)
    config.encoder.update(base="code_encoder", targets=("2k BPE", "bytes"))
    config.measurements = ("targets", "identity", "variant", "unigramify", "encoder", "n-shot")


def sweep() -> list[dict[str, Any]]:
    """For `:offline`: training without noise, without the identity stage, without the auxiliary
    loss; all equally long, and shorter than the main run."""
    inside = "hypernetwork.recipe"
    shared: dict[str, Any] = {
        "measurements": ("targets", "identity"),
        "heuristics": ("fvt",),
        f"{inside}.training.identity_steps": 150,
        f"{inside}.training.steps": 200,
        f"{inside}.training.warmup_steps": 20,
    }
    return [
        {"name": "full", **shared},
        {"name": "no identity stage", **shared, f"{inside}.training.identity_steps": 0},
        {"name": "no auxiliary loss", **shared, f"{inside}.training.auxiliary_weight": 0.0},
        {"name": "no noise", **shared, f"{inside}.sampler.noise": False},
    ]
