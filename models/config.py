"""The architecture of a decoder-only Transformer, as data.

One frozen dataclass covers Llama, Mistral, Mixtral, Qwen, Gemma, OPT and LLaDA; what differs
between families is a field here, never a subclass. `models.hf_config` translates Hugging Face's
`config.json` to and from it, `models.sizes` names published sizes.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from models.errors import InputError, check_choice, nearest

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv 2104.09864) and its length extensions.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      kind: 'default'; 'linear' (positions divided by `factor`); 'llama3' (frequencies below a
        band divided by `factor`, with a smooth band); 'yarn' (arXiv 2309.00071).
      factor: context extension factor, used by every kind but 'default'.
      original_max_position: context length before extension ('llama3' and 'yarn').
      low_freq_factor, high_freq_factor: the band of 'llama3'.
      beta_fast, beta_slow: the ramp of 'yarn', in rotations over the original context.
      attention_factor: scale of cos and sin under 'yarn'; None for 0.1 ln(factor) + 1.
      truncate: whether 'yarn' rounds the ends of its ramp to whole dimensions.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_choice("rope.kind", self.kind, ROPE_KINDS)
        if self.kind in ("llama3", "yarn") and self.original_max_position <= 0:
            raise InputError(
                f"rope.original_max_position: {self.original_max_position} must be positive "
                f"when rope.kind is {self.kind!r}"
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only Transformer. Letters in brackets are the axis names used in docstrings.

    Attributes:
      family: the Hugging Face `model_type` this architecture is saved as.
      vocab_size: rows of the embedding [V].
      embed_dim: width of the residual stream [D].
      num_layers: blocks [L].
      num_heads, num_kv_heads: query heads [Q] and key/value heads [K]; K divides Q.
      head_dim: width of a head [H]; Q * H need not equal D.
      mlp_dim: inner width of the feed-forward network [F].
      max_position: longest context in tokens.
      norm, norm_eps: normalisation; `norm_offset` is added to the stored scale (1 for Gemma).
      post_norms: also normalise each sublayer's output before the residual sum (Gemma 2, 3).
      activation, gated_mlp: feed-forward non-linearity, and whether it gates a second product.
      qkv_bias, out_bias, mlp_bias: which projections carry a bias.
      qk_norm: normalise each query and key head (Qwen3, Gemma 3).
      attention_scale: multiplies q.k; None for H ** -0.5.
      attention_softcap, logit_softcap: c in c * tanh(x / c); None for none (Gemma 2).
      embedding_scale: multiplies token embeddings (Gemma: D ** 0.5).
      positions: 'rope', 'learned' (OPT) or 't5', see `RelativeBiasConfig`.
      position_offset: added to positions before the learned table is read (OPT: 2).
      rope, local_rope: rotary embedding of global layers and of sliding-window layers (None:
        the same).
      window: tokens that a local layer sees, itself included; None for no local layers.
      local_layers: which layers are local, one bool a layer; empty for none.
      num_experts, experts_per_token: mixture of experts; 0 experts for a dense network.
      tie_embeddings: whether logits come from the transposed embedding.
      causal: False for bidirectional masked-diffusion models (LLaDA).
      mask_token_id: the token that stands for 'not yet decided' in masked diffusion.
      eos_token_ids, bos_token_id, pad_token_id: special tokens, where the checkpoint has them.
      dtype: compute dtype; logits are float32 whatever it is.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_position: int
    family: str = "llama"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    positions: Literal["rope", "learned", "t5"] = "rope"
    position_offset: int = 0
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    tie_embeddings: bool = False
    causal: bool = True
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "mlp_dim", "max_position",
        )  # fmt: skip
        for field in sizes:
            if (value := getattr(self, field)) < 1:
                raise InputError(f"{field}: {value} must be at least 1")
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("positions", self.positions, ("rope", "learned", "t5"))
        if self.positions == "t5" and not isinstance(self, RelativeBiasConfig):
            raise InputError("positions: 't5' needs the buckets of a RelativeBiasConfig")
        check_choice("dtype", self.dtype, DTYPES)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads: {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise InputError(f"head_dim: {self.head_dim} must be even for rotary positions")
        if self.local_layers and len(self.local_layers) != self.num_layers:
            raise InputError(
                f"local_layers: {len(self.local_layers)} entries for {self.num_layers} layers"
            )
        if any(self.local_layers) and not self.window:
            raise InputError(f"window: {self.window} must be positive when a layer is local")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(
                f"experts_per_token: {self.experts_per_token} must be between 1 and "
                f"num_experts {self.num_experts}"
            )

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share a key/value head [G]."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """Multiplier of q.k before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def compute_dtype(self) -> Any:
        return DTYPES[self.dtype]

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that rotary positions turn; even."""
        return self.head_dim

    @property
    def expert_dim(self) -> int:
        """Inner width of an expert."""
        return self.mlp_dim

    def is_routed(self, layer: int) -> bool:
        """Whether `layer` has experts."""
        return self.num_experts > 0

    def is_local(self, layer: int) -> bool:
        """Whether `layer` attends within `window` only."""
        return bool(self.local_layers) and self.local_layers[layer]

    def replace(self, **changes: Any) -> "TransformerConfig":
        """A copy with `changes`; raises InputError for a field that does not exist."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"TransformerConfig has no field {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def num_params(self) -> int:
        """Number of parameters, counted from the fields (not from an initialised model)."""
        D, F, H, Q, K = (
            self.embed_dim, self.mlp_dim, self.head_dim, self.num_heads, self.num_kv_heads,
        )  # fmt: skip
        norm = D * (2 if self.norm == "layernorm" else 1)
        attention = D * H * (2 * Q + 2 * K)
        attention += H * (Q + 2 * K) * self.qkv_bias + D * self.out_bias + 2 * H * self.qk_norm
        mlp = D * F * (3 if self.gated_mlp else 2)
        mlp += (F * (2 if self.gated_mlp else 1) + D) * self.mlp_bias
        if self.num_experts:
            mlp = mlp * self.num_experts + D * self.num_experts
        layer = attention + mlp + norm * (4 if self.post_norms else 2)
        embed = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        table = (self.max_position + self.position_offset) * D * (self.positions == "learned")
        return embed + table + self.num_layers * layer + norm


@dataclasses.dataclass(frozen=True)
class GroupedExpertsConfig(TransformerConfig):
    """A Transformer with group-limited sigmoid routing beside a shared expert (Ling 2.0, LLaDA2).

    `mlp_dim` is the inner width of the layers without experts. The routing is that of DeepSeek-V3
    (arXiv 2412.19437, section 2.1.2).

    Attributes:
      rotary_share: share of a head's dimensions that rotary positions turn, the leading ones.
      dense_layers: layers without experts, the first ones.
      routed_dim: inner width of an expert.
      shared_dim: inner width of the expert that every token goes through; 0 for none.
      expert_groups: groups of equally many experts, in order.
      groups_per_token: groups that a token may choose from: those with the largest sum of their
        two best scores.
      routed_scale: multiplies weights that sum to one.
    """

    rotary_share: float = 1.0
    dense_layers: int = 0
    routed_dim: int = 0
    shared_dim: int = 0
    expert_groups: int = 1
    groups_per_token: int = 1
    routed_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1 or self.routed_dim < 1:
            raise InputError(
                f"num_experts, routed_dim: {self.num_experts}, {self.routed_dim} must be at least 1"
            )
        if not 0 < self.rotary_share <= 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise InputError(
                f"rotary_share: {self.rotary_share} must make an even number of the "
                f"{self.head_dim} dimensions of a head"
            )
        if not 0 <= self.dense_layers <= self.num_layers:
            raise InputError(
                f"dense_layers: {self.dense_layers} must be between 0 and {self.num_layers}"
            )
        if self.expert_groups < 1 or self.num_experts % self.expert_groups:
            raise InputError(
                f"expert_groups: {self.expert_groups} must divide num_experts {self.num_experts}"
            )
        if not 1 <= self.groups_per_token <= self.expert_groups:
            raise InputError(
                f"groups_per_token: {self.groups_per_token} must be between 1 and expert_groups "
                f"{self.expert_groups}"
            )
        choice = self.groups_per_token * self.num_experts // self.expert_groups
        if self.experts_per_token > choice:
            raise InputError(
                f"experts_per_token: {self.experts_per_token} must be at most the {choice} experts "
                "of a token's groups"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_share)

    @property
    def expert_dim(self) -> int:
        return self.routed_dim

    def is_routed(self, layer: int) -> bool:
        return layer >= self.dense_layers

    def num_params(self) -> int:
        dense = self.without_experts().num_params()
        D, E = self.embed_dim, self.num_experts
        routed = D * E + E + 3 * D * (E * self.routed_dim + self.shared_dim)
        return dense + (self.num_layers - self.dense_layers) * (routed - 3 * D * self.mlp_dim)

    def without_experts(self) -> TransformerConfig:
        """The same sizes with a dense network in every layer."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(TransformerConfig)}
        return TransformerConfig(**fields | {"num_experts": 0, "experts_per_token": 0})


@dataclasses.dataclass(frozen=True)
class RelativeBiasConfig(TransformerConfig):
    """A Transformer whose only positions are T5's relative ones (arXiv 1910.10683, section 2.1).

    Attributes:
      relative_buckets: distances that have a bias of their own, near ones one each and far ones
        by powers; half of them for either direction where the model is bidirectional.
      relative_max_distance: distances from here on share the last bucket.
    """

    positions: Literal["rope", "learned", "t5"] = "t5"
    relative_buckets: int = 32
    relative_max_distance: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "t5":
            raise InputError(f"positions: {self.positions!r} must be 't5' with relative buckets")
        directions = 1 if self.causal else 2
        if self.relative_buckets < 2 * directions or self.relative_buckets % (2 * directions):
            raise InputError(
                f"relative_buckets: {self.relative_buckets} must be a multiple of {2 * directions}"
            )
        if self.relative_max_distance <= (exact := self.relative_buckets // (2 * directions)):
            raise InputError(
                f"relative_max_distance: {self.relative_max_distance} must exceed {exact}, the "
                "distances that have a bucket each"
            )

    def num_params(self) -> int:
        return super().num_params() + self.relative_buckets * self.num_heads
