"""Word vectors against a naive loop: context, padding, order, size, scripts, the cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cross_attention_words as caw
from models import spaced_words, words
from models.cross_attention_words import WordEncoderConfig, WordModelConfig
from models.errors import InputError

WIDTH = 17
BACKBONE = caw.bert_backbone(layers=1, width=16, heads=2, max_words=32)
MODEL = WordModelConfig(BACKBONE, WordEncoderConfig(width=WIDTH, num_heads=4))
VARIANTS = {
    "query": MODEL.encoder,
    "mean_query": WordEncoderConfig(WIDTH, 4, pooling="mean_query"),
    "mean": WordEncoderConfig(WIDTH, 4, pooling="mean"),
    "three queries": WordEncoderConfig(WIDTH, 4, num_queries=3),
    "network": WordEncoderConfig(WIDTH, 4, mlp_dim=24),
    "no positions": WordEncoderConfig(WIDTH, 4, positions=False),
}
TEXT = "tea eat (naïve)  Москва 東 internationalisation"
encode = jax.jit(caw.encode, static_argnums=0)


@functools.cache
def params_of(model: WordModelConfig) -> dict:
    """Of the word encoder alone, but for `MODEL`: a backbone takes long to compile."""
    if model == MODEL:
        return jax.device_get(caw.init(model, jax.random.key(0)))
    symbols, lengths = jnp.zeros((1, WIDTH), jnp.int32), jnp.ones(1, jnp.int32)
    made = caw.WordEncoder(model).init(jax.random.key(0), symbols, lengths)
    return jax.device_get({"encoder": made["params"]})


def packed(text: str, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    return words.pack(spaced_words.split(text, WIDTH - 1), width)


def naive(model: WordModelConfig, params: dict, word: bytes) -> np.ndarray:
    """One word, one head at a time, with keys and values of every byte."""
    p, encoder = params["encoder"], model.encoder
    D, M = model.backbone.embed_dim, encoder.num_heads
    H = D // M
    u = np.stack(
        [
            p["embedding"][byte] + (p["positions"][place] if encoder.positions else 0)
            for place, byte in enumerate(word)
        ]
    )
    queries = p["query_embedding"] if encoder.pooling == "query" else u.mean(0, keepdims=True)
    outputs = []
    for query in queries:
        heads = []
        for m in range(M):
            mine = slice(m * H, (m + 1) * H)
            values = u @ p["value_kernel"][:, mine]
            weights = np.full(len(u), 1 / len(u))
            if encoder.pooling != "mean":
                keys = u @ p["key_kernel"][:, mine]
                scores = keys @ (query @ p["query_kernel"][:, mine]) / math.sqrt(H)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
            heads.append(weights @ values)
        outputs.append(np.concatenate(heads) @ p["out"]["kernel"])
    x = outputs[0]
    if len(outputs) > 1:
        x = sum(o @ k for o, k in zip(outputs, p["merge"]["kernel"], strict=True))
    x = norm(x, p["norm"])
    if encoder.mlp_dim:
        inner = x @ p["up"]["kernel"] + p["up"]["bias"]
        inner = np.asarray(jax.nn.gelu(inner))
        x = norm(x + inner @ p["down"]["kernel"] + p["down"]["bias"], p["mlp_norm"])
    return x * D**-0.5


def norm(x: np.ndarray, p: dict) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + BACKBONE.norm_eps) * p["scale"] + p["bias"]


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_are_those_of_a_naive_loop(name: str) -> None:
    model = dataclasses.replace(MODEL, encoder=VARIANTS[name])
    params = params_of(model)
    found = encode(model, params, *packed(TEXT))
    for vector, word in zip(found, spaced_words.split(TEXT, WIDTH - 1), strict=True):
        if model.encoder.pooling == "mean":
            params = {"encoder": {**params["encoder"], "query_embedding": np.zeros((1, 16))}}
        np.testing.assert_allclose(vector, naive(model, params, word), atol=2e-5)


def test_a_vector_depends_on_its_word_alone() -> None:
    """Any batch, any neighbours, any padding: the same, so that it can be kept."""
    params = params_of(MODEL)
    symbols, lengths = packed(TEXT)
    together = np.asarray(encode(MODEL, params, symbols, lengths))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, symbols.shape)
    inside = np.arange(WIDTH) < lengths[:, None]
    other_padding = np.asarray(encode(MODEL, params, np.where(inside, symbols, noise), lengths))
    np.testing.assert_array_equal(together, other_padding)
    for row in range(len(symbols)):
        width = int(lengths[row])
        alone = encode(MODEL, params, symbols[row : row + 1, :width], lengths[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


def test_order_of_bytes_counts_only_with_positions() -> None:
    symbols, lengths = packed("x tea eat")
    for name, differs in (("query", True), ("mean_query", True), ("no positions", False)):
        model = dataclasses.replace(MODEL, encoder=VARIANTS[name])
        _, tea, eat = encode(model, params_of(model), symbols, lengths)
        assert (float(jnp.abs(tea - eat).max()) > 1e-2) is differs


def test_size_of_the_input() -> None:
    """4 D^2 of attention, 256 + C rows: at D = 768 within 12 % of BERT's 30,522 rows."""
    model = WordModelConfig(caw.bert_backbone(), WordEncoderConfig())
    shapes = jax.eval_shape(lambda: caw.init(model, jax.random.key(0)))
    D = 768
    expected = 4 * D**2 + (256 + 17 + 1) * D + 2 * D + len(caw.SPECIALS) * D
    assert caw.num_input_params(shapes) == expected
    assert expected / (30_522 * D) < 0.12
    assert pytest.approx(0.1006, abs=1e-4) == 4 * D**2 / (30_522 * D)
    # No axis of the input is a vocabulary: nothing has more than 4 D or 512 rows or columns.
    backbone = dict(shapes["backbone"])
    sizes = {size for leaf in jax.tree.leaves((shapes["encoder"], backbone)) for size in leaf.shape}
    assert max(sizes) == 4 * D


