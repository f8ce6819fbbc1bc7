"""Where each parameter lies in a Hugging Face checkpoint.

A parameter is assembled from one or more checkpoint tensors: a kernel is a transposed `weight`,
the fused query/key/value kernel is three of them side by side. `Piece` says how one tensor's
axes map to a block of a parameter; `table` lists the pieces of every parameter of an
architecture. Everything is data and small pure functions, used in both directions.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from models.config import GroupedExpertsConfig, TransformerConfig

Path = tuple[str, ...]
Index = tuple[slice, ...]

_LLAMA = {
    "embed": "model.embed_tokens.weight",
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "block_sparse_moe.gate",
    "expert": "block_sparse_moe.experts.{}.",
    "final_norm": "model.norm",
    "head": "lm_head.weight",
}
_GEMMA2 = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_OPT = _LLAMA | {
    "embed": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "layer": "model.decoder.layers.{}.",
    "attention_norm": "self_attn_layer_norm",
    "out": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
    "final_norm": "model.decoder.final_layer_norm",
}
_LLADA = _LLAMA | {
    "embed": "model.transformer.wte.weight",
    "layer": "model.transformer.blocks.{}.",
    "attention_norm": "attn_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out.weight",
}
_LLADA2 = _LLAMA | {
    "embed": "model.word_embeddings.weight",
    "query": "attention.query_key_value",
    "key": "attention.query_key_value",
    "value": "attention.query_key_value",
    "out": "attention.dense",
    "query_norm": "attention.query_layernorm",
    "key_norm": "attention.key_layernorm",
    "router": "mlp.gate",
    "router_bias": "mlp.gate.expert_bias",
    "expert": "mlp.experts.{}.",
    "shared_gate": "mlp.shared_experts.gate_proj",
    "shared_up": "mlp.shared_experts.up_proj",
    "shared_down": "mlp.shared_experts.down_proj",
}
_NAMES = {
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "opt": _OPT,
    "llada": _LLADA,
    "llada2_moe": _LLADA2,
}
# Gate, up and down of an expert; Mixtral's names unless the family has others.
_EXPERT_PARTS = {"llada2_moe": ("gate_proj", "up_proj", "down_proj")}
# Families that store queries, keys and values as one tensor, in this order.
_FUSED_QKV = ("llada2_moe",)

# What stands in the wild for the 'model.' of the tables above, and before the head's name:
# nothing in a bare backbone, the last two in multimodal checkpoints.
PREFIXES = (
    ("model.", ""),
    ("", ""),
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A checkpoint tensor, or rows of one, and the block of a parameter that it fills.

    Attributes:
      name: the tensor.
      split: for each axis of the tensor, the factors it is reshaped into; there are as many
        factors in all as the parameter has axes.
      order: the factors' order in the parameter, as `np.transpose` takes it.
      offset: where the block begins in the parameter.
    """

    name: str
    split: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    offset: tuple[int, ...]
    first_row: int = 0
    num_rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the piece in the checkpoint."""
        return tuple(math.prod(factors) for factors in self.split)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.shape if self.num_rows is None else (self.num_rows, *self.shape[1:])

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(factor for factors in self.split for factor in factors)

    @property
    def block(self) -> Index:
        """The part of the parameter that the tensor fills."""
        sizes = (self.factors[axis] for axis in self.order)
        return tuple(slice(start, start + size) for start, size in zip(self.offset, sizes))


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter's shape and the pieces that fill it exactly once."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def table(config: TransformerConfig, *, fused_experts: bool = False) -> dict[Path, Parameter]:
    """Every parameter of an architecture, keyed by its path in the tree, in model order.

    Args:
      config: the architecture; its `family` chooses the names.
      fused_experts: the experts are stored as two tensors a layer, as transformers 5 holds them
        in memory, rather than one by one, as it saves them.
    """
    names = _NAMES.get(config.family, _LLAMA)
    V, D = config.vocab_size, config.embed_dim
    found: dict[Path, Parameter] = {("embedder", "embedding"): _same(names["embed"], V, D)}
    if config.positions == "learned":
        rows = config.max_position + config.position_offset
        found["embedder", "positions"] = _same(names["positions"], rows, D)
    for layer in range(config.num_layers):
        prefix = names["layer"].format(layer)
        full = {k: prefix + v for k, v in names.items() if k not in ("embed", "head", "layer")}
        for path, parameter in _block(config, full, config.is_routed(layer), fused_experts).items():
            found[(f"layers_{layer}", *path)] = parameter
    found |= _norm(config, "final_norm", names["final_norm"])
    if not config.tie_embeddings:
        found["lm_head", "kernel"] = _transposed(names["head"], V, D)
    return found


def _block(
    config: TransformerConfig, names: dict[str, str], routed: bool, fused_experts: bool
) -> dict[Path, Parameter]:
    found: dict[Path, Parameter] = {}
    found |= _norm(config, "attention_norm", names["attention_norm"])
    found |= {("attention", *path): p for path, p in _attention(config, names).items()}
    if config.post_norms:
        found |= _norm(config, "post_attention_norm", names["post_attention_norm"])
    found |= _norm(config, "mlp_norm", names["mlp_norm"])
    if routed:
        experts = _fused_experts if fused_experts else _experts
        found |= {("moe", *path): p for path, p in experts(config, names).items()}
    else:
        found |= {("mlp", *path): p for path, p in _mlp(config, names, config.mlp_dim).items()}
    if config.post_norms:
        found |= _norm(config, "post_mlp_norm", names["post_mlp_norm"])
    return found


def _norm(config: TransformerConfig, path: str, name: str) -> dict[Path, Parameter]:
    found: dict[Path, Parameter] = {(path, "scale"): _same(f"{name}.weight", config.embed_dim)}
    if config.norm == "layernorm":
        found[path, "bias"] = _same(f"{name}.bias", config.embed_dim)
    return found


def _attention(config: TransformerConfig, names: dict[str, str]) -> dict[Path, Parameter]:
    """qkv.kernel [D, K, G + 2, H] holds each group's queries, then its key, then its value."""
    D, K, G, H = config.embed_dim, config.num_kv_heads, config.queries_per_kv, config.head_dim
    slots = (("query", G, 0), ("key", 1, G), ("value", 1, G + 1))
    fused = config.family in _FUSED_QKV

    def rows(at: int) -> dict[str, int]:
        """Where a part begins in a tensor that holds all queries, then all keys, then values."""
        return {"first_row": K * at * H, "num_rows": K * (G + 2) * H} if fused else {}

    kernel = tuple(
        Piece(f"{names[k]}.weight", ((K, n, H), (D,)), (3, 0, 1, 2), (0, 0, at, 0), **rows(at))
        for k, n, at in slots
    )
    bias = tuple(
        Piece(f"{names[k]}.bias", ((K, n, H),), (0, 1, 2), (0, at, 0), **rows(at))
        for k, n, at in slots
    )
    out = Piece(f"{names['out']}.weight", ((D,), (K, G, H)), (1, 2, 3, 0), (0, 0, 0, 0))
    found: dict[Path, Parameter] = {("qkv", "kernel"): Parameter((D, K, G + 2, H), kernel)}
    if config.qkv_bias:
        found["qkv", "bias"] = Parameter((K, G + 2, H), bias)
    found["out", "kernel"] = Parameter((K, G, H, D), (out,))
    if config.out_bias:
        found["out", "bias"] = _same(f"{names['out']}.bias", D)
    if config.qk_norm:
        for norm in ("query_norm", "key_norm"):
            found[norm, "scale"] = _same(f"{names[norm]}.weight", H)
    return found


