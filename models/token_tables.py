"""A language model's token tables, taken out and put in: what changes when its tokeniser does.

Tables are by token: [V, D] of a model with tied embeddings; else [V, 2 D], the row that a token is
read with beside the row that scores it (the transposed logits' kernel).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from models.errors import InputError

# Parameters that hold one row a token.
_TABLES = (("embedder", "embedding"), ("lm_head", "kernel"))


class Tables(NamedTuple):
    """Rows of tokens.

    Attributes:
      input: [V, D].
      output: [V, D]; None for a model whose embeddings are tied.
      bias: [V], added to the logits; None without one.
    """

    input: jax.Array
    output: jax.Array | None = None
    bias: jax.Array | None = None


def tables(config: TransformerConfig, params: Any, bias: jax.Array | None = None) -> Tables:
    """The tables of a model; `bias` [V] is that of a masked language model's logits."""
    embedding = params["embedder"]["embedding"]
    output = None if config.tie_embeddings else params["lm_head"]["kernel"].T
    return Tables(embedding, output, bias)


def joined(found: Tables) -> jax.Array:
    """Input and output rows side by side: [V, D] tied, else [V, 2 D]."""
    if found.output is None:
        return found.input
    return jnp.concatenate([found.input, found.output], axis=-1)


def split(config: TransformerConfig, table: jax.Array, bias: jax.Array | None = None) -> Tables:
    """The inverse of `joined`."""
    width = config.embed_dim * (1 if config.tie_embeddings else 2)
    if table.shape[-1] != width:
        raise InputError(f"table: {table.shape[-1]} columns; the model's tokens have {width}")
    if config.tie_embeddings:
        return Tables(table, None, bias)
    return Tables(table[:, : config.embed_dim], table[:, config.embed_dim :], bias)


def with_tables(params: Any, new: Tables) -> Any:
    """Parameters of the model with other tokens; what is no table is shared, not copied."""
    dtype = params["embedder"]["embedding"].dtype
    embedder = {**params["embedder"], "embedding": new.input.astype(dtype)}
    changed = {**params, "embedder": embedder}
    if new.output is not None:
        changed["lm_head"] = {**params["lm_head"], "kernel": new.output.T.astype(dtype)}
    return changed


def with_rows(new: Tables, old: Tables, places: jax.Array, ids: jax.Array) -> Tables:
    """`new` with the rows at int [s] `places` replaced by those of `old` at int [s] `ids`.

    How special tokens keep the language model's own rows, exactly.
    """

    kept = Tables(*(None if mine is None else old[i] for i, mine in enumerate(new)))  # type: ignore[arg-type]
    return jax.tree.map(
        lambda mine, theirs: mine.at[places].set(theirs[ids].astype(mine.dtype)), new, kept
    )


def retokenized_config(
    config: TransformerConfig, vocab_size: int, specials: Mapping[int, int] | None = None
) -> TransformerConfig:
    """The architecture with another vocabulary.

    Args:
      config: of the model as it was.
      vocab_size: of the new tokeniser.
      specials: old id -> new id of special tokens that moved; they stay where they are by default.

    Raises:
      InputError: a special token of the model lies beyond the new vocabulary.
    """
    moved = specials or {}

    def place(old: int | None) -> int | None:
        return None if old is None else moved.get(old, old)

    changed = config.replace(
        vocab_size=vocab_size,
        eos_token_ids=tuple(moved.get(old, old) for old in config.eos_token_ids),
        **{
            field: place(getattr(config, field))
            for field in ("bos_token_id", "pad_token_id", "mask_token_id")
        },
    )
    ids = [*changed.eos_token_ids, changed.bos_token_id, changed.mask_token_id]
    for new in ids:
        if new is not None and new >= vocab_size:
            raise InputError(f"vocab_size: {vocab_size} has no room for special token {new}")
    return changed


def transfer_to_variant(base: Any, swapped: Any, variant: Any, share: float = 0.5) -> Any:
    """A fine-tuned variant of a model with the tokeniser that its base was given (section 2.7).

    What is no table is variant + share * (swapped - base); tables are those of `swapped`.

    Args:
      base: parameters of the model as it was.
      swapped: the base with the new tokeniser; trained further or not.
      variant: the base after fine-tuning, with the old tokeniser.
      share: lambda; has no effect where only tables of the base were changed. Published: 0.5.

    Raises:
      InputError: parameters of different architectures.
    """
    trees = [jax.tree.structure(tree) for tree in (base, swapped, variant)]
    if len(set(trees)) > 1:
        raise InputError("variant: its parameters are not those of the base's architecture")

    def one(path: Any, old: jax.Array, new: jax.Array, tuned: jax.Array) -> jax.Array:
        if is_table(path):
            return new
        if not old.shape == new.shape == tuned.shape:
            name = jax.tree_util.keystr(path)
            raise InputError(f"variant: {name} has shape {tuned.shape}, the base {old.shape}")
        return tuned + share * (new - old)

    return jax.tree_util.tree_map_with_path(one, base, swapped, variant)


def is_table(path: Any) -> bool:
    """Whether a parameter's path in the tree is one of the tables."""
    return tuple(str(key.key) for key in path) in _TABLES


def statistics(table: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column."""
    values = np.asarray(table, np.float64)
    return values.mean(0), values.std(0)
