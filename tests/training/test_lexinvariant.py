"""Training under a fresh cipher a row: whose keys are whose, exchanged tokens, runs that go on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import random_embeddings as lex
from models import sharding, transformer
from models.errors import InputError
from models.permutation_mixture import MarkovLanguage, log_probs
from models.random_embeddings import LexinvariantConfig
from training import fitting, image_batches, lexinvariant, losses
from training.fitting import TrainConfig
from training.lexinvariant import Cipher
from training.optimizers import AdafactorConfig, OptimizerConfig
from training.symbol_data import LanguageRows

B, T, V = 8, 12, 6
MODEL = LexinvariantConfig(
    vocab_size=V, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
    max_position=32, activation="gelu", gated_mlp=False, fixed_ids=(5,),
)  # fmt: skip
STANDARD = MODEL.replace(table="learned", fixed_ids=())
CONFIG = TrainConfig(
    MODEL, OptimizerConfig(learning_rate=1e-2, warmup_steps=2), num_steps=6, batch_size=B,
    sequence_length=T, log_every=1, eval_every=3, checkpoint_every=3,
)  # fmt: skip
ROWS = MarkovLanguage(V).sample(64, T + 1, seed=0)


def batch(start=0):
    rows = LanguageRows(ROWS)
    found = [rows[(start + i) % 64] for i in range(B)]
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


def config_for(model, **changes):
    import dataclasses

    return dataclasses.replace(CONFIG, model=model, **changes)


@functools.cache
def nats_of(model, cipher, remat=False):
    config = config_for(model, remat=remat)
    return jax.jit(functools.partial(lexinvariant.nats, config, cipher))


@jax.jit
def _hidden(params, inputs):
    return transformer.apply(MODEL, params, inputs, with_logits=False).hidden


@pytest.mark.parametrize("draw", lexinvariant.DRAWS)
def test_loss_is_that_of_a_naive_model_under_the_rows_own_tables(draw):
    """Each row alone, its tables and permutations drawn here from the documented keys."""
    params, key, rows = lex.init(MODEL, jax.random.key(1)), jax.random.key(2), batch()
    found = nats_of(MODEL, Cipher(draw=draw))(params, rows, key)
    keys = lexinvariant.row_keys(key, B)
    permuted = np.asarray(lexinvariant.permutations(MODEL, keys))
    for row in range(B):
        shared = jax.random.fold_in(key, 1)
        table = np.array(
            jax.random.normal(shared if draw == "permutations" else keys[row], (V, 16))
        )
        table[5] = params["fixed"]["embedding"][0]
        if draw == "permutations":
            table = table[permuted[row]]  # the vector of plain token v
        inputs = table[rows["tokens"][row]] * np.asarray(params["input"]["scale"])
        inputs = inputs + np.asarray(params["input"]["bias"])
        hidden = _hidden(params, jnp.asarray(inputs, jnp.float32)[None])[0]
        logits = np.asarray(hidden) @ table.T * np.asarray(params["readout"]["scale"]) / 4
        expected = losses.cross_entropy(jnp.asarray(logits), rows["targets"][row])
        np.testing.assert_allclose(found[row], expected, atol=2e-5)


def test_recomputed_tables_give_the_same_loss_and_gradient():
    params, key, rows = lex.init(MODEL, jax.random.key(1)), jax.random.key(2), batch()

    def run(remat):
        loss = lambda p: lexinvariant.nats(  # noqa: E731
            config_for(MODEL, remat=remat), Cipher(), p, rows, key
        ).mean()
        return jax.jit(jax.value_and_grad(loss))(params)

    for one, other in zip(jax.tree.leaves(run(False)), jax.tree.leaves(run(True)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_every_row_and_every_step_has_its_own_table():
    keys = [
        jax.random.key_data(lexinvariant.row_keys(fitting.step_key(CONFIG, step), B))
        for step in range(4)
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4 * B
    tables = lex.draw(MODEL, lex.init(MODEL, jax.random.key(0)), lexinvariant.row_keys(
        fitting.step_key(CONFIG, 0), B))  # fmt: skip
    free = np.asarray(tables)[:, :5].reshape(B, -1)
    correlation = np.corrcoef(free) - np.eye(B)
    assert np.abs(correlation).max() < 0.6
    assert (np.asarray(tables)[:, 5] == np.asarray(tables)[0, 5]).all()  # the fixed id
    # The same rows twice in a batch do not have the same loss: they are not under one cipher.
    rows = batch()
    twice = {name: np.concatenate([value[:4], value[:4]]) for name, value in rows.items()}
    params = lex.init(MODEL, jax.random.key(1))
    for draw in lexinvariant.DRAWS:
        found = nats_of(MODEL, Cipher(draw=draw))(params, twice, jax.random.key(0))
        assert (np.abs(found[:4] - found[4:]).max(axis=1) > 1e-3).all()


def test_shards_of_a_batch_have_the_rows_of_the_whole_batch():
    """Keys belong to rows of the global batch, so four devices draw what one does."""
    params, rows = lex.init(MODEL, jax.random.key(1)), batch()
    same = {name: np.repeat(value[:1], B, axis=0) for name, value in rows.items()}
    alone = nats_of(MODEL, Cipher())(params, same, jax.random.key(3))
    mesh = sharding.make_mesh(4)
    placed = lexinvariant.put(same, config_for(MODEL, mesh=(4, 1)), mesh)
    assert len(placed["tokens"].sharding.device_set) == 4
    split = nats_of(MODEL, Cipher())(params, placed, jax.random.key(3))
    np.testing.assert_allclose(split, alone, atol=1e-5)
    assert len({round(float(x), 3) for x in np.asarray(split).mean(axis=1)}) == B


def _trajectory(config, loss_fn, steps=5):
    state = fitting.init(config, lex.init(config.model, jax.random.key(0)))
    step = jax.jit(functools.partial(fitting.update, config, loss_fn))
    found = []
    for number in range(steps):
        state, metrics = step(state, batch(number * B))
        found.append(float(metrics["loss"]))
    return found


def test_nothing_exchanged_is_the_standard_model_bit_for_bit():
    config = config_for(STANDARD)

    def plain(params, rows, step, frozen):
        """The standard model's loss, without any cipher in sight."""
        table = params["fixed"]["embedding"]
        inputs = lex.encode(STANDARD, params, table, rows["tokens"])
        hidden = transformer.apply(
            STANDARD, params, inputs, positions=jnp.arange(T)[None], with_logits=False
        ).hidden
        nats = losses.cross_entropy(lex.logits(STANDARD, params, table, hidden), rows["targets"])
        return losses.masked_mean(nats, rows["loss_mask"]), {}

    expected = _trajectory(config, plain)
    for unit in lexinvariant.UNITS:
        cipher = Cipher(permuted=0.0, unit=unit)
        found = _trajectory(config, functools.partial(lexinvariant.loss_fn, config, cipher))
        assert found == expected


