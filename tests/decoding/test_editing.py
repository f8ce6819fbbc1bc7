"""Token editing over exact block caches against a naive loop that computes everything anew."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, randomness
from decoding.sampling import SamplingConfig, log_probs
from decoding.unmasking import canvas
from decoding.unmasking.block_causal import block_causal
from decoding.unmasking.canvas import Schedule, View
from decoding.unmasking.editing import anti_stutter, joint_threshold
from decoding.unmasking.method import unmasking
from decoding.unmasking.policies import whole_canvas
from decoding.unmasking.prediction import Prediction, reader
from models import masks, sharding, transformer
from models.errors import InputError
from tests.decoding import masked, tiny

BLOCK = 8
SCHEDULE = Schedule(BLOCK, absolute=True)
EDITING = {"mask_threshold": 0.4, "edit_threshold": 0.3, "max_post_steps": 4}
CASES: dict[str, dict] = {
    "editing": EDITING,
    "speedy": {"mode": "S", "max_post_steps": 3, "num_to_transfer": 2, "penalty": 2.0},
    "one_by_one": {"mask_threshold": 1, "edit_threshold": 1},
    "multi_block": EDITING | {"edit_threshold": 0.45, "revisit": 2},
    "narrow": EDITING | {"edit_threshold": 0.45, "revisit": 100, "widen": False},
}


def build(temperature: float = 0.0, name: str = "llada21", **options):
    return tiny.build(name, temperature, **{"block_length": BLOCK, **options})


@functools.cache
def _forward():
    @jax.jit
    def run(params, tokens, first, last):
        """Logits [S, V] under the block mask; positions first..last-1 see all before `last`."""
        index = jnp.arange(masked.SLOTS)
        mask = masks.block_diffusion(index[None], index, BLOCK)
        wide = ((index >= first) & (index < last))[:, None] & (index < last)
        return transformer.apply(masked.CONFIG, params, tokens[None], mask=mask | wide).logits[0]

    return run


def predict(tokens: np.ndarray, start: int, penalty: float, first: int = 0, last: int = 0):
    """The most likely token at each position from `start` on, and its probability."""
    padded = np.zeros(masked.SLOTS, np.int32)
    padded[: len(tokens)] = tokens
    logits = _forward()(masked.params()["target"], padded, first, last)
    logits = np.array(logits, np.float64)[: len(tokens)]
    for i in range(1, len(tokens)):
        if penalty and i % BLOCK:
            logits[i, tokens[i - 1]] -= penalty
    logits[:, masked.MASK] = -np.inf
    return logits.argmax(axis=-1), masked.softmax(logits).max(axis=-1)


def naive(
    prompt: Sequence[int],
    *,
    mode: str = "Q",
    mask_threshold: float | None = None,
    edit_threshold: float | None = None,
    max_post_steps: int = 16,
    num_to_transfer: int = 1,
    penalty: float = 0.0,
    revisit: int = 0,
    widen: bool = True,
) -> tuple[list[int], dict[str, int]]:
    """One row by the published loop, sheet section 2.3; the new tokens and the work."""
    if mask_threshold is None:
        mask_threshold, edit_threshold = {"S": (0.5, 0.0), "Q": (0.7, 0.5)}[mode]
    P, limit = len(prompt), len(prompt) + masked.NEW
    end = -(-limit // BLOCK) * BLOCK
    x = np.array([*prompt, *[masked.MASK] * (end - P)])
    work = dict.fromkeys(
        ("calls", "edits", "post_passes", "budget_exits", "commit_passes", "revisit_passes"), 0
    )
    for start in range(P // BLOCK * BLOCK, end, BLOCK):
        inside = range(start, start + BLOCK)
        post, unsaved = 0, False
        while True:
            active = [i for i in inside if i >= P and x[i] == masked.MASK]
            if not active:
                post += 1
                if post > max_post_steps:
                    work["budget_exits"] += 1
                    unsaved = True
                    break
                work["post_passes"] += 1
            token, sure = predict(x, start, penalty)
            work["calls"] += 1
            fill = [i for i in active if sure[i] > mask_threshold]
            if len(fill) < num_to_transfer:
                fill = sorted(active, key=lambda i: -sure[i])[:num_to_transfer]
            edit = [
                i
                for i in inside
                if i >= P and i not in active and token[i] != x[i] and sure[i] > edit_threshold
            ]
            for i in fill + edit:
                x[i] = token[i]
            work["edits"] += len(edit)
            if not active and not edit:
                break
        refresh = False
        if revisit and start > P // BLOCK * BLOCK:
            first = max(0, start - revisit * BLOCK)
            window = (first, start + BLOCK) if widen else (0, 0)
            token, sure = predict(x, first, penalty, *window)
            work["revisit_passes"] += 1
            edit = [
                i
                for i in range(max(first, P), start)
                if token[i] != x[i] and sure[i] > edit_threshold
            ]
            for i in edit:
                x[i] = token[i]
            work["edits"] += len(edit)
            refresh = bool(edit)
        stop = start + BLOCK
        if masked.EOS in x[P : min(stop, limit)] or stop == end:
            break
        work["commit_passes"] += unsaved or refresh
    work["calls"] += work["commit_passes"] + work["revisit_passes"]
    text = x[P:limit].tolist()
    if masked.EOS in text:
        text = text[: text.index(masked.EOS) + 1]
    return text, work


@functools.cache
def decoded(case: str, temperature: float = 0.0):
    return masked.decode(build(temperature, **CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_texts_and_work_are_those_of_a_naive_loop(case):
    rows = decoded(case)
    for prompt, row in zip(tiny.PROMPTS, rows, strict=True):
        text, work = naive(prompt, **CASES[case])
        assert row.token_ids == text
        assert row.stats["target_calls"] == work.pop("calls")
        assert {name: row.stats[name] for name in work} == work
        assert row.stats["tokens_emitted"] == len(text)
        assert masked.MASK not in text
    total = generation.total_stats(rows)
    if case == "one_by_one":  # sheet, 6.5: one token a call and a call that ends each block
        assert total["edits"] == total["budget_exits"] == total["commit_passes"] == 0
        for prompt, row in zip(tiny.PROMPTS, rows, strict=True):
            P, shown = len(prompt), len(prompt) + len(row.token_ids)
            blocks = -(-shown // BLOCK) - P // BLOCK
            filled = (P // BLOCK + blocks) * BLOCK - P
            assert row.stats["target_calls"] == filled + blocks
    else:
        assert total["edits"] > 0 and total["budget_exits"] > 0
        assert total["commit_passes"] > 0
    assert (total["revisit_passes"] > 0) == (case in ("multi_block", "narrow"))


def test_multi_block_editing_changes_texts_through_what_comes_later():
    once = {name: value for name, value in CASES["multi_block"].items() if name != "revisit"}
    plain = [naive(prompt, **once)[0] for prompt in tiny.PROMPTS]
    assert tiny.texts(decoded("multi_block")) != plain


def test_commit_passes_come_after_blocks_that_were_left_with_a_write():
    """Whole canvases need none: the same texts, edits and predicting calls, noise included."""
    cached = decoded("editing", 1.0)
    anew = masked.decode(build(1.0, **EDITING, cache="none"))
    assert tiny.texts(cached) == tiny.texts(anew)
    for mine, other in zip(cached, anew, strict=True):
        predicting = mine.stats["target_calls"] - mine.stats["commit_passes"]
        assert predicting == other.stats["target_calls"] == other.stats["full_calls"]
        for name in ("edits", "post_passes", "budget_exits"):
            assert mine.stats[name] == other.stats[name]


def test_an_edit_threshold_of_one_is_the_sampler_of_llada2():
    """A call that changes nothing saves a block's keys there; here a commit pass does.

    The last block's are of no use.
    """
    rows = masked.decode(build(name="llada2", mask_threshold=0.3))
    for prompt, row in zip(tiny.PROMPTS, rows, strict=True):
        text, work = naive(prompt, mask_threshold=0.3, edit_threshold=1)
        assert row.token_ids == text
        assert row.stats["edits"] == row.stats["post_passes"] == work["edits"] == 0
        assert work["budget_exits"] == work["commit_passes"] == 0
        assert row.stats["budget_exits"] == work["post_passes"]
        assert row.stats["commit_passes"] == work["post_passes"] - 1
        assert row.stats["target_calls"] == work["calls"] - 1
    assert 1.2 < generation.total_stats(rows)["tokens_per_target_call"] < 6


def test_every_call_has_the_logits_of_full_recomputation():
    """Prompts of several lengths, edits and commits on the way; sheet, 6.4."""
    exact = block_causal(masked.CONFIG, SCHEDULE)
    anew = whole_canvas(masked.CONFIG, block_causal=BLOCK)
    method = build(**EDITING)

    @jax.jit
    def both(state):
        view = canvas.look(state, SCHEDULE, masked.MASK)

        def read(logits, positions):
            if positions is not None:
                rows = jnp.arange(len(logits))[:, None]
                logits = (
                    jnp.zeros((*view.tokens.shape, 64)).at[rows, positions].set(logits, mode="drop")
                )
            return logits

        calls = [
            policy.compute(masked.params(), view, store, read).prediction
            for policy, store in ((exact, state.inner.store), (anew, ()))
        ]
        predicts = view.active & (state.inner.store.duty == 0)
        return *calls, view.open & predicts[:, None]

    state, slots = generation.begin(masked.params(), tiny.PROMPTS, method, masked.ENDLESS)
    compared = 0
    for _ in range(150):
        seen = state.replace(tokens=state.tokens[:, :slots])
        mine, theirs, where = map(np.asarray, both(seen))
        size = np.abs(theirs).max()  # about 12: errors are relative to it
        np.testing.assert_allclose(mine[where] / size, theirs[where] / size, atol=1e-5)
        compared += where.any(axis=1).sum()
        state, slots = generation.advance(
            masked.params(), state, slots, method, masked.ENDLESS, rounds=1
        )
        if not np.asarray(state.active).any():
            break
    total = np.asarray(state.stats.target_calls).sum()
    commits = np.asarray(state.stats.extra["commit_passes"]).sum()
    assert compared == total - commits and commits > 0


def test_a_row_does_not_depend_on_its_neighbours():
    for case, temperature in (("editing", 1.0), ("multi_block", 0.0)):
        together = decoded(case, temperature)
        method = build(temperature, **CASES[case])
        backwards = masked.decode(method, tiny.PROMPTS[::-1], row_ids=range(8)[::-1])
        assert backwards[::-1] == together
    alone = masked.decode(method, tiny.PROMPTS[2:3], row_ids=[2])
    assert alone == together[2:3]


def test_streams_end_in_the_texts_of_generate():
    method = build(**CASES["multi_block"])
    found: list[list[int]] = [[] for _ in tiny.PROMPTS]
    for event in generation.stream(masked.params(), tiny.PROMPTS, method, masked.STOP, every=7):
        found[event.row] += event.token_ids
    assert found == tiny.texts(decoded("multi_block"))


def test_a_mesh_changes_nothing():
    mesh = sharding.make_mesh(2, 4)
    target = masked.params()["target"]
    placed = jax.device_put(target, sharding.param_shardings(masked.CONFIG, mesh))
    method = build(**CASES["multi_block"])
    rows = generation.generate({"target": placed}, tiny.PROMPTS, method, masked.STOP, mesh=mesh)
    assert rows == decoded("multi_block")


def test_the_mask_is_never_written():
    """Not even by a model that always prefers it."""
    target = dict(masked.params()["target"])
    kernel = target["lm_head"]["kernel"]
    # Twice the sum of all other columns' sizes: above every logit wherever it is positive.
    target["lm_head"] = {"kernel": kernel.at[:, masked.MASK].set(100 * kernel[:, 7])}
    method = build(**EDITING)
    rows = generation.generate({"target": target}, tiny.PROMPTS, method, masked.ENDLESS)
    for row in rows:
        assert masked.MASK not in row.token_ids
        assert len(row.token_ids) == masked.NEW


def fabricated(tokens, *, prompt, start=0, known=None) -> View:
    """A view of one row in the block of four that begins at `start`."""
    tokens = jnp.asarray([tokens])
    index = jnp.arange(tokens.shape[1])
    one = lambda value: jnp.array([value])  # noqa: E731
    end = tokens.shape[1]
    return View(
        tokens=tokens,
        masked=(tokens == masked.MASK) & (index >= prompt),
        open=((index >= start) & (index < start + 4))[None],
        start=one(start),
        stop=one(start + 4),
        prompt_lengths=one(prompt),
        ends=one(end),
        step=one(0),
        calls=one(0),
        active=one(True),
        keys=randomness.row_keys(0, jnp.arange(1)),
    )


def said(tokens, confidence, known=None) -> Prediction:
    tokens = jnp.asarray([tokens])
    known = jnp.ones(tokens.shape, bool) if known is None else jnp.asarray([known])
    return Prediction(known, tokens, jnp.asarray([confidence]), {})


M = masked.MASK


@pytest.mark.parametrize(
    ("options", "tokens", "confidence", "writes"),
    [
        # Both kinds from one call; a threshold is exceeded strictly; equal tokens are no edits.
        ((0.5, 0.25), [9, M, 1, 4], [0.9, 0.75, 0.5, 0.9], [0, 1, 1, 0]),
        ((0.5, 0.25), [9, M, 1, 4], [0.9, 0.5, 0.25, 0.9], [0, 1, 0, 0]),  # the fallback
        ((0.5, 0.25), [9, M, M, M], [0.9, 0.5, 0.25, 0.3], [0, 1, 0, 0]),
        ((0.5, 0.25), [9, M, M, M], [0.9, 0.75, 0.25, 0.625], [0, 1, 0, 1]),
        ((0.5, 0.25, 2), [9, M, M, M], [0.9, 0.25, 0.3, 0.75], [0, 0, 1, 1]),
        ((0.5, 0.25, 3), [9, M, 1, M], [0.9, 0.25, 0.3, 0.75], [0, 1, 1, 1]),
        # A threshold of 0 edits whatever differs, and is not a licence to fill.
        ((0.5, 0.0), [9, M, 1, M], [0.9, 0.25, 0.01, 0.3], [0, 0, 1, 1]),
        ((1.0, 1.0), [9, M, 1, M], [1.0, 1.0, 1.0, 1.0], [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_what_a_call_writes(options, tokens, confidence, writes):
    """The first position is the prompt's and the prediction differs there; sheet, 6.1 and 6.3."""
    selector = joint_threshold(*options[:2], num_to_transfer=(*options, 1)[2])
    view = fabricated([*tokens, M, M, M, M], prompt=1)
    prediction = said([2, 3, 5, 4, 6, 6, 6, 6], [*confidence, 0.9, 0.9, 0.9, 0.9])
    choice = selector.select({}, view, prediction, selector.init(1))
    assert choice.write[0].tolist() == [*map(bool, writes), False, False, False, False]
    edits = sum(bool(w) and t != M for w, t in zip(writes, tokens))
    assert choice.extra["edits"].tolist() == [edits]
    assert choice.stay.tolist() == [True]


