"""Token Recycling against a naive copy of it; its table, its learning, and that it is lossless."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generation, loop, methods, randomness, stopping
from decoding.prefill import prefill
from decoding.sampling import SamplingConfig, draw
from decoding.speculative import rules, template, token_recycling, verification
from decoding.speculative.method import speculative
from decoding.speculative.rules import RuleSpec
from decoding.speculative.token_recycling import expand, recycling_drafter, update_table
from experiments.configs import token_recycling as configs
from models import cache as kv
from models.errors import InputError
from models.transformer import Output
from tests.decoding import tiny
from tests.decoding.exact_laws import EOS, TARGET, laws, p_value, sampled

V = tiny.TARGET.vocab_size


def build(temperature: float = 0.0, **options) -> loop.Method:
    """Twenty nodes unless told otherwise: caches of one size hold them."""
    return tiny.build("token_recycling", temperature, **{"template": "nodes20", **options})


def tokens_per_call(rows) -> float:
    return generation.total_stats(rows)["tokens_per_target_call"]


# --- Drafts and updates ------------------------------------------------------------------------


def test_the_tree_is_read_off_the_table_level_by_level():
    table = jnp.array([[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]])
    shape = template.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    tokens = expand(table, jnp.array([0, 3]), shape)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 2, 3, 3], [3, 0, 1, 1, 2, 2]])
    assert (shape.parent, shape.depth) == ((-1, 0, 0, 1, 1, 2), (0, 1, 1, 2, 2, 2))
    # A table a row: each row reads its own.
    other = (table + 1) % 4
    tokens = expand(jnp.stack([table, other]), jnp.array([0, 0]), shape)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 2, 3, 3], [0, 2, 3, 0, 1, 1]])


def naive_update(table, tokens, successors, order, usable):
    """Writes from the last to the first, so that the first of a token is what stays."""
    table = table.copy()
    B, W = tokens.shape
    for _, b, w in sorted(((order[b, w], b, w) for b in range(B) for w in range(W)), reverse=True):
        if usable[b, w]:
            (table if table.ndim == 2 else table[b])[tokens[b, w]] = successors[b, w]
    lost = np.zeros(B, int)
    for b, w in np.argwhere(usable):
        kept = (table if table.ndim == 2 else table[b])[tokens[b, w]]
        lost[b] += (kept != successors[b, w]).any()
    return table, lost


@pytest.mark.parametrize("per_row", [False, True])
def test_of_updates_of_one_token_the_first_in_order_wins(per_row):
    rng, B, W, k = np.random.default_rng(0), 3, 17, 3
    jitted = jax.jit(update_table)
    for _ in range(20):
        table = rng.integers(0, 7, (B, 7, k) if per_row else (7, k)).astype(np.int32)
        tokens = rng.integers(0, 6, (B, W))  # token 6 is never written
        # Few successors: some of the losers would have written the same.
        successors = rng.integers(0, 2, (B, W, k)).astype(np.int32)
        order = np.stack([rng.permutation(W) for _ in range(B)])
        usable = rng.random((B, W)) < 0.7
        expected, lost = naive_update(table, tokens, successors, order, usable)
        arguments = tuple(map(jnp.asarray, (table, tokens, successors, order, usable)))
        for update in (update_table, jitted):
            found, duplicates = update(*arguments)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(duplicates, lost)
        assert (lost > 0).all() and (lost < usable.sum(axis=1)).all()


# --- Against a naive copy ----------------------------------------------------------------------

ROWS = [tiny.PROMPTS[i] for i in (0, 7, 4)]
SHAPE, K, STEPS = template.named("nodes20", 4), 4, 16


@dataclasses.dataclass
class Naive:
    """What the naive copy of the method knows about one row."""

    text: list[int]
    table: np.ndarray
    calls: int = 0
    accepted: list[int] = dataclasses.field(default_factory=lambda: [0] * SHAPE.max_depth)
    duplicates: list[int] = dataclasses.field(default_factory=list)
    reached: list[int] = dataclasses.field(default_factory=lambda: [0] * SHAPE.num_nodes)

    def tree(self) -> dict:
        """The token of every path."""
        nodes = {(): self.text[-1]}
        for path in SHAPE.paths[1:]:
            nodes[path] = int(self.table[nodes[path[:-1]]][path[-1]])
        return nodes

    def contexts(self, tree: dict) -> list[list[int]]:
        """The text up to every path."""
        return [self.text + [tree[path[: i + 1]] for i in range(len(path))] for path in SHAPE.paths]

    def advance(self, tree: dict, said: dict, limit: int) -> list:
        """Follows what the target says after each path; returns the accepted paths."""
        walk = [()]
        while True:
            right = [
                p for p in SHAPE.paths[1:] if p[:-1] == walk[-1] and tree[p] == said[p[:-1]][0]
            ]
            if not right:
                break
            walk.append(right[0])
        self.text = (self.text + [int(said[path][0]) for path in walk])[:limit]
        self.calls += 1
        for path in walk[1:]:
            self.accepted[len(path) - 1] += 1
        for node, path in enumerate(SHAPE.paths):
            self.reached[node] += path in walk
        return walk


def last_logits(texts) -> np.ndarray:
    """After each text; always the same number of them, so that one shape is compiled."""
    room = len(ROWS) * SHAPE.num_nodes
    assert len(texts) <= room
    padded = [*texts, *[[0]] * (room - len(texts))]
    return tiny.last_logits(tiny.TARGET, tiny.params()["target"], padded)[: len(texts)]


def best(logits: np.ndarray) -> np.ndarray:
    """The K likeliest tokens, in order."""
    ordered = np.sort(logits)[::-1]
    assert (ordered[:K] - ordered[1 : K + 1] > 1e-5).all(), "near-tie: choose other prompts"
    return np.argsort(-logits)[:K]


def read_prompts(rows: list[Naive]) -> None:
    """A later place of a token wins; of equal places the first row's."""
    places = [(i, -b) for b, prompt in enumerate(ROWS) for i in range(len(prompt) - 1)]
    places.sort()
    logits = last_logits([ROWS[-b][: i + 1] for i, b in places])
    for (i, b), values in zip(places, logits, strict=True):
        rows[-b].table[ROWS[-b][i]] = best(values)


