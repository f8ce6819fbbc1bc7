"""Training of hypernetworks: losses against plain sums, what stays frozen, what is learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import byte_level, hypernetwork, sharding, token_tables, transformer
from models.errors import InputError
from models.token_tables import Tables
from tests.models import random_models
from training import (
    fitting,
    hypernetwork_losses,
    tokenizer_sampling,
    tokenizer_transfer,
)
from training import hypernetwork as training
from training import tokenizers as tokenizer_training
from training.hypernetwork import HypernetworkTraining
from training.hypernetwork_losses import BaseModel
from training.tokenizer_sampling import Layout, SampledBatches, SamplerConfig

END = tokenizer_training.END_OF_TEXT
SAMPLER = SamplerConfig(
    batch_size=4, queue_batches=2, characters=120, vocab_mean=300, vocab_min=300, vocab_max=300,
    longest_run=1, stride=2,
)  # fmt: skip
TRAINING = HypernetworkTraining(
    identity_steps=120, identity_tokens=128, identity_rate=1e-2, steps=6, learning_rate=1e-4,
    warmup_steps=2, sequence_length=16, compute_dtype="float32", eval_batches=1, log_every=1,
    eval_every=6, checkpoint_every=4, seed=5,
)  # fmt: skip


@functools.cache
def documents():
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma_ray", "deltas", "epsilon", "größer", "x1", "returning", "def"]
    return [{"text": " ".join(rng.choice(words, 60)) + "\n    end"} for _ in range(8)]


@functools.cache
def base(kind: str = "untied") -> BaseModel:
    """Left to right with two tables, or bidirectional with one table and a bias."""
    special = (END, tokenizer_training.MASK)
    trained = tokenizer_training.train_bpe([d["text"] for d in documents()], 290, special)
    form = byte_level.normalise(trained)
    model = random_models.BASE.replace(vocab_size=form.vocab_size, eos_token_ids=(0,))
    if kind == "masked":
        model = model.replace(
            causal=False, tie_embeddings=True, mask_token_id=1, num_kv_heads=4, qkv_bias=True
        )
        bias = jnp.linspace(-1, 1, form.vocab_size)
        return BaseModel(model, random_models.params(model), form, bias)
    return BaseModel(model, random_models.params(model), form)


@functools.cache
def network(kind: str = "untied"):
    chosen = base(kind)
    return hypernetwork.for_model(
        chosen.config, num_heads=2, num_layers=1, max_surface=3, hidden_dim=32, mlp_dim=32,
        bias=chosen.bias is not None,
    )  # fmt: skip


def batches(kind: str = "untied") -> SampledBatches:
    chosen = base(kind)
    layout = Layout(chosen.form, 16, 0, 3, chosen.config.causal, END)
    return SampledBatches(documents(), SAMPLER, layout, seed=3)


def run(workdir, kind: str = "untied", **changes):
    stream = batches(kind)
    return training.train(
        network(kind), dataclasses.replace(TRAINING, **changes), base(kind),
        train_batches=stream, eval_batches=stream.held_out(documents(), 1), sampler=SAMPLER,
        workdir=workdir,
    )  # fmt: skip


@functools.cache
def frozen(kind: str = "untied"):
    return training._place_frozen(base(kind), sharding.make_mesh())


def test_the_first_stage_learns_the_rows_and_nothing_of_the_model_changes(tmp_path):
    """Sections 6.3 and 6.4 in small: cosine above 0.9, language model bit-identical."""
    before = jax.tree.map(np.asarray, base().params)
    found = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, before, base().params)
    assert found.step == 6 and np.isfinite(found.metrics["eval_bits_per_byte"])
    config, params = network(), found.state.params
    ids = np.arange(1, base().config.vocab_size)  # 0 is padding
    rows = hypernetwork.predict(config, params, base().source, ids[:, None])
    wanted = token_tables.split(base().config, base().source[ids])
    cosine = hypernetwork_losses.cosine(rows, wanted)
    fresh = training.start(config, base(), 5)
    plain = hypernetwork.predict(config, fresh, base().source, ids[:, None])
    assert cosine > 0.9 > hypernetwork_losses.cosine(plain, wanted) + 0.4
    # The source tokeniser through the hypernetwork: the model's loss within 10%.
    form = base().form
    swapped = tokenizer_transfer.with_hypernetwork(base(), form, config, params)
    batch = in_own_tokens()
    means = []
    for model in (base(), swapped):
        nats, weights = hypernetwork_losses.token_nats(
            model.config, model.params, model.tables, batch, jax.random.key(0)
        )
        means.append(float((nats * weights).sum() / weights.sum()))
    assert means[1] == pytest.approx(means[0], rel=0.1)
    # Frozen scalers are those of the start, the others moved.
    for name, value in fresh.items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), value, params[name])
        assert all(jax.tree.leaves(same)) == (name in ("in_scaler", "input_scaler")), name
    # A run that goes on from its checkpoints ends the same.
    again = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, params)


@functools.cache
def gradient(kind: str):
    chosen, model = base(kind), base(kind).config.replace(vocab_size=300)
    main = TRAINING.stage(model, 4, identity=False)
    loss = functools.partial(hypernetwork_losses.main_loss, network(kind), main, 0.5)
    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params = training.start(network(kind), chosen, 1)
    batch = training.put(next(batches(kind)), main, sharding.make_mesh())
    return both, params, batch


@pytest.mark.parametrize("kind", ["untied", "masked"])
def test_the_gradient_comes_through_the_frozen_model(kind):
    """Section 6.3: with the language model's loss alone, every part of the network learns."""
    both, params, batch = gradient(kind)
    (loss, metrics), slope = both(params, batch, jnp.int32(2), frozen(kind))
    told = {name: float(value) for name, value in metrics.items()}
    assert float(loss) == pytest.approx(told["nats"] + 0.5 * told["auxiliary"], rel=1e-5)
    model = base(kind).config.replace(vocab_size=300)
    predicted, tables = hypernetwork_losses.predicted_tables(
        network(kind), params, batch["surfaces"], frozen(kind)
    )
    # Section 6.5: special rows are the model's own.
    for mine, theirs in zip(tables, base(kind).tables, strict=True):
        if mine is not None:
            np.testing.assert_array_equal(mine[:2], theirs[:2])
    main = TRAINING.stage(model, 4, identity=False)
    nats, weights = hypernetwork_losses.token_nats(
        model, base(kind).params, tables, batch, fitting.step_key(main, 2)
    )
    assert told["nats"] == pytest.approx(float((nats * weights).sum() / weights.sum()), rel=1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(slope):
        still = path[0].key in ("in_scaler", "input_scaler", "fallback")
        assert (np.abs(leaf).max() == 0) == still, path
    # The auxiliary loss, token by token.
    total, count = np.zeros(2), 0
    pairs = list(zip(predicted[:2], base(kind).tables[:2], strict=True))
    for row, surface in enumerate(np.asarray(batch["surfaces"])):
        if row > 1 and (surface != 0).sum() == 1:
            count += 1
            for side, (mine, theirs) in enumerate(pairs):
                if mine is not None:
                    total[side] += ((mine[row] - theirs[surface[0]]) ** 2).sum()
    lengths = []
    for _, theirs in pairs:
        if theirs is not None:
            singles = [s[0] for r, s in enumerate(np.asarray(batch["surfaces"]))
                       if r > 1 and (s != 0).sum() == 1]  # fmt: skip
            lengths.append(np.linalg.norm(np.asarray(theirs)[singles], axis=1).mean())
    expected = np.mean([t / count / n for t, n in zip(total, lengths, strict=False)])
    assert count > 50 and told["auxiliary"] == pytest.approx(expected, rel=1e-4)


def test_rows_beyond_the_vocabulary_are_never_said():
    """Section 2.9: padding rows are masked, whatever their embeddings."""
    both, params, batch = gradient("untied")
    fewer = {**batch, "vocab_size": jnp.int32(280)}
    surfaces = np.asarray(batch["surfaces"]).copy()
    surfaces[280:] = 5
    noisy = {**fewer, "surfaces": jnp.asarray(surfaces)}
    targets = jnp.minimum(batch["targets"], 279)
    one, two = (
        both(params, {**b, "targets": targets, "tokens": jnp.minimum(batch["tokens"], 279)},
             jnp.int32(0), frozen())[0][1]["nats"]
        for b in (fewer, noisy)
    )  # fmt: skip
    assert one == two


def test_masked_models_are_asked_for_hidden_tokens_only():
    """15% of real tokens, most of them shown as the mask; others do not count."""
    model = base("masked").config.replace(vocab_size=300)
    wide = model.replace(embed_dim=16)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 300, (64, 16)).astype(np.int32)
    real = np.ones((64, 16), np.float32)
    real[:, 12:] = 0
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": real, "vocab_size": np.int32(300)}
    tables = Tables(jnp.asarray(rng.normal(size=(300, 16)), jnp.float32), None, jnp.zeros(300))
    nats, weights = hypernetwork_losses.token_nats(
        wide, base("masked").params, tables, jax.tree.map(jnp.asarray, batch), jax.random.key(0)
    )
    assert 0.1 < weights[:, :12].mean() < 0.2 and not weights[:, 12:].any()
    other = {**batch, "tokens": np.where(real > 0, tokens, 7)}
    again, _ = hypernetwork_losses.token_nats(
        wide, base("masked").params, tables, jax.tree.map(jnp.asarray, other), jax.random.key(0)
    )
    np.testing.assert_allclose(nats[:, :12], again[:, :12], atol=1e-5)  # padding is not seen


