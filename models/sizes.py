"""Named architectures: published ones for random-weight benchmarks and compile checks, tiny ones
for tests.

Figures are those of each model's published `config.json`.
"""

from collections.abc import Callable

from models.config import RopeConfig, TransformerConfig
from models.errors import check_choice


def get(name: str) -> TransformerConfig:
    """The architecture called `name`; raises InputError naming the nearest for another."""
    check_choice("size", name, SIZES)
    return SIZES[name]()


def _llama(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    vocab: int = 128256,
    max_position: int = 8192,
    rope: RopeConfig = RopeConfig(theta=500000.0),  # noqa: B008  (frozen)
    tied: bool = False,
) -> TransformerConfig:
    """Llama (arXiv 2302.13971, 2307.09288, 2407.21783); defaults of Llama 3."""
    llama3 = vocab == 128256  # its tokeniser, and with it the special tokens
    return TransformerConfig(
        family="llama",
        vocab_size=vocab,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_dim=mlp,
        max_position=max_position,
        norm_eps=1e-5,
        rope=rope,
        tie_embeddings=tied,
        bos_token_id=128000 if llama3 else 1,
        eos_token_ids=(128001,) if llama3 else (2,),
        dtype="bfloat16",
    )


_LLAMA3_2_ROPE = RopeConfig(
    theta=500000.0,
    kind="llama3",
    factor=32.0,
    original_max_position=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)


def _mistral_7b() -> TransformerConfig:
    """Mistral 7B v0.1 (arXiv 2310.06825)."""
    base = _llama(32, 4096, 32, 8, 14336, vocab=32000, max_position=32768, rope=RopeConfig())
    return base.replace(family="mistral", window=4096, local_layers=(True,) * 32)


def _mixtral_8x7b() -> TransformerConfig:
    """Mixtral 8x7B (arXiv 2401.04088)."""
    rope = RopeConfig(theta=1e6)
    base = _llama(32, 4096, 32, 8, 14336, vocab=32000, max_position=32768, rope=rope)
    return base.replace(family="mixtral", num_experts=8, experts_per_token=2)


def _qwen(
    family: str,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    vocab: int = 151936,
    max_position: int = 40960,
    tied: bool = False,
) -> TransformerConfig:
    """Qwen 2.5 (arXiv 2412.15115) and Qwen 3 (arXiv 2505.09388)."""
    base = _llama(
        layers, width, heads, kv_heads, mlp,
        vocab=vocab, max_position=max_position, rope=RopeConfig(theta=1e6), tied=tied,
    )  # fmt: skip
    return base.replace(
        family=family,
        head_dim=128 if family == "qwen3" else width // heads,
        norm_eps=1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        bos_token_id=151643,
        eos_token_ids=(151643,) if family == "qwen2" else (151645,),
    )


