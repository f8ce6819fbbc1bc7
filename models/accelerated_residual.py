"""A second residual stream that is ahead of the model's own: M2R2 (arXiv 2502.02040).

Beside the ordinary stream, which stays exact, an accelerated one runs through small adapters and
is, after few layers, what the ordinary one is after many. It attends to the ordinary stream's keys
and values and writes none. No code was published and only the abstract could be read: the rates and
the shared keys and values are the paper's, sizes and initial values are our own.
"""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import exit_router, masks, parameter_files, rope
from models.attention import attend
from models.cache import KVCache
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from models.layers import Norm

ROLE = "accelerator"
KINDS = ("attention_mlp", "mlp")
_KIND = "accelerated_residual"


@dataclasses.dataclass(frozen=True)
class AcceleratorConfig:
    """Where the stream starts anew, how fast it is, and how wide its adapters are.

    Attributes:
      intervals: J; gates stand after each L / J layers.
      rate: R, layers of the model that a layer of the stream stands for; 0 to be at the last layer
        at every gate.
      restart: each interval starts from the ordinary stream; else from the accelerated one.
      max_lead: most layers that the stream is ahead; 0 for no limit.
      attention_rank, mlp_rank: inner widths of an adapter; 0 for D / 16 and D / 8, at least 8.
      kind: 'attention_mlp', or 'mlp': the bottleneck alone, which reads no keys.
      router_width: inner width of the routers at the gates; 0 for a model without them.
    """

    intervals: int = 4
    rate: float = 0.0
    restart: bool = True
    max_lead: int = 0
    attention_rank: int = 0
    mlp_rank: int = 0
    kind: str = "attention_mlp"
    router_width: int = 64

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if self.intervals < 1:
            raise InputError(f"intervals: {self.intervals} must be at least 1")
        if self.rate != 0 and not self.rate > 1:
            raise InputError(f"rate: {self.rate} must be above 1, or 0 to aim at the last layer")
        for field in ("max_lead", "attention_rank", "mlp_rank", "router_width"):
            if (value := getattr(self, field)) < 0:
                raise InputError(f"{field}: {value} must be at least 0")

    def ranks(self, target: TransformerConfig) -> tuple[int, int]:
        """Inner widths (attention, MLP) for a target."""
        D = target.embed_dim
        return self.attention_rank or max(8, D // 16), self.mlp_rank or max(8, D // 8)


def gates(intervals: int, num_layers: int) -> tuple[int, ...]:
    """g_0 = 0 < g_1 < ... < g_J = L, equally far apart (section 2.1).

    Raises:
      InputError: intervals of different lengths.
    """
    if num_layers % intervals:
        raise InputError(f"intervals: {intervals} must divide the model's {num_layers} layers")
    step = num_layers // intervals
    return tuple(range(0, num_layers + 1, step))


def interval_of(config: AcceleratorConfig, num_layers: int, layer: int) -> int:
    """First layer of the interval whose adapters have made the stream after `layer` layers."""
    if not config.restart:
        return 0
    step = gates(config.intervals, num_layers)[1]
    return (max(layer, 1) - 1) // step * step


def ahead(config: AcceleratorConfig, num_layers: int, layer: int) -> int:
    """tau(i): after how many layers the ordinary stream is what the accelerated one is after i.

    At a gate it is that of the interval which ends there. Halves are rounded up.
    """
    start = interval_of(config, num_layers, layer)
    rate = config.rate or (num_layers - start) / gates(config.intervals, num_layers)[1]
    reached = min(num_layers, int(start + rate * (layer - start) + 0.5))
    return min(reached, layer + config.max_lead) if config.max_lead else reached


def num_adapted(config: AcceleratorConfig, num_layers: int) -> int:
    """Layers that have an adapter: none beyond the last gate that saves layers, or, with a single
    interval, beyond where the stream is at the last layer."""
    if config.intervals > 1:
        return gates(config.intervals, num_layers)[-2]
    return next(i for i in range(1, num_layers + 1) if ahead(config, num_layers, i) == num_layers)


class _Adapter(nn.Module):
    """One layer of the stream: low-rank queries on the model's own keys, and a bottleneck."""

    target: TransformerConfig
    attention_rank: int  # 0 for none
    mlp_rank: int

    @nn.compact
    def __call__(
        self,
        p: jnp.ndarray,
        keys: jnp.ndarray | None,
        values: jnp.ndarray | None,
        angles: tuple[jnp.ndarray, jnp.ndarray] | None,
        mask: jnp.ndarray,
    ) -> jnp.ndarray:
        target, D = self.target, self.target.embed_dim
        normal = nn.initializers.lecun_normal()
        norm = target.replace(norm="rmsnorm")
        if r := self.attention_rank:
            K, G, H = target.num_kv_heads, target.queries_per_kv, target.head_dim
            u = Norm(norm, name="attention_norm")(p)
            narrow = self._product("query_down", normal, u, r)
            queries = self._product("query_up", normal, narrow, K * G * H)
            queries = queries.reshape(*p.shape[:2], K, G, H)
            if target.qk_norm:
                queries = Norm(target, name="query_norm")(queries)
            if angles is not None:
                cos, sin = angles
                queries = rope.rotate(queries, cos[..., None, :], sin[..., None, :])
            assert keys is not None and values is not None
            mixed = attend(
                queries, keys, values, mask, scale=target.scale, softcap=target.attention_softcap
            ).reshape(*p.shape[:2], K * G * H)
            narrow = self._product("out_down", normal, mixed, r)
            p = p + self._product("out_up", nn.initializers.zeros, narrow, D)
        u = Norm(norm, name="mlp_norm")(p)
        inner = nn.silu(self._product("mlp_down", normal, u, self.mlp_rank))
        return p + self._product("mlp_up", nn.initializers.zeros, inner, D)

    def _product(self, name: str, init: Any, x: jnp.ndarray, width: int) -> jnp.ndarray:
        """x times a matrix of its own."""
        kernel = self.param(name, init, (x.shape[-1], width))
        return x @ kernel.astype(x.dtype)


def init(config: AcceleratorConfig, target: TransformerConfig, key: jax.Array) -> Any:
    """Parameters with which the stream is a copy of what it starts from; routers are random.

    Returns:
      {'layers_i': an adapter, 'router_g': `exit_router`'s for the gate after g layers}.

    Raises:
      InputError: intervals that do not fit the target; T5's positions, whose biases are those of
        the model's own queries.
    """
    if target.positions == "t5":
        raise InputError("positions: 't5' is not for accelerated streams; allowed: rope, learned")
    between = gates(config.intervals, target.num_layers)[1:-1]
    attention, mlp = config.ranks(target)
    module = _Adapter(target, attention if config.kind == "attention_mlp" else 0, mlp)
    p = jnp.zeros((1, 1, target.embed_dim))
    store = jnp.zeros((1, target.num_kv_heads, 1, target.head_dim))
    mask = jnp.ones((1, 1, 1), bool)
    count = num_adapted(config, target.num_layers)
    params: dict[str, Any] = {}
    for layer in range(count):
        given = (p, store, store, None, mask)
        params[f"layers_{layer}"] = module.init(jax.random.fold_in(key, layer), *given)["params"]
    if config.router_width:
        slots = gates(config.intervals, target.num_layers)[1]
        for gate in between:
            params[f"router_{gate}"] = exit_router.init(
                target.embed_dim, slots, config.router_width, jax.random.fold_in(key, count + gate)
            )
    return params


def begin(target: TransformerConfig, target_params: Any, params: Any) -> Any:
    """`init`'s parameters with queries as near to the target's own as their rank allows.

    The truncated singular value decomposition of each layer's query matrix (section 2.2), and the
    norm's gain before it.
    """
    params = dict(params)
    for name in [name for name in params if name.startswith("layers_")]:
        adapter, block = dict(params[name]), target_params[name]
        if "query_down" not in adapter:
            continue
        rank = adapter["query_down"].shape[1]
        qkv = jnp.asarray(block["attention"]["qkv"]["kernel"], jnp.float32)
        wide = qkv[:, :, : target.queries_per_kv].reshape(target.embed_dim, -1)
        left, sizes, right = jnp.linalg.svd(wide, full_matrices=False)
        root = jnp.sqrt(sizes[:rank])
        adapter["query_down"] = left[:, :rank] * root
        adapter["query_up"] = root[:, None] * right[:rank]
        adapter["attention_norm"] = {"scale": block["attention_norm"]["scale"]}
        params[name] = adapter
    return params


def adapted_layers(params: Any) -> int:
    """How many layers have an adapter."""
    return sum(name.startswith("layers_") for name in params)


def apply(
    target: TransformerConfig,
    params: Any,
    p: jnp.ndarray,
    cache: KVCache,
    layers: tuple[int, int],
    *,
    positions: jnp.ndarray,
    mask: jnp.ndarray | None = None,
    key_positions: jnp.ndarray | None = None,
) -> tuple[jnp.ndarray, ...]:
    """The accelerated stream after each of some layers.

    Args:
      target: the architecture it is for.
      params: from `init`.
      p: [B, T, D], the stream before layer `layers[0]`, not normalised.
      cache: the target's, with these layers' keys and values of the same tokens written already;
        nothing is written here.
      layers: (start, stop).
      positions: int [B, T].
      mask, key_positions: as `transformer.apply`.

    Returns:
      stop - start arrays [B, T, D].
    """
    if mask is None:
        mask = masks.causal(positions, cache.slots)
    if key_positions is None:
        key_positions = jnp.arange(cache.slots)
    p = p.astype(target.compute_dtype)
    streams = []
    for layer in range(*layers):
        adapter = params[f"layers_{layer}"]
        local = target.is_local(layer)
        angles = None
        if target.positions == "rope":
            turns = (target.local_rope if local else None) or target.rope
            angles = rope.angles(turns, target.rotary_dim, positions)
        seen = mask
        if local:
            assert target.window is not None
            seen = masks.within(mask, positions, key_positions, target.window)
        rank = adapter["query_down"].shape[1] if "query_down" in adapter else 0
        module = _Adapter(target, rank, adapter["mlp_down"].shape[1])
        p = module.apply(  # type: ignore[assignment]
            {"params": adapter}, p, cache.keys[layer], cache.values[layer], angles, seen
        )
        streams.append(p)
    return tuple(streams)


def multiply_adds(config: AcceleratorConfig, target: TransformerConfig) -> dict[str, int]:
    """Products a token, from shapes: an adapter's, a layer of the model, and a router's a gate.

    Attention's reads of the cache are left out of both: they are of the same size in each.
    """
    D, wide = target.embed_dim, target.num_heads * target.head_dim
    attention, mlp = config.ranks(target)
    adapter = 2 * D * mlp + (2 * (D + wide) * attention if config.kind == "attention_mlp" else 0)
    experts = target.experts_per_token if target.num_experts else 1
    kernels = (3 if target.gated_mlp else 2) * D * target.expert_dim
    kv = 2 * D * target.num_kv_heads * target.head_dim
    slots = gates(config.intervals, target.num_layers)[1]
    return {
        "adapter": adapter,
        "layer": 2 * D * wide + kv + experts * kernels + D * target.num_experts,
        "router": exit_router.multiply_adds(D, slots, config.router_width),
    }


def save(directory: str | os.PathLike[str], config: AcceleratorConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(
    directory: str | os.PathLike[str], target: TransformerConfig
) -> tuple[AcceleratorConfig, Any]:
    """Reads what `save` wrote for a target; errors as `parameter_files.load` and `init`."""

    def shapes(config: AcceleratorConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config, target), jax.random.key(0))

    return parameter_files.load(directory, _KIND, AcceleratorConfig, shapes)
