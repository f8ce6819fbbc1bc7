"""Big Little Decoder against the two-model loop written out, token by token, in plain Python."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from decoding import loop, methods, randomness, stopping
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig
from decoding.speculative import rollback
from decoding.speculative.bild import SPEC, fallback_drafter
from decoding.speculative.method import speculative
from decoding.speculative.tree import chain
from models import cache as kv
from models import transformer
from models.errors import InputError
from tests.decoding import tiny

PROMPTS = tiny.prompts((9, 1, 17, 5, 12, 2, 7, 3))
MODELS = tiny.params()
STEPS, CAP, SLOTS = 24, 4, 64
GREEDY = SamplingConfig()
INFINITY = float("inf")


# --- The reference: one text at a time, no caches, no rounds -------------------------------------


@functools.cache
def _forward(role: str):
    config = tiny.CONFIGS[role]
    return jax.jit(lambda params, tokens: transformer.apply(config, params, tokens).logits)


@functools.cache
def _logits(role: str, text: tuple[int, ...]) -> np.ndarray:
    """Logits [len(text), V], from the whole text at once."""
    tokens = np.zeros((1, SLOTS), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(_forward(role)(MODELS[role], tokens), np.float64)[0, : len(text)]


@functools.partial(jax.jit, static_argnums=2)
def _noise(keys: jax.Array, positions: jnp.ndarray, purpose: int) -> jnp.ndarray:
    return randomness.gumbel(randomness.at(keys, positions, purpose), tiny.TARGET.vocab_size)


def above(value: float, threshold: float) -> bool:
    assert abs(value - threshold) > 1e-4, "near-tie: choose another threshold"
    return value > threshold


@dataclasses.dataclass
class Run:
    """A finished text and what it took."""

    text: list[int]
    target_calls: int = 0
    draft_calls: int = 0
    fallbacks: int = 0
    rollbacks: int = 0
    small_tokens: int = 0
    rolled_back_tokens: int = 0
    unchecked_ends: int = 0
    longest_run: int = 0


def next_logits(role: str, text: list[int], config: SamplingConfig) -> np.ndarray:
    """Logits [V] after a text; what it holds is penalised."""
    logits = _logits(role, tuple(text))[-1].copy()
    for token in set(text):
        penalty = config.repetition_penalty
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    return logits


def cut_at(
    text: list[int], pending: int, threshold: float, policy: str, config: SamplingConfig
) -> int | None:
    """The position whose token is replaced, among the last `pending` of `text`."""
    for at in range(len(text) - pending, len(text)):
        log_p = special.log_softmax(next_logits("target", text[:at], config))
        unlikely = above(-log_p[text[at]], threshold)
        agrees = log_p.argmax() == text[at]
        if unlikely and (policy == "paper" or not agrees):
            return at
        if unlikely and policy == "official":
            return None
    return None


def two_models(
    prompt: Sequence[int],
    fallback: float,
    threshold: float,
    *,
    policy: str,
    official: bool,
    eos: int = -1,
    verify_eos: bool = True,
    config: SamplingConfig = GREEDY,
    key: jax.Array | None = None,
) -> Run:
    """Two models in turns.

    The length is looked at after a turn of the large model only, and the text then cut.
    """

    def choose(logits: np.ndarray, purpose: int) -> int:
        if key is None:
            return int(logits.argmax())
        noise = _noise(key[None], jnp.asarray([len(text)]), purpose)[0]
        return int((logits / config.temperature + np.asarray(noise)).argmax())

    run = Run(list(prompt))
    text, pending, run_length, small = run.text, 0, 0, not official
    while True:
        if small:
            logits = next_logits("draft", text, config)
            run.draft_calls += 1
            if not above(special.softmax(logits).max(), fallback):
                run.fallbacks += 1
                small = False
                continue
            text.append(choose(logits, randomness.DRAFT))
            run.small_tokens += 1
            pending, run_length = pending + 1, run_length + 1
            run.longest_run = max(run.longest_run, run_length)
            if text[-1] == eos and not verify_eos:
                run.unchecked_ends += 1
                break
            small = run_length < CAP and text[-1] != eos
            continue
        run.target_calls += 1
        at = cut_at(text, pending, threshold, policy, config)
        if at is not None:
            run.rollbacks += 1
            run.rolled_back_tokens += len(text) - at
            del text[at:]
        text.append(choose(next_logits("target", text, config), randomness.SAMPLE))
        pending = run_length = 0
        small = at is None or not official
        if len(text) >= len(prompt) + STEPS or eos in text[len(prompt) :]:
            break
    new = text[len(prompt) : len(prompt) + STEPS]
    run.text = new[: new.index(eos) + 1] if eos in new else new
    return run


# --- The implementation, compiled once for all thresholds -----------------------------------------


@functools.cache
def decoder(policy: str, official: bool, config: SamplingConfig = GREEDY):
    """(fallback, threshold, rounds) -> state after that many rounds on PROMPTS."""

    @jax.jit
    def run(models, fallback, threshold, rounds):
        # Behind the caches of both functions, thresholds may be traced.
        drafter = fallback_drafter.__wrapped__(tiny.DRAFT, fallback, CAP, config, official=official)
        options = (("threshold", threshold), ("policy", policy))
        method = speculative.__wrapped__("bild", tiny.TARGET, drafter, "rollback", config, options)
        state = tiny.start(method, models, PROMPTS, slots=SLOTS, buffer=SLOTS)
        stop = stopping.StopConfig(STEPS)
        return loop.advance(models, state, rounds, method=method, stop=stop, slots=SLOTS)

    def decode(fallback: float, threshold: float, rounds: int = 99) -> loop.DecodeState:
        return run(MODELS, jnp.float32(fallback), jnp.float32(threshold), jnp.int32(rounds))

    return decode


def texts(state: loop.DecodeState) -> list[list[int]]:
    tokens = np.asarray(state.tokens)
    return [tokens[b, len(prompt) : state.lengths[b]].tolist() for b, prompt in enumerate(PROMPTS)]


def totals(state: loop.DecodeState) -> dict[str, int]:
    stats = state.stats
    found = {name: int(values.sum()) for name, values in stats.extra.items()}
    for name in ("target_calls", "draft_calls", "tokens_emitted"):
        found[name] = int(getattr(stats, name).sum())
    return found


def counters(state: loop.DecodeState, row: int) -> dict[str, int]:
    stats = state.stats
    found = {name: int(values[row]) for name, values in stats.extra.items()}
    return found | {
        name: int(getattr(stats, name)[row]) for name in ("target_calls", "draft_calls")
    }


def counted(run: Run) -> dict[str, int]:
    return {k: v for k, v in dataclasses.asdict(run).items() if k not in ("text", "longest_run")}


@functools.cache
def plain() -> list[list[int]]:
    return tiny.greedy(tiny.TARGET, MODELS["target"], PROMPTS, STEPS)


def agreement(state: loop.DecodeState) -> float:
    return float(np.mean(np.asarray(texts(state)) == np.asarray(plain())))


THRESHOLDS = [(0.15, 3.0), (0.15, 1.0), (0.25, 0.0), (0.0, 2.0), (0.2, INFINITY)]


@pytest.mark.parametrize(
    "policy,official", [("joint", False), ("joint", True), ("official", True), ("paper", False)]
)
def test_text_and_counters_are_those_of_the_two_model_loop(policy, official):
    seen = Run([])
    for fallback, threshold in THRESHOLDS:
        state = decoder(policy, official)(fallback, threshold)
        for b, prompt in enumerate(PROMPTS):
            run = two_models(prompt, fallback, threshold, policy=policy, official=official)
            assert texts(state)[b] == run.text
            assert counters(state, b) == counted(run)
            seen.longest_run = max(seen.longest_run, run.longest_run)
            seen.rollbacks += run.rollbacks
            seen.rolled_back_tokens += run.rolled_back_tokens
    assert seen.longest_run == CAP
    # Cuts in the middle of a chain occurred.
    assert seen.rolled_back_tokens > seen.rollbacks > 0


# --- Properties -----------------------------------------------------------------------------------


def test_a_small_model_that_is_never_sure_leaves_the_large_one_alone():
    state = decoder("joint", False)(1.01, 0.0)
    assert texts(state) == plain()
    found = totals(state)
    assert found["small_tokens"] == 0
    assert found["fallbacks"] == found["target_calls"] == found["draft_calls"] == 8 * STEPS


@pytest.mark.parametrize("official", [False, True])
def test_rolling_back_every_disagreement_is_plain_greedy_in_fewer_calls(official):
    state = decoder("joint", official)(0.15, 0.0)
    assert texts(state) == plain()
    if not official:  # which spends a call of its own on every correction
        assert totals(state)["target_calls"] < 8 * STEPS
    assert totals(state)["rollbacks"] > 0


def test_the_official_rule_at_zero_misses_disagreements():
    """It looks at the first token only: any probability below 1 offends."""
    assert agreement(decoder("official", True)(0.15, 0.0)) < 0.9
    assert agreement(decoder("joint", True)(0.15, 0.0)) == 1


def test_the_large_model_writes_first_in_the_official_loop():
    state = decoder("joint", True)(0.0, INFINITY, 1)
    assert [row[:1] for row in plain()] == texts(state)
    assert totals(state)["draft_calls"] == 0
    state = decoder("joint", True)(0.0, INFINITY, 2)
    np.testing.assert_array_equal(state.stats.tokens_emitted, 1 + CAP + 1)


def test_the_large_model_writes_twice_after_a_rollback_in_the_official_loop():
    before = [decoder("joint", True)(0.0, 3.0, rounds) for rounds in (2, 3)]
    corrected = np.asarray(before[0].stats.extra["rollbacks"]) > 0
    assert 0 < corrected.sum() < 8
    drafted = np.asarray(before[1].stats.draft_calls - before[0].stats.draft_calls)
    emitted = np.asarray(before[1].stats.tokens_emitted - before[0].stats.tokens_emitted)
    np.testing.assert_array_equal(drafted, np.where(corrected, 0, CAP))
    assert (emitted[corrected] == 1).all()


def test_the_small_model_never_writes_more_than_its_cap():
    lengths = [np.asarray(decoder("joint", False)(0.0, INFINITY, n).lengths) for n in range(5)]
    np.testing.assert_array_equal(np.diff(lengths, axis=0), CAP + 1)


def test_every_token_is_accounted_for():
    for rounds in (1, 3, 5):
        state = decoder("joint", False)(0.15, 1.0, rounds)
        assert np.asarray(state.active).all()
        found = totals(state)
        written = found["small_tokens"] + found["target_calls"]
        assert written == found["tokens_emitted"] + found["rolled_back_tokens"]
    # One call of the large model scores all that was written since the last one.
    assert found["rollbacks"] > 0
    assert (found["small_tokens"] + found["target_calls"]) / found["target_calls"] > 1.3


@functools.cache
def _prefilled(role: str):
    config = tiny.CONFIGS[role]

    @jax.jit
    def fresh(params, tokens, lengths):
        cache = kv.create(config, len(tokens), SLOTS)
        return prefill(config, params, cache, tokens, lengths)

    return fresh


@pytest.mark.parametrize("official", [False, True])
def test_what_was_rolled_back_is_in_neither_cache(official):
    for rounds in range(1, 6):
        state = decoder("joint", official)(0.15, 1.0, rounds)
        assert np.asarray(state.active).all()
        lengths = np.asarray(state.lengths)
        np.testing.assert_array_equal(state.inner.target.lengths, lengths - 1)
        # The small model reads the last two tokens again.
        caches = {
            "target": (state.inner.target, lengths - 1),
            "draft": (state.inner.drafter.cache, np.maximum(lengths - 2, 0)),
        }
        for role, (cache, valid) in caches.items():
            fresh = _prefilled(role)(MODELS[role], state.tokens, jnp.asarray(valid))
            pairs = zip((*cache.keys, *cache.values), (*fresh.keys, *fresh.values), strict=True)
            for found, expected in pairs:
                for b, length in enumerate(valid):
                    np.testing.assert_allclose(
                        found[b, :, :length], expected[b, :, :length], atol=1e-4
                    )
    assert (np.asarray(state.stats.extra["rollbacks"]) > 0).sum() > 3


def test_thresholds_trade_quality_for_calls():
    def grid(pairs):
        states = [decoder("joint", False)(*pair) for pair in pairs]
        found = [totals(state) for state in states]
        share = lambda name: [f[name] / f["tokens_emitted"] for f in found]  # noqa: E731
        return share("fallbacks"), share("rollbacks"), [agreement(state) for state in states]

    def rises(values):
        assert (np.diff(values) >= 0).all()
        assert values[-1] > values[0]

    fallbacks, rollbacks, quality = grid([(f, 2.5) for f in (0.1, 0.2, 0.4, 1.01)])
    rises(fallbacks)
    rises(rollbacks[::-1])
    rises(quality)
    _, rollbacks, quality = grid([(0.15, r) for r in (0.0, 2.5, 3.5, INFINITY)])
    rises(rollbacks[::-1])
    rises(quality[::-1])
    assert rollbacks[-1] == 0


# --- The rule on numbers made by hand -------------------------------------------------------------


_judge = jax.jit(
    lambda tree, logits, keys, threshold, policy, unchecked_eos: rollback.rollback(
        tree, logits, keys, jnp.asarray([5]), GREEDY,
        threshold=threshold, policy=policy, unchecked_eos=unchecked_eos,
    ),
    static_argnames=("policy", "unchecked_eos"),
)  # fmt: skip


def judge(probabilities, drafts, threshold, policy="joint", unchecked_eos=()):
    """The verdict's tokens and counters, for a chain with next-token distributions [E + 1, V].

    Chains of fewer than three drafts are filled up with places that hold none.
    """
    missing = 3 - len(drafts)
    drafts = np.asarray([drafts + [-1] * missing])
    tree = chain(jnp.zeros(1, jnp.int32), jnp.maximum(drafts, 0), jnp.asarray(drafts >= 0))
    probabilities = probabilities + [RARE] * missing
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32)) + 3.0
    keys = randomness.row_keys(0, jnp.arange(1))
    verdict = _judge(tree, logits, keys, threshold, policy=policy, unchecked_eos=unchecked_eos)
    return np.asarray(verdict.tokens)[0, : verdict.count[0]].tolist(), verdict.counters


RARE = [0.7, 0.1, 0.2]  # -log .1 = 2.3026
SPLIT = [0.4, 0.35, 0.25]  # the arg-max has .9163 nats


def test_the_distance_is_minus_log_p_of_the_draft_in_nats():
    for threshold, expected in ((2.0, [0]), (2.30, [0]), (2.31, [1, 2]), (3.0, [1, 2])):
        tokens, found = judge([RARE, [0.1, 0.2, 0.7]], [1], threshold=threshold)
        assert tokens == expected
        assert found["rollbacks"][0] == found["rolled_back_tokens"][0] == (threshold < 2.3026)
    assert judge([[1.0, 0.0, 0.0], RARE], [1], threshold=INFINITY)[0] == [1, 0]


def test_policies_differ_where_the_arg_max_is_unlikely():
    rows, drafts = [SPLIT, RARE, SPLIT, RARE], [0, 1, 2]
    # The first draft is the arg-max, though beyond the threshold; the second is wrong.
    assert judge(rows, drafts, threshold=0.5, policy="joint")[0] == [0, 0]
    assert judge(rows, drafts, threshold=0.5, policy="official")[0] == [0, 1, 2, 0]
    assert judge(rows, drafts, threshold=0.5, policy="paper")[0] == [0]
    # Where it is within the threshold all agree.
    for policy in rollback.POLICIES:
        tokens, found = judge(rows, drafts, threshold=1.0, policy=policy)
        assert tokens == [0, 0]
        assert (found["rollbacks"][0], found["rolled_back_tokens"][0]) == (1, 2)


def test_places_without_a_draft_are_not_judged():
    assert judge([SPLIT, RARE, RARE], [0, -1], threshold=0.0)[0] == [0, 0]
    assert judge([RARE, RARE, RARE], [-1, -1], threshold=0.0, policy="paper")[0] == [0]


def test_a_chain_that_ends_the_text_unchecked_is_kept_whole():
    rows, drafts = [RARE, RARE, SPLIT], [1, 2]
    assert judge(rows, drafts, threshold=2.0)[0] == [0]
    tokens, found = judge(rows, drafts, threshold=2.0, unchecked_eos=(2,))
    assert tokens[:2] == drafts
    assert (found["rollbacks"][0], found["unchecked_ends"][0]) == (0, 1)
    # Only the end of the chain can end the text.
    assert judge(rows, drafts, threshold=2.0, unchecked_eos=(1,))[0] == [0]
    assert judge(rows, [-1, -1], threshold=2.0, unchecked_eos=(0,))[1]["unchecked_ends"][0] == 0


# --- Through the front door -----------------------------------------------------------------------


@functools.cache
def ending_token() -> int:
    """A token that the small model writes often and that does not always stand."""
    base = {"policy": "joint", "official": False}
    kept, written = (
        [two_models(p, 0.15, threshold, **base).text for p in PROMPTS]
        for threshold in (1.0, INFINITY)
    )
    count = lambda rows, token: sum(token in row[:-CAP] for row in rows)  # noqa: E731
    return max(range(64), key=lambda t: min(count(written, t) - count(kept, t), 3))


def ending(verify_eos: bool) -> loop.Method:
    config = tiny.TARGET.replace(eos_token_ids=(ending_token(),))
    options = {"fallback": 0.15, "rollback": 1.0, "max_small": CAP, "verify_eos": verify_eos}
    return methods.build("bild", {"target": config, "draft": tiny.DRAFT}, GREEDY, options)


def stop() -> stopping.StopConfig:
    return stopping.StopConfig(STEPS, (ending_token(),))


@pytest.mark.parametrize("verify_eos", [True, False])
def test_whether_the_end_of_the_text_is_checked(verify_eos):
    rows = tiny.decode(ending(verify_eos), PROMPTS, stop=stop())
    for row in rows:
        run = two_models(
            row.prompt_ids, 0.15, 1.0, policy="joint", official=False, eos=ending_token(),
            verify_eos=verify_eos,
        )  # fmt: skip
        assert row.token_ids == run.text
        assert {name: row.stats[name] for name in counted(run)} == counted(run)
        assert row.stats["target_positions"] == run.target_calls * (CAP + 1)
    ends = sum(row.stats["unchecked_ends"] for row in rows)
    assert (ends > 0) != verify_eos
    assert {row.finish_reason for row in rows} == {"eos", "length"}


def test_rows_do_not_depend_on_their_neighbours():
    method = ending(verify_eos=True)
    together = tiny.decode(method, PROMPTS, stop=stop())
    for b, prompt in enumerate(PROMPTS):
        assert tiny.decode(method, [prompt], stop=stop()) == [together[b]]
    assert len({row.stats["target_calls"] for row in together}) > 1


def test_it_does_not_promise_the_targets_text():
    assert not ending(verify_eos=True).lossless
    assert ending(verify_eos=False).depth == CAP
    assert tiny.build("bild").depth == SPEC.options["max_small"].default == 10


def test_sampling_and_penalty():
    """The small model's tokens and the corrections, each with their own noise."""
    config = SamplingConfig(temperature=0.8, repetition_penalty=1.4)
    state = decoder("joint", False, config)(0.125, 3.0)
    keys = randomness.row_keys(0, jnp.arange(len(PROMPTS)))
    for b, prompt in enumerate(PROMPTS):
        run = two_models(
            prompt, 0.125, 3.0, policy="joint", official=False, config=config, key=keys[b]
        )
        assert texts(state)[b] == run.text
        assert counters(state, b) == counted(run)
    found = totals(state)
    assert 0 < found["rollbacks"] < found["target_calls"]


def test_thresholds_are_parsed_and_checked():
    parse = functools.partial(methods.parse_options, "bild")
    assert parse({"rollback": "inf"})["rollback"] == INFINITY
    assert parse({}) == {
        "fallback": 0.6, "rollback": 5.0, "max_small": 10, "policy": "joint", "loop": "paper",
        "verify_eos": True,
    }  # fmt: skip
    for option, value in (("fallback", -0.1), ("rollback", -1), ("rollback", "nan")):
        with pytest.raises(InputError, match=f"^{option}: .* must be at least 0"):
            parse({option: value})
    with pytest.raises(InputError, match="max_small: 0 must be at least 1"):
        parse({"max_small": 0})


def test_rollback_is_for_chains_only():
    drafter = tiny.branching_drafter(tiny.PARENTS, 5, False)
    with pytest.raises(InputError, match="rule: 'rollback' needs a sampled chain"):
        speculative("x", tiny.SMALL, drafter, "rollback", GREEDY)