def _gemma(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> TransformerConfig:
    """Gemma (arXiv 2403.08295), what its three generations share."""
    base = _llama(layers, width, heads, kv_heads, mlp, vocab=256000, rope=RopeConfig())
    return base.replace(
        family="gemma",
        head_dim=256,
        norm_eps=1e-6,
        norm_offset=1.0,
        activation="gelu_tanh",
        embedding_scale=float(width) ** 0.5,
        tie_embeddings=True,
        bos_token_id=2,
        eos_token_ids=(1,),
        pad_token_id=0,
    )


def _gemma2(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> TransformerConfig:
    """Gemma 2 (arXiv 2408.00118): every other layer local, soft caps."""
    return _gemma(layers, width, heads, kv_heads, mlp).replace(
        family="gemma2",
        post_norms=True,
        attention_scale=256**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        window=4096,
        local_layers=tuple(layer % 2 == 0 for layer in range(layers)),
    )


def _gemma3_1b() -> TransformerConfig:
    """Gemma 3 1B (arXiv 2503.19786): five local layers to a global one."""
    return _gemma(26, 1152, 4, 1, 6912).replace(
        family="gemma3_text",
        vocab_size=262144,
        max_position=32768,
        post_norms=True,
        qk_norm=True,
        attention_scale=256**-0.5,
        rope=RopeConfig(theta=1e6),
        local_rope=RopeConfig(theta=10000.0),
        window=512,
        local_layers=tuple((layer + 1) % 6 != 0 for layer in range(26)),
    )


def _opt(layers: int, width: int, heads: int) -> TransformerConfig:
    """OPT (arXiv 2205.01068), the pre-norm sizes."""
    return TransformerConfig(
        family="opt",
        vocab_size=50272,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=4 * width,
        max_position=2048,
        norm="layernorm",
        norm_eps=1e-5,
        activation="relu",
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        position_offset=2,
        tie_embeddings=True,
        bos_token_id=2,
        eos_token_ids=(2,),
        pad_token_id=1,
        dtype="float16",
    )


def _llada_8b() -> TransformerConfig:
    """LLaDA 8B (arXiv 2502.09992)."""
    base = _llama(32, 4096, 32, 32, 12288, vocab=126464, max_position=4096)
    return base.replace(
        family="llada",
        causal=False,
        mask_token_id=126336,
        bos_token_id=None,
        eos_token_ids=(126081,),
        pad_token_id=126081,
    )


def _tiny(config: TransformerConfig, **changes: object) -> TransformerConfig:
    """`config` with 2 layers 16 wide over a vocabulary of bytes, and no special tokens."""
    width, heads = 16, 4
    grouped = config.num_kv_heads < config.num_heads
    local = (True, False) if any(config.local_layers) else ()
    return config.replace(
        vocab_size=256,
        embed_dim=width,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=2 if grouped else heads,
        head_dim=width // heads,
        mlp_dim=32,
        max_position=512,
        window=8 if local else None,
        local_layers=local,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
        dtype="float32",
        **changes,
    )


def _bench(layers: int, width: int, heads: int, mlp: int) -> TransformerConfig:
    """A Llama with a small vocabulary, so that layers are what is measured."""
    return _llama(
        layers, width, heads, heads, mlp,
        vocab=1024, max_position=4096, rope=RopeConfig(), tied=True,
    ).replace(bos_token_id=None, eos_token_ids=(), dtype="float32")  # fmt: skip


SIZES: dict[str, Callable[[], TransformerConfig]] = {
    "llama2_7b": lambda: _llama(
        32, 4096, 32, 32, 11008, vocab=32000, max_position=4096, rope=RopeConfig()
    ),
    "llama3_8b": lambda: _llama(32, 4096, 32, 8, 14336),
    "llama3_70b": lambda: _llama(80, 8192, 64, 8, 28672),
    "llama3_2_1b": lambda: _llama(
        16, 2048, 32, 8, 8192, max_position=131072, rope=_LLAMA3_2_ROPE, tied=True
    ),
    "llama3_2_3b": lambda: _llama(
        28, 3072, 24, 8, 8192, max_position=131072, rope=_LLAMA3_2_ROPE, tied=True
    ),
    "mistral_7b": _mistral_7b,
    "mixtral_8x7b": _mixtral_8x7b,
    "qwen2_5_0_5b": lambda: _qwen("qwen2", 24, 896, 14, 2, 4864, max_position=32768, tied=True),
    "qwen2_5_7b": lambda: _qwen("qwen2", 28, 3584, 28, 4, 18944, vocab=152064, max_position=131072),
    "qwen3_0_6b": lambda: _qwen("qwen3", 28, 1024, 16, 8, 3072, tied=True),
    "qwen3_8b": lambda: _qwen("qwen3", 36, 4096, 32, 8, 12288),
    "qwen3_32b": lambda: _qwen("qwen3", 64, 5120, 64, 8, 25600),
    "gemma_2b": lambda: _gemma(18, 2048, 8, 1, 16384),
    "gemma2_2b": lambda: _gemma2(26, 2304, 8, 4, 9216),
    "gemma2_9b": lambda: _gemma2(42, 3584, 16, 8, 14336),
    "gemma3_1b": _gemma3_1b,
    "opt_125m": lambda: _opt(12, 768, 12),
    "opt_1_3b": lambda: _opt(24, 2048, 32),
    "llada_8b": _llada_8b,
    "tiny_llama": lambda: _tiny(_llama(32, 4096, 32, 8, 14336)),
    "tiny_qwen3": lambda: _tiny(_qwen("qwen3", 28, 1024, 16, 8, 3072, tied=True)),
    "tiny_gemma3": lambda: _tiny(_gemma3_1b(), embedding_scale=4.0),
    "tiny_opt": lambda: _tiny(_opt(12, 768, 12)),
    "tiny_mixtral": lambda: _tiny(_mixtral_8x7b(), num_experts=4),
    "tiny_llada": lambda: _tiny(_llada_8b(), mask_token_id=255),
    "bench_5m": lambda: _bench(6, 256, 4, 688),
    "bench_85m": lambda: _bench(12, 768, 12, 2048),
}
