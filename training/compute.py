"""Work of a forward pass, in floating-point operations: what models are matched by.

A product of a matrix with a vector is two operations an entry. Attention counts its scores and sums
over the keys in sight; norms, rotations and non-linearities are left out.
"""

from models.config import TransformerConfig
from models.hierarchical import HierarchicalConfig


def position(config: TransformerConfig, keys: float, *, logits: bool = True) -> float:
    """Operations of one position with `keys` keys in sight (its own among them)."""
    D, H, Q, K = config.embed_dim, config.head_dim, config.num_heads, config.num_kv_heads
    matrices = D * H * (2 * Q + 2 * K) + D * config.mlp_dim * (3 if config.gated_mlp else 2)
    attention = 2 * keys * H * Q
    head = config.vocab_size * D if logits else 0
    return 2 * (config.num_layers * (matrices + attention) + head)


def word(config: HierarchicalConfig, length: float, context: float) -> float:
    """Operations of a word: read, thought about, written.

    Args:
      config: the model.
      length: units of the word; a mean does.
      context: words in sight of the backbone, this one among them.
    """
    p, d, D = config.num_prefix, config.encoder.embed_dim, config.backbone.embed_dim
    seen = p + length
    read = seen * position(config.encoder, seen, logits=False)
    think = p * (position(config.backbone, p * context, logits=False) + 2 * d * D)
    written = (p + length) * position(config.decoder, (seen + 1) / 2, logits=False)
    head = 2 * (length + 1) * config.vocab_size * config.decoder.embed_dim
    return read + think + p * 2 * D * config.decoder.embed_dim + written + head


def per_byte(
    config: TransformerConfig | HierarchicalConfig,
    *,
    bytes_per_position: float,
    context_bytes: float,
) -> float:
    """Operations a byte of text, for text of so many bytes a word (or token), mean context.

    Args:
      config: the model; a word's p vectors count as one position here.
      bytes_per_position: bytes of a word or a token.
      context_bytes: text in sight, on average.
    """
    context = 1 + context_bytes / bytes_per_position
    if isinstance(config, HierarchicalConfig):
        return word(config, bytes_per_position, context) / bytes_per_position
    return position(config, context) / bytes_per_position
