"""Leaving at gates: against a naive loop, both ways to have keys, rows, meshes and counters."""

import jax
import numpy as np
import pytest

from decoding import generation, loop, stopping
from decoding.early_exit import ExitRule, early_exit
from decoding.sampling import SamplingConfig
from models import sharding
from models.errors import InputError
from tests.decoding import tiny, tiny_accelerated
from tests.decoding.tiny_accelerated import ACCELERATOR, CONFIG, Naive

STOP = stopping.StopConfig(8)
# With random routers probabilities are on both sides of one half.
RULE = ExitRule(intervals=2, threshold=0.5)
ROWS = tiny.PROMPTS[:4]
QUEUE = 2


def decode(rule: ExitRule, rows=ROWS, **more) -> list:
    method = early_exit(CONFIG, SamplingConfig(), rule)
    return generation.generate(tiny_accelerated.models(), rows, method, STOP, **more)


def naive(rule: ExitRule, prompt: list[int], steps: int) -> tuple[list[int], int]:
    """The row's tokens and the layers that they ran, one token and one layer at a time."""
    model, L, gate = tiny_accelerated.models(), CONFIG.num_layers, CONFIG.num_layers // 2
    row, text, layers = Naive(CONFIG, model), list(prompt), 0
    for position, token in enumerate(text[:-1]):
        x = row.embed(token)
        for layer in range(L):
            x = row.run(layer, x, position)
    waiting: list[tuple[int, np.ndarray]] = []  # position and stream at the gate
    ages: list[bool] = []  # of the last tokens: whether each still waits
    for _ in range(steps):
        position = len(text) - 1
        x = p = row.embed(text[-1])
        states = []
        for layer in range(gate):
            x = row.run(layer, x, position)
            if rule.stream == "accelerated":
                p = row.faster(layer, p, position)
                states.append(p)
        found = p if rule.stream == "accelerated" else x
        if rule.router == "fixed":
            leaves = True
        elif rule.router == "confidence":
            z = row.logits(found)
            leaves = (np.exp(z - z.max()) / np.exp(z - z.max()).sum()).max() > rule.threshold
        else:
            router = model["accelerator"][f"router_{gate}"]
            leaves = tiny_accelerated.router(router, rule.router, states) > rule.threshold
        if rule.keys == "exact":
            full = len(ages) >= rule.queue and ages[-rule.queue]
            leaves = leaves and not full
        layers += gate
        if leaves and rule.keys == "copy":
            for layer in range(gate, L):
                row.run(layer, found, position)
        elif leaves:
            waiting.append((position, x))
        else:
            layers += L - gate
            for layer in range(gate, L):
                waiting = [(at, row.run(layer, y, at)) for at, y in waiting]
                x = row.run(layer, x, position)
            waiting, ages, found = [], [False] * len(ages), x
        ages.append(bool(leaves))
        text.append(int(np.argmax(row.logits(found))))
    return text[len(prompt) :], layers


RULES = [
    RULE,
    ExitRule(intervals=2, threshold=0.5, router="linear", keys="exact", queue=QUEUE),
    ExitRule(intervals=2, threshold=0.1, router="confidence", stream="slow"),
    ExitRule(intervals=2, router="fixed", keys="exact", queue=QUEUE),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.router}-{r.stream}-{r.keys}")
