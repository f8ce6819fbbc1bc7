"""A tiny language model with a tokeniser of words, and coco_captions with a few made-up images."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
import tokenizers

from tests.models import hf_fixtures

WORDS = [f"w{i}" for i in range(hf_fixtures.VOCAB - 2)]


def save_tokenizer(directory):
    """Words, with a beginning-of-sequence token before the first."""
    vocab = {name: i for i, name in enumerate(("<unk>", "<s>", *WORDS))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.save(str(directory / "tokenizer.json"))


def save_text_model(directory):
    hf_fixtures.checkpoint("llama", directory)
    save_tokenizer(directory)
    return directory


# coco_captions as tfds prepares it, with made-up images. (tfds' own builder needs TensorFlow.)

CAPTIONS = {"train": 3, "val": 2, "test": 1, "restval": 1}


class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="2014", version=tfds.core.Version("1.1.0"))
    ]

    def _info(self):
        number = {"id": np.int64}
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    **number,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(num_classes=80),
                    "is_crowd": np.bool_,
                }
            ),
            "captions": tfds.features.Sequence({"text": np.str_, **number}),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in CAPTIONS}

    def _generate_examples(self, split):
        rng = np.random.default_rng(0)
        for number in range(CAPTIONS[split]):
            texts = [f"w{number} w{i}" for i in range(2 + number)]
            yield (
                number,
                {
                    "image": _jpeg(rng, number),
                    "image/filename": f"{split}{number}.jpg",
                    "image/id": number,
                    "objects": [],
                    "captions": [{"id": i, "text": text} for i, text in enumerate(texts)],
                },
            )


def _jpeg(rng, number):
    """Like COCO's: of any size, and now and then grey."""
    shape = (30 + number, 24, 3) if number % 2 else (20, 26)
    picture = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(picture, "JPEG")
    picture.seek(0)
    return picture


def prepare_coco(folder):
    CocoCaptions(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return folder
