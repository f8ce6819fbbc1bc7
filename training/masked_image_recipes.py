"""Recipes of masked image models: the offline presets' and the full-scale ones, by name."""

import dataclasses
from typing import Any

from models import enat
from models.enat import ENATConfig, TextENATConfig
from training import masked_image
from training.data_parallel import RunConfig
from training.image_batches import ImageData
from training.image_captions import CaptionedImageModel, Captions
from training.masked_image import MaskedImageModel
from training.optimizers import OptimizerConfig


def _digits_masked(encoder: int, decoder: int, **more: Any) -> MaskedImageModel:
    return MaskedImageModel(
        ImageData(sizes=(32,)),
        masked_image.TrainConfig(
            model=ENATConfig(embed_dim=64, encoder_layers=encoder, decoder_layers=decoder, **more),
            run=RunConfig(num_steps=2000, batch_size=32, eval_every=500, checkpoint_every=500),
            optimizer=OptimizerConfig(
                learning_rate=2e-3, warmup_steps=100, weight_decay=0.03, beta2=0.99
            ),
            ema_decay=0.995,
        ),
    )


def _imagenet_masked(model: ENATConfig) -> MaskedImageModel:
    """The published training at 256 pixels, for a tokeniser and a dataset of your own."""
    return MaskedImageModel(
        ImageData("imagenet2012", sizes=(256,)),
        masked_image.TrainConfig(
            model=model,
            run=RunConfig(
                num_steps=500_000, batch_size=2048, log_every=100, eval_every=5000,
                checkpoint_every=5000,
            ),
            optimizer=OptimizerConfig(
                learning_rate=4e-4, warmup_steps=5000, final_fraction=1.0, weight_decay=0.03,
                beta1=0.99, beta2=0.99, clip_norm=None,
            ),
        ),
        tokenizer="checkpoints/vq",
        flip=True,
    )  # fmt: skip


def _captioned_digits(steps: int) -> CaptionedImageModel:
    """Scenes of four digits, drawn from a sentence that names them."""
    base = _digits_masked(3, 3)
    model = TextENATConfig(**dataclasses.asdict(base.train.model), text_dim=512)
    run = dataclasses.replace(base.train.run, num_steps=steps)
    return CaptionedImageModel(
        ImageData(options={"grid": 2, "captions": True}, sizes=(32,)),
        dataclasses.replace(base.train, model=model, run=run),
    )


def _captioned_coco() -> CaptionedImageModel:
    """Ours, as the method's training on MS-COCO is not public: that of classes, in batches of 256.

    Karpathy's 'train' is the 82,783 images of train2014; every caption of an image is used.
    """
    base = _imagenet_masked(enat.ENAT_B)
    model = TextENATConfig(**dataclasses.asdict(enat.ENAT_B), text_dim=2048)
    return CaptionedImageModel(
        ImageData("coco_captions", sizes=(256,), eval_split="val", label_field=None),
        dataclasses.replace(
            base.train,
            model=model,
            run=dataclasses.replace(base.train.run, batch_size=256),
            optimizer=dataclasses.replace(base.train.optimizer, learning_rate=2e-4),
        ),
        tokenizer=base.tokenizer,
        captions=Captions("checkpoints/text", field="captions.text", choice="every"),
    )


RECIPES: dict[str, MaskedImageModel] = {
    # ENAT at three splits of six layers, the uniform network of as many layers, and the one whose
    # sampling costs about as much as ENAT's without reuse.
    "digits_enat_e5d1": _digits_masked(5, 1),
    "digits_enat_e3d3": _digits_masked(3, 3),
    "digits_enat_e1d5": _digits_masked(1, 5),
    "digits_nat_l6": _digits_masked(6, 0, disentangled=False),
    "digits_nat_l3": _digits_masked(3, 0, disentangled=False),
    "digits_enat_captions": _captioned_digits(1500),
    "coco_enat_b": _captioned_coco(),
    "imagenet_enat_l": _imagenet_masked(enat.ENAT_L),
    "imagenet_nat_l": _imagenet_masked(dataclasses.replace(enat.ENAT_L, disentangled=False)),
}
