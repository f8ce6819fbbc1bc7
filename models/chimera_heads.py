"""Heads that guess ahead and see what was guessed: a trigram encoder, a full-context encoder and
residual decoding heads (Chimera, arXiv 2402.15758).

After x_0 .. x_i the target has said x_{i+1} and its states H_0 .. H_i, what its own head reads. A
*trigram encoder* makes a state of three token embeddings; a *full-context encoder*, one decoder
layer, lets it read the target's states and the trigrams before it. What comes out, Z, stands for
the target's state at the trigram's last token, which the target has not computed yet. Head k reads
H_i and the Z of the token k + 1 places after it, and guesses the token after that: it only has to
add what has changed since H_i.

Every position has two entries that others may attend to: its state (H, or Z while it is a draft)
and its trigram. A trigram attends to states before its position and to trigrams up to its own.
"""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models import parameter_files, rope, transformer
from models.attention import attend
from models.config import TransformerConfig
from models.errors import InputError
from models.exit_adapter import block_config
from models.layers import MLP, Dense, Norm
from models.medusa_heads import head_kernel

ROLE = "chimera_heads"
_KIND = "chimera_heads"


@dataclasses.dataclass(frozen=True)
class ChimeraConfig:
    """What the parts are, beside their target's sizes.

    Attributes:
      heads: K, tokens guessed ahead.
      own_head: whether head k is a matrix U_k [2 D, V] of its own (published); else it is
        W (H + P_k Z) with the target's W and a P_k [D, D], a small variant.
      trigram: False leaves the encoder a projection of the last embedding (ablation).
      context: False leaves out the full-context encoder: Z is the trigram's state (ablation).
      residual: False lets a head read Z alone (ablation).
      draft_states: False hides the entries of drafts from those after them, which then see earlier
        drafts through their trigram alone, as the published mask does by mistake.
    """

    heads: int = 4
    own_head: bool = False
    trigram: bool = True
    context: bool = True
    residual: bool = True
    draft_states: bool = True

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"heads: {self.heads} must be at least 1")


class ChimeraHeads(struct.PyTreeNode):
    """Parameters that say what they are: what decoding is given under `ROLE`."""

    config: ChimeraConfig = struct.field(pytree_node=False)
    params: Any


class _Encoder(nn.Module):
    """One decoder layer as the target's, in two halves around its attention."""

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        K, G, H = config.num_kv_heads, config.queries_per_kv, config.head_dim
        self.attention_norm = Norm(config)
        self.qkv = Dense((K, G + 2, H))
        self.out = Dense((config.embed_dim,), contract=3)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def entries(
        self, x: jnp.ndarray, positions: jnp.ndarray
    ) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
        G = self.config.queries_per_kv
        queries, keys, values = jnp.split(self.qkv(self.attention_norm(x)), [G, G + 1], axis=-2)
        cos, sin = rope.angles(self.config.rope, self.config.rotary_dim, positions)
        queries = rope.rotate(queries, cos[..., None, :], sin[..., None, :])
        keys = rope.rotate(keys[..., 0, :], cos, sin)
        return queries, keys, values[..., 0, :]

    def finish(self, x: jnp.ndarray, mixed: jnp.ndarray) -> jnp.ndarray:
        x = x + self.out(mixed)
        return x + self.mlp(self.mlp_norm(x))

    def __call__(self, x: jnp.ndarray, positions: jnp.ndarray) -> jnp.ndarray:
        return self.finish(x, self.entries(x, positions)[0])


def init(config: ChimeraConfig, target: TransformerConfig, key: jax.Array) -> Any:
    """Random parameters, with B = 0 and P_k = 1: logits are W (H + Z) at first.

    12 D^2 of them in the trigram encoder, a layer's in the full-context encoder, and D^2 a head,
    or 2 D V with matrices of their own, which `with_head` fills.
    """
    K, D, V = config.heads, target.embed_dim, target.vocab_size
    of_trigram, of_context, of_heads = jax.random.split(key, 3)
    width = 3 * D if config.trigram else D
    scale = width**-0.5
    params: dict[str, Any] = {
        "trigram": {"project": {"kernel": scale * jax.random.normal(of_trigram, (width, D))}}
    }
    if config.trigram:
        params["trigram"]["mix"] = {
            "kernel": jnp.zeros((width, width)),
            "bias": jnp.zeros((width,)),
        }
    if config.context:
        module = _Encoder(block_config(target))
        x, positions = jnp.zeros((1, 1, D)), jnp.zeros((1, 1), jnp.int32)
        params["context"] = module.init(of_context, x, positions)["params"]
    if config.own_head:
        reads = 2 * D if config.residual else D
        kernel = D**-0.5 * jax.random.normal(of_heads, (K, reads, V))
        params["head"] = {"kernel": kernel}
    else:
        params["step"] = {"kernel": jnp.broadcast_to(jnp.eye(D), (K, D, D))}
    return params


def fresh(config: ChimeraConfig, target: TransformerConfig, key: jax.Array) -> ChimeraHeads:
    """Untrained heads, as decoding is given them."""
    return ChimeraHeads(config, init(config, target, key))


