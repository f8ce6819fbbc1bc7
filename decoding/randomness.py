"""Random numbers that belong to a row and a position, never to a batch.

A row's key is folded with the absolute position of the token being decided and with the purpose
of the draw. So a row's text does not depend on its neighbours, on how many tokens earlier rounds
emitted, or on where a run was cut into chunks; and two methods that decide the same position with
the same purpose draw the same noise.
"""

import jax
import jax.numpy as jnp

# What a draw at a position is for.
SAMPLE = 0  # the target's own token at this position
DRAFT = 1  # the drafter's token
ACCEPT = 2  # the uniform of an acceptance test
RESIDUAL = 3  # the token after a rejection
ORDER = 4  # which of several positions comes first
TABLE = 5  # a row's own token vectors, at position 0


def row_keys(seed: int, rows: jnp.ndarray) -> jax.Array:
    """One key a row: key [B] from a seed and row numbers int [B] that identify the rows."""
    base = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(base, row))(jnp.asarray(rows))


def at(keys: jax.Array, positions: jnp.ndarray, purpose: int) -> jax.Array:
    """Keys [B] for one purpose at positions int [B]."""
    return jax.vmap(lambda k, p: jax.random.fold_in(jax.random.fold_in(k, p), purpose))(
        keys, positions
    )


def each(keys: jax.Array, positions: jnp.ndarray, purpose: int) -> jax.Array:
    """As `at`, for several positions of a row: keys [B], positions int [B, T] -> keys [B, T]."""
    return jax.vmap(at, in_axes=(None, 1, None), out_axes=1)(keys, positions, purpose)


def several(keys: jax.Array, count: int) -> jax.Array:
    """`count` keys from each: keys [B, ...] -> [B, ..., count].

    The first is the key itself, so that what needs one draw a position (a chain) shares it with
    the first of what needs several (the siblings of a tree).
    """
    numbers = jnp.arange(1, count)
    fold = lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)  # noqa: E731
    for _ in keys.shape:
        fold = jax.vmap(fold)
    return jnp.concatenate([keys[..., None], fold(keys)], axis=-1)


def gumbel(keys: jax.Array, size: int) -> jnp.ndarray:
    """Standard Gumbel noise for keys [...]: float32 [..., size]."""
    draw = lambda key: jax.random.gumbel(key, (size,), jnp.float32)  # noqa: E731
    for _ in keys.shape:
        draw = jax.vmap(draw)
    return draw(keys)


def uniform(keys: jax.Array) -> jnp.ndarray:
    """Uniforms in [0, 1), one for each of keys [...]: float32 [...]."""
    draw = lambda key: jax.random.uniform(key, (), jnp.float32)  # noqa: E731
    for _ in keys.shape:
        draw = jax.vmap(draw)
    return draw(keys)
