"""Window-Diffusion (arXiv 2601.20332): both forms against a NumPy loop, and what they leave out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from decoding import generation, loop, methods, randomness, stopping
from decoding.sampling import SamplingConfig
from decoding.unmasking import window, window_diffusion
from decoding.unmasking.canvas import View
from decoding.unmasking.prediction import Prediction, reader
from models import sharding, transformer
from models.errors import InputError
from tests.decoding import masked, tiny
from tests.decoding import window_reference as naive

SMALL = {"active_tokens": 4, "window_tokens": 8, "refresh_cycle": 4, "early_stop": False}
FAST = {**SMALL, "tokens_per_step": 3, "window_tokens": 13, "refresh_cycle": 3}


def build(temperature: float = 0.0, **options) -> loop.Method:
    return tiny.build("window_diffusion", temperature, **{**SMALL, **options})


@functools.cache
def model() -> naive.Model:
    return naive.Model(masked.CONFIG, masked.params()["target"])


CASES = {
    "one_a_step": ({}, {}),
    "three_a_step": (FAST, {"n": 3, "window": 13, "refresh": 3}),
    "one_phase": ({"refresh_cycle": 0, "window_tokens": 0}, {"refresh": 99, "window": 99}),
    "no_buffer": ({"buffer": False}, {"buffer": False}),
    "not_sliding": ({"slide": False}, {"slide": False}),
    "not_again": ({"recompute_decoded": False}, {"recompute": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_llada_form_is_that_of_a_naive_loop(case):
    """Token for token, position for position (sheet 2.9, 6.5), with each part left out (2.8)."""
    options, how = CASES[case]
    how = {"active": 4, "window": 8, "refresh": 4, **how}
    rows = masked.decode(build(**options), stop=masked.ENDLESS)
    for prompt, row in zip(tiny.PROMPTS, rows):
        found = naive.unmask(model(), prompt, masked.NEW, **how)
        assert found.gap > 1e-5, "near-tie: choose another seed"
        assert row.token_ids == found.tokens[len(prompt) :]
        assert row.stats["target_calls"] == len(found.rows)
        assert row.stats["target_positions"] == sum(found.rows)
        assert row.stats["full_calls"] == -(-len(found.rows) // how["refresh"])


DREAM = {
    "shifted": ({"shifted": True}, {}),
    "two_a_step": ({"tokens_per_step": 2, "window_tokens": 13}, {"n": 2, "window": 13}),
    "adaptive": ({"shifted": True, "adaptive_length": True}, {"eos": masked.EOS}),
}


@pytest.mark.parametrize("case", DREAM)
def test_the_dream_form_is_that_of_a_naive_loop(case):
    """Prefix, slice, shifted logits, entropy, first mask; steps after an end refresh (2.4, 6.8)."""
    options, how = DREAM[case]
    shifted = "shifted" in options
    how = {"active": 4, "window": 8, "refresh": 4, "shifted": shifted, **how}
    stop = masked.STOP if "eos" in how else masked.ENDLESS
    rows = masked.decode(build(variant="dream", **options), stop=stop)
    for prompt, row in zip(tiny.PROMPTS, rows):
        found = naive.unmask_dream(model(), prompt, masked.NEW, **how)
        assert found.gap > 1e-5, "near-tie: choose another seed"
        assert row.token_ids == found.tokens[len(prompt) :]
        # No position after an end of text is computed: the naive canvas has none.
        assert row.stats["target_positions"] == sum(found.rows)
        assert row.stats["target_calls"] == len(found.rows)
    if "eos" in how:
        assert 2 < sum(row.finish_reason == "eos" for row in rows) < 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_phases_of_one_step_are_plain_unmasking(temperature):
    mine = masked.decode(build(temperature, refresh_cycle=1, active_tokens=1, window_tokens=2))
    plain = tiny.build("llada", temperature, block_length=0, early_stop=False)
    assert tiny.texts(mine) == tiny.texts(masked.decode(plain))
    assert len({tuple(text) for text in tiny.texts(mine)}) == 8


def look(view: View):
    """A reader that keeps the logits [B, S, V] as a feature."""

    def read(logits: jnp.ndarray, positions: jnp.ndarray | None) -> Prediction:
        B, S = view.tokens.shape
        at = jnp.broadcast_to(jnp.arange(S), (B, S)) if positions is None else positions
        rows = jnp.arange(B)[:, None]
        placed = jnp.zeros((B, S, logits.shape[-1])).at[rows, at].set(logits, mode="drop")
        known = jnp.zeros((B, S), bool).at[rows, at].set(True, mode="drop")
        return Prediction(known, view.tokens, placed[..., 0], {"logits": placed})

    return read


@functools.cache
def phase(active: int, size: int):
    """A policy, its jitted call with logits, a view of eight rows and the store after one step."""
    policy = window.windowed(masked.CONFIG, window.Window(active, size, refresh=4))
    call = jax.jit(lambda view, store: policy.compute(masked.params(), view, store, look(view)))
    S, ends = 64, jnp.asarray([len(p) + masked.NEW for p in tiny.PROMPTS])
    lengths = jnp.asarray(tiny.PROMPT_LENGTHS)
    tokens = np.full((8, S), masked.MASK, np.int32)
    for b, prompt in enumerate(tiny.PROMPTS):
        tokens[b, : len(prompt)] = prompt
        tokens[b, len(prompt) + masked.NEW :] = 0
    index = jnp.arange(S)
    inside = (index >= lengths[:, None]) & (index < ends[:, None])
    zero = jnp.zeros(8, jnp.int32)
    view = View(
        jnp.asarray(tokens), inside, inside, lengths, ends, lengths, ends, zero, zero,
        jnp.ones(8, bool), randomness.row_keys(0, jnp.arange(8)),
    )  # fmt: skip
    first = call(view, policy.init(8, S))
    # The first step of the phase decodes the second mask of each row.
    write = index == lengths[:, None] + 1
    store = policy.update(first.store, view, write, jnp.zeros(8, bool))
    view = view.replace(tokens=jnp.where(write, 7, view.tokens), masked=view.masked & ~write)
    return policy, call, view, store


def logits_of(call, view, store):
    found = call(view, store)
    known = np.asarray(found.prediction.known)
    return np.where(known[..., None], found.prediction.features["logits"], 0.0), found


def test_a_step_on_every_position_is_a_full_forward():
    """A = W = S, the decoded tokens computed too (6.1)."""
    _, call, view, store = phase(64, 0)
    inside = view.index < view.ends[:, None]
    mine, found = logits_of(call, view, store.replace(stays=inside & ~view.masked))
    assert not found.full.any()
    np.testing.assert_array_equal(found.positions, view.ends)
    mask = jnp.broadcast_to(inside[:, None], (8, 64, 64))
    full = transformer.apply(masked.CONFIG, masked.params()["target"], view.tokens, mask=mask)
    np.testing.assert_allclose(
        mine, np.where(view.masked[..., None], full.logits, 0.0), atol=1e-4, rtol=0
    )


def test_the_far_field_is_not_seen_and_the_buffer_is_what_was_cached():
    """6.3 and 6.6: four active masks, four of buffer, the rest far."""
    _, call, view, store = phase(4, 8)
    before, found = logits_of(call, view, store)
    rank = jnp.cumsum(view.masked, axis=1)
    active = view.masked & (rank <= 4)
    buffer, far = view.masked & (rank > 4) & (rank <= 8), view.masked & (rank > 8)
    # Four masks and the token that the first step decoded are computed, and nothing else.
    np.testing.assert_array_equal(found.positions, 5)
    np.testing.assert_array_equal(np.abs(before).sum(axis=-1) > 0, active)

    def with_cache(where: jnp.ndarray):
        change = lambda x: x + 0.5 * where[:, None, :, None]  # noqa: E731
        cache = store.cache
        return store.replace(
            cache=cache.replace(
                keys=tuple(map(change, cache.keys)), values=tuple(map(change, cache.values))
            )
        )

    # Other tokens in the buffer or beyond change nothing: neither is computed.
    for where in (buffer, far, buffer | far):
        other = view.replace(tokens=jnp.where(where, 11, view.tokens))
        np.testing.assert_array_equal(logits_of(call, other, store)[0], before)
    # What is cached of the far field is not attended to; that of the buffer and the text is.
    np.testing.assert_array_equal(logits_of(call, view, with_cache(far))[0], before)
    text = view.index < view.prompt_lengths[:, None]
    for where in (buffer, text):
        changed = np.abs(logits_of(call, view, with_cache(where))[0] - before).max(axis=(1, 2))
        assert (changed > 1e-3).all()
    # The first step of the next phase computes all of it.
    other = view.replace(tokens=jnp.where(buffer | far, 11, view.tokens))
    fresh = store.replace(offset=jnp.zeros(8, jnp.int32))
    a, b = logits_of(call, view, fresh)[0], logits_of(call, other, fresh)[0]
    assert (np.abs(a - b).max(axis=(1, 2)) > 1e-3).all()


def test_active_rows_grow_and_computation_shrinks():
    """The defaults at S = 512: 17, 17, 18, ..., 46 rows, then a full step (6.4, 6.5, 6.9)."""
    prompt, new = tiny.PROMPTS[3], 480
    stop = stopping.StopConfig(new)
    method = tiny.build("window_diffusion")
    state, slots = generation.begin(masked.params(), [prompt], method, stop)
    assert slots == 512
    rows = []
    for _ in range(33):
        before = int(state.stats.target_positions[0])
        state, slots = generation.advance(masked.params(), state, slots, method, stop, rounds=1)
        rows.append(int(state.stats.target_positions[0]) - before)
    assert rows == [512, 17, *range(17, 47), 512]
    state, _ = generation.advance(masked.params(), state, slots, method, stop)
    assert int(state.lengths[0]) == 512
    assert int(state.stats.extra["full_calls"][0]) == 480 // 32
    computed = int(state.stats.target_positions[0])
    assert computed <= 15 * sum(rows[:32])  # the last phase runs out of masks
    assert 10 * computed < 480 * 512
    # The pruned call is narrow: its products have 32 or 48 rows, not 512 of which most are hidden.
    assert window._widths(17, 48) == [32, 48]
    flops = {width: _flops(width) for width in (48, 512)}
    assert 8 * flops[48] < flops[512]


def _flops(width: int) -> float:
    tokens, on = jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512), bool)
    policy = window.windowed(masked.CONFIG, window.Window())
    run = jax.jit(
        lambda cache: window.gathered(masked.CONFIG, masked.params(), tokens, on, on, cache, width)[
            1
        ]
    )
    return run.lower(policy.init(1, 512).cache).cost_analysis()["flops"]


def test_a_canvas_that_is_cut_keeps_what_was_decided_before_its_end():
    """With one active mask text grows left to right: the same up to its end, for less (6.8)."""
    options = {"variant": "dream", "active_tokens": 1, "window_tokens": 5}
    whole = masked.decode(build(**options), seed=5)
    cut = masked.decode(build(**options, adaptive_length=True), seed=5)
    assert tiny.texts(cut) == tiny.texts(whole)
    ended = [row.finish_reason == "eos" for row in cut]
    assert 1 < sum(ended) < 8
    for a, b, end in zip(whole, cut, ended):
        assert b.stats["target_calls"] == (len(b.token_ids) if end else masked.NEW)
        assert (b.stats["target_positions"] < a.stats["target_positions"]) == (
            len(b.token_ids) < masked.NEW
        )


def test_rows_are_alone_whatever_is_beside_them_and_nothing_is_compiled_twice():
    """Neighbours, canvas sizes, pieces of a run, devices: none changes a row's text or work."""
    method = build(1.0, ranking="random", adaptive_length=True)
    rows = masked.decode(method)
    assert len({tuple(row.token_ids) for row in rows}) == 8
    assert 0 < sum(row.finish_reason == "eos" for row in rows) < 8
    before = loop.start._cache_size(), loop.advance._cache_size()
    masked.decode(build(1.0, ranking="random", adaptive_length=True))
    assert (loop.start._cache_size(), loop.advance._cache_size()) == before
    assert masked.decode(method, [tiny.PROMPTS[4]], row_ids=[4]) == [rows[4]]
    found = [[] for _ in rows]
    for event in generation.stream(masked.params(), tiny.PROMPTS, method, masked.STOP, every=3):
        found[event.row] += event.token_ids
    assert found == tiny.texts(rows)
    mesh = sharding.make_mesh(4, 2)
    layout = sharding.param_shardings(masked.CONFIG, mesh)
    placed = {"target": jax.device_put(masked.params()["target"], layout)}
    split = generation.generate(placed, tiny.PROMPTS, method, masked.STOP, mesh=mesh)
    assert split == rows


