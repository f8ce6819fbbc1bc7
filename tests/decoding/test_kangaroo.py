"""Kangaroo: text, law, caches and counters, for adapters that say anything."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, randomness, stopping
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig
from decoding.speculative.kangaroo import kangaroo_drafter
from decoding.speculative.kangaroo_tree import kangaroo_tree_drafter
from decoding.speculative.method import speculative
from models import cache as kv
from models import exit_adapter, masks, transformer
from models.errors import InputError
from models.exit_adapter import ExitAdapterConfig
from tests.decoding import exact_laws, tiny

# Eight prompts at once, so that rows stop drafting at different places.
E = 3


@functools.cache
def adapter(kind: str = "attention", config: Any = tiny.TARGET, seed: int = 3) -> Any:
    return exit_adapter.init(ExitAdapterConfig(1, kind), config, jax.random.key(seed))


def models(kind: str = "attention") -> dict[str, Any]:
    return {"target": tiny.params()["target"], "adapter": adapter(kind)}


def build(temperature: float = 0.0, /, **options: Any) -> loop.Method:
    return tiny.build(
        "kangaroo", temperature, **{"exit_layer": 1, "num_draft": E, "threshold": 0.1, **options}
    )


def decode(method: loop.Method, kind: str = "attention", **more: Any) -> list:
    stop = more.pop("stop", tiny.STOP)
    return generation.generate(models(kind), tiny.PROMPTS, method, stop, **more)


@pytest.mark.parametrize("kind", exit_adapter.KINDS)
def test_text_is_plain_decodings_whatever_the_adapter_says(kind):
    assert tuple(map(tuple, tiny.texts(decode(build(), kind)))) == tiny.plain_greedy()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.5])
def test_text_of_a_tree_is_plain_decodings(threshold, temperature):
    rows = decode(build(temperature, threshold=threshold, width=3), seed=4)
    plain = tiny.decode(tiny.build("autoregressive", temperature), seed=4)
    assert tiny.texts(rows) == tiny.texts(plain)
    for row in rows:
        counts = row.stats
        assert counts["shallow_calls"] == counts["target_calls"] + counts["draft_calls"]
        assert counts["layers_run"] == counts["shallow_calls"] + counts["target_calls"]
        levels = counts["draft_calls"] / counts["target_calls"]
        assert threshold == 0.1 or levels == (1 if threshold > 1 else E)
    assert sum(sum(row.stats["accepted"]) for row in rows) > 0


def test_a_tree_keeps_more_a_round_than_a_chain():
    """Its likeliest path is the chain, and there are others beside it."""
    rounds = [
        sum(row.stats["target_calls"] for row in decode(build(threshold=0.0, width=width)))
        for width in (1, 3)
    ]
    assert rounds[1] < rounds[0]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_text_does_not_depend_on_the_threshold(threshold):
    rows = decode(build(threshold=threshold))
    assert tuple(map(tuple, tiny.texts(rows))) == tiny.plain_greedy()
    for row in rows:
        drafted = row.stats["draft_calls"] / row.stats["target_calls"]
        # Never sure: the first draft is put up all the same, and no other. Always sure: all.
        assert drafted == (1 if threshold > 1 else E)


def test_exact_match_at_temperature_one_gives_plain_decodings_tokens():
    rows = decode(build(1.0, rule="exact_match"), seed=4)
    plain = tiny.decode(tiny.build("autoregressive", 1.0), seed=4)
    assert tiny.texts(rows) == tiny.texts(plain)
    assert sum(sum(row.stats["accepted"]) for row in rows) > 0


def test_first_layers_run_once_a_token_and_the_others_once_a_round():
    rows = decode(build())
    for row in rows:
        counts = row.stats
        assert counts["shallow_calls"] == counts["target_calls"] + counts["draft_calls"]
        assert counts["draft_calls"] == sum(counts["proposed"])
        assert counts["layers_run"] == counts["shallow_calls"] + counts["target_calls"]
    assert len({r.stats["draft_calls"] / r.stats["target_calls"] for r in rows}) > 2


def test_a_row_does_not_depend_on_its_neighbours():
    method = build(0.8, threshold=0.2)
    together = tiny.texts(decode(method, seed=1))
    stop = tiny.STOP
    alone = [
        generation.generate(models(), [prompt], method, stop, seed=1, row_ids=[i])[0].token_ids
        for i, prompt in list(enumerate(tiny.PROMPTS))[:3]
    ]
    assert together[:3] == alone


def test_drafting_stops_at_an_end_of_text_inside_accepted_drafts():
    """A token that occurs in every text ends it, wherever in a round it stands."""
    plain = tiny.plain_greedy()
    for eos in sorted({row[5] for row in plain})[:3]:
        stop = stopping.StopConfig(tiny.NEW_TOKENS, (eos,))
        rows = decode(build(threshold=0.0), stop=stop)
        for row, whole in zip(rows, plain, strict=True):
            cut = whole.index(eos) + 1 if eos in whole else len(whole)
            assert row.token_ids == list(whole[:cut])


@pytest.mark.parametrize("width", [1, 3])
def test_caches_equal_those_of_a_fresh_pass(width):
    """After any number of rounds: the target's of the committed text, the adapter's but for what
    the next round feeds it again."""
    if width > 1:
        drafter = kangaroo_tree_drafter(tiny.TARGET, 1, width, E, 0.05, SamplingConfig())
    else:
        drafter = kangaroo_drafter(tiny.TARGET, 1, E, 0.05, SamplingConfig(), randomness.SAMPLE)
    method = speculative("kangaroo", tiny.TARGET, drafter, "exact_match", SamplingConfig())
    slots, model, counts = 64, models(), []
    state = tiny.start(method, model, tiny.PROMPTS, slots=slots, buffer=64)

    @jax.jit
    def fresh(tokens, lengths):
        cache = kv.create(tiny.TARGET, len(lengths), slots)
        cache = prefill(tiny.TARGET, model["target"], cache, tokens[:, :slots], lengths)
        streams = transformer.apply(
            tiny.TARGET, model["target"], tokens[:, :slots], layers=(0, 1), with_logits=False
        ).hidden
        index = jnp.broadcast_to(jnp.arange(slots), tokens[:, :slots].shape)
        empty = kv.create(tiny.TARGET, len(lengths), slots, num_layers=1)
        _, adapted = exit_adapter.apply(
            tiny.TARGET, model["adapter"], streams, positions=index, cache=empty
        )
        return cache, adapted, streams

    for _ in range(4):
        before = np.asarray(state.lengths)
        state = loop.advance(
            model, state, np.int32(state.rounds + 1), method=method, stop=tiny.STOP, slots=slots
        )
        counts.append(np.asarray(state.lengths) - before)
        inner, committed = state.inner, np.asarray(state.lengths) - 1
        cache, adapted, streams = fresh(state.tokens, jnp.asarray(committed))
        np.testing.assert_array_equal(inner.target.lengths, committed)
        for b, length in enumerate(committed):
            for mine, theirs in ((inner.target, cache), (inner.drafter.cache, adapted)):
                end = length if mine is inner.target else length - 1
                for layer in range(len(mine.keys)):
                    for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                        np.testing.assert_allclose(
                            one[layer][b, :, :end], other[layer][b, :, :end], atol=1e-5
                        )
            np.testing.assert_allclose(
                inner.drafter.carry[b], np.asarray(streams)[b, length - 1], atol=1e-5
            )
    # Among the rounds there were some in which everything was kept, and some in which little was.
    assert np.max(counts) == E + 1 and np.min(counts) == 1


def test_the_law_is_the_targets():
    config, sampling, eos = tiny.SMALL, SamplingConfig(temperature=0.9, top_p=0.95), (4,)
    drafter = kangaroo_drafter(config, 1, 2, 0.35, sampling, randomness.DRAFT)
    method = speculative("kangaroo", config, drafter, "speculative_sampling", sampling)
    model = {"target": tiny.params(config)["target"], "adapter": adapter(config=config)}
    counts = exact_laws.sampled(method, eos, models=model)
    laws = exact_laws.laws(sampling, eos, config, model["target"])
    assert exact_laws.p_value(counts, laws) > 1e-3


def test_an_adapter_has_the_published_number_of_parameters():
    config = tiny.TARGET.replace(num_heads=4, num_kv_heads=4, head_dim=4)
    params = exit_adapter.init(ExitAdapterConfig(1), config, jax.random.key(0))
    D = config.embed_dim
    assert sum(x.size for x in jax.tree.leaves(params)) == 4 * D * D + 2 * D


def test_an_adapter_is_written_and_read(tmp_path):
    for kind in exit_adapter.KINDS:
        params = adapter(kind)
        exit_adapter.save(tmp_path / kind, ExitAdapterConfig(1, kind), params)
        config, found = exit_adapter.load(tmp_path / kind, tiny.TARGET)
        assert config == ExitAdapterConfig(1, kind)
        jax.tree.map(np.testing.assert_array_equal, params, found)
    with pytest.raises(InputError, match="shape"):
        exit_adapter.load(tmp_path / "attention", tiny.SMALL)


def test_the_adapter_is_the_block_that_the_paper_describes():
    """Against NumPy: causal attention between two norms, and nothing else."""
    config, params = tiny.TARGET.replace(num_kv_heads=8), None
    params = exit_adapter.init(ExitAdapterConfig(1), config, jax.random.key(1))
    rng, T = np.random.default_rng(0), 5
    x = rng.normal(size=(1, T, config.embed_dim)).astype(np.float32)
    index = jnp.arange(T)[None]
    mine, _ = exit_adapter.apply(
        config, params, jnp.asarray(x), positions=index, mask=masks.causal(index, T)
    )

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * np.asarray(scale)

    def turned(x):
        half = config.head_dim // 2
        angle = np.arange(T)[:, None] * config.rope.theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    y = norm(x[0], params["attention_norm"]["scale"])
    kernel = np.asarray(params["attention"]["qkv"]["kernel"])  # [D, K, 3, H]
    mixed = np.zeros((T, config.num_heads, config.head_dim))
    for head in range(config.num_heads):
        q, k, v = (y @ kernel[:, head, part] for part in range(3))
        scores = turned(q) @ turned(k).T * config.head_dim**-0.5
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v
    out = np.asarray(params["attention"]["out"]["kernel"]).reshape(-1, config.embed_dim)
    wanted = norm(x[0] + mixed.reshape(T, -1) @ out, params["norm"]["scale"])
    np.testing.assert_allclose(mine[0], wanted, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_an_exit_must_leave_layers_on_both_sides(layer):
    with pytest.raises(InputError, match=r"exit_layer"):
        build(exit_layer=layer)


def test_overlap_of_distributions_is_the_rate_at_which_first_drafts_are_kept():
    """Sheet item 10: sum_v min(p_v, q_v), what training reports, at temperature 1."""
    config, sampling = tiny.SMALL, SamplingConfig(temperature=1.0)
    drafter = kangaroo_drafter(config, 1, 2, 0.0, sampling, randomness.DRAFT)
    method = speculative("kangaroo", config, drafter, "speculative_sampling", sampling)
    model = {"target": tiny.params(config)["target"], "adapter": adapter(config=config)}
    copies = exact_laws.COPIES
    rows = [prompt for prompt in exact_laws.PROMPTS for _ in range(copies)]
    slots = 12 + method.lookahead
    state = tiny.start(method, model, rows, slots=slots, buffer=16)
    stop = stopping.StopConfig(exact_laws.STEPS, (4,))
    state = loop.advance(model, state, jnp.int32(1), method=method, stop=stop, slots=slots)
    kept = np.asarray(state.stats.accepted)[:, 0].reshape(-1, copies).mean(axis=1)
    for prompt, rate in zip(exact_laws.PROMPTS, kept, strict=True):
        tokens = jnp.asarray([prompt])
        out = transformer.apply(config, model["target"], tokens, collect=(1,))
        index = jnp.arange(len(prompt))[None]
        hidden, _ = exit_adapter.apply(
            config, model["adapter"], out.collected[0], positions=index,
            mask=masks.causal(index, len(prompt)),
        )  # fmt: skip
        p = jax.nn.softmax(out.logits[0, -1])
        q = jax.nn.softmax(transformer.unembed(config, model["target"], hidden)[0, -1])
        overlap = float(jnp.minimum(p, q).sum())
        assert abs(rate - overlap) < 4 * (overlap * (1 - overlap) / copies) ** 0.5 + 1e-3