def with_head(target: TransformerConfig, target_params: Any, params: Any) -> Any:
    """Matrices of their own begin as [W, W], W being the target's head; others stay as they are."""
    if "head" not in params:
        return params
    shape = params["head"]["kernel"].shape
    copies = jnp.tile(head_kernel(target, target_params), (shape[1] // target.embed_dim, 1))
    return {**params, "head": {"kernel": jnp.broadcast_to(copies, shape)}}


def trigram_ids(
    before: jnp.ndarray, last: jnp.ndarray, token: jnp.ndarray, positions: jnp.ndarray
) -> jnp.ndarray:
    """int [..., 3]: two tokens and the one at `positions` after them.

    Where there are none before, as published: (x0, x0, x0) at position 0, (x0, x1, x1) at 1.
    """
    first = jnp.where(positions == 0, token, jnp.where(positions == 1, last, before))
    second = jnp.where(positions <= 1, token, last)
    return jnp.stack([first, second, token], axis=-1)


def trigram(
    config: ChimeraConfig,
    target: TransformerConfig,
    target_params: Any,
    params: Any,
    ids: jnp.ndarray,
) -> jnp.ndarray:
    """States [..., D] of trigrams int [..., 3]: A (z + silu(B z + b)), z the three embeddings."""
    kernels = params["trigram"]
    if not config.trigram:
        ids = ids[..., -1:]
    embeddings = transformer.token_embeddings(target, target_params, ids)
    z = embeddings.reshape(*ids.shape[:-1], -1)
    if config.trigram:
        mix = jax.tree.map(lambda x: x.astype(z.dtype), kernels["mix"])
        z = z + jax.nn.silu(z @ mix["kernel"] + mix["bias"])
    return z @ kernels["project"]["kernel"].astype(z.dtype)


def entries(
    target: TransformerConfig, params: Any, x: jnp.ndarray, positions: jnp.ndarray
) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """What states or trigrams x [B, T, D] at positions int [B, T] are attended by and with.

    Returns:
      Queries [B, T, K, G, H]; keys and values [B, T, K, H].
    """
    module = _Encoder(block_config(target))
    found: Any = module.apply({"params": params["context"]}, x, positions, method="entries")
    return found


def finish(
    target: TransformerConfig, params: Any, x: jnp.ndarray, mixed: jnp.ndarray
) -> jnp.ndarray:
    """Z [B, T, D] of trigrams x [B, T, D] and what their attention gave, [B, T, K, G, H]."""
    module = _Encoder(block_config(target))
    found: Any = module.apply({"params": params["context"]}, x, mixed, method="finish")
    return found


def encode(
    target: TransformerConfig,
    params: Any,
    x: jnp.ndarray,
    queries: jnp.ndarray,
    keys: jnp.ndarray,
    values: jnp.ndarray,
    mask: jnp.ndarray,
) -> jnp.ndarray:
    """Z [B, T, D] of trigrams under a mask.

    Args:
      target: the architecture that the heads are for.
      params: of the heads.
      x: [B, T, D], the trigrams.
      queries: theirs, from `entries`.
      keys: [B, K, S, H] of everything there is to attend to, or [K, S, H] of a folded cache.
      values: as `keys`.
      mask: bool [B, T, S].
    """
    block = block_config(target)
    mixed = attend(queries, keys, values, mask, scale=block.scale, softcap=block.attention_softcap)
    return finish(target, params, x, mixed)


def logits(
    config: ChimeraConfig,
    target: TransformerConfig,
    target_params: Any,
    params: Any,
    k: int,
    hidden: jnp.ndarray,
    drafted: jnp.ndarray,
) -> jnp.ndarray:
    """Head k: float32 [..., V] from H [..., D] of the last verified token and Z [..., D]."""
    dtype = drafted.dtype
    hidden = jnp.broadcast_to(hidden.astype(dtype), drafted.shape)
    if config.own_head:
        x = jnp.concatenate([hidden, drafted], axis=-1) if config.residual else drafted
        kernel = params["head"]["kernel"][k].astype(dtype)
        return jnp.einsum("...d,dv->...v", x, kernel, preferred_element_type=jnp.float32)
    x = drafted @ params["step"]["kernel"][k].astype(dtype)
    return transformer.unembed(target, target_params, hidden + x if config.residual else x)


def save(directory: str | os.PathLike[str], config: ChimeraConfig, params: Any) -> None:
    """Writes config.json and model.safetensors; errors as `parameter_files.save`."""
    parameter_files.save(directory, _KIND, config, params)


def load(directory: str | os.PathLike[str], target: TransformerConfig) -> tuple[ChimeraConfig, Any]:
    """Reads what `save` wrote for a target; errors as `parameter_files.load`."""

    def shapes(config: ChimeraConfig) -> Any:
        return jax.eval_shape(functools.partial(init, config, target), jax.random.key(0))

    return parameter_files.load(directory, _KIND, ChimeraConfig, shapes)