def _mlp(
    config: TransformerConfig, names: dict[str, str], width: int, prefix: str = ""
) -> dict[Path, Parameter]:
    """gate_up.kernel [D, 2, F] holds the gate's columns, then those it multiplies.

    F is `width`, and the names are those of `prefix`.
    """
    D, F = config.embed_dim, width
    names = {name: names[prefix + name] for name in ("gate", "up", "down")}
    found: dict[Path, Parameter] = {}
    if config.gated_mlp:
        both = (names["gate"], names["up"])
        kernel = [
            Piece(f"{name}.weight", ((1, F), (D,)), (2, 0, 1), (0, i, 0))
            for i, name in enumerate(both)
        ]
        bias = [Piece(f"{name}.bias", ((1, F),), (0, 1), (i, 0)) for i, name in enumerate(both)]
        found["gate_up", "kernel"] = Parameter((D, 2, F), tuple(kernel))
        if config.mlp_bias:
            found["gate_up", "bias"] = Parameter((2, F), tuple(bias))
    else:
        found["up", "kernel"] = _transposed(f"{names['up']}.weight", F, D)
        if config.mlp_bias:
            found["up", "bias"] = _same(f"{names['up']}.bias", F)
    found["down", "kernel"] = _transposed(f"{names['down']}.weight", D, F)
    if config.mlp_bias:
        found["down", "bias"] = _same(f"{names['down']}.bias", D)
    return found


