"""A small convolutional classifier of images, whose last hidden layer is a space to measure in.

It stands for the Inception network of published scores. Distances in its features are between
images of the data that it was trained on; they are not FID and compare with nothing elsewhere.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import parameter_files
from models.errors import InputError

KIND = "image_classifier"


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The architecture.

    Attributes:
      size: pixels a side, H = W.
      channels: of an image, C.
      num_classes: classes.
      widths: channels of each 3x3 convolution; each is followed by 2x2 max pooling.
      num_features: width F of the last hidden layer.
    """

    size: int = 32
    channels: int = 1
    num_classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    num_features: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON has lists
        for name in ("size", "channels", "num_classes", "num_features"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"classifier.{name}: {value} must be at least 1")
        if not self.widths or min(self.widths) < 1:
            raise InputError(f"classifier.widths: {self.widths} must be positive numbers")
        if self.size % 2 ** len(self.widths):
            raise InputError(
                f"classifier.size: {self.size} must be a multiple of {2 ** len(self.widths)}"
            )


class Classified(NamedTuple):
    """Attributes: features float32 [B, F]; logits float32 [B, classes]."""

    features: jax.Array
    logits: jax.Array


class _Classifier(nn.Module):
    config: ClassifierConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> Classified:
        for level, width in enumerate(self.config.widths):
            x = nn.relu(nn.Conv(width, (3, 3), name=f"conv_{level}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        features = nn.relu(nn.Dense(self.config.num_features, name="features")(x))
        return Classified(features, nn.Dense(self.config.num_classes, name="logits")(features))


def init(config: ClassifierConfig, key: jax.Array) -> Any:
    """Parameters: a nested dict, float32."""
    images = jnp.zeros((1, config.size, config.size, config.channels))
    return _Classifier(config).init(key, images)["params"]


def param_shapes(config: ClassifierConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of `init`'s parameters."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def apply(config: ClassifierConfig, params: Any, images: jax.Array) -> Classified:
    """Features and logits of images float [B, H, W, C] in [0, 1].

    Raises:
      InputError: images of another shape.
    """
    shape = (config.size, config.size, config.channels)
    if images.shape[1:] != shape:
        raise InputError(f"images: shape {images.shape} must be [B, {', '.join(map(str, shape))}]")
    found: Any = _Classifier(config).apply({"params": params}, images)
    return found


def save(directory: Any, config: ClassifierConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: Any) -> tuple[ClassifierConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, ClassifierConfig, param_shapes)