def test_positions_may_be_drawn_and_the_draw_is_a_rows_own():
    """Dream's alg_temp: softmax(score / temperature), whatever the canvas is padded to."""
    _, _, view, _ = phase(4, 8)
    rows, temperature = 4000, 0.5
    selector = window_diffusion.rate(1, "constant", "confidence", temperature)
    score = np.linspace(0.0, 1.0, 4)
    drawn = {}
    for S in (4, 6):
        masked_ = jnp.broadcast_to(jnp.arange(S) < 4, (rows, S))
        tokens = jnp.zeros((rows, S), jnp.int32)
        many = view.replace(
            tokens=tokens, masked=masked_, open=masked_, step=jnp.zeros(rows, jnp.int32),
            calls=jnp.full(rows, 3), keys=randomness.row_keys(0, jnp.arange(rows)),
        )  # fmt: skip
        sure = jnp.broadcast_to(jnp.asarray([*score, 9.0, 9.0][:S]), (rows, S))
        said = Prediction(jnp.ones((rows, S), bool), tokens, sure, {})
        drawn[S] = np.asarray(selector.select({}, many, said, selector.init(rows)).write)
    np.testing.assert_array_equal(drawn[4], drawn[6][:, :4])
    assert (drawn[4].sum(axis=1) == 1).all()
    expected = rows * masked.softmax(score / temperature)
    assert stats.chisquare(drawn[4].sum(axis=0), expected).pvalue > 1e-3


