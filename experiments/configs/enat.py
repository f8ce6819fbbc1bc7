"""ENAT: deep encoding of visible image tokens, once each (arXiv 2411.06959), and its uniform base.

    python -m experiments.run --config=experiments/configs/enat.py:offline --workdir=runs/enat
    python -m experiments.run --config=experiments/configs/enat.py:captions --workdir=runs/captions
    python -m experiments.sweep --config=experiments/configs/enat.py:offline --workdir=runs/e

`:offline` trains on digits of 32 pixels (8x8 tokens) in minutes. The default trains and draws
256-pixel images of ImageNet's classes in the published setting, with a tokeniser and a classifier
of your own (directories, `checkpoints/...`). Another labelled dataset that tfds has prepared on
this machine, by its name or folder, is a matter of `--config.data.dataset=...` and
`--config.data.data_dir=...`, a network of your own of `--config.models.enat=DIR`.

`:coco` and `:captions` are conditioned on text: MS-COCO at 256 pixels, with any language model in
Hugging Face's format as text encoder (`--config.models.text_model=DIR`), and scenes of four digits
in minutes. The paper has such a variant and does not describe it: what text conditions, and how,
is this project's own (`training/image_captions.py`).
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.image_generation import claim
from models.errors import check_choice

PRESETS = ("", "offline", "coco", "captions")


def method(label: str, model: str, **options: Any) -> ConfigDict:
    """An entry of `config.decode.methods`.

    Args:
      label: as reports show it.
      model: a role of `config.models`.
      options: of `SamplerConfig`, over those of `config.decode.sampler`.
    """
    return ConfigDict({"label": label, "model": model, "options": options})


def get_config(preset: str = "") -> ConfigDict:
    """ENAT with and without reuse against the uniform network; `preset` is one of `PRESETS`."""
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
            "train_split": "train", "builder_options": {}, "label_field": "label",
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
    if preset == "offline":
        _offline(config)
    elif preset:
        _text(config)
        {"coco": _coco, "captions": _captions}[preset](config)
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


def _text(config: ConfigDict) -> None:
    """One network, asked for the captions of held-out images, with and without guidance."""
    config.decode.methods = (
        method("ENAT", "enat"),
        method("ENAT, no guidance", "enat", guidance=0.0),
        method("ENAT, no reuse", "enat", reuse=False),
    )
    config.baseline = "enat"
    config.analyses = ()


def _coco(config: ConfigDict) -> None:
    """The images of val2014, in Karpathy's splits, and the first caption of each."""
    config.models = ConfigDict(
        {
            "tokenizer": "checkpoints/vq",
            "classifier": "checkpoints/classifier",
            "text_model": "checkpoints/text",
            "enat": "coco_enat_b",
        }
    )
    config.data.update(dataset="coco_captions", split="val+test+restval", label_field="")
    config.captions = ConfigDict({"field": "captions.text", "choice": "every", "max_tokens": 128})
    config.quality.update(num_images=30_000, num_real=40_504)


def _captions(config: ConfigDict) -> None:
    config.models = ConfigDict(
        {
            "tokenizer": "digits_vq32",
            "classifier": "digits_classifier16",
            "text_model": "code_target",
            "enat": "digits_enat_captions",
        }
    )
    config.data.update(dataset="digit_scenes", size=32, split="test", label_field="labels")
    config.data.builder_options = ConfigDict({"grid": 2, "captions": True})
    config.captions = ConfigDict({"field": "caption", "choice": "first", "max_tokens": 128})
    config.quality.update(num_images=300, num_real=676, batch_size=50)
    config.claims = (
        claim("digits follow the caption, not chance", "accuracy",
              "ENAT", "ENAT", over_metric="other_caption", at_least=5.0),
        claim("captions that training did not have are followed as well", "unseen",
              "ENAT", "ENAT", over_metric="accuracy", at_least=0.95),
        claim("guidance makes more digits right", "accuracy",
              "ENAT", "ENAT, no guidance", at_least=1.0),
        claim("guidance brings images nearer to real ones", "frechet",
              "ENAT", "ENAT, no guidance", at_most=1.0),
        claim("reuse keeps the digits right", "accuracy", "ENAT", "ENAT, no reuse", at_least=0.95),
        claim("reuse keeps the distance about equal", "frechet",
              "ENAT", "ENAT, no reuse", at_most=1.1),
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