@functools.cache
def simulate(per_row=False, accepted_only=False, from_prompt=False) -> list[Naive]:
    """The method on ROWS at temperature 0, row by row and node by node.

    Every node is scored by running its whole text. Rows may hold the same table.
    """
    shared = np.zeros((V, K), int)
    rows = [Naive(list(prompt), np.zeros((V, K), int) if per_row else shared) for prompt in ROWS]
    limits = [len(prompt) + STEPS for prompt in ROWS]
    if from_prompt:
        read_prompts(rows)
    while going := [b for b, row in enumerate(rows) if len(row.text) < limits[b]]:
        trees = {b: rows[b].tree() for b in going}
        contexts = [text for b in going for text in rows[b].contexts(trees[b])]
        logits = iter(last_logits(contexts))
        writes = []
        for b in going:
            said = {path: best(next(logits)) for path in SHAPE.paths}
            walk = rows[b].advance(trees[b], said, limits[b])
            writes += [
                ((path not in walk, len(path), path, b), trees[b][path], said[path])
                for path in SHAPE.paths
                if path in walk or not accepted_only
            ]
        # Accepted paths first, then by depth, place and row: the first is written last.
        for (*_, b), token, successors in sorted(writes, key=lambda w: w[0], reverse=True):
            rows[b].table[token] = successors
        for b in going:
            mine = [(token, found) for (*_, row), token, found in writes if row == b]
            lost = [(rows[b].table[token] != found).any() for token, found in mine]
            rows[b].duplicates.append(sum(lost))
    return rows


