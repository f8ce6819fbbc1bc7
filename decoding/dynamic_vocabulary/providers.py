"""Where the embeddings of tokens come from that a model has no rows for.

A provider is a function of token strings: of their constituents' rows (`average`, the heuristic
called FVT), or of a hypernetwork (`models.hypernetwork`). `copying` puts the model's own rows in
the place of what a provider says, as is always done for special tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.config import TransformerConfig
from models.errors import InputError


class Embeddings(NamedTuple):
    """Rows of n tokens, float32.

    Attributes:
      inputs: [n, D], before a model's `embedding_scale`.
      outputs: [n, D], rows of the logits' kernel; None where embeddings are tied.
    """

    inputs: np.ndarray
    outputs: np.ndarray | None

    @property
    def heads(self) -> np.ndarray:
        """Rows that hidden states are multiplied with to give logits."""
        return self.inputs if self.outputs is None else self.outputs

    def take(self, index: Any) -> "Embeddings":
        """Rows `index` of both tables; copies where it is an array."""
        outputs = None if self.outputs is None else self.outputs[index]
        return Embeddings(self.inputs[index], outputs)


class Provider(NamedTuple):
    """A source of embeddings.

    Attributes:
      name: as reports show it.
      width: D.
      embed: token strings (byte characters) -> rows, in order. Each row depends on its own string
        alone, so that tables can be made in parts and kept.
    """

    name: str
    width: int
    embed: Callable[[Sequence[str]], Embeddings]


def model_rows(config: TransformerConfig, params: Any) -> Embeddings:
    """A model's own tables on the host: V rows each."""
    inputs = np.asarray(params["embedder"]["embedding"], np.float32)
    if config.tie_embeddings:
        return Embeddings(inputs, None)
    return Embeddings(inputs, np.asarray(params["lm_head"]["kernel"], np.float32).T)


def with_rows(config: TransformerConfig, params: Any, rows: Embeddings) -> tuple[Any, Any]:
    """A model whose vocabulary is `rows`: its config and its parameters."""
    changed = dict(params)
    changed["embedder"] = {**params["embedder"], "embedding": rows.inputs}
    if not config.tie_embeddings:
        assert rows.outputs is not None
        changed["lm_head"] = {**params["lm_head"], "kernel": rows.outputs.T}
    return config.replace(vocab_size=len(rows.inputs)), changed


def average(rows: Embeddings, pieces: Callable[[str], list[int]]) -> Provider:
    """Mean of the rows of each token's constituents (FVT; section 2.2 of the sheet, point 5).

    A token of the model's own vocabulary is its own constituent, and keeps its row.

    Args:
      rows: the model's tables, see `model_rows`.
      pieces: ids of what a string decomposes into, see `byte_level.ByteLevel.decompose`.
    """

    def mean(table: np.ndarray, ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Any:
        return np.add.reduceat(table[ids], starts, axis=0) / sizes[:, None].astype(np.float32)

    def embed(tokens: Sequence[str]) -> Embeddings:
        found = [pieces(token) for token in tokens]
        for token, ids in zip(tokens, found, strict=True):
            if not ids:
                raise InputError(f"token: {token!r} has no constituents in the tokeniser")
        if not found:
            return rows.take(slice(0))
        sizes = np.array([len(ids) for ids in found])
        flat, starts = np.concatenate(found).astype(int), np.cumsum(sizes) - sizes
        outputs = None if rows.outputs is None else mean(rows.outputs, flat, starts, sizes)
        return Embeddings(mean(rows.inputs, flat, starts, sizes), outputs)

    return Provider("fvt", rows.inputs.shape[1], embed)


def copying(
    provider: Provider, rows: Embeddings, ids: Mapping[str, int], *, name: str | None = None
) -> Provider:
    """A provider but for the tokens of `ids`, which have the model's own rows.

    Args:
      provider: asked for all other tokens, and only for these.
      rows: the model's tables.
      ids: special tokens (always), or the whole vocabulary where original embeddings are kept.
      name: of the result; default the provider's.
    """

    def embed(tokens: Sequence[str]) -> Embeddings:
        own = np.array([ids.get(token, -1) for token in tokens], int)
        others = provider.embed([token for token in tokens if token not in ids])
        result = rows.take(np.maximum(own, 0))
        result.inputs[own < 0] = others.inputs
        if result.outputs is not None:
            assert others.outputs is not None
            result.outputs[own < 0] = others.outputs
        return result

    return Provider(name or provider.name, provider.width, embed)


def in_chunks(provider: Provider, tokens: Sequence[str], chunk: int = 5000) -> Embeddings:
    """Tables of a large vocabulary, `chunk` tokens a call (published: 5,000)."""
    if chunk < 1:
        raise InputError(f"chunk: {chunk} must be at least 1")
    return _concatenate(
        provider.embed(tokens[start : start + chunk]) for start in range(0, len(tokens), chunk)
    )


def _concatenate(parts: Iterable[Embeddings]) -> Embeddings:
    inputs, outputs = zip(*parts, strict=True)
    tied = outputs[0] is None
    return Embeddings(np.concatenate(inputs), None if tied else np.concatenate(outputs))
