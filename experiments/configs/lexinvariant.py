"""Lexinvariant language models (arXiv 2305.16349) against standard ones.

    python -m experiments.run --config=experiments/configs/lexinvariant.py:offline \\
        --workdir=runs/lexinvariant
    python -m experiments.sweep --config=experiments/configs/lexinvariant.py:offline \\
        --workdir=runs/lexinvariant_sweep

`:offline` trains, in minutes, on a language of six symbols whose best lexinvariant model is
computed exactly, and on docstrings and source of the standard library by 64 characters. The default
is the published setting: 150M parameters, 250k steps of Adafactor on 512 characters; Wiki-40B as
tfds has prepared it on this machine, the Pile and its GitHub part as text files of your own
(`data/pile`, `data/github`). `config.overrides` changes fields of the recipes
(`training/lexinvariant_models.py`).
"""

from typing import Any

from ml_collections import ConfigDict

from models.errors import check_choice

PRESETS = ("", "offline")


def text(
    label: str, lexinvariant: str, standard: str, *, semi: str = "", probe: str = ""
) -> ConfigDict:
    """An entry of `config.texts`: recipes of `training.lexinvariant_models`, trained on first use.

    Args:
      label: as reports show it.
      lexinvariant, standard: the same network with tables drawn and with one learned.
      semi: the standard network trained on partly exchanged tokens; '' for none.
      probe: reads keys off the lexinvariant model; '' for none.
    """
    return ConfigDict(
        {
            "label": label, "lexinvariant": lexinvariant, "standard": standard, "semi": semi,
            "probe": probe,
        }
    )  # fmt: skip


def get_config(preset: str = "") -> ConfigDict:
    """Loss by position, keys of ciphers, symbols in context; `preset` is '' or 'offline'."""
    check_choice("preset", preset, PRESETS)
    config = ConfigDict()
    config.name = "lexinvariant" + (f" {preset}" if preset else "")
    config.experiment = "lexinvariance"
    config.seed = 0
    # Draws of the table a sequence; the probabilities of several are averaged.
    config.draws = 1
    # Pairs of a field of every model's recipe and its value: ("train.num_steps", 2000).
    config.overrides = ()
    # The enumerable language; '' to leave it out. p' of every size up to 7 can be computed.
    config.language = ConfigDict(
        {
            "lexinvariant": "", "standard": "", "rows": 1000, "length": 32, "sizes": (4, 5, 6),
            "theorem_length": 128,
        }
    )  # fmt: skip
    config.texts = (
        text(
            "Pile", "pile_lexinvariant", "pile_standard", semi="pile_semi_020", probe="pile_probe"
        ),
        text("GitHub", "github_lexinvariant", "github_standard"),
        text("Wiki-40B", "wiki_lexinvariant", "wiki_standard"),
    )
    # Held-out sequences of so many tokens; perplexities are means over `window` positions.
    config.context = ConfigDict({"rows": 100, "length": 511, "window": 100, "batch_size": 20})
    config.tasks = ConfigDict({"examples": 1000, "batch_size": 100})
    # Windows in which places vote on the key; soft entries average `soft_window` places.
    config.probe = ConfigDict(
        {
            "window": 100,
            "windows": 6,
            "soft_window": 50,
            "temperatures": (1.0, 2.0, 3.0),
            "overrides": (),  # of the probe's own recipe
        }
    )
    if preset:
        config.language.update(lexinvariant="markov_lexinvariant", standard="markov_standard")
        config.texts = (
            text("prose", "prose_lexinvariant", "prose_standard", probe="prose_probe"),
            text("code", "code_lexinvariant", ""),
        )
        config.context.update(rows=200, length=128, window=32, batch_size=25)
        config.probe.update(window=50, windows=5)
        config.tasks.update(examples=400, batch_size=100)
    return config


def sweep() -> list[dict[str, Any]]:
    """The share p of tokens that are exchanged, from the standard model to a whole cipher."""
    shared = {"texts": ()}
    return [
        {
            "name": f"p = {percent / 100:g}",
            "language.standard": f"markov_semi_{percent:03d}",
            "language.lexinvariant": "markov_lexinvariant",
            **shared,
        }
        for percent in (0, 20, 50, 100)
    ]