@pytest.mark.parametrize("max_post_steps", (0, 1, 3))
def test_calls_are_bounded_whatever_the_model_says(max_post_steps):
    """Fresh random predictions in every call: no more than L + max_post_steps; sheet, 6.2."""
    rng = np.random.default_rng(max_post_steps)
    selector = joint_threshold(0.9, 0.0, max_post_steps=max_post_steps)
    tokens, memory = np.array([[8, M, M, M, M, M, M, M]]), selector.init(1)
    with_masks = without = 0
    while True:
        view = fabricated(tokens[0], prompt=1)
        had_masks = bool(view.candidates.any())
        with_masks, without = with_masks + had_masks, without + (not had_masks)
        prediction = said(rng.integers(0, 60, 8), rng.uniform(size=8))
        choice = selector.select({}, view, prediction, memory)
        tokens = np.where(choice.write, choice.tokens, tokens)
        memory = choice.memory
        if not choice.stay[0]:
            break
    assert with_masks <= 3 and without == max_post_steps
    assert choice.extra["budget_exits"].tolist() == [1] and memory.tolist() == [0]
    assert tokens[0, 0] == 8 and (tokens[0, 4:] == M).all()


def test_a_block_is_left_when_a_call_neither_fills_nor_edits():
    selector = joint_threshold(0.5, 0.5)
    for tokens, stay in (([9, 3, 5, 4], False), ([9, 3, 1, 4], True), ([9, 3, M, 4], True)):
        view = fabricated([*tokens, M, M, M, M], prompt=1)
        choice = selector.select(
            {}, view, said([2, 3, 5, 4, 6, 6, 6, 6], [0.9] * 8), selector.init(1)
        )
        assert bool(choice.write.any()) == stay  # SGLang's condition
        assert choice.stay.tolist() == [stay]
    nothing = said([2, 3, 5, 4, 6, 6, 6, 6], [0.9] * 8, known=[False] * 8)
    choice = selector.select({}, view, nothing, jnp.array([2]))
    assert not choice.write.any() and choice.memory.tolist() == [2]


