"""Maps of rejected tokens: growing them by a radius and splitting them into islands."""

import jax
import jax.numpy as jnp


def dilate(marks: jnp.ndarray, radius: int) -> jnp.ndarray:
    """Marks every cell within `radius` rows and columns of a marked one: bool [B, h, w].

    MuLo-SD's neighbourhood N(t, l), clipped to the map.
    """
    size = 2 * radius + 1
    grown = jax.lax.reduce_window(
        marks.astype(jnp.int32), 0, jax.lax.max, (1, size, size), (1, 1, 1), "SAME"
    )
    return grown.astype(bool)


def max_components(height: int, width: int) -> int:
    """The most 8-connected components that a map can have."""
    return -(-height // 2) * -(-width // 2)


def components(marks: jnp.ndarray) -> jnp.ndarray:
    """Numbers the 8-connected components of each map.

    Labels spread by taking the least of all neighbours until nothing changes, so it takes as many
    rounds as the longest way through a component.

    Args:
      marks: bool [B, h, w].

    Returns:
      int32 [B, h, w], 0, 1, ... by the first cell in raster order; -1 where nothing is marked.
    """
    B, h, w = marks.shape
    none = h * w
    start = jnp.where(marks, jnp.arange(none).reshape(h, w), none)

    def spread(carry: tuple[jnp.ndarray, jnp.ndarray]) -> tuple[jnp.ndarray, jnp.ndarray]:
        labels, _ = carry
        least = jax.lax.reduce_window(labels, none, jax.lax.min, (1, 3, 3), (1, 1, 1), "SAME")
        least = jnp.where(marks, least, none)
        return least, (least != labels).any()

    labels, _ = jax.lax.while_loop(lambda carry: carry[1], spread, (start, jnp.bool_(True)))
    flat = labels.reshape(B, none)
    is_root = flat == jnp.arange(none)
    rank = jnp.cumsum(is_root, axis=1) - 1
    number = jnp.take_along_axis(rank, jnp.minimum(flat, none - 1), axis=1)
    return jnp.where(flat < none, number, -1).reshape(B, h, w).astype(jnp.int32)
