"""A larger vocabulary, its index, and decoding with it against exhaustive search and faiss."""

import functools

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, methods, stopping
from decoding.dynamic_vocabulary import ann_vocabulary, boundaries, inverted_lists, providers
from decoding.sampling import SamplingConfig
from models import byte_characters, sharding, token_tables, transformer
from models.errors import InputError
from tests.decoding import tiny
from tests.decoding.test_embedding_cache import CONFIG, fvt, params, source
from tests.decoding.test_merging import TEXTS
from training import ann_index, large_vocabulary

MORE = (
    "def longest_prefix(token, vocabulary):\n    return vocabulary.find(token)\n" * 4,
    "from collections import Counter, OrderedDict, defaultdict\n" * 4,
    *TEXTS,
)
K = 8


@functools.cache
def tokens() -> tuple[str, ...]:
    return large_vocabulary.extend(source(), MORE * 2, 420)


@functools.cache
def large():
    """The tiny model with the large vocabulary; rows of different norms."""
    rows = providers.in_chunks(fvt(), tokens())
    rng = np.random.default_rng(1)
    outputs = rows.output * np.exp(rng.normal(0, 0.3, (len(tokens()), 1)))
    outputs = outputs + rng.normal(0, 0.02, outputs.shape)  # averages of the same rows are alike
    rows = rows._replace(output=outputs.astype(np.float32))
    config = token_tables.retokenized_config(CONFIG.replace(eos_token_ids=(0,)), len(tokens()))
    return config, token_tables.with_tables(params(), rows)


@functools.cache
def index(metric: str = "cosine", balance: float | None = 2.0):
    rows = np.asarray(large()[1]["lm_head"]["kernel"]).T
    sizes = large_vocabulary.token_bytes(source(), tokens())
    return ann_index.build(rows, sizes, lists=24, metric=metric, balance=balance)


def queries(count: int = 16) -> np.ndarray:
    """Final hidden states of the model on its own text."""
    config, model = large()
    ids = jnp.array([source().encode(TEXTS[0])[:count]])
    return np.asarray(transformer.apply(config, model, ids).hidden)[0]


def test_the_models_tokens_are_pinned_and_new_ones_are_pieces():
    vocabulary = tokens()
    assert len(vocabulary) == 420
    assert vocabulary[: source().vocab_size] == source().tokens
    assert len(set(vocabulary)) == len(vocabulary)
    splitter = source().backend.pre_tokenizer
    for token in vocabulary[source().vocab_size :]:
        assert byte_characters.is_byte_level(token)
        assert len(source().decompose(token)) > 1
        if (text := boundaries.text_of(token)) is not None:  # else part of a character
            assert len(splitter.pre_tokenize_str(text)) == 1
    with pytest.raises(InputError, match="size: 3 must be at least"):
        large_vocabulary.extend(source(), [], 3)


def test_the_longest_prefix_is_taken():
    backend = large_vocabulary.longest_prefix(source(), tokens())
    known = set(tokens())
    for text in (*MORE, "12 naïve 🙂\n\n\tx", "Ünïcode — ok"):
        expected = []
        for piece, _ in source().backend.pre_tokenizer.pre_tokenize_str(text):
            while piece:
                n = max(n for n in range(1, len(piece) + 1) if piece[:n] in known)
                expected.append(piece[:n])
                piece = piece[n:]
        found = backend.encode(text)
        assert found.tokens == expected
        assert backend.decode(found.ids) == text
        assert len(found.ids) <= len(source().encode(text))
    assert backend.encode("a<|endoftext|>b").ids[1] == source().specials["<|endoftext|>"]


def brute(rows: np.ndarray, hidden: np.ndarray, k: int) -> np.ndarray:
    """The naive oracle: the k largest products, ties to the smaller id."""
    scores = hidden @ rows.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


search = jax.jit(inverted_lists.search, static_argnames=("k", "probes"))