def test_tokens_are_exchanged_at_the_rate_given_and_targets_with_them():
    model = MODEL.replace(vocab_size=40, fixed_ids=(3,))
    keys = jax.random.split(jax.random.key(0), 2000)
    tokens = np.random.default_rng(0).integers(0, 40, (2000, 20)).astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for unit in lexinvariant.UNITS:
        found, after = map(
            np.asarray, lexinvariant.exchange(model, Cipher(permuted=0.2, unit=unit), keys, inputs,
                                              targets))  # fmt: skip
        # A permutation of 39 tokens leaves one in 39 where it is.
        changed = (found != inputs)[inputs != 3].mean()
        assert abs(changed - 0.2 * 38 / 39) < 0.01
        assert (found[inputs == 3] == 3).all()
        np.testing.assert_array_equal(found[:, 1:], after[:, :-1])  # the same token, seen twice
        assert (after[:, -1] != targets[:, -1]).any()
        same = [
            len({int(y) for x, y in zip(row, new) if x == row[0]})
            for row, new in zip(inputs, found)
        ]
        assert (max(same) == 1) is (unit == "type")
    whole, _ = lexinvariant.exchange(model, Cipher(permuted=1.0), keys, inputs, targets)
    permuted = np.asarray(lexinvariant.permutations(model, jax.vmap(jax.random.split)(keys)[:, 0]))
    np.testing.assert_array_equal(whole, np.take_along_axis(permuted, inputs, axis=1))
    assert (np.sort(permuted, axis=1) == np.arange(40)).all()
    assert len(np.unique(permuted[:, 0])) > 30  # uniform: no token stays away


