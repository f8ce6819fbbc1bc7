"""A tiny model of four layers, adapters that say anything, and a naive accelerated stream."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import accelerated_residual, transformer
from models.accelerated_residual import AcceleratorConfig
from models.config import TransformerConfig
from tests.decoding import tiny

CONFIG = tiny.TARGET.replace(num_layers=4, local_layers=(True, False, True, False))
ACCELERATOR = AcceleratorConfig(intervals=2, router_width=8)


@functools.cache
def models(config: TransformerConfig = CONFIG, accelerator: AcceleratorConfig = ACCELERATOR) -> Any:
    """Random parameters by role; nothing of the adapters is zero."""
    target = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(0))
    # Blocks that say something, so that streams differ from layer to layer.
    target = jax.tree_util.tree_map_with_path(
        lambda path, x: 6 * x if path[-2].key in ("out", "down") else x, target
    )
    rng = np.random.default_rng(1)
    params = accelerated_residual.init(accelerator, config, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
    return {"target": target, "accelerator": params}


def _norm(x: np.ndarray, scale: Any) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)


def _turn(config: TransformerConfig, x: np.ndarray, position: int) -> np.ndarray:
    half = config.head_dim // 2
    angle = position * config.rope.theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


def adapter(
    config: TransformerConfig,
    params: Any,
    layer: int,
    p: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
) -> np.ndarray:
    """One layer of the stream for one token, head by head.

    p [D]; keys and values [K, S, H] of positions 0 .. S - 1, of which S - 1 is the token's.
    """
    one = jax.tree.map(np.asarray, params[f"layers_{layer}"])
    p = p.astype(np.float64)
    if "query_down" in one:
        u = _norm(p, one["attention_norm"]["scale"])
        queries = (u @ one["query_down"] @ one["query_up"]).reshape(-1, config.head_dim)
        first = 0
        if config.is_local(layer):
            first = max(0, position + 1 - config.window)
        mixed = []
        for head, query in enumerate(queries):
            group = head // config.queries_per_kv
            scores = keys[group, first:] @ _turn(config, query, position) * config.scale
            weights = np.exp(scores - scores.max())
            mixed.append(weights / weights.sum() @ values[group, first:])
        p = p + np.concatenate(mixed) @ one["out_down"] @ one["out_up"]
    inner = _norm(p, one["mlp_norm"]["scale"]) @ one["mlp_down"]
    return p + inner / (1 + np.exp(-inner)) @ one["mlp_up"]


def router(params: Any, kind: str, states: list[np.ndarray]) -> float:
    """The probability of a gate's router, by loops."""
    one = jax.tree.map(np.asarray, params[kind])
    wide = [x / np.sqrt((x * x).mean() + 1e-6) for x in states]
    if kind == "linear":
        odds = wide[-1] @ one["weight"] + one["bias"][0]
    else:
        narrow = [x @ one["down"] + slot for x, slot in zip(wide, one["slots"], strict=True)]
        query = narrow[-1] @ one["query"]
        scores = np.array([query @ (x @ one["key"]) for x in narrow]) / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        mixed = sum(
            w * (x @ one["value"]) for w, x in zip(weights / weights.sum(), narrow, strict=True)
        )
        odds = np.concatenate([mixed, wide[-1] @ one["state"]]) @ one["weight"] + one["bias"][0]
    return float(1 / (1 + np.exp(-odds)))


class Naive:
    """A row that leaves at gates, token by token and layer by layer, keys kept in lists.

    `keys` and `values` by layer: [K, H] of each position.
    """

    def __init__(self, config: TransformerConfig, model: Any):
        self.config, self.model = config, model
        L = config.num_layers
        self.keys: list[list[np.ndarray]] = [[] for _ in range(L)]
        self.values: list[list[np.ndarray]] = [[] for _ in range(L)]
        self._layer = jax.jit(self._one_layer, static_argnames="layer")

    def _one_layer(self, x: Any, keys: Any, values: Any, length: Any, layer: int) -> Any:
        """x [D] through a layer after `length` tokens, whose keys are padded to 64 slots."""
        from models import cache as kv

        cache = kv.create(self.config, 1, 64)
        cache = cache.replace(
            keys=tuple(keys[None] for _ in cache.keys),
            values=tuple(values[None] for _ in cache.values),
            lengths=length[None],
        )
        out = transformer.apply(
            self.config, self.model["target"], x[None, None], cache=cache,
            layers=(layer, layer + 1), collect=(layer + 1,), with_logits=False,
        )  # fmt: skip
        slot = length
        return (
            out.collected[0][0, 0],
            out.cache.keys[layer][0, :, slot],
            out.cache.values[layer][0, :, slot],
        )

    def run(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        """A layer on the token at `position`, whose keys are kept; later ones are not read."""
        K, H = self.config.num_kv_heads, self.config.head_dim
        stores = []
        for kept in (self.keys[layer], self.values[layer]):
            store = np.zeros((K, 64, H), np.float32)
            for slot, vector in enumerate(kept[:position]):
                store[:, slot] = vector
            stores.append(jnp.asarray(store))
        y, key, value = self._layer(
            jnp.asarray(x, jnp.float32), *stores, jnp.int32(position), layer
        )
        for kept, vector in ((self.keys[layer], key), (self.values[layer], value)):
            del kept[position:]
            kept.append(np.asarray(vector))
        return np.asarray(y)

    def embed(self, token: int) -> np.ndarray:
        table = self.model["target"]["embedder"]["embedding"]
        return np.asarray(table[token], np.float32)

    def faster(self, layer: int, p: np.ndarray, position: int) -> np.ndarray:
        stacked = [np.stack(kept[layer], axis=1) for kept in (self.keys, self.values)]
        return adapter(self.config, self.model["accelerator"], layer, p, *stacked, position)

    def logits(self, x: np.ndarray) -> np.ndarray:
        hidden = transformer.final_norm(
            self.config, self.model["target"], jnp.asarray(x, jnp.float32)
        )
        return np.asarray(transformer.unembed(self.config, self.model["target"], hidden))