SLOTS = BUFFER = 64


def run(method: loop.Method, until: int = 99) -> loop.DecodeState:
    """ROWS, STEPS tokens each, or up to round `until`."""
    state = tiny.start(method, tiny.params(), ROWS, slots=SLOTS, buffer=BUFFER)
    stop = stopping.StopConfig(STEPS)
    return loop.advance(
        tiny.params(), state, jnp.int32(until), method=method, stop=stop, slots=SLOTS
    )


VARIANTS = [
    {},
    {"per_row": True, "accepted_only": True},
    {"from_prompt": True},
    {"from_prompt": True, "per_row": True},
]


def options(per_row=False, accepted_only=False, from_prompt=False) -> dict:
    return {
        "table": "per_row" if per_row else "shared",
        "update": "accepted" if accepted_only else "all",
        "update_from_prompt": from_prompt,
        "k": K,
    }


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_everything_it_does_is_what_a_naive_copy_does(variant):
    """Texts, counters and tables; rows that are done learn nothing while others go on."""
    rows = simulate(**variant)
    state = run(build(**options(**variant)))
    for b, row in enumerate(rows):
        assert state.tokens[b, : state.lengths[b]].tolist() == row.text
        assert state.stats.target_calls[b] == row.calls
        assert state.stats.accepted[b].tolist() == row.accepted
        assert state.stats.extra["tree_nodes"][b] == row.calls * 20
        # What a round lost is counted when the next one begins.
        assert state.stats.extra["duplicate_updates"][b] == sum(row.duplicates[:-1])
        drafter = state.inner.drafter
        assert drafter.reached[b].tolist() == row.reached
        own = drafter.table[b] if drafter.table.ndim == 3 else drafter.table
        np.testing.assert_array_equal(own, row.table)
    assert len({row.calls for row in rows}) > 1
    assert sum(sum(row.duplicates) for row in rows) > 0


def test_the_variants_differ():
    calls = [[row.calls for row in simulate(**variant)] for variant in VARIANTS]
    assert len(set(map(tuple, calls))) == len(VARIANTS)


def test_prompts_are_read_in_chunks(monkeypatch):
    """The table is the same, whatever the chunks."""
    drafter = recycling_drafter(tiny.TARGET, K, SHAPE, from_prompt=True)
    lengths = np.array([len(prompt) for prompt in ROWS])
    tokens = np.zeros((len(ROWS), 12), int)
    for b, prompt in enumerate(ROWS):
        tokens[b, : len(prompt)] = prompt
    expected = [Naive([], np.zeros((V, K), int))] * len(ROWS)
    read_prompts(expected)
    for chunk in (256, 4):
        monkeypatch.setattr(token_recycling, "CHUNK", chunk)
        read = jax.jit(lambda *inputs: drafter.prefill(inputs[0], drafter.init(3, 12), *inputs[1:]))
        found = read(tiny.params(), tokens, lengths - 1)
        np.testing.assert_array_equal(found.table, expected[0].table)


def test_the_cache_is_a_prefill_of_the_text():
    """After every accepted path, whatever its nodes were."""
    read = jax.jit(
        lambda params, tokens, lengths: prefill(
            tiny.TARGET, params, kv.create(tiny.TARGET, len(ROWS), SLOTS), tokens, lengths
        )
    )
    method = build(**options(from_prompt=True))
    for until in (1, 4, 99):
        state = run(method, until)
        cache, lengths = state.inner.target, np.asarray(state.lengths) - 1
        if until < 99:  # rows that are done keep what they accepted beyond their last token
            np.testing.assert_array_equal(cache.lengths, lengths)
        fresh = read(tiny.params()["target"], state.tokens, jnp.asarray(lengths))
        for found, expected in zip(
            (*cache.keys, *cache.values), (*fresh.keys, *fresh.values), strict=True
        ):
            for b, end in enumerate(lengths):
                np.testing.assert_allclose(found[b, :, :end], expected[b, :, :end], atol=1e-4)
    assert np.asarray(state.stats.accepted)[:, 1:].sum() > 0