def test_unseen_scripts_have_vectors_of_their_own() -> None:
    """No word is unknown: whatever its script, it has a vector, and another one than its peers."""
    text = "日 本 Ελλάδα Ελλάδος ประเทศไทย ประเทศจีน ⵜⴰⵎⴰⵣⵉⵖⵜ 👩 한국어"
    different = list(dict.fromkeys(spaced_words.split(text, WIDTH - 1)))  # parts may be the same
    found = np.asarray(encode(MODEL, params_of(MODEL), *words.pack(different, WIDTH)))
    assert len(found) > 8 and np.isfinite(found).all()
    distances = np.linalg.norm(found[:, None] - found[None], axis=-1)
    assert distances[~np.eye(len(found), dtype=bool)].min() > 1e-2


def test_padding_and_specials() -> None:
    """Rows of nothing but padding stay finite; special words do not go through the encoder."""
    params = params_of(MODEL)
    symbols, lengths = packed("one two three")
    rows = np.zeros((3, 5, WIDTH), np.int32)
    sizes = np.zeros((3, 5), np.int32)
    rows[0, 1:4], sizes[0, 1:4] = symbols, lengths
    special = np.full((3, 5), caw.PAD)
    special[0] = [caw.CLS, caw.WORD, caw.WORD, caw.WORD, caw.SEP]
    special[1, :2] = caw.CLS, caw.MASK
    apply = jax.jit(caw.apply, static_argnums=0)
    hidden, cache = apply(MODEL, params, rows, sizes, special)
    assert cache is None and np.isfinite(hidden).all()
    x = np.asarray(caw.embed(MODEL, params, rows, sizes, special))
    table = params["backbone"]["embedder"]["embedding"]
    np.testing.assert_array_equal(x[1, 1], table[caw.MASK])
    np.testing.assert_allclose(x[0, 1:4], encode(MODEL, params, symbols, lengths), atol=1e-6)
    # What stands in the place of padding does not matter to the others.
    garbage, longer = rows.copy(), sizes.copy()
    garbage[1, 2:], longer[1, 2:] = symbols[0], lengths[0]
    again, _ = apply(MODEL, params, garbage, longer, special)
    np.testing.assert_allclose(again[:2, :2], hidden[:2, :2], atol=1e-6)
    half = np.asarray(
        caw.encode(
            dataclasses.replace(MODEL, backbone=BACKBONE.replace(dtype="bfloat16")), params,
            rows[1], sizes[1],
        )
    )  # fmt: skip
    assert np.isfinite(half.astype(np.float32)).all()


def test_cache_of_words() -> None:
    params = params_of(MODEL)
    kept = caw.WordCache(MODEL, params, capacity=3)
    text = spaced_words.split("a b a c", WIDTH - 1)
    expected = encode(MODEL, params, *words.pack(text, WIDTH))
    np.testing.assert_allclose(kept(text), expected, atol=1e-6)
    first = spaced_words.split("a b", WIDTH - 1)[0]  # 'a' without and with a space are two words
    assert (kept.hits, kept.misses) == (0, 4)
    kept(text[1:])
    assert (kept.hits, kept.misses) == (3, 4)
    kept([first])  # had to go, as the least recently used
    assert (kept.hits, kept.misses) == (3, 5)


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"encoder.pooling: 'max' is not known"):
        WordEncoderConfig(pooling="max")
    with pytest.raises(InputError, match=r"encoder.num_queries: 2 are learned"):
        WordEncoderConfig(pooling="mean", num_queries=2)
    with pytest.raises(InputError, match=r"backbone.vocab_size: 9 must be 5"):
        WordModelConfig(BACKBONE.replace(vocab_size=9))
    with pytest.raises(InputError, match=r"num_heads: 5 must divide embed_dim 16"):
        WordModelConfig(BACKBONE, WordEncoderConfig(num_heads=5))
    with pytest.raises(InputError, match=r"symbols: 18 bytes a word"):
        caw.encode(MODEL, params_of(MODEL), np.zeros((1, 18), int), np.ones(1, int))
    with pytest.raises(InputError, match=r"capacity: 0"):
        caw.WordCache(MODEL, params_of(MODEL), 0)
