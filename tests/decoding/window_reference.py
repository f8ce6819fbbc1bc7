"""Window-Diffusion for one row as its sheet writes it down: NumPy, lists of positions, own forward.

Shares no code with the package: keys and values are rows of a dictionary by layer and position.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.config import TransformerConfig


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


class Model:
    """A bidirectional Llama in float64 with a store of keys and values by position."""

    def __init__(self, config: TransformerConfig, params: Any) -> None:
        self.config = config
        as_array = lambda tree: {  # noqa: E731
            k: as_array(v) if isinstance(v, dict) else np.asarray(v, np.float64)
            for k, v in tree.items()
        }
        self.params = as_array(params)
        self.store: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [
            {} for _ in range(config.num_layers)
        ]

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], keys: Sequence[int]
    ) -> np.ndarray:
        """Logits [T, V] of the rows `positions`, which attend to the stored rows `keys`."""
        config, params = self.config, self.params
        H = config.head_dim
        x = params["embedder"]["embedding"][[tokens[i] for i in positions]]
        for number, store in enumerate(self.store):
            layer = params[f"layers_{number}"]
            y = _norm(x, layer["attention_norm"]["scale"], config.norm_eps)
            qkv = np.einsum("td,dkgh->tkgh", y, layer["attention"]["qkv"]["kernel"])
            rotated = [
                _rotate(row[:, :-1], position, config.rope.theta)
                for row, position in zip(qkv, positions)
            ]
            for row, turned, position in zip(qkv, rotated, positions):
                store[position] = (turned[:, -1], row[:, -1])
            K = np.stack([store[i][0] for i in keys])  # [S, K, H]
            V = np.stack([store[i][1] for i in keys])
            queries = np.stack(rotated)[:, :, :-1]
            weights = _softmax(np.einsum("tkgh,skh->tkgs", queries, K) * H**-0.5)
            mixed = np.einsum("tkgs,skh->tkgh", weights, V)
            x = x + np.einsum("tkgh,kghd->td", mixed, layer["attention"]["out"]["kernel"])
            y = _norm(x, layer["mlp_norm"]["scale"], config.norm_eps)
            both = np.einsum("td,dcf->tcf", y, layer["mlp"]["gate_up"]["kernel"])
            gate, up = both[:, 0], both[:, 1]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
        x = _norm(x, params["final_norm"]["scale"], config.norm_eps)
        logits = x @ params["lm_head"]["kernel"]
        logits[:, config.mask_token_id] = -np.inf
        return logits


@dataclasses.dataclass
class Result:
    """The canvas, rows computed in each step, and the smallest gap that a choice was made by."""

    tokens: list[int]
    rows: list[int]
    gap: float


def unmask(
    model: Model,
    prompt: Sequence[int],
    new: int,
    *,
    active: int,
    window: int,
    refresh: int,
    n: int = 1,
    slide: bool = True,
    buffer: bool = True,
    recompute: bool = True,
) -> Result:
    """The LLaDA variant at temperature 0 (sheet 2.9), and what of it may be left out (2.8)."""
    mask = model.config.mask_token_id
    x = [*prompt, *[mask] * new]
    S, steps = len(x), -(-new // n)
    quota = [new // steps + (t < new % steps) for t in range(steps)]
    recent: list[int] = []
    fixed: list[int] = []
    computed: list[int] = []
    seen: list[int] = []
    rows, gap = [], np.inf
    for t, count in enumerate(quota):
        full = t % refresh == 0
        if full:
            computed = seen = list(range(S))
        logits = model(x, computed, seen)
        rows.append(len(computed))
        law = _softmax(logits)
        masks = [row for row, i in enumerate(computed) if i >= len(prompt) and x[i] == mask]
        masks.sort(key=lambda row: -law[row].max())
        sure = [law[row].max() for row in masks]
        if len(sure) > count:
            gap = min(gap, sure[count - 1] - sure[count])
        for row in masks[:count]:
            best = np.sort(law[row])
            gap = min(gap, best[-1] - best[-2])
            x[computed[row]] = int(law[row].argmax())
        committed = [computed[row] for row in masks[:count]]
        left = [i for i in range(len(prompt), S) if x[i] == mask]
        if full:
            seen = [i for i in range(S) if i not in left] + left[:window]
            fixed, recent = left[:active], []
        else:
            recent += committed
        masks_now = left[:active] if slide else [i for i in fixed if i in left]
        kept = (committed if full else recent) if recompute else []
        computed = sorted(masks_now + kept)
        if not buffer:
            seen = [i for i in range(S) if i not in left] + masks_now
    return Result(x, rows, gap)


def unmask_dream(
    model: Model,
    prompt: Sequence[int],
    new: int,
    *,
    active: int,
    window: int,
    refresh: int,
    n: int = 1,
    shifted: bool = True,
    eos: int | None = None,
) -> Result:
    """The Dream variant at temperature 0 (sheet 2.4); `eos` cuts the canvas (early stop)."""
    mask = model.config.mask_token_id
    x = [*prompt, *[mask] * new]
    steps = -(-new // n)
    times = np.linspace(1, 1e-3, steps + 1)
    rows, gap, t = [], np.inf, 0
    start = kept = 0
    while mask in x[len(prompt) :]:
        masks = [i for i in range(len(prompt), len(x)) if x[i] == mask]
        full = t % refresh == 0 or (eos is not None and eos in x[len(prompt) :])
        if full:
            start, kept = masks[0], len(x) - len(masks) + min(len(masks), window - 1)
            for store in model.store:
                store.clear()
            first, end = 0, kept
        else:
            first, end = start, masks[:active][-1] + 1
        logits = model(x, range(first, end), range(max(end, kept)))
        rows.append(end - first)
        if shifted:
            logits = np.concatenate([logits[:1], logits[:-1]])
        law = {i: _softmax(logits[i - first]) for i in masks[:active] if i < end}
        sure = {i: (p[p > 0] * np.log(p[p > 0])).sum() for i, p in law.items()}
        if full:
            chosen = masks[:1]
        else:
            share = 1 - times[t + 1] / times[t] if t < steps - 1 else 1.0
            count = n if eos is not None else max(int(len(masks) * share), 1)
            ranked = sorted(sure, key=lambda i: -sure[i])
            chosen = ranked[:count]
            if len(ranked) > count:
                gap = min(gap, sure[ranked[count - 1]] - sure[ranked[count]])
        for i in chosen:
            best = np.sort(law[i])
            gap = min(gap, best[-1] - best[-2])
            x[i] = int(law[i].argmax())
        if eos is not None and eos in x[len(prompt) :]:
            x = x[: x.index(eos, len(prompt)) + 1]
        t += 1
    return Result(x, rows, gap)
