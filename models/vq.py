"""The vector-quantised image tokeniser: a convolutional autoencoder whose code is a grid of ids.

VQ-VAE (van den Oord et al., arXiv 1711.00937) with the convolutional network of MaskGIT's VQGAN
(Chang et al., arXiv 2202.04200): residual blocks with group norm and swish, no attention, so any
image whose sides are multiples of `factor` is encoded.

Letters: B batch, H and W pixels, h = H / factor and w = W / factor, C channels, K codes, Z width
of a code.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import parameter_files
from models.errors import InputError, check_choice

KIND = "vq"
DOWNSAMPLERS = ("average", "convolution")


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """The architecture. The defaults are the offline preset: f = 4, 64 codes, width 32.

    Attributes:
      channels: of an image, C.
      base_width: channels of the finest level.
      multipliers: width of each level from fine to coarse, as multiples of `base_width`; every
        level after the first halves the sides.
      num_res_blocks: residual blocks a level, and as many at the coarsest in the middle.
      norm_groups: of the group norms.
      codebook_size: K.
      embed_dim: Z.
      downsample: 'average' pooling of 2x2 (the published class default), or a 'convolution' of
        stride 2 with zeros on the right and bottom.
    """

    channels: int = 1
    base_width: int = 16
    multipliers: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: int = 1
    norm_groups: int = 8
    codebook_size: int = 64
    embed_dim: int = 16
    downsample: str = "average"

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON has lists
        for name in (
            "channels", "base_width", "num_res_blocks", "norm_groups", "codebook_size", "embed_dim",
        ):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise InputError(f"vq.{name}: {value} must be at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"vq.multipliers: {self.multipliers} must be positive numbers")
        if bad := [w for w in self.widths if w % self.norm_groups]:
            raise InputError(
                f"vq.norm_groups: {self.norm_groups} must divide every level's width; got {bad[0]}"
            )
        check_choice("vq.downsample", self.downsample, DOWNSAMPLERS)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, fine to coarse."""
        return tuple(self.base_width * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels along a side of what one token stands for, f."""
        return 2 ** (len(self.multipliers) - 1)


# MaskGIT's tokeniser, which ENAT and MuLo-SD use at full scale: f = 16, 1024 codes.
VQGAN_F16 = VQConfig(
    channels=3,
    base_width=128,
    multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    norm_groups=32,
    codebook_size=1024,
    embed_dim=256,
)


class Reconstruction(NamedTuple):
    """A pass through the whole autoencoder, for training.

    Attributes:
      images: [B, H, W, C], not clipped.
      ids: int32 [B, h, w].
      latents: [B, h, w, Z], the encoder's output before it is quantised.
      codebook_loss: [], mean squared distance of the codes to the fixed latents.
      commitment_loss: [], the same number, whose gradient goes to the latents instead.
    """

    images: jax.Array
    ids: jax.Array
    latents: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array


class _ResBlock(nn.Module):
    width: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        convolution = functools.partial(nn.Conv, self.width, (3, 3), use_bias=False)
        y = nn.silu(nn.GroupNorm(self.groups, name="norm_0")(x))
        y = convolution(name="conv_0")(y)
        y = nn.silu(nn.GroupNorm(self.groups, name="norm_1")(y))
        y = convolution(name="conv_1")(y)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), use_bias=False, name="shortcut")(x)
        return x + y


class _Encoder(nn.Module):
    config: VQConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_groups
        x = nn.Conv(config.widths[0], (3, 3), use_bias=False, name="conv_in")(x)
        for level, width in enumerate(config.widths):
            for block in range(config.num_res_blocks):
                x = _ResBlock(width, groups, name=f"level_{level}_block_{block}")(x)
            if level < len(config.widths) - 1:
                x = self._down(x, width, level)
        for block in range(config.num_res_blocks):
            x = _ResBlock(config.widths[-1], groups, name=f"middle_block_{block}")(x)
        x = nn.silu(nn.GroupNorm(groups, name="norm_out")(x))
        return nn.Conv(config.embed_dim, (1, 1), name="conv_out")(x)

    def _down(self, x: jax.Array, width: int, level: int) -> jax.Array:
        if self.config.downsample == "average":
            return nn.avg_pool(x, (2, 2), (2, 2))
        convolution = nn.Conv(
            width, (3, 3), (2, 2), padding=((0, 1), (0, 1)), name=f"level_{level}_down"
        )
        return convolution(x)


class _Decoder(nn.Module):
    config: VQConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_groups
        x = nn.Conv(config.widths[-1], (3, 3), name="conv_in")(x)
        for block in range(config.num_res_blocks):
            x = _ResBlock(config.widths[-1], groups, name=f"middle_block_{block}")(x)
        for level in reversed(range(len(config.widths))):
            for block in range(config.num_res_blocks):
                x = _ResBlock(config.widths[level], groups, name=f"level_{level}_block_{block}")(x)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = nn.Conv(config.widths[level], (3, 3), name=f"level_{level}_up")(x)
        x = nn.silu(nn.GroupNorm(groups, name="norm_out")(x))
        return nn.Conv(config.channels, (3, 3), name="conv_out")(x)


class _Autoencoder(nn.Module):
    config: VQConfig

    def setup(self) -> None:
        self.encoder = _Encoder(self.config)
        self.decoder = _Decoder(self.config)
        shape = (self.config.codebook_size, self.config.embed_dim)
        bound = 1 / self.config.codebook_size
        uniform = nn.initializers.uniform(2 * bound)
        self.codebook = self.param("codebook", lambda key: uniform(key, shape, jnp.float32) - bound)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(images))


def init(config: VQConfig, key: jax.Array) -> Any:
    """Parameters: a nested dict with `encoder`, `decoder` and `codebook` [K, Z], float32."""
    side = config.factor
    images = jnp.zeros((1, side, side, config.channels))
    return _Autoencoder(config).init(key, images)["params"]


def param_shapes(config: VQConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of `init`'s parameters."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def latents(config: VQConfig, params: Any, images: jax.Array) -> jax.Array:
    """The encoder's output float [B, h, w, Z] for images [B, H, W, C] in [0, 1].

    Raises:
      InputError: sides that are no multiple of `config.factor`, or another number of channels.
    """
    _, height, width, channels = images.shape
    if height % config.factor or width % config.factor or channels != config.channels:
        raise InputError(
            f"images: shape {images.shape} must be [B, H, W, {config.channels}] with H and W "
            f"multiples of {config.factor}"
        )
    encoded: Any = _Autoencoder(config).apply(
        {"params": params}, images, method=lambda module, x: module.encoder(x)
    )
    return encoded


def nearest_codes(params: Any, vectors: jax.Array) -> jax.Array:
    """Ids int32 [...] of the codes nearest to vectors [..., Z] in Euclidean distance."""
    codebook = params["codebook"]
    # |v|^2 is the same for all codes. Full precision, or near ties differ between devices.
    products = jnp.matmul(vectors, codebook.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(codebook**2, -1) - 2 * products, -1).astype(jnp.int32)


def encode(config: VQConfig, params: Any, images: jax.Array) -> jax.Array:
    """Token ids int32 [B, h, w] of images [B, H, W, C] in [0, 1]; errors as `latents`."""
    return nearest_codes(params, latents(config, params, images))


def decode(config: VQConfig, params: Any, ids: jax.Array) -> jax.Array:
    """Images float32 [B, H, W, C], clipped to [0, 1], of token ids int [B, h, w]."""
    return jnp.clip(decode_embeddings(config, params, params["codebook"][ids]), 0, 1)


def decode_embeddings(config: VQConfig, params: Any, codes: jax.Array) -> jax.Array:
    """Images [B, H, W, C], not clipped, of code vectors [B, h, w, Z]."""
    decoded: Any = _Autoencoder(config).apply(
        {"params": params}, codes, method=lambda module, x: module.decoder(x)
    )
    return decoded


def embeddings(params: Any) -> jax.Array:
    """The codebook [K, Z]."""
    return params["codebook"]


def reconstruct(config: VQConfig, params: Any, images: jax.Array) -> Reconstruction:
    """Through encoder, codebook and decoder, with the straight-through gradient (section 3.2 of
    arXiv 1711.00937): what reaches the codes from the decoder goes to the latents unchanged."""
    found = latents(config, params, images)
    ids = nearest_codes(params, found)
    codes = params["codebook"][ids]
    fixed = jax.lax.stop_gradient
    straight = found + fixed(codes - found)
    return Reconstruction(
        decode_embeddings(config, params, straight),
        ids,
        found,
        codebook_loss=jnp.mean((codes - fixed(found)) ** 2),
        commitment_loss=jnp.mean((fixed(codes) - found) ** 2),
    )


def save(directory: Any, config: VQConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: Any) -> tuple[VQConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, VQConfig, param_shapes)
