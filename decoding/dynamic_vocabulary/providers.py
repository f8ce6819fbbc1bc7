"""Where the embeddings of tokens come from that a model has no rows for.

A provider is a function of token strings: a mean of their constituents' rows (`average`, the
heuristic called FVT) or what a hypernetwork predicts (`hypernetwork`). `copying` puts the model's
own rows in the place of what a provider says, as is always done for special tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models import byte_level, embedding_heuristics, token_tables
from models import hypernetwork as networks
from models.byte_level import ByteLevel
from models.config import TransformerConfig
from models.errors import InputError
from models.token_tables import Tables


class Provider(NamedTuple):
    """A source of embeddings.

    Attributes:
      name: as reports show it.
      width: D.
      embed: strings of byte characters -> tables of as many rows, float32, on the host; inputs are
        before a model's `embedding_scale`. Each row depends on its own string alone, so that tables
        can be made in parts and kept.
    """

    name: str
    width: int
    embed: Callable[[Sequence[str]], Tables]


def model_rows(config: TransformerConfig, params: Any) -> Tables:
    """A model's own tables on the host."""
    return on_host(token_tables.tables(config, params))


def on_host(tables: Tables) -> Tables:
    """Tables as float32 arrays of numpy."""
    return jax.tree.map(lambda table: np.asarray(table, np.float32), tables)


def average(
    config: TransformerConfig, params: Any, pieces: Callable[[str], Sequence[int]]
) -> Provider:
    """Mean of the rows of each token's constituents (FVT; section 2.2 of the sheet, point 5).

    A token of the model's own vocabulary is its own constituent, and keeps its row.

    Args:
      config, params: the model whose rows are averaged.
      pieces: ids of what a string decomposes into, see `ByteLevel.decompose`.
    """
    table = np.asarray(token_tables.joined(model_rows(config, params)))

    def embed(tokens: Sequence[str]) -> Tables:
        none = np.full(len(tokens), -1)
        found = embedding_heuristics.fvt(table, none, [pieces(token) for token in tokens])
        return token_tables.split(config, found.astype(np.float32))  # type: ignore[arg-type]

    return Provider("fvt", config.embed_dim, embed)


def hypernetwork(
    config: networks.HypernetworkConfig,
    network: Any,
    model: Tables,
    source: ByteLevel,
    *,
    max_surface: int | None = None,
    language: int | None = None,
) -> Provider:
    """What a hypernetwork predicts from each token's surface form.

    Args:
      config, network: the hypernetwork and its parameters.
      model: tables of the language model that it was trained for.
      source: that one's tokeniser.
      max_surface: longest surface form (published: 4 for XLM-R, 7 for Mistral); None for what the
        hypernetwork was trained with.
      language: index of the language, where it has language embeddings.
    """
    table = token_tables.joined(model)
    length = max_surface or config.max_surface

    def embed(tokens: Sequence[str]) -> Tables:
        found = byte_level.surfaces(source, tokens, pad_id=config.pad_id, max_length=length)
        # A power of two, so that few sizes are compiled.
        size = max(128, 1 << max(len(tokens) - 1, 0).bit_length())
        ids = np.full((size, length), config.pad_id, np.int32)
        ids[: len(tokens)] = found.ids
        languages = None if language is None else np.full(size, language)
        made = networks.predict(config, network, table, ids, languages)
        return jax.tree.map(lambda rows: rows[: len(tokens)], on_host(made))

    return Provider("hypernetwork", config.embed_dim, embed)


def copying(
    provider: Provider, model: Tables, ids: Mapping[str, int], *, name: str | None = None
) -> Provider:
    """A provider but for the tokens of `ids`, which have the model's own rows.

    Args:
      provider: asked for all other tokens, and only for these.
      model: tables on the host, see `model_rows`.
      ids: special tokens (always), or the whole vocabulary where original embeddings are kept.
      name: of the result; default the provider's.
    """

    def embed(tokens: Sequence[str]) -> Tables:
        own = np.array([ids.get(token, -1) for token in tokens], int)
        others = provider.embed([token for token in tokens if token not in ids])

        def put(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            result = mine[np.maximum(own, 0)]
            result[own < 0] = theirs
            return result

        bias = None if model.bias is None else others.bias
        return jax.tree.map(put, model, others._replace(bias=bias))

    return Provider(name or provider.name, provider.width, embed)


def vocabulary(source: ByteLevel) -> dict[str, int]:
    """Ids of a model's own tokens, bytes that were appended left out."""
    return {token: i for i, token in enumerate(source.tokens[: source.num_original])}


def in_chunks(provider: Provider, tokens: Sequence[str], chunk: int = 5000) -> Tables:
    """Tables of a large vocabulary, `chunk` tokens a call (published: 5,000)."""
    if chunk < 1:
        raise InputError(f"chunk: {chunk} must be at least 1")
    parts = [provider.embed(tokens[at : at + chunk]) for at in range(0, len(tokens), chunk)]
    return jax.tree.map(lambda *tables: np.concatenate(tables), *parts)