def test_quotas():
    """LLaDA's and Dream's numbers of tokens for 24 masks, as their code has them."""
    S, G = 32, 24
    for n, quota in ((1, "even"), (5, "even"), (1, "linear"), (3, "linear"), (2, "constant")):
        steps = -(-G // n)
        times = np.linspace(1, 1e-3, steps + 1)
        selector = window_diffusion.rate(n, quota)
        open_ = np.arange(S) < G
        memory = selector.init(1)
        for step in range(steps):
            left = int(open_.sum())
            even = G // steps + (step < G % steps)
            share = int(left * (1 - times[step + 1] / times[step])) if step < steps - 1 else left
            expected = {"even": even, "linear": max(share, 1), "constant": n}[quota]
            _, _, view, _ = phase(4, 8)
            one = jax.tree.map(lambda x: x[:1], view.replace(keys=None)).replace(keys=view.keys[:1])
            now = jnp.asarray(open_)[None]
            one = one.replace(
                masked=now, open=now, step=jnp.full(1, step), tokens=view.tokens[:1, :S]
            )
            sure = jnp.linspace(0, 1, S)[None]
            said = Prediction(jnp.ones((1, S), bool), one.tokens, sure, {})
            choice = selector.select({}, one, said, memory)
            memory = choice.memory
            write = np.asarray(choice.write[0])
            assert write.sum() == min(expected, left)
            assert write[open_.nonzero()[0][-expected:]].all()  # the surest
            open_ = open_ & ~write
            if not open_.any():
                break
        assert not open_.any()


def test_fewer_active_masks_than_a_quota_write_what_there_is():
    """Sheet 2.9.4: no decoded token is written again; the row takes more steps."""
    rows = masked.decode(
        build(active_tokens=2, tokens_per_step=5, window_tokens=0), stop=masked.ENDLESS
    )
    assert {len(row.token_ids) for row in rows} == {24}
    # Phases of 5 + 2 + 2 + 2 tokens: 24 are two of them, and a third's first step takes the rest.
    assert {row.stats["target_calls"] for row in rows} == {9}


def test_entropy_of_the_filtered_distribution():
    """Dream ranks by entropy after temperature and nucleus; at temperature 0 after the nucleus."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 4, 64)).astype(np.float32) * 2
    _, _, view, _ = phase(4, 8)
    one = view.replace(
        tokens=view.tokens[:1, :4], ends=view.ends[:1], keys=view.keys[:1], calls=view.calls[:1]
    )
    for temperature in (0.0, 0.5):
        sampling = SamplingConfig(temperature=temperature, top_p=0.8)
        read = reader(one, sampling, masked.MASK, features=("entropy",), filtered=True)
        mine = read(jnp.asarray(logits), None).features["entropy"][0]
        for row, value in zip(logits[0], mine):
            row = np.where(np.arange(64) == masked.MASK, -np.inf, row / (temperature or 1.0))
            law = np.sort(masked.softmax(row))[::-1]
            kept = law[: (np.cumsum(law) < 0.8).sum() + 1]
            kept = kept / kept.sum()
            np.testing.assert_allclose(value, -(kept * np.log(kept)).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"window_tokens": 7}, "window_tokens: 7 must be active_tokens + refresh_cycle * "
         "tokens_per_step or more, or 0 for the whole canvas; allowed: at least 8"),
        ({"refresh_cycle": 0}, "window_tokens: 8 must be active_tokens + refresh_cycle * "
         "tokens_per_step or more, or 0 for the whole canvas; allowed: 0"),
        ({"slide": False, "refresh_cycle": 5, "window_tokens": 9},
         "active_tokens: 4 are fewer than a phase fills without slide; allowed: at least 5"),
        ({"shifted": True}, "shifted: True needs variant=dream; given: llada"),
        ({"variant": "dream", "buffer": False},
         "buffer, recompute_decoded: False needs variant=llada; given: dream"),
        ({"active_tokens": 0}, "active_tokens: 0 must be at least 1"),
        ({"variant": "drm"}, "variant: 'drm' is not known (did you mean 'dream'?); "
         "allowed: dream, llada"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        build(**options)


def test_adaptive_length_needs_an_end_of_text():
    config = masked.CONFIG.replace(eos_token_ids=())
    with pytest.raises(InputError, match=r"^adaptive_length: True needs a target with an end"):
        methods.build(
            "window_diffusion", {"target": config}, SamplingConfig(), {"adaptive_length": True}
        )