def _experts(config: TransformerConfig, names: dict[str, str]) -> dict[Path, Parameter]:
    """Gate, up and down of each expert on its own; and what every token goes through."""
    D, F, E = config.embed_dim, config.expert_dim, config.num_experts
    gate, up, last = _EXPERT_PARTS.get(config.family, ("w1", "w3", "w2"))
    gate_up = tuple(
        Piece(
            f"{names['expert'].format(e)}{name}.weight",
            ((1, 1, F), (D,)),
            (0, 3, 1, 2),
            (e, 0, i, 0),
        )
        for e in range(E)
        for i, name in enumerate((gate, up))
    )
    down = tuple(
        Piece(f"{names['expert'].format(e)}{last}.weight", ((1, D), (F,)), (0, 2, 1), (e, 0, 0))
        for e in range(E)
    )
    found: dict[Path, Parameter] = {
        ("router", "kernel"): _transposed(f"{names['router']}.weight", E, D),
        ("gate_up", "kernel"): Parameter((E, D, 2, F), gate_up),
        ("down", "kernel"): Parameter((E, F, D), down),
    }
    if isinstance(config, GroupedExpertsConfig):
        found["router", "bias"] = _same(names["router_bias"], E)
        if config.shared_dim:
            shared = _mlp(config, names, config.shared_dim, "shared_")
            found |= {("shared_mlp", *path): p for path, p in shared.items()}
    return found


def _fused_experts(config: TransformerConfig, names: dict[str, str]) -> dict[Path, Parameter]:
    """All experts in one tensor, [E, 2F, D] and [E, D, F], under 'mlp' as in transformers 5."""
    D, F, E = config.embed_dim, config.mlp_dim, config.num_experts
    base = names["router"].removesuffix("block_sparse_moe.gate") + "mlp."
    gate_up = Piece(f"{base}experts.gate_up_proj", ((E,), (2, F), (D,)), (0, 3, 1, 2), (0, 0, 0, 0))
    down = Piece(f"{base}experts.down_proj", ((E,), (D,), (F,)), (0, 2, 1), (0, 0, 0))
    return {
        ("router", "kernel"): _transposed(f"{base}gate.weight", E, D),
        ("gate_up", "kernel"): Parameter((E, D, 2, F), (gate_up,)),
        ("down", "kernel"): Parameter((E, F, D), (down,)),
    }


def head_name(config: TransformerConfig) -> str:
    """The tensor of the logits' kernel, which tied checkpoints may hold a copy in."""
    return _NAMES.get(config.family, _LLAMA)["head"]


def stored_name(name: str, prefix: tuple[str, str]) -> str:
    """A table's tensor name as a checkpoint with this entry of `PREFIXES` spells it."""
    backbone, head = prefix
    return backbone + name[len("model.") :] if name.startswith("model.") else head + name


def _same(name: str, *shape: int) -> Parameter:
    """A parameter stored as it is."""
    axes = tuple(range(len(shape)))
    return Parameter(shape, (Piece(name, tuple((n,) for n in shape), axes, (0,) * len(shape)),))


def _transposed(name: str, features: int, inputs: int) -> Parameter:
    """A kernel [inputs, features], stored as torch's `weight` [features, inputs]."""
    piece = Piece(name, ((features,), (inputs,)), (1, 0), (0, 0))
    return Parameter((inputs, features), (piece,))


def overlap(piece: Piece, index: Sequence[slice]) -> Index | None:
    """The part of a piece's block within `index` of the parameter, in the block's own indices.

    None when they do not meet.
    """
    block = piece.block
    part = tuple(
        slice(max(b.start, i.start) - b.start, min(b.stop, i.stop) - b.start)
        for b, i in zip(block, index)
    )
    return part if all(p.start < p.stop for p in part) else None


def stored_index(piece: Piece, part: Index) -> Index:
    """The smallest slice of the stored tensor, one range an axis, that covers `part`.

    A range of an axis's leading factor is a contiguous range of the axis; the factors after it
    are read whole.
    """
    found: list[slice] = []
    first = 0
    for factors in piece.split:
        lead = _lead(factors)
        inner = math.prod(factors[lead + 1 :])
        wanted = part[piece.order.index(first + lead)]
        row = 0 if found else piece.first_row
        found.append(slice(row + wanted.start * inner, row + wanted.stop * inner))
        first += len(factors)
    return tuple(found)


def to_parameter(piece: Piece, part: Index, stored: np.ndarray) -> np.ndarray:
    """`part` of the piece's block, as a view of what `stored_index` made the caller read."""
    shape: list[int] = []
    rest = list(part)  # what is left to cut: all but the leading factors
    for factors, size in zip(piece.split, stored.shape):
        lead = _lead(factors)
        axis = piece.order.index(len(shape) + lead)
        rest[axis] = slice(0, part[axis].stop - part[axis].start)
        inner = factors[lead + 1 :]
        shape += [*factors[:lead], size // math.prod(inner), *inner]
    return stored.reshape(shape).transpose(piece.order)[tuple(rest)]


def _lead(factors: tuple[int, ...]) -> int:
    """The first factor that is not 1 (the last if all are): the one with the largest stride."""
    return next((i for i, n in enumerate(factors) if n > 1), len(factors) - 1)


def to_stored(piece: Piece, parameter: np.ndarray) -> np.ndarray:
    """The block of a whole parameter that a piece stores: a view of shape `piece.factors`."""
    return parameter[piece.block].transpose(np.argsort(piece.order))
