"""Row-causal up- and down-samplers of code grids: a row depends on no row below its own.

MuLo-SD (arXiv 2601.05149): an image that is being written exists down to some row only, so what
takes its codes from one resolution to another must not look further. Convolutions are padded from
above alone; along a row they look both ways, since rows are written as a whole. The output is the
input's embeddings, scaled by nearest neighbour or averages, plus what the network adds, matched
with the codebook.

Letters: B batch, h and w sides of the small grid, r factor, Z width of a code, K codes.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import parameter_files
from models.errors import InputError, check_choice

KIND = "row_causal_resampler"
DIRECTIONS = ("up", "down")


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """The architecture.

    Attributes:
      direction: 'up' (U_r) or 'down' (D_r).
      factor: r.
      embed_dim: Z, of the codebook.
      width: channels of the network.
      num_layers: convolutions of 3x3 at the small grid's resolution; each sees two rows above.
    """

    direction: str
    factor: int = 2
    embed_dim: int = 16
    width: int = 256
    num_layers: int = 3

    def __post_init__(self) -> None:
        check_choice("resampler.direction", self.direction, DIRECTIONS)
        for name, least in (("factor", 2), ("embed_dim", 1), ("width", 1), ("num_layers", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"resampler.{name}: {value} must be at least {least}")


class _Resampler(nn.Module):
    config: ResamplerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Embeddings [B, *, *, Z] at one resolution -> [B, *, *, Z] at the other."""
        config, r, Z = self.config, self.config.factor, self.config.embed_dim
        if config.direction == "up":
            plain = x.repeat(r, axis=1).repeat(r, axis=2)
        else:
            x = gather_cells(x, r)
            plain = x.reshape(*x.shape[:3], r * r, Z).mean(axis=3)
        y = nn.Dense(config.width, name="into")(x)
        convolution = functools.partial(
            nn.Conv, config.width, (3, 3), padding=((2, 0), (1, 1)), use_bias=False
        )
        for layer in range(config.num_layers):
            # Normalised at each place by itself: statistics over an image would look below.
            z = nn.silu(nn.LayerNorm(name=f"norm_{layer}")(y))
            y = y + convolution(name=f"conv_{layer}")(z)
        y = nn.silu(nn.LayerNorm(name="norm_out")(y))
        features = Z * r * r if config.direction == "up" else Z
        y = nn.Dense(features, kernel_init=nn.initializers.zeros, name="out")(y)
        if config.direction == "up":
            y = spread_cells(y, r)
        # Scale of the logits that a cross-entropy sees; the nearest code does not depend on it.
        self.param("log_scale", nn.initializers.zeros, (1,))
        return plain + y


def spread_cells(x: jax.Array, factor: int) -> jax.Array:
    """Pixel shuffle: [B, h, w, r r C] -> [B, r h, r w, C]."""
    B, h, w, channels = x.shape
    x = x.reshape(B, h, w, factor, factor, channels // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h * factor, w * factor, -1)


def gather_cells(x: jax.Array, factor: int) -> jax.Array:
    """Undoes `spread_cells`."""
    B, height, width, channels = x.shape
    x = x.reshape(B, height // factor, factor, width // factor, factor, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, height // factor, width // factor, -1)


def init(config: ResamplerConfig, key: jax.Array) -> Any:
    """Random parameters; at first the network adds nothing."""
    x = jnp.zeros((1, config.factor, config.factor, config.embed_dim))
    return _Resampler(config).init(key, x)["params"]


def param_shapes(config: ResamplerConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of `init`'s parameters."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def vectors(config: ResamplerConfig, params: Any, codes: jax.Array) -> jax.Array:
    """Embeddings at the other resolution of code vectors [B, *, *, Z]: [B, *, *, Z].

    Raises:
      InputError: a grid that `factor` does not divide, going down.
    """
    if config.direction == "down" and (
        codes.shape[1] % config.factor or codes.shape[2] % config.factor
    ):
        raise InputError(
            f"codes: a grid of {codes.shape[1]}x{codes.shape[2]} cannot be brought down by "
            f"{config.factor}"
        )
    found: Any = _Resampler(config).apply({"params": params}, codes)
    return found


def logits(params: Any, codebook: jax.Array, found: jax.Array) -> jax.Array:
    """Scores float32 [..., K] of the codes for vectors [..., Z]: minus the squared distance.

    Up to a term that all codes share, scaled by a learned factor.
    """
    distance = jnp.sum(codebook**2, axis=-1) - 2 * found @ codebook.T
    return -distance * jnp.exp(params["log_scale"])


def resample(
    config: ResamplerConfig, params: Any, codebook: jax.Array, ids: jax.Array
) -> jax.Array:
    """Codes int32 at the other resolution of codes int [B, *, *]."""
    found = vectors(config, params, codebook[ids])
    return jnp.argmax(logits(params, codebook, found), axis=-1).astype(jnp.int32)


def save(directory: Any, config: ResamplerConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, KIND, config, params)


def load(directory: Any) -> tuple[ResamplerConfig, Any]:
    """Reads what `save` wrote; errors as `parameter_files.load`."""
    return parameter_files.load(directory, KIND, ResamplerConfig, param_shapes)
