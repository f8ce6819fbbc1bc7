"""Accelerated streams: their losses, a target that stays as it is, and what they learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from decoding import expert_loading
from decoding.expert_loading import MemoryTiers
from experiments import accelerated_streams, expert_prefetch
from models import accelerated_residual as accelerated
from models import cache as kv
from models import exit_router, transformer
from models.accelerated_residual import AcceleratorConfig
from tests.decoding import tiny_accelerated
from tests.training.test_language_model import CONFIG, MODEL, Batches, lines, make_batch
from training import accelerated_residual as training
from training import losses, target_features
from training.accelerated_residual import Objective

ACCELERATOR = AcceleratorConfig(2, router_width=8)
TARGET = jax.jit(lambda key: transformer.init(MODEL, key))(jax.random.key(5))


def train(workdir, **more):
    return target_features.train(
        dataclasses.replace(CONFIG, num_steps=9),
        training.part(ACCELERATOR),
        TARGET,
        train_batches=Batches(more.pop("before", lambda step: None)),
        eval_batches=[make_batch(1000), make_batch(1001)],
        workdir=workdir,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    before = jax.tree.map(np.asarray, TARGET)
    result = train(workdir)
    jax.tree.map(np.testing.assert_array_equal, before, TARGET)
    return workdir, result


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def reference(params, batch):
    """Loss and agreement, each packed segment alone and each token in NumPy."""
    head = functools.partial(transformer.unembed, MODEL, TARGET)
    norm = functools.partial(transformer.final_norm, MODEL, TARGET)
    totals, count = np.zeros(2), 0.0
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            tokens = np.zeros(12, np.int32)
            tokens[: len(at)] = batch["tokens"][row, at]
            out = forward(jnp.asarray(tokens)[None])
            keys, values = (np.asarray(x[0][0]) for x in (out.cache.keys, out.cache.values))
            streams = [np.asarray(x[0], np.float64) for x in out.collected]
            logits = np.asarray(out.logits, np.float64)[0]
            for t in range(len(at)):
                if not batch["loss_mask"][row, at[t]]:
                    continue
                p = tiny_accelerated.adapter(
                    MODEL, params, 0, streams[0][t], keys[:, : t + 1], values[:, : t + 1], t
                )
                both = [np.asarray(norm(jnp.asarray(x, jnp.float32)), np.float64)
                        for x in (p, streams[2][t])]  # fmt: skip
                near = 1 - cosine(p, streams[2][t]) + 0.1 * np.square(both[0] - both[1]).mean()
                mine = np.asarray(head(jnp.asarray(both[0], jnp.float32)), np.float64)
                log_p, log_q = special.log_softmax(logits[t]), special.log_softmax(mine)
                same = mine.argmax() == logits[t].argmax()
                entropies = []
                for kind in exit_router.ROUTERS:
                    chance = tiny_accelerated.router(params["router_1"], kind, [p])
                    entropies.append(-np.log(chance if same else 1 - chance))
                loss = near + (np.exp(log_p) * (log_p - log_q)).sum() + np.mean(entropies)
                totals += loss, same
                count += 1
    return totals / count


@jax.jit
def forward(tokens):
    return transformer.apply(
        MODEL, TARGET, tokens, cache=kv.create(MODEL, 1, 12), collect=(0, 1, 2)
    )


def test_the_loss_is_the_one_that_is_described(run):
    workdir, result = run
    params = accelerated.init(ACCELERATOR, MODEL, jax.random.key(CONFIG.seed))
    params = accelerated.begin(MODEL, TARGET, params)
    loss, agreement = reference(params, make_batch(1))
    assert lines(workdir, "loss", "agreement_1")[0] == pytest.approx([loss, agreement], rel=1e-4)
    # And with adapters that do say something.
    held_out = [reference(result.state.params, make_batch(seed)) for seed in (1000, 1001)]
    tokens = [make_batch(seed)["loss_mask"].sum() for seed in (1000, 1001)]
    loss, agreement = np.average(held_out, axis=0, weights=tokens)
    assert result.metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert result.metrics["eval_agreement_1"] == pytest.approx(agreement, rel=1e-4)
    losses = [loss for (loss,) in lines(workdir, "eval_loss")]
    assert losses[-1] < losses[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_end(run, tmp_path):
    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, before=stop)
    result = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run[1].state.params, result.state.params)


# Four layers; with random ones that change the stream much there is something to be ahead of.
DEEP = MODEL.replace(
    num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
)


@functools.cache
def deep(config=DEEP):
    params = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(2))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 8 * x if path[-2].key in ("out", "down") else x, params
    )


def tokens_of(seed, rows=16):
    """Rows that count by ones, twos or threes, but for a few tokens."""
    rng = np.random.default_rng(seed)
    start, stride = rng.integers(0, 32, (rows, 1)), rng.integers(1, 4, (rows, 1))
    counted = (start + stride * np.arange(12)) % 32
    other = rng.integers(0, 32, counted.shape)
    return np.where(rng.random(counted.shape) < 0.1, other, counted).astype(np.int32)


@functools.cache
def trained(config=DEEP, steps=400):
    """A model that has learned to count: what it says is decided late."""
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def step(carry, tokens):
        def loss(params):
            logits = transformer.apply(config, params, tokens).logits[:, :-1]
            return losses.cross_entropy(logits, tokens[:, 1:]).mean()

        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = transformer.init(config, jax.random.key(4))
    carry = (params, optimizer.init(params))
    for seed in range(steps):
        carry = step(carry, jnp.asarray(tokens_of(seed + 10**7, 32)))
    return carry[0]


def batch_of(seed):
    tokens = tokens_of(seed)
    return {
        "tokens": jnp.asarray(tokens),
        "positions": jnp.broadcast_to(jnp.arange(12), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
        "loss_mask": jnp.ones(tokens.shape, jnp.float32),
    }


@functools.cache
def learned(config, objective, model=deep, target=DEEP, steps=250):
    """Parameters after some steps of Adam, and the last metrics."""
    part, frozen = training.part(config, objective), model(target)
    params = part.begin(target, frozen, part.init(target, jax.random.key(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            found = target_features.features(target, frozen, batch, None, True)
            return part.loss(target, params, found, batch, frozen, jax.random.key(0))

        gradient, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for seed in range(steps):
        params, state, metrics = step(params, state, batch_of(seed))
    return params, jax.device_get(metrics)


def streams(config, objective, model):
    params, tokens = learned(config, objective, model)[0], tokens_of(10**6, 64)
    found = accelerated_streams.read(config, DEEP, model(), params, jnp.asarray(tokens))
    return jax.device_get(found)


def gains(found):
    layers = range(1, len(found.fast))
    return [
        float(np.mean(found.fast_says[i] == found.says) - np.mean(found.slow_says[i] == found.says))
        for i in layers
    ]


def test_the_stream_is_ahead_and_the_more_so_the_faster_it_is():
    """Section 6, items 2 and 3: held-out agreement with the last word, by layer; the rate."""
    alone, rate = Objective(gate=0.0), AcceleratorConfig(2, rate=1.5, router_width=8)
    slower, faster = streams(rate, alone, trained), streams(ACCELERATOR, alone, trained)
    assert min(gains(faster)) > 0.02
    assert np.mean(gains(faster)) > np.mean(gains(slower)) > 0
    for config, found in ((ACCELERATOR, faster), (rate, slower)):
        for i in (1, 2):
            likeness = [accelerated_streams._cosine(found.fast[i], h) for h in found.slow]
            assert int(np.argmax(likeness)) == accelerated.ahead(config, 4, i)


def test_leaving_ahead_is_better_than_leaving_as_one_is():
    """Section 6, item 8: held-out, at equal mean depth and with the same test of confidence."""
    found = streams(ACCELERATOR, Objective(), trained)
    right, as_is = (says[2] == found.says for says in (found.fast_says, found.slow_says))
    assert right.mean() > as_is.mean() + 0.02  # all tokens leave at the gate
    slow, fast = (np.asarray(sure[2]) for sure in found.sure)
    mine = accelerated_streams.curve([fast], [right], (2,), 4)
    plain = accelerated_streams.curve([slow], [as_is], (2,), 4)
    assert accelerated_streams.gain_at_equal_depth(mine, plain) > 0.005
    # Leaving always and never are the ends of a curve.
    assert mine[0][0] == 2 and mine[0][-1] == 4 and mine[1][-1] == 1
    assert mine[1][0] == pytest.approx(right.mean())


def test_the_router_that_reads_all_states_ranks_tokens_best():
    """Section 6, item 9: held-out tokens, the same labels."""
    found = streams(ACCELERATOR, Objective(), deep)
    params = learned(ACCELERATOR, Objective())[0]
    right = found.fast_says[2] == found.says
    assert 0.1 < right.mean() < 0.98
    states = [jnp.asarray(x) for x in found.fast[1:3]]
    areas = {
        kind: accelerated_streams.auc(
            np.asarray(exit_router.score(kind, params["router_2"], states)), right
        )
        for kind in exit_router.ROUTERS
    }
    assert areas["arla"] > areas["linear"] > 0.5, areas


def test_routers_send_no_gradient_into_the_adapters():
    params = learned(ACCELERATOR, Objective())[0]
    found = []
    for weight in (0.0, 1.0):
        part = training.part(ACCELERATOR, Objective(router=weight))

        @jax.jit
        def gradient(params, batch, part=part):
            def loss(params):
                features = target_features.features(DEEP, deep(), batch, None, True)
                return part.loss(DEEP, params, features, batch, deep(), jax.random.key(0))[0]

            return jax.grad(loss)(params)

        found.append(gradient(params, batch_of(0)))
    for name in ("layers_0", "layers_1"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-7), found[0][name], found[1][name]
        )
    assert not jax.tree.leaves(found[0]["router_2"])[0].any()
    assert any(x.any() for x in jax.tree.leaves(found[1]["router_2"]))


EXPERTS = DEEP.replace(num_experts=8, experts_per_token=2, mlp_dim=32, family="mixtral")
AHEAD = AcceleratorConfig(1, rate=2.0, router_width=0)


def test_which_layers_are_predicted_and_when():
    assert training.routed_pairs(AHEAD, 4) == [(1, 2), (2, 3)]
    assert training.routed_pairs(AHEAD, 8) == [(1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 7)]
    capped = dataclasses.replace(AHEAD, max_lead=2)
    assert all(layer - i <= 2 for i, layer in training.routed_pairs(capped, 8))


def test_experts_are_predicted_and_loading_them_ahead_saves_time():
    """Section 6, item 7, on a model's own routing."""
    objective = Objective(gate=0.0, route=1.0, router=0.0)
    params, metrics = learned(AHEAD, objective, target=EXPERTS)
    tokens = jnp.asarray(tokens_of(10**6, 8))
    true, slow, fast = map(
        np.asarray, expert_prefetch.routes(AHEAD, EXPERTS, deep(EXPERTS), params, tokens)
    )
    joined = [x.reshape(-1, *x.shape[2:]) for x in (true, slow, fast)]
    said = expert_prefetch.predictors(AHEAD, *joined)
    hits = {name: expert_loading.recall(joined[0], found) for name, found in said.items()}
    order = ("oracle", "M2R2", "ordinary stream", "previous token", "on demand")
    assert sorted(hits, key=hits.__getitem__, reverse=True) == list(order), hits
    assert hits["oracle"] == 1 and hits["on demand"] == 0
    assert abs(hits["M2R2"] - metrics["recall"]) < 0.1
    seconds = [
        expert_loading.simulate(joined[0], said[name], MemoryTiers(4, load=0.4)).seconds
        for name in ("oracle", "M2R2", "on demand")
    ]
    assert seconds == sorted(seconds)
    # The routing itself does not depend on what is predicted.
    other = accelerated.init(AHEAD, EXPERTS, jax.random.key(9))
    again = expert_prefetch.routes(AHEAD, EXPERTS, deep(EXPERTS), other, tokens)[0]
    np.testing.assert_array_equal(again, true)