# --- Learning ----------------------------------------------------------------------------------


def accepted_by_round(accepted_only: bool) -> list[int]:
    """Drafts accepted in three rounds of a target that knows 1 -> 2 -> 3 -> 4 only.

    The table knows that 3 may follow 1, which the target refuses.
    """
    size = 6
    following = np.array([0, 2, 3, 4, 5, 0])
    logits = jnp.asarray(10.0 * np.eye(size)[following] + 0.1 * np.eye(size)[1])
    shape = template.from_paths([(0,), (1,), (0, 0)])
    config = tiny.SMALL.replace(vocab_size=size)
    drafter = recycling_drafter(config, 2, shape, accepted_only=accepted_only)
    inner = drafter.init(1, 8)
    inner = drafter.memory.put(inner, inner.table.at[1].set(jnp.array([3, 0])))
    keys, greedy = randomness.row_keys(0, jnp.arange(1)), SamplingConfig()

    @jax.jit
    def step(inner, tokens, lengths):
        draft = drafter.propose({}, inner, types.SimpleNamespace(tokens=tokens, lengths=lengths))
        output = Output(logits=logits[draft.tree.tokens], hidden=None, cache=None)
        verdict = verification.exact_match(draft.tree, output.logits, keys, lengths, greedy)
        return verdict, drafter.observe(draft.inner, draft.tree, verdict, output, lengths > 0)

    text, accepted = [1], []
    for _ in range(3):
        padded = np.pad(text, (0, 8 - len(text)))[None]
        verdict, inner = step(inner, padded, np.array([len(text)]))
        text += verdict.tokens[0, : verdict.count[0]].tolist()
        accepted.append(int(verdict.count[0]) - 1)
    assert text == [1, 2, 3, 4, 5][: len(text)]
    return accepted


def test_what_a_rejected_node_showed_is_accepted_later():
    """3 is drafted after 1 and refused; what the target says after it is right two rounds on."""
    assert accepted_by_round(accepted_only=False) == [0, 0, 1]
    assert accepted_by_round(accepted_only=True) == [0, 0, 0]


def test_the_first_round_of_a_cold_table_accepts_nothing_but_token_zero():
    method = tiny.build("token_recycling")
    state, slots = generation.begin(tiny.params(), tiny.PROMPTS, method, tiny.STOP)
    assert not np.asarray(state.inner.drafter.table).any()
    state, _ = generation.advance(tiny.params(), state, slots, method, tiny.STOP, rounds=1)
    zeros = [next(i for i, token in enumerate(row) if token) for row in tiny.plain_greedy()]
    gained = np.asarray(state.lengths - state.prompt_lengths)
    np.testing.assert_array_equal(gained, 1 + np.asarray(zeros))
    assert (gained == 1).mean() > 0.5


def test_a_hot_table_accepts_more_and_a_reset_forgets_it():
    method, hot = build(), generation.HotStart()
    rates = [tokens_per_call(tiny.decode(method, hot=hot)) for _ in range(3)]
    assert rates[0] < rates[1] < rates[2]
    assert tokens_per_call(tiny.decode(method)) == rates[0]
    assert tokens_per_call(tiny.decode(method, hot=generation.HotStart())) == rates[0]
    # The same start, twice: what was kept is not used up.
    found = [
        tokens_per_call(tiny.decode(method, hot=generation.HotStart(hot.value))) for _ in range(2)
    ]
    assert found[0] == found[1] > rates[0]


STREAM = [tiny.prompts(seed=100 + i) for i in range(7)]


