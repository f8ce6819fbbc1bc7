"""Training for LUD: units, what branches see, the same loss as cut copies, resuming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import branches, lexical_units, losses
from training.lexical_units import Units

LONG = MODEL.replace(max_position=32)
START = jax.jit(lambda key: transformer.init(LONG, key))(jax.random.key(7))
UNITS = Units(window=3, confidence=0.05, pad_id=31, branches=4)


def naive_units(row: list[bool], window: int) -> list[int]:
    found, i = [0] * len(row), 0
    while i < len(row):
        end = i
        while end < len(row) and row[end]:
            end += 1
        for begin in range(i, end, window):
            piece = min(window, end - begin)
            found[begin] = piece if piece >= 2 else 0
        i = end + 1
    return found


@pytest.mark.parametrize("window", [2, 3, 5])
def test_units_are_runs_cut_into_pieces(window):
    rng = np.random.default_rng(window)
    rows = rng.random((6, 40)) < np.linspace(0.2, 0.95, 6)[:, None]
    rows[0], rows[5] = False, True
    found = lexical_units.unit_lengths(jnp.asarray(rows), window)
    assert found.tolist() == [naive_units(row.tolist(), window) for row in rows]


@pytest.mark.parametrize("window", [2, 3, 5])
def test_headed_units_begin_with_the_token_before_the_run(window):
    rng = np.random.default_rng(window)
    rows = rng.random((6, 40)) < np.linspace(0.2, 0.95, 6)[:, None]
    rows[0], rows[:, 0] = False, False
    wanted = []
    for row in rows.tolist():
        found = [0] * 40
        for head in range(40):
            end = head + 1
            while end < 40 and row[end]:
                end += 1
            if row[head] or end == head + 1:
                continue
            for begin in range(head, end, window):
                piece = min(window, end - begin)
                found[begin] = piece if piece >= 2 else 0
        wanted.append(found)
    assert lexical_units.unit_lengths(jnp.asarray(rows), window, headed=True).tolist() == wanted


def test_units_are_of_the_models_own_confidence():
    """Against naive NumPy; a lower bar, or another model, gives other units."""
    batch = placed(make_batch(5))

    @jax.jit
    def logits_of(params):
        return transformer.apply(
            LONG, params, batch["tokens"], positions=batch["positions"],
            mask=branches.masks.packed_causal(batch["segment_ids"]),
        ).logits  # fmt: skip

    @jax.jit
    def found(logits, bars):
        sure = [lexical_units.confident_tokens(logits, batch, least) for least in bars]
        return *sure, lexical_units.confident_tokens(logits, batch, 0.0, likeliest=True)

    logits = logits_of(START)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    counted = np.asarray(batch["loss_mask"]) > 0
    gold = np.zeros(tokens.shape)  # of tokens that may be sure
    for b, t in np.ndindex(tokens.shape):
        if t > 0 and segments[b, t] == segments[b, t - 1] and counted[b, t - 1]:
            gold[b, t] = p[b, t - 1, tokens[b, t]]
    order = np.sort(gold[gold > 0])
    bars = [(order[i] + order[i - 1]) / 2 for i in (5, len(order) // 2, -5)]
    *sure, best = map(np.asarray, found(logits, bars))
    for mine, bar in zip(sure, bars, strict=True):
        np.testing.assert_array_equal(mine, gold >= bar)
    likeliest = np.roll(p.argmax(-1) == np.asarray(batch["targets"]), 1, axis=1)
    np.testing.assert_array_equal(best, likeliest & (gold > 0))
    other = found(logits_of(jax.tree.map(lambda x: -x, START)), bars)[1]
    assert not np.array_equal(other, sure[1])


def test_branches_stand_before_units_and_anywhere():
    rng = np.random.default_rng(0)
    lengths = lexical_units.unit_lengths(jnp.asarray(rng.random((3, 30)) < 0.7), 3)
    usable = jnp.ones((3, 30), bool).at[:, 20:].set(False)
    units = dataclasses.replace(UNITS, branches=6)
    draw = jax.jit(lambda key: lexical_units.places(lengths, usable, units, key))
    anywhere = set()
    for seed in range(20):
        cut, counts = map(np.asarray, draw(jax.random.key(seed)))
        assert cut.shape == (3, 6)
        for b in range(3):
            for place, count in zip(cut[b, :3], counts[b, :3], strict=True):
                assert count == max(int(lengths[b, place + 1]) - 1, 0)
            assert (cut[b, 3:] < 20).all() and (counts[b, 3:] == 2).all()
            anywhere |= set(cut[b, 3:].tolist())
    assert len(anywhere) > 15
    none = lexical_units.places(jnp.zeros((1, 8), int), usable[:1, :8], units, jax.random.key(0))
    assert none[1][0, :3].tolist() == [0, 0, 0]


def placed(batch):
    return {name: jnp.asarray(value) for name, value in batch.items()}


def test_branches_see_their_prefix_alone_and_text_does_not_see_them():
    batch, cut = placed(make_batch(2)), jnp.asarray([[1, 6]] * 4)
    pads = START["embedder"]["embedding"][jnp.array([31, 31])]
    text, branch = branches.hidden(LONG, START, batch, cut, pads)
    plain = transformer.apply(
        LONG, START, batch["tokens"], positions=batch["positions"],
        mask=branches.masks.packed_causal(batch["segment_ids"]),
    ).hidden  # fmt: skip
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(text[real], plain[real], atol=1e-5)
    later = dict(batch, tokens=batch["tokens"].at[:, 7:].set(1))
    text_later, branch_later = branches.hidden(LONG, START, later, cut, pads)
    np.testing.assert_allclose(branch_later, branch, atol=1e-5)
    assert float(jnp.abs(text_later - text)[real].max()) > 1e-3
    text_other, branch_other = branches.hidden(LONG, START, batch, cut, pads + 1)
    np.testing.assert_array_equal(text_other[real], text[real])
    assert float(jnp.abs(branch_other - branch).max()) > 1e-3


def test_branches_give_the_loss_of_copies_that_are_cut_behind_their_unit():
    """Layout B against layout A: each unit in a row of its own, placeholders in its place."""
    batch = placed(make_batch(4))
    cut, n = jnp.asarray([[1, 7], [0, 6], [2, 8], [1, 6]]), 2
    pads = START["embedder"]["embedding"][jnp.array([31] * n)]
    _, branch = branches.hidden(LONG, START, batch, cut, pads)
    logits = transformer.unembed(LONG, START, branch)
    targets = np.asarray(batch["targets"])
    for row in range(4):
        for c in range(2):
            place = int(cut[row, c])
            segment = np.asarray(batch["segment_ids"])[row]
            at = np.flatnonzero(segment == segment[place])
            prefix = np.asarray(batch["tokens"])[row, at[at <= place]]
            tokens = jnp.asarray([[*prefix.tolist(), *[31] * n]])
            alone = transformer.apply(LONG, START, tokens).logits[0, -n:]
            labels = jnp.asarray(targets[row, place + 1 : place + 1 + n])
            mine = losses.cross_entropy(logits[row, c], labels)
            np.testing.assert_allclose(mine, losses.cross_entropy(alone, labels), atol=1e-4)


def train(workdir, **more):
    config = dataclasses.replace(CONFIG, model=LONG, num_steps=9)
    return lexical_units.train(
        config,
        UNITS,
        initial_params=START,
        train_batches=Batches(more.get("before", lambda step: None)),
        eval_batches=[make_batch(1000), make_batch(1001)],
        workdir=workdir,
    )


def test_both_losses_fall_and_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    before = jax.tree.map(np.asarray, START)
    whole = train(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, before, START)
    found = lines(tmp_path / "whole", "text_loss", "branch_loss")
    assert found[-1][0] < found[0][0] and found[-1][1] < found[0][1]
    held_out = lines(tmp_path / "whole", "eval_text_loss", "eval_branch_loss")[-1]
    assert whole.metrics["eval_loss"] == pytest.approx(sum(held_out), rel=1e-5)

    def stop(step):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", before=stop)
    again = train(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, again.state.params)