def test_the_penalty_is_for_the_token_to_the_left_inside_a_block():
    schedule = Schedule(4, absolute=True)
    view = fabricated([1, 2, 3, 4, 5, 6, M, M], prompt=1)
    logits = jnp.zeros((1, 8, 64))
    found = np.asarray(anti_stutter(schedule, 1.5)(view, logits, view.index[None]))
    expected = np.zeros_like(logits)
    for i in (1, 2, 3, 5, 6, 7):
        expected[0, i, view.tokens[0, i - 1]] -= 1.5
    np.testing.assert_array_equal(found, expected)
    part = np.asarray(anti_stutter(schedule, 1.5)(view, logits[:, 4:], view.index[None, 4:]))
    np.testing.assert_array_equal(part, expected[:, 4:])


def test_confidence_of_a_sampled_token_is_that_of_the_filtered_distribution():
    view = fabricated([1, M, M, M], prompt=1)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 64)), jnp.float32) * 2
    sampling = SamplingConfig(temperature=0.7, top_k=3)
    read = reader(view, sampling, M, filtered=True)(logits, None)
    kept = np.exp(log_probs(logits.at[..., M].set(-jnp.inf), sampling))
    chosen = np.take_along_axis(kept, np.asarray(read.tokens)[..., None], axis=-1)[..., 0]
    assert (chosen > 0).all()
    np.testing.assert_allclose(read.confidence, chosen, rtol=1e-5)
    own = reader(view, sampling, M)(logits, None)
    assert (own.tokens == read.tokens).all() and (own.confidence < read.confidence).all()