def in_own_tokens():
    """A batch in the model's own tokeniser."""
    form = base().form
    drawn = tokenizer_sampling.Drawn(form, 0.0, form.vocab_size)
    layout = Layout(form, 16, 0, 3, True, END)
    config = dataclasses.replace(SAMPLER, vocab_max=form.vocab_size, vocab_min=280)
    texts = [d["text"] for d in documents()[:4]]
    batch = tokenizer_sampling.encode(drawn, texts, layout, config)
    return jax.tree.map(jnp.asarray, batch)


def test_the_source_tokeniser_itself_loses_nothing_with_its_own_rows():
    """Section 6.4's swap with exact rows: the loss is the language model's."""
    size, batch = base().form.vocab_size, in_own_tokens()
    np.testing.assert_array_equal(batch["surfaces"][2:, 0], np.arange(2, size))
    nats, _ = hypernetwork_losses.token_nats(
        base().config, base().params, base().tables, batch, jax.random.key(0)
    )
    logits = transformer.apply(base().config, base().params, batch["tokens"]).logits
    law = jax.nn.log_softmax(logits)
    expected = -jnp.take_along_axis(law, batch["targets"][..., None], 2)[..., 0]
    np.testing.assert_allclose(nats, expected, atol=1e-4)


def test_on_a_mesh_the_update_is_the_same(tmp_path):
    whole = run(tmp_path / "one", identity_steps=0, steps=2)
    split = run(tmp_path / "four", identity_steps=0, steps=2, mesh=(2, 2))
    for mine, theirs in zip(
        jax.tree.leaves(whole.state.params), jax.tree.leaves(split.state.params), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=3e-4)


def test_schedules_are_the_published_ones():
    """Section 2.6: a linear rise in the first stage; a rise and a cosine to a tenth in the main."""
    from training import optimizers

    published = HypernetworkTraining()
    model = base().config.replace(max_position=128)
    for identity, peak, at in ((True, 3e-4, 10_000), (False, 6e-5, 10_000)):
        stage = published.stage(model, 128, identity=identity)
        rate = optimizers.schedule(stage.optimizer, stage.num_steps)
        assert float(rate(at)) == pytest.approx(peak, rel=1e-3)
        assert float(rate(at // 2)) == pytest.approx(peak / 2, rel=1e-3)
        assert (stage.optimizer.beta2, stage.optimizer.clip_norm) == (0.95, 0.1)
        assert (stage.optimizer.weight_decay, stage.optimizer.epsilon) == (0.01, 1e-8)
    assert float(rate(190_000)) == pytest.approx(6e-6, rel=1e-3)
    assert published.identity_steps + published.steps == 200_000


def test_mistakes_are_named():
    with pytest.raises(InputError, match="auxiliary_weight"):
        HypernetworkTraining(auxiliary_weight=-1)
    with pytest.raises(InputError, match="steps"):
        HypernetworkTraining(steps=0)