def test_fifty_prompts_as_plain_decoding_while_the_table_learns():
    """The published tree over a stream of new prompts of one model."""
    plain, method = tiny.build("autoregressive"), tiny.build("token_recycling")
    hot, learning, forgetting = generation.HotStart(), [], []
    for prompts in STREAM:
        texts = tiny.texts(tiny.decode(plain, prompts))
        learning.append(tiny.decode(method, prompts, hot=hot))
        forgetting.append(tiny.decode(method, prompts))
        assert tiny.texts(learning[-1]) == tiny.texts(forgetting[-1]) == texts
    assert sum(map(len, STREAM)) >= 50
    assert learning[0] == forgetting[0]
    late = [
        np.mean([tokens_per_call(rows) for rows in runs[4:]]) for runs in (learning, forgetting)
    ]
    assert late[0] > 1.05 * late[1]


def test_memory_does_not_grow_with_what_was_read():
    config = tiny.TARGET.replace(vocab_size=32_000)
    drafter = recycling_drafter(config, 8, template.DEFAULT80)
    inner = jax.eval_shape(lambda: drafter.init(1, 128))
    assert inner.table.dtype == jnp.int32
    assert inner.table.size * 4 == 32_000 * 8 * 4 < 2 * 2**20
    shapes = lambda inner: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), inner)  # noqa: E731
    method = build(**options())
    empty = shapes(jax.eval_shape(lambda: method.init(len(ROWS), SLOTS).drafter))
    assert shapes(run(method).inner.drafter) == empty


def test_tables_of_another_shape_are_refused():
    eight_rows = generation.HotStart(jnp.zeros((8, V, 8), jnp.int32))
    with pytest.raises(InputError, match=r"^hot start: a table of shape \(8, 64, 8\) was kept"):
        tiny.decode(build(table="per_row"), tiny.PROMPTS[:2], hot=eight_rows)
    wide = generation.HotStart(jnp.zeros((V, 8), jnp.int32))
    with pytest.raises(InputError, match=r"this run needs \(64, 4\); allowed: the same k"):
        tiny.decode(build(k=4), hot=wide)


# --- Only the target speaks --------------------------------------------------------------------


# The third row as in PROMPTS, among others.
NEIGHBOURS = tiny.prompts(seed=3)
NEIGHBOURS[2] = tiny.PROMPTS[2]


def test_the_tables_do_not_show_in_the_text_at_any_temperature():
    plain = tiny.texts(tiny.decode(tiny.build("autoregressive", 1.0)))
    shared, own = build(1.0), build(1.0, table="per_row")
    rows = tiny.decode(own)
    assert tiny.texts(tiny.decode(shared)) == tiny.texts(rows) == plain
    assert plain != [list(row) for row in tiny.plain_greedy()]
    # A row notices its neighbours by what the shared table says, or not at all.
    assert tiny.decode(own, NEIGHBOURS)[2] == rows[2]
    found = [tiny.decode(shared, batch)[2] for batch in (tiny.PROMPTS, NEIGHBOURS)]
    assert found[0].token_ids == found[1].token_ids == rows[2].token_ids
    assert found[0].stats != found[1].stats


def test_rows_end_as_in_plain_decoding():
    """Accepted paths are cut at the limit and after an end of sequence."""
    stop = stopping.StopConfig(9, tuple({row[4] for row in tiny.plain_greedy()[:3]}))
    hot = generation.HotStart()
    plain = tiny.decode(tiny.build("autoregressive"), stop=stop)
    for _ in range(2):
        rows = tiny.decode(build(), stop=stop, hot=hot)
        for row, expected in zip(rows, plain, strict=True):
            assert row.token_ids == expected.token_ids
            assert row.finish_reason == expected.finish_reason
    # Both ends have cut a row that had accepted more.
    long = [
        row.finish_reason
        for row in rows
        if sum(row.stats["accepted"]) + row.stats["target_calls"] > len(row.token_ids)
    ]
    assert set(long) == {"eos", "length"}


T1 = SamplingConfig(1.0)
SIX = template.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])


