"""SkipDecode: the schedule, what is computed, and that decoding is what training computes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding import generation, loop, stopping
from decoding.sampling import SamplingConfig
from decoding.skip_decode import default_layers, skip_decode
from models import cache as kv
from models import transformer
from models.errors import InputError
from models.layer_skipping import SkipSchedule, gated
from tests.decoding import tiny

CONFIG = tiny.TARGET.replace(num_layers=6, window=None, local_layers=())
STOP = stopping.StopConfig(12)
SCHEDULE = SkipSchedule(5, 2, span=8, warmup=1)


@functools.cache
def params() -> dict:
    return {"target": jax.jit(lambda k: transformer.init(CONFIG, k))(jax.random.key(0))}


def decode(schedule: SkipSchedule, rows=tiny.PROMPTS, prompt_layers="full", **more) -> list:
    method = skip_decode(CONFIG, SamplingConfig(), schedule, prompt_layers)
    return generation.generate(params(), rows, method, STOP, **more)


schedules = st.builds(
    lambda warmup, least, more, span, place: SkipSchedule(
        warmup + least + more, warmup + least, span, warmup, place
    ),
    st.integers(0, 2),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(1, 40),
    st.sampled_from(["top", "bottom"]),
)


@given(schedules)
def test_a_schedule_falls_from_most_to_fewest_and_active_layers_are_nested(schedule):
    L = schedule.max_layers + 2
    budgets = [int(schedule.layers(t)) for t in range(schedule.span + 5)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[schedule.span - 1 :] == [
        schedule.min_layers if schedule.span > 1 else schedule.max_layers,
        *[schedule.min_layers] * 5,
    ]
    assert budgets[0] == schedule.max_layers
    active = [{l for l in range(L) if schedule.runs(l, L, n)} for n in budgets]
    assert [len(layers) for layers in active] == budgets
    assert all(later <= earlier for earlier, later in itertools.pairwise(active))
    assert all(set(range(schedule.warmup)) <= layers for layers in active)


@pytest.mark.parametrize(
    ("most", "least", "warmup", "place"),
    [
        *((5, 3, warmup, place) for warmup in (0, 1, 2) for place in ("top", "bottom")),
        (4, 4, 1, "spread"),
        (2, 2, 1, "bottom"),  # truncation
    ],
)
def test_decoding_is_what_the_gated_forward_computes(most, least, warmup, place):
    """Greedy tokens of rows of different lengths, and the layers that were run."""
    schedule = SkipSchedule(most, least, 8, warmup, place)
    rows = decode(schedule)
    longest = max(map(len, tiny.PROMPTS)) + STOP.max_new_tokens
    tokens = np.zeros((len(rows), longest), np.int32)
    generated = np.zeros(tokens.shape, np.int32)
    for b, row in enumerate(rows):
        text = row.prompt_ids + row.token_ids
        tokens[b, : len(text)] = text
        generated[b] = np.arange(longest) - (len(row.prompt_ids) - 1)
    logits = jax.jit(functools.partial(gated, CONFIG, schedule=schedule))(
        params()["target"], jnp.asarray(tokens), jnp.asarray(generated)
    )
    for b, row in enumerate(rows):
        first = len(row.prompt_ids) - 1
        wanted = np.argmax(logits[b, first : first + len(row.token_ids)], axis=-1)
        assert row.token_ids == wanted.tolist()
        assert row.stats["layers_run"] == sum(
            int(schedule.layers(t)) for t in range(STOP.max_new_tokens)
        )


def test_spread_layers_are_even_and_hold_the_first_and_the_last():
    for L, n in itertools.product(range(2, 33), range(2, 33)):
        if n <= L:
            schedule = SkipSchedule(n, n, 1, 1, "spread")
            kept = [l for l in range(L) if schedule.runs(l, L, n)]
            assert kept == [int(i * (L - 1) / (n - 1) + 0.5) for i in range(n)]
            assert all(schedule.runs(l, L, L) for l in range(L))  # a prompt
    with pytest.raises(InputError, match="place: 'spread' needs as many layers"):
        SkipSchedule(4, 2, 8, 1, "spread")


def test_a_truncated_model_is_the_model_of_its_first_layers():
    """Static truncation: nothing of the upper layers counts, not even of the prompt."""
    kept = {k: v for k, v in params()["target"].items() if k not in ("layers_4", "layers_5")}
    short = CONFIG.replace(num_layers=4)
    method = tiny.methods.build("autoregressive", {"target": short}, SamplingConfig())
    plain = generation.generate({"target": kept}, tiny.PROMPTS, method, STOP)
    for prompt_layers in ("full", "max"):
        rows = decode(SkipSchedule(4, 4, 1, 1, "bottom"), prompt_layers=prompt_layers)
        assert tiny.texts(rows) == tiny.texts(plain)


def test_all_layers_for_all_tokens_is_plain_decoding():
    method = tiny.methods.build("autoregressive", {"target": CONFIG}, SamplingConfig())
    plain = generation.generate(params(), tiny.PROMPTS, method, STOP)
    assert tiny.texts(decode(SkipSchedule(6, 6, 8))) == tiny.texts(plain)


def test_rows_are_independent_and_chunks_change_nothing():
    together = tiny.texts(decode(SCHEDULE, seed=1))
    assert tiny.texts(decode(SCHEDULE, tiny.PROMPTS[2:3], seed=1)) == together[2:3]
    method = skip_decode(CONFIG, SamplingConfig(), SCHEDULE)
    events = generation.stream(params(), tiny.PROMPTS[:2], method, STOP, every=3)
    found: dict[int, list[int]] = {0: [], 1: []}
    for event in events:
        found[event.row] += event.token_ids
    assert list(found.values()) == together[:2]


def test_a_row_that_ends_early_does_not_change_the_schedule_of_others():
    whole = tiny.texts(decode(SCHEDULE))
    stop = stopping.StopConfig(STOP.max_new_tokens, (whole[0][2],))
    method = skip_decode(CONFIG, SamplingConfig(), SCHEDULE)
    rows = generation.generate(params(), tiny.PROMPTS, method, stop)
    assert rows[0].finish_reason == "eos"
    for row, text in zip(rows, whole, strict=True):
        assert row.token_ids == text[: len(row.token_ids)]


def test_skipped_layers_write_nothing_and_read_nothing():
    """Their slots hold NaN to begin with, and the text stays what it is."""
    plain = decode(SCHEDULE)
    method = skip_decode(CONFIG, SamplingConfig(), SCHEDULE)
    state = tiny.start(method, params(), tiny.PROMPTS, slots=64, buffer=64)
    index = jnp.arange(64)
    beyond = index[None] >= state.inner.lengths[:, None]

    def poison(store):
        return jnp.where(beyond[:, None, :, None], jnp.nan, store)

    # A masked key of NaN would still spoil a product, so only layers that will be skipped hold it.
    always = [SCHEDULE.runs(l, 6, SCHEDULE.min_layers) for l in range(6)]
    never = [not SCHEDULE.runs(l, 6, SCHEDULE.max_layers) for l in range(6)]
    assert any(never) and any(always)
    cache = state.inner.replace(
        keys=tuple(poison(k) if never[l] else k for l, k in enumerate(state.inner.keys)),
        values=tuple(poison(v) if never[l] else v for l, v in enumerate(state.inner.values)),
    )
    state = loop.advance(
        params(), state.replace(inner=cache), jnp.int32(99), method=method, stop=STOP, slots=64
    )
    for b, row in enumerate(plain):
        first = len(row.prompt_ids)
        text = np.asarray(state.tokens)[b, first : first + len(row.token_ids)]
        assert text.tolist() == row.token_ids
    # Of each layer exactly the first tokens were written: T_l of them. The longest prompt's row is
    # the one in which nothing else, such as another's padding, was written there.
    longest = int(np.argmax([len(prompt) for prompt in tiny.PROMPTS]))
    start = len(tiny.PROMPTS[longest]) - 1
    for layer in range(6):
        ran = sum(bool(SCHEDULE.runs(layer, 6, int(SCHEDULE.layers(t)))) for t in range(12))
        keys = np.abs(np.nan_to_num(state.inner.keys[layer][longest])).sum(axis=(0, 2))
        assert (keys[start : start + 12] > 0).sum() == ran


def test_layers_that_are_skipped_are_not_computed():
    """The compiled round has one body a layer behind a condition: its own count says which ran."""
    rows = decode(SkipSchedule(2, 2, 1))
    assert all(row.stats["layers_run"] == 2 * STOP.max_new_tokens for row in rows)


def test_a_prompt_may_run_as_many_layers_as_the_first_token():
    method = skip_decode(CONFIG, SamplingConfig(), SCHEDULE, "max")
    state = tiny.start(method, params(), tiny.PROMPTS, slots=64, buffer=64)
    empty = kv.create(CONFIG, len(tiny.PROMPTS), 64)
    for layer in range(6):
        same = bool(jnp.array_equal(state.inner.keys[layer], empty.keys[layer]))
        assert same is not bool(SCHEDULE.runs(layer, 6, SCHEDULE.max_layers))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_layers": 1}, "min_layers: 1 must be at least 2"),
        ({"max_layers": 1, "min_layers": 2}, "max_layers: 1"),
        ({"span": 0}, "span: 0"),
        ({"warmup": -1}, "warmup: -1"),
        ({"place": "middle"}, "place: 'middle'"),
    ],
)
def test_schedules_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SkipSchedule(**{"max_layers": 5, "min_layers": 2, "span": 8, **fields})


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(InputError, match="max_layers: 7 must be at most the model's 6"):
        decode(SkipSchedule(7, 2, 8))


def test_a_speed_up_gives_the_published_pairs_nearly():
    assert [default_layers(32, s) for s in (1, 2, 4)] == [(32, 32), (21, 11), (11, 5)]
    with pytest.raises(InputError, match="speed_up"):
        default_layers(32, 0.5)