def test_decoding_is_the_naive_loop(rule):
    rows = decode(rule)
    depths = set()
    for row in rows[:2]:
        wanted, layers = naive(rule, row.prompt_ids, STOP.max_new_tokens)
        assert row.token_ids == wanted
        assert row.stats["layers_needed"] == layers
        depths.add(layers)
    # Some tokens left and some did not.
    total = sum(row.stats["layers_needed"] for row in rows)
    tokens = sum(row.stats["tokens_emitted"] for row in rows)
    if rule.router != "fixed":
        assert 2 * tokens < total < 4 * tokens
    else:  # one in every QUEUE + 1 must let the others catch up
        assert total == len(rows) * (2 * STOP.max_new_tokens + 2 * (STOP.max_new_tokens // 3))
    for row in rows:
        assert row.stats["layers_run"] >= row.stats["layers_needed"]


def test_a_row_does_not_depend_on_its_neighbours_and_alone_runs_only_what_it_needs():
    for rule in RULES[:2]:
        together = decode(rule, seed=1)
        for b in (0, 2):
            (alone,) = decode(rule, ROWS[b : b + 1], seed=1, row_ids=[b])
            assert alone.token_ids == together[b].token_ids
            assert alone.stats["layers_needed"] == together[b].stats["layers_needed"]
            assert alone.stats["layers_run"] == alone.stats["layers_needed"]


def test_never_leaving_is_plain_decoding_and_adapters_leave_the_model_alone():
    """Section 6, item 1: keys and values are the same bits with the stream beside them or not."""
    method = tiny.methods.build("autoregressive", {"target": CONFIG}, SamplingConfig())
    models = tiny_accelerated.models()
    plain = generation.generate(models, ROWS, method, STOP)
    caches = []
    for fields in (
        {},
        {"stream": "slow", "router": "confidence"},
        {"keys": "exact", "queue": QUEUE},
    ):
        rule = ExitRule(**{"intervals": 2, "threshold": 1.0, **fields})
        method = early_exit(CONFIG, SamplingConfig(), rule)
        state = tiny.start(method, models, ROWS, slots=64, buffer=64)
        state = loop.advance(models, state, np.int32(99), method=method, stop=STOP, slots=64)
        for b, row in enumerate(plain):
            end = int(state.lengths[b])
            assert np.asarray(state.tokens)[b, :end].tolist() == row.prompt_ids + row.token_ids
        assert (np.asarray(state.stats.extra["layers_run"]) == 4 * STOP.max_new_tokens).all()
        caches.append(state.inner.cache)
    for one, other in zip(jax.tree.leaves(caches[0]), jax.tree.leaves(caches[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_chunks_and_meshes_change_nothing():
    whole, method = decode(RULE), early_exit(CONFIG, SamplingConfig(), RULE)
    found: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    events = generation.stream(tiny_accelerated.models(), ROWS, method, STOP, every=3)
    for event in events:
        found[event.row] += event.token_ids
    assert list(found.values()) == tiny.texts(whole)
    mesh = sharding.make_mesh(2, 4)
    models = tiny_accelerated.models()
    placed = {
        "target": jax.device_put(models["target"], sharding.param_shardings(CONFIG, mesh)),
        "accelerator": jax.device_put(
            models["accelerator"], sharding.tree_shardings(models["accelerator"], mesh)
        ),
    }
    split = generation.generate(placed, ROWS, method, STOP, mesh=mesh)
    assert tiny.texts(split) == tiny.texts(whole)


def test_a_row_that_is_done_does_not_make_others_run_layers():
    """Two rows, of which the first ends at once: what is run is what the second needs."""
    rows = decode(RULE)
    stop = stopping.StopConfig(STOP.max_new_tokens, (rows[0].token_ids[0],))
    method = early_exit(CONFIG, SamplingConfig(), RULE)
    first, second = generation.generate(tiny_accelerated.models(), ROWS[:2], method, stop)
    assert len(first.token_ids) == 1
    text = rows[1].token_ids
    assert second.token_ids == text[: len(second.token_ids)]
    assert second.stats["layers_run"] <= second.stats["layers_needed"] + 2


def test_caches_have_the_size_of_plain_decodings():
    """Section 6, item 4: nothing is kept of the accelerated stream."""
    method = early_exit(CONFIG, SamplingConfig(), RULE)
    plain = tiny.methods.build("autoregressive", {"target": CONFIG}, SamplingConfig())
    sizes = []
    for one in (method, plain):
        state = jax.eval_shape(lambda one=one: one.init(2, 32))
        caches = loop.caches(state)
        sizes.append([store.shape for c in caches for store in (*c.keys, *c.values)])
    assert sizes[0] == sizes[1]
    assert not any("key" in name or "value" in name for name in _names("layers_"))
    assert ACCELERATOR.intervals == 2


def _names(prefix: str) -> list[str]:
    params = tiny_accelerated.models()["accelerator"]
    kept = {name: leaf for name, leaf in params.items() if name.startswith(prefix)}
    return [sharding.path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "arla", "stream": "slow"}, "router: 'arla' reads the accelerated stream"),
        ({"exit_gate": 2}, "exit_gate: 2 must be between 1 and 1"),
        ({"keys": "none"}, "keys: 'none'"),
        ({"queue": 0}, "queue: 0"),
    ],
)
def test_rules_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ExitRule(**{"intervals": 2, **fields})


def test_intervals_must_divide_the_layers():
    with pytest.raises(InputError, match="intervals: 3 must divide the model's 4 layers"):
        early_exit(CONFIG, SamplingConfig(), ExitRule(intervals=3))