@pytest.mark.parametrize("metric", inverted_lists.METRICS)
def test_probing_all_lists_is_exhaustive_search(metric):
    config, made = index(metric)
    rows = np.asarray(large()[1]["lm_head"]["kernel"]).T
    if metric == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    ids, scores, compared = search(made, queries(), K, 1000)
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(np.ascontiguousarray(rows))
    best, nearest = flat.search(queries(), K)
    np.testing.assert_array_equal(ids, nearest)
    np.testing.assert_array_equal(ids, brute(rows, queries(), K))
    np.testing.assert_allclose(scores, best, atol=1e-4)
    assert (np.asarray(compared) == len(rows)).all()
    # Every row lies in one list.
    held = made.ids[made.ids >= 0]
    assert sorted(held.tolist()) == list(range(len(rows)))
    assert config.width == made.ids.shape[1]


def test_a_search_of_few_lists_is_that_of_faiss():
    config, made = index(balance=None)
    rows = np.asarray(large()[1]["lm_head"]["kernel"]).T
    rows = np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    coarse = faiss.IndexFlatIP(config.dim)
    coarse.add(np.asarray(made.centroids))
    ivf = faiss.IndexIVFFlat(coarse, config.dim, config.lists, faiss.METRIC_INNER_PRODUCT)
    ivf.add(rows)
    for probes in (1, 3, 8):
        ivf.nprobe = probes
        best, nearest = ivf.search(queries(), K)
        ids, scores, compared = search(made, queries(), K, probes)
        np.testing.assert_array_equal(ids, nearest)  # -1 where the lists held fewer, in both
        known = nearest >= 0
        np.testing.assert_allclose(np.asarray(scores)[known], best[known], atol=1e-4)
        assert (np.asarray(compared) < len(rows)).all()


def test_recall_rises_with_probes_and_lists_are_bounded():
    config, made = index()
    exact = brute(np.asarray(large()[1]["lm_head"]["kernel"]).T, queries(), 1)
    recalls = []
    for probes in (1, 8, 1000):
        ids, _, _ = search(made, queries(), K, probes)
        recalls.append((np.asarray(ids) == exact).any(axis=1).mean())
    assert recalls == sorted(recalls)
    assert recalls[-1] > recalls[0]
    assert config.width <= np.ceil(2 * config.vocab_size / 24)
    assert config.lists >= 24


def test_identical_rows_are_cut_into_lists_too():
    config, made = ann_index.build(np.ones((100, 4), np.float32), np.ones(100), lists=4)
    assert config.width <= 50
    assert sorted(made.ids[made.ids >= 0].tolist()) == list(range(100))


def test_cosine_may_miss_rows_of_large_norm_that_inner_products_find():
    rows = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    rows[7] = 30 * rows[8] / np.linalg.norm(rows[8]) + rows[7]
    query = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    query *= np.sign(query @ rows[7])
    found = {}
    for metric in inverted_lists.METRICS:
        _, made = ann_index.build(rows, np.ones(200), lists=8, metric=metric)
        found[metric] = np.asarray(search(made, query, K, 1000)[0])[0].tolist()
    assert 7 in found["inner"]
    assert 7 not in found["cosine"]


PROMPTS = [[5, 60, 7, 19], [40, 41, 42], [9] * 6]
STOP = stopping.StopConfig(12, (0,))


def decode(method, models=None, prompts=PROMPTS, **kwargs):
    _, model = large()
    models = models or {"target": model, "index": index("inner")[1]}
    return generation.generate(models, prompts, method, kwargs.pop("stop", STOP), **kwargs)


