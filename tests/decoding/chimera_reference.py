"""Chimera's encoders and heads by plain loops over slots, in float64."""

import functools
from typing import Any

import jax
import numpy as np

from models import transformer
from models.chimera_heads import ChimeraHeads
from models.config import TransformerConfig


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


class Encoder:
    """One row's slots, which are added in order; `context` False gives the trigram back."""

    def __init__(self, config: TransformerConfig, model: Any, heads: ChimeraHeads):
        cast = lambda tree: {  # noqa: E731
            name: cast(value) if isinstance(value, dict) else np.asarray(value, np.float64)
            for name, value in tree.items()
        }
        self.config, self.heads, self.params = config, heads.config, cast(heads.params)
        self.model, self.embedding = model, np.asarray(model["embedder"]["embedding"], np.float64)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = self.params["context"][name]["scale"]
        return x / np.sqrt((x * x).mean() + self.config.norm_eps) * scale

    def turn(self, x: np.ndarray, position: int) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = position * self.config.rope.theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    def entry(self, x: np.ndarray, position: int) -> tuple[np.ndarray, ...]:
        """Queries [K, G, H], key and value [K, H]."""
        kernel = self.params["context"]["qkv"]["kernel"]
        qkv = np.einsum("d,dkgh->kgh", self.norm(x, "attention_norm"), kernel)
        queries, key = self.turn(qkv[:, :-2], position), self.turn(qkv[:, -2], position)
        return queries, key, qkv[:, -1]

    def trigram(self, text: list[int], position: int) -> np.ndarray:
        before = text[position - 2 : position] if position > 1 else text[:2]
        ids = [*before, text[position]]
        if not self.heads.trigram:
            ids = ids[-1:]
        z = np.concatenate([self.embedding[i] for i in ids])
        if self.heads.trigram:
            mix = self.params["trigram"]["mix"]
            z = z + silu(z @ mix["kernel"] + mix["bias"])
        return z @ self.params["trigram"]["project"]["kernel"]

    def encode(self, x: np.ndarray, position: int, slots: list[tuple]) -> np.ndarray:
        """Z of a trigram at a position that sees the keys and values in `slots`, and itself."""
        if not self.heads.context:
            return x
        queries, *mine = self.entry(x, position)
        params, out = self.params["context"], np.zeros_like(x)
        for k in range(queries.shape[0]):
            for g in range(queries.shape[1]):
                seen = [*slots, mine]
                scores = [queries[k, g] @ key[k] * self.config.head_dim**-0.5 for key, _ in seen]
                weights = np.exp(np.array(scores) - max(scores))
                mixed = sum(w * value[k] for w, (_, value) in zip(weights, seen, strict=True))
                out = out + mixed / weights.sum() @ params["out"]["kernel"][k, g]
        x = x + out
        both = np.einsum("d,dif->if", self.norm(x, "mlp_norm"), params["mlp"]["gate_up"]["kernel"])
        return x + (silu(both[0]) * both[1]) @ params["mlp"]["down"]["kernel"]

    def logits(self, k: int, hidden: np.ndarray, z: np.ndarray) -> np.ndarray:
        if self.heads.own_head:
            x = np.concatenate([hidden, z]) if self.heads.residual else z
            return x @ self.params["head"]["kernel"][k]
        x = z @ self.params["step"]["kernel"][k]
        x = hidden + x if self.heads.residual else x
        head = (
            self.embedding.T
            if self.config.tie_embeddings
            else np.asarray(self.model["lm_head"]["kernel"], np.float64)
        )
        return x @ head

    def states(self, hidden: np.ndarray) -> list[tuple]:
        return [self.entry(h, p)[1:] for p, h in enumerate(np.asarray(hidden, np.float64))]

    def trigrams(self, text: list[int]) -> list[tuple]:
        """Entries from position 1 on."""
        return [self.entry(self.trigram(text, p), p)[1:] for p in range(1, len(text))]

    def draft(
        self, text: list[int], hidden: np.ndarray, drafts: list[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Logits and Z of one step more than there are drafts.

        Args:
          text: x_0 .. x_{i+1}.
          hidden: [i + 1, D], the target's states H_0 .. H_i.
          drafts: tokens drafted after it.
        """
        slots: list[tuple] = []
        if self.heads.context:
            slots = self.states(hidden) + self.trigrams(text)[:-1]
        last, found = np.asarray(hidden[-1], np.float64), []
        text = list(text)
        for k in range(len(drafts) + 1):
            position = len(text) - 1
            x = self.trigram(text, position)
            z = self.encode(x, position, slots)
            found.append((self.logits(k, last, z), z))
            if self.heads.context:
                if k == 0 or self.heads.draft_states:
                    slots = [*slots, self.entry(x, position)[1:]]
                if self.heads.draft_states:
                    slots = [*slots, self.entry(z, position)[1:]]
            text += drafts[k : k + 1]
        return found


def hidden_states(config: TransformerConfig, model: Any, text: list[int]) -> np.ndarray:
    """What the target's head reads [T, D], from one call without a cache on padded text."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(_run(config, model, tokens))[0, : len(text)]


@functools.partial(jax.jit, static_argnums=0)
def _run(config: TransformerConfig, model: Any, tokens: np.ndarray) -> Any:
    return transformer.apply(config, model, tokens, with_logits=False).hidden
