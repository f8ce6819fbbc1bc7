"""ENAT: deep encoding of visible image tokens, once each (arXiv 2411.06959), and its uniform base.

    python -m experiments.run --config=experiments/configs/enat.py:offline --workdir=runs/enat
    python -m experiments.sweep --config=experiments/configs/enat.py:offline --workdir=runs/e

`:offline` trains on digits of 32 pixels (8x8 tokens) in minutes. The default trains and draws
256-pixel images of ImageNet's classes in the published setting, with a tokeniser and a classifier
of your own (directories, `checkpoints/...`). Another labelled dataset that tfds has prepared on
this machine, by its name or folder, is a matter of `--config.data.dataset=...` and
`--config.data.data_dir=...`, a network of your own of `--config.models.enat=DIR`. The variant that
is conditioned on text is not here.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.image_generation import claim
from models.errors import check_choice

PRESETS = ("", "offline")


def method(label: str, model: str, **options: Any) -> ConfigDict:
    """An entry of `config.decode.methods`.

    Args:
      label: as reports show it.
      model: a role of `config.models`.
      options: of `SamplerConfig`, over those of `config.decode.sampler`.
    """
    return ConfigDict({"label": label, "model": model, "options": options})


def get_config(preset: str = "") -> ConfigDict:
    """ENAT with and without reuse against the uniform network; `preset` is '' or 'offline'."""
    check_choice("preset", preset, PRESETS)
    config = ConfigDict()
    config.name = "enat" + (f" {preset}" if preset else "")
    config.experiment = "image_generation"
    config.seed = 0
    # A recipe of training.image_models (trained on first use), or a directory.
    config.models = ConfigDict(
        {
            "tokenizer": "checkpoints/vq",
            "classifier": "checkpoints/classifier",
            "uniform": "imagenet_nat_l",
            "enat": "imagenet_enat_l",
        }
    )
    config.baseline = "uniform"
    # Real images that generated ones are compared with.
    config.data = ConfigDict(
        {
            "dataset": "imagenet2012", "data_dir": "", "size": 256, "split": "validation",
            "train_split": "train", "builder_options": {},
        }
    )  # fmt: skip
    config.decode = ConfigDict()
    # Published for 256 pixels; for 512: guidance 3.5 and sampling_temperature 4.
    config.decode.sampler = ConfigDict(
        {"steps": 8, "guidance": 2.5, "mask_temperature": 1.5, "sampling_temperature": 6.0}
    )
    config.decode.batch_size = 50
    config.decode.repeats = 3
    config.decode.methods = (
        method("uniform", "uniform"),
        method("ENAT, no reuse", "enat", reuse=False),
        method("ENAT", "enat"),
    )
    config.quality = ConfigDict({"num_images": 50_000, "num_real": 50_000, "batch_size": 50})
    config.pictures = ConfigDict({"columns": 10, "rows": 2, "animated": "ENAT"})
    config.probes = ConfigDict({"num_images": 200})
    config.analyses = ("attention", "similarity")
    config.claims = ()
    if preset:
        _offline(config)
    return config


def _offline(config: ConfigDict) -> None:
    config.models = ConfigDict(
        {
            "tokenizer": "digits_vq32",
            "classifier": "digits_classifier32",
            "uniform": "digits_nat_l6",
            "uniform3": "digits_nat_l3",
            "enat": "digits_enat_e5d1",
            "enat33": "digits_enat_e3d3",
        }
    )
    config.data.update(dataset="digit_scenes", size=32, split="test")
    config.quality.update(num_images=300, num_real=676, batch_size=50)
    config.decode.methods = (
        method("uniform L=6", "uniform"),
        method("uniform L=3", "uniform3"),
        method("ENAT E=3 D=3, no reuse", "enat33", reuse=False),
        method("ENAT E=5 D=1, no reuse", "enat", reuse=False),
        method("ENAT E=5 D=1", "enat"),
        method("ENAT E=5 D=1, 16 steps, no reuse", "enat", steps=16, reuse=False),
        method("ENAT E=5 D=1, 16 steps", "enat", steps=16),
        method("ENAT E=5 D=1, projecting once", "enat", project_once=True),
        method("ENAT E=5 D=1, 16 steps, projecting once", "enat", steps=16, project_once=True),
    )
    config.pictures.animated = "ENAT E=5 D=1"
    config.claims = (
        claim("matched work: these cost the same to 5%", "mmacs_per_image",
              "ENAT E=3 D=3, no reuse", "uniform L=3", at_most=1.05),
        claim("disentangled at most as far as uniform at matched work", "frechet",
              "ENAT E=3 D=3, no reuse", "uniform L=3", at_most=1.0),
        claim("and so with the encoder-heavy split, at 0.77 of the work", "frechet",
              "ENAT E=5 D=1, no reuse", "uniform L=3", at_most=1.0),
        claim("encoder-heavy at most as far as balanced", "frechet",
              "ENAT E=5 D=1, no reuse", "ENAT E=3 D=3, no reuse", at_most=1.0),
        claim("reuse saves work (published 43% at E=22, D=2)", "mmacs_per_image",
              "ENAT E=5 D=1", "ENAT E=5 D=1, no reuse", at_most=0.7),
        claim("reuse saves more in more steps", "mmacs_per_image",
              "ENAT E=5 D=1, 16 steps", "ENAT E=5 D=1, 16 steps, no reuse", at_most=0.61),
        claim("reuse keeps the distance about equal", "frechet",
              "ENAT E=5 D=1", "ENAT E=5 D=1, no reuse", at_most=1.1),
        claim("and so in 16 steps", "frechet",
              "ENAT E=5 D=1, 16 steps", "ENAT E=5 D=1, 16 steps, no reuse", at_most=1.1),
        claim("projecting once brings 16 steps nearer", "frechet",
              "ENAT E=5 D=1, 16 steps, projecting once", "ENAT E=5 D=1, 16 steps", at_most=1.0),
        claim("work that is saved is time that is saved", "milliseconds_per_image",
              "ENAT E=5 D=1", "uniform L=6", at_most=0.5),
    )  # fmt: skip


def sweep() -> list[dict[str, Any]]:
    """Steps, with and without reuse; and the splits of six layers."""
    lines = (
        method("uniform L=6", "uniform"),
        method("ENAT, no reuse", "enat", reuse=False),
        method("ENAT", "enat"),
    )
    shared = {"decode.methods": lines, "claims": (), "analyses": (), "pictures.animated": "ENAT"}
    steps = [{"name": f"T={t}", "decode.sampler.steps": t, **shared} for t in (4, 8, 12, 16)]
    splits = [
        {"name": f"E={e} D={6 - e}", "models.enat": f"digits_enat_e{e}d{6 - e}", **shared}
        for e in (5, 3, 1)
    ]
    return [*steps, *splits]