@pytest.mark.parametrize(
    "sampling,chosen,eos",
    [
        (T1, {}, ()),
        (SamplingConfig(1.3), {"per_row": True, "from_prompt": True}, (EOS,)),
        (SamplingConfig(1.2, top_p=0.8), {"accepted_only": True}, ()),
    ],
    ids=str,
)
def test_whole_texts_follow_the_exact_law(sampling, chosen, eos):
    drafter = recycling_drafter(TARGET, 3, SIX, **chosen)
    method = speculative("recycling", TARGET, drafter, "exact_match", sampling)
    assert p_value(sampled(method, eos), laws(sampling, eos)) > 1e-3


def resample_after_mismatch(tree, logits, keys, positions, sampling):
    """Draws anew where no child had the target's token: children count twice."""
    verdict = verification.exact_match(tree, logits, keys, positions, sampling)
    last = verdict.count - 1
    node = jnp.take_along_axis(verdict.path, last[:, None], axis=1)[:, 0]
    token = draw(
        verification.rows(logits, node), keys, positions + last, sampling, randomness.RESIDUAL
    )
    there = jnp.arange(verdict.tokens.shape[1]) == last[:, None]
    return verdict.replace(tokens=jnp.where(there, token[:, None], verdict.tokens))


def test_the_chi_square_rejects_sampling_again_after_a_mismatch(monkeypatch):
    monkeypatch.setitem(
        rules.RULES, "resample", RuleSpec(resample_after_mismatch, verification.LAWS)
    )
    drafter = recycling_drafter(TARGET, 3, SIX)
    method = speculative("resampling", TARGET, drafter, "resample", T1)
    assert p_value(sampled(method), laws(T1)) < 1e-9


def test_typical_acceptance_needs_a_table_a_row():
    """Its text depends on the drafts, which neighbours must not change."""
    with pytest.raises(InputError, match=r"^table: 'shared' with rule typical_acceptance"):
        build(1.0, rule="typical_acceptance")
    typical = build(1.0, rule="typical_acceptance", table="per_row")
    assert not typical.lossless and build(1.0).lossless
    assert build(0.0, rule="typical_acceptance") is build()
    rows = tiny.decode(typical)
    assert tiny.decode(typical, NEIGHBOURS)[2] == rows[2]
    assert tokens_per_call(rows) > tokens_per_call(tiny.decode(build(1.0, table="per_row")))


# --- Options -----------------------------------------------------------------------------------


def test_k_must_fit_the_vocabulary_and_the_template():
    with pytest.raises(InputError, match=r"^k: 8 must be at most 5, the tokens of the vocabulary$"):
        methods.build("token_recycling", tiny.SMALL_CONFIGS, T1)
    with pytest.raises(InputError, match=r"^k: 7 must be at least 8, which the template needs$"):
        recycling_drafter(tiny.TARGET, 7, template.DEFAULT80)
    with pytest.raises(InputError, match=r"^k: 0 must be at least 1$"):
        build(k=0)
    # Fewer than the published tree needs: its other nodes are left out.
    assert tiny.build("token_recycling", k=3).lookahead == 46
    assert tiny.build("token_recycling").lookahead == 81


def test_the_experiments_methods_and_its_sweep_can_be_built():
    settings = configs.sweep()
    entries = [entry for one in settings for entry in one["decode.methods"]]
    for preset in ("", "offline"):
        config = configs.get_config(preset)
        entries += config.decode.methods
        labels = {entry.label for entry in config.decode.methods}
        for claim in config.claims:
            assert claim.label in labels and claim.over in {*labels, ""}
    for entry in entries:
        methods.build(entry.method, tiny.CONFIGS, SamplingConfig(), entry.options.to_dict())
    assert len({one["name"] for one in settings}) == len(settings) == 8
    assert {entry.hot for entry in entries if entry.method == "token_recycling"} == {True, False}