def test_bad_input():
    for options, message in (
        ({"mask_threshold": 1.5}, "mask_threshold: 1.5 must be between 0 and 1"),
        ({"edit_threshold": -0.5}, "edit_threshold: -0.5 must be between 0 and 1"),
        ({"max_post_steps": -1}, "max_post_steps: -1 must be at least 0"),
        ({"num_to_transfer": 0}, "num_to_transfer: 0 must be at least 1"),
        ({"block_length": 0}, "block_length: 0 must be at least 1"),
        ({"revisit": 2, "cache": "none"}, "revisit: 2 needs cache=blocks; given: none"),
        ({"mode": "fast"}, "mode: 'fast' is not known; allowed: Q, S, custom"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            build(**options)
    for schedule in (Schedule(8), Schedule(8, absolute=True, horizon=1)):
        with pytest.raises(InputError, match="schedule: exact block caches need blocks at abs"):
            block_causal(masked.CONFIG, schedule)
    with pytest.raises(InputError, match="revisit: -1 must be 0"):
        block_causal(masked.CONFIG, SCHEDULE, revisit=-1)
    with pytest.raises(InputError, match="max_post_steps: -1 must be 0 or more"):
        joint_threshold(0.5, 0.5, max_post_steps=-1)
    with pytest.raises(InputError, match="num_to_transfer: 0 must be at least 1"):
        joint_threshold(0.5, 0.5, num_to_transfer=0)


def test_the_same_arguments_give_the_same_method():
    policy = block_causal(masked.CONFIG, SCHEDULE, revisit=1)
    selector = joint_threshold(0.5, 0.0, earlier=True)
    make = functools.partial(
        unmasking, "x", masked.CONFIG, SamplingConfig(), SCHEDULE, selector, policy
    )
    assert make() is make()
    assert build(mode="S") is build(mask_threshold=0.5, edit_threshold=0)