def build(temperature=0.0, **options):
    sampling = SamplingConfig(temperature=temperature, top_k=options.pop("top_k", 0))
    return methods.build("ann_vocabulary", {"target": large()[0]}, sampling, options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_probes_decode_as_exhaustive_search(temperature):
    exact = tiny.texts(decode(build(temperature, search="exact", k=K)))
    found = decode(build(temperature, k=K, probes=1000))
    assert tiny.texts(found) == exact
    # A row does not depend on its neighbours.
    for row, prompt in enumerate(PROMPTS):
        alone = decode(
            build(temperature, k=K, probes=1000), prompts=[prompt] * 3, row_ids=[row] * 3
        )
        assert tiny.texts(alone)[0] == exact[row]
    if temperature == 0:
        config, model = large()
        plain = methods.build("autoregressive", {"target": config}, SamplingConfig())
        rows = generation.generate({"target": model}, PROMPTS, plain, STOP)
        assert tiny.texts(rows) == exact
    for row in found:
        emitted = row.stats["tokens_emitted"]
        assert row.stats["rows_compared"] == emitted * len(tokens())
        sizes = index("inner")[1].bytes
        assert row.stats["bytes_emitted"] == sum(sizes[token] for token in row.token_ids)


def test_few_probes_compare_fewer_rows_and_k_of_all_is_the_whole_law():
    rows = decode(build(k=K, probes=4))
    width = index("inner")[0].width
    assert all(0 < r.stats["rows_compared"] <= 4 * width * r.stats["tokens_emitted"] for r in rows)
    # With all tokens as candidates the law is the model's, in another order of noise.
    config, model = large()
    hidden = jnp.asarray(queries(3))
    ids, logits = inverted_lists.exhaustive(
        transformer.unembed(config, model, hidden), config.vocab_size
    )
    exact = ann_vocabulary.exact_logits(config, {"target": model}, hidden, ids)
    np.testing.assert_allclose(exact, logits, atol=1e-4)
    assert (np.asarray(ann_vocabulary.exact_logits(config, {"target": model}, hidden, ids * 0 - 1))
            == -np.inf).all()  # fmt: skip


def test_the_end_of_a_text_is_reached():
    config, model = large()
    assert not any(0 in row.token_ids for row in decode(build(k=K, probes=1000)))
    # As a candidate among all it can be preferred, and it ends the row.
    rows = decode(build(k=config.vocab_size, probes=1000, eos_bias=1e4))
    assert [(row.token_ids, row.finish_reason) for row in rows] == [([0], "eos")] * 3
    # Where it is the most likely token, few probes find it.
    hidden = queries(1)[0]
    kernel = np.array(model["lm_head"]["kernel"])
    kernel[:, 0] = 20 * hidden / np.linalg.norm(hidden)
    changed = {**model, "lm_head": {"kernel": jnp.asarray(kernel)}}
    sizes = large_vocabulary.token_bytes(source(), tokens())
    _, made = ann_index.build(kernel.T, sizes, lists=24)
    prompt = source().encode(TEXTS[0])[:1]
    found = decode(build(k=K, probes=2), {"target": changed, "index": made}, [prompt] * 3)
    assert [row.token_ids for row in found] == [[0]] * 3


def test_a_mesh_decodes_the_same():
    config, model = large()
    mesh = sharding.make_mesh(2, 2)
    placed = jax.device_put(model, sharding.param_shardings(config, mesh))
    prompts = [*PROMPTS, [7, 8]]
    method = build(1.0, k=K, probes=6)
    found = decode(method, {"target": placed, "index": index("inner")[1]}, prompts, mesh=mesh)
    assert found == decode(method, prompts=prompts)


def test_the_repetition_penalty_is_for_tokens_that_occurred():
    ids = jnp.array([[3, 5, -1], [4, 3, 9]])
    text = jnp.array([[3, 9, 9, 0], [4, 4, 9, 9]])
    seen = ann_vocabulary.seen_candidates(ids, text, jnp.array([1, 4]))
    assert seen.tolist() == [[True, False, False], [True, False, True]]
    sampling = SamplingConfig(repetition_penalty=1e9)
    method = methods.build(
        "ann_vocabulary", {"target": large()[0]}, sampling, {"k": 40, "probes": 99}
    )
    rows = decode(method)
    assert all(len({*row.token_ids} - {*row.prompt_ids}) == len(row.token_ids) for row in rows)


def test_mistakes_are_named():
    rows = np.ones((4, 2), np.float32)
    with pytest.raises(InputError, match="lists: 5 must be between 1 and the 4 rows"):
        ann_index.build(rows, np.ones(4), lists=5)
    with pytest.raises(InputError, match="metric: 'l2' is not known"):
        ann_index.build(rows, np.ones(4), lists=2, metric="l2")
    with pytest.raises(InputError, match=r"balance: 0.5 must be at least 1"):
        ann_index.build(rows, np.ones(4), lists=2, balance=0.5)
    with pytest.raises(InputError, match="probes: 0 must be at least 1"):
        build(probes=0)
    _, small = ann_index.build(np.eye(16, dtype=np.float32), np.ones(16), lists=2)
    with pytest.raises(InputError, match="index: it is over 16 rows of 16; the target has 420"):
        decode(build(), {"target": large()[1], "index": small})