def test_p_of_one_learns_what_gaussian_tables_do():
    """Losses at the first and the last position, after some training of both."""
    steps = 60
    found = {}
    for name, model, cipher in (
        ("gaussian", MODEL.replace(fixed_ids=()), Cipher()),
        ("permuted", STANDARD, Cipher(permuted=1.0)),
    ):
        config = config_for(model, num_steps=steps)
        found[name] = _trajectory(
            config, functools.partial(lexinvariant.loss_fn, config, cipher), steps
        )
    gap = np.mean(found["gaussian"][-20:]) - np.mean(found["permuted"][-20:])
    assert abs(gap) < 0.06
    assert np.mean(found["permuted"][-20:]) < np.mean(found["permuted"][:5])
    # Neither can know the first target: the exact lexinvariant model is no worse there.
    exact = -np.asarray(log_probs(MarkovLanguage(V).transition(), ROWS)).mean()
    assert np.mean(found["permuted"][-20:]) > exact


def test_a_run_that_was_stopped_goes_on_with_the_same_draws(tmp_path):
    rows = LanguageRows(ROWS)

    def run(workdir, steps_first=None):
        config = config_for(MODEL)
        for _ in range(1 if steps_first is None else 2):
            batches = image_batches.train_batches([(rows, B)], seed=0)
            source = _Ends(batches, steps_first) if steps_first else batches
            try:
                result = lexinvariant.train(
                    config, Cipher(), train_batches=source,
                    eval_batches=[batch()], workdir=workdir,
                )  # fmt: skip
            except InputError:  # the batches ended, as when a run is killed
                steps_first = None
                continue
            return result
        raise AssertionError

    whole, parts = run(tmp_path / "a"), run(tmp_path / "b", steps_first=4)
    assert whole.metrics == parts.metrics
    for one, other in zip(
        jax.tree.leaves(whole.state.params), jax.tree.leaves(parts.state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert whole.metrics["eval_loss"] == pytest.approx(
        whole.metrics["eval_bits_per_byte"] * np.log(2)
    )


class _Ends:
    """Batches that end after so many."""

    def __init__(self, batches, count):
        self._batches, self._left = batches, count

    def __next__(self):
        self._left -= 1
        if self._left < 0:
            raise StopIteration
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def test_adafactor_takes_the_parameters_and_lowers_the_loss():
    optimizer = AdafactorConfig(learning_rate=0.1, warmup_steps=0, final_fraction=1.0)
    config = config_for(MODEL, optimizer=optimizer, num_steps=32)
    found = _trajectory(config, functools.partial(lexinvariant.loss_fn, config, Cipher()), 32)
    assert np.isfinite(found).all()
    assert np.mean(found[24:]) < np.mean(found[:8])  # the same 64 rows, in batches of eight


def test_what_cannot_be_is_refused(tmp_path):
    run = {"train_batches": None, "eval_batches": None, "workdir": tmp_path}
    with pytest.raises(InputError, match=r"cipher\.permuted"):
        lexinvariant.train(CONFIG, Cipher(permuted=0.5), **run)
    with pytest.raises(InputError, match="fixed_ids"):
        lexinvariant.train(config_for(MODEL.replace(fixed_ids=(0, 1, 2, 3, 4))), Cipher(), **run)
    with pytest.raises(InputError, match=r"cipher\.unit"):
        Cipher(unit="word")
    with pytest.raises(InputError, match=r"cipher\.permuted"):
        Cipher(permuted=1.5)
