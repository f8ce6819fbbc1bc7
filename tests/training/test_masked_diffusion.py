"""Masked diffusion: the vectorised loss against loops, runs that resume, a model that answers."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models import hf_checkpoint, sharding, transformer
from models.config import TransformerConfig
from models.errors import InputError
from models.tokenizer import Tokenizer
from training import base_models, corruption, fitting, masked_diffusion, metric_writers
from training.fitting import TrainConfig
from training.masked_diffusion import Editing, Objective
from training.optimizers import MuonConfig, OptimizerConfig

B, T, V, MASK, EOS = 4, 12, 32, 31, 30
MODEL = TransformerConfig(
    vocab_size=V, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
    max_position=32, family="llada", causal=False, mask_token_id=MASK, eos_token_ids=(EOS,),
    tie_embeddings=True,
)  # fmt: skip
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
    num_steps=6,
    batch_size=B,
    sequence_length=T,
    log_every=1,
    eval_every=3,
    checkpoint_every=3,
)
# Blocks of two sizes, wrong tokens and two turns: everything that draws noise.
EVERYTHING = Objective(
    mask_ratio=(0.3, 0.8),
    weighting="mean",
    block_schedule=((0, 12), (4, 3)),
    editing=Editing(corruption=0.5, turns=2),
    confidence_weight=0.5,
)


def canvas_batch(seed, lengths=(2, 5), rows=B):
    """Prompts of some length; the answer repeats the prompt, then comes end-of-text."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(lengths[0], lengths[1] + 1, rows).astype(np.int32)
    tokens = np.full((rows, T), EOS, np.int32)
    for row, length in enumerate(prompts):
        tokens[row, :length] = tokens[row, length : 2 * length] = rng.integers(0, 20, length)
    return {"tokens": tokens, "prompt_lengths": prompts, "answer_lengths": prompts + 1}


def packed_rows():
    """Two documents a row, and padding at the end of some: as `masked_diffusion.put` gives them."""
    rng = np.random.default_rng(9)
    segments, positions = np.zeros((2, B, T), np.int32)
    for row, (first, end) in enumerate([(5, 12), (7, 12), (4, 10), (8, 11)]):
        segments[row, :first], segments[row, first:end] = 1, 2
        positions[row, :first], positions[row, first:end] = np.arange(first), np.arange(end - first)
    tokens = rng.integers(0, 30, (B, T)).astype(np.int32) * (segments > 0)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": positions,
        "changeable": segments > 0,
    }


class Batches:
    """Endless, different batches; its position is a number."""

    def __init__(self, stop_before=0, **options):
        self._position, self._stop_before, self._options = 0, stop_before, options

    def __next__(self):
        self._position += 1
        if self._position == self._stop_before:
            raise KeyboardInterrupt
        return canvas_batch(self._position, **self._options)

    def get_state(self):
        return {"position": self._position}

    def set_state(self, state):
        self._position = state["position"]


def train(workdir, objective=EVERYTHING, config=CONFIG, **more):
    more.setdefault("train_batches", Batches())
    more.setdefault("eval_batches", [canvas_batch(1000), canvas_batch(1001)])
    return masked_diffusion.train(config, objective, workdir=workdir, **more)


def curve(workdir):
    """Every line of metrics, floats exactly, without what depends on the clock."""
    lines = metric_writers.read_metrics(workdir / "metrics.jsonl")
    return [
        {k: float(v).hex() for k, v in line.items() if k != "tokens_per_second"} for line in lines
    ]


PARAMS = transformer.init(MODEL, jax.random.key(3))
predict = jax.jit(functools.partial(masked_diffusion.predict, MODEL), static_argnames=("remat",))


@jax.jit
def full_logits(params, tokens, valid):
    """A row of at most T tokens that all see each other."""
    mask = jnp.broadcast_to(valid[:, None, :], (1, T, T))
    return transformer.apply(MODEL, params, tokens, mask=mask).logits


@jax.jit
def blockwise_logits(params, tokens, valid, block):
    """A row of at most T tokens that see their own and earlier blocks."""
    index = jnp.arange(T) // block
    mask = (index[None, :] <= index[:, None]) & valid[:, None, :]
    return transformer.apply(MODEL, params, tokens, mask=mask).logits


def padded(tokens):
    return np.pad(tokens, (0, T - len(tokens)))[None], np.arange(T)[None] < len(tokens)


@pytest.mark.parametrize("block", [3, 5])
def test_one_pass_over_noisy_and_clean_is_a_pass_for_each_block(block):
    """Block k of a document: clean tokens before it, its own noisy tokens, nothing after."""
    batch = packed_rows()
    noisy = corruption.mask(
        jax.random.key(1), batch["tokens"], batch["changeable"], jnp.full((B, 1), 0.5), MASK
    )
    found = predict(PARAMS, batch, noisy.tokens, jnp.int32(block))
    total = expected_total = 0.0
    for row, segment in itertools.product(range(B), (1, 2)):
        at = np.flatnonzero(batch["segment_ids"][row] == segment)
        clean = batch["tokens"][row, at]
        hidden = np.asarray(noisy.tokens)[row, at]
        for start in range(0, len(at), block):
            stop = min(start + block, len(at))
            seen = np.concatenate([clean[:start], hidden[start:stop]])
            logits = blockwise_logits(PARAMS, *padded(seen), jnp.int32(block))
            expected = np.asarray(logits, np.float64)[0, start:stop]
            np.testing.assert_allclose(found[row, at[start:stop]], expected, atol=1e-5)
            masked = np.asarray(noisy.masked)[row, at[start:stop]]
            log_p = special.log_softmax(expected, -1)[np.arange(stop - start), clean[start:stop]]
            expected_total -= (log_p * masked).sum()
    log_p = jax.nn.log_softmax(found, -1)
    picked = np.take_along_axis(np.asarray(log_p), batch["tokens"][..., None], -1)[..., 0]
    total = -(picked * noisy.masked).sum()
    assert total == pytest.approx(expected_total, rel=1e-5)


def test_the_whole_row_as_one_block_is_full_attention():
    batch = packed_rows()
    noisy = np.where(np.arange(T) % 3 == 0, MASK, batch["tokens"])
    whole = predict(PARAMS, batch, noisy, None)
    inside = batch["changeable"]
    one_block = predict(PARAMS, batch, noisy, jnp.int32(T))
    np.testing.assert_allclose(one_block[inside], whole[inside], atol=1e-5)
    for row, segment in itertools.product(range(B), (1, 2)):
        at = np.flatnonzero(batch["segment_ids"][row] == segment)
        alone = full_logits(PARAMS, *padded(noisy[row, at]))
        np.testing.assert_allclose(whole[row, at], alone[0, : len(at)], atol=1e-5)


@pytest.mark.parametrize("block", [None, 3])
def test_documents_leak_nothing_into_each_other(block):
    """The gradient of one document's loss in the other's embeddings is exactly zero."""
    batch = packed_rows()
    tokens = np.where(batch["segment_ids"] == 2, batch["tokens"] % 10, batch["tokens"] % 10 + 10)
    batch = batch | {"tokens": tokens}
    noisy = np.where(np.arange(T) % 2 == 0, MASK, tokens)

    @jax.jit
    def gradient(params, segment):
        def loss(params):
            logits = masked_diffusion.predict(
                # Untied, so that the embedding is what is read and nothing else.
                MODEL.replace(tie_embeddings=False),
                params,
                batch,
                noisy,
                block,
            )
            return jnp.sum(jax.nn.logsumexp(logits, -1) * (batch["segment_ids"] == segment))

        return jax.grad(loss)(params)["embedder"]["embedding"]

    params = transformer.init(MODEL.replace(tie_embeddings=False), jax.random.key(0))
    first, second = (np.abs(np.asarray(gradient(params, s))).sum(-1) for s in (1, 2))
    assert np.all(first[:10] == 0)  # ids 0-9 are document 2's, 10-19 document 1's
    assert np.all(second[10:20] == 0)
    assert first[10:20].max() > 1e-4
    assert second[:10].max() > 1e-4


def _mean(values, mask):
    return (values * mask).sum() / max(mask.sum(), 1)


def test_loss_is_that_of_a_loop_over_turns():
    """Masks, wrong tokens, the model's own fills and the confidence term, written out."""
    batch = {k: np.asarray(v) for k, v in _placed(canvas_batch(1)).items()}
    loss, metrics = loss_fn(EVERYTHING, PARAMS, batch, 7)
    key = fitting.step_key(CONFIG, jnp.int32(7))
    probability = corruption.mask_probabilities(key, B, (0.3, 0.8), 1e-3)
    noisy = corruption.mask(key, batch["tokens"], batch["changeable"], probability, MASK)
    noisy = corruption.corrupt(key, noisy, 0.5, V, MASK)
    total = 0.0
    for turn in range(2):
        logits = np.asarray(predict(PARAMS, batch, noisy.tokens, jnp.int32(3)), np.float64)
        log_p = special.log_softmax(logits, -1)
        nats = -np.take_along_axis(log_p, batch["tokens"][..., None], -1)[..., 0]
        entropy = -(np.exp(log_p) * log_p).sum(-1)
        right = np.asarray(noisy.masked) & (logits.argmax(-1) == batch["tokens"])
        total += _mean(nats, np.asarray(noisy.masked))
        total += _mean(nats, np.asarray(noisy.corrupted)) + 0.1 * _mean(
            nats, np.asarray(noisy.kept)
        )
        total += 0.5 * _mean(entropy, right)
        if turn == 0:
            logits[..., MASK] = -np.inf
            fills = logits.argmax(-1).astype(np.int32)
            noisy = corruption.fill(key, noisy, fills, batch["tokens"], 0.5)
    assert np.asarray(noisy.corrupted).any()
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert {"denoising", "editing", "confidence", "second_editing"} <= set(metrics)


@functools.partial(jax.jit, static_argnums=0)
def loss_fn(objective, params, batch, step):
    return masked_diffusion.loss_fn(CONFIG, objective, params, batch, step)


def _placed(batch, config=CONFIG):
    return masked_diffusion.put(batch, config, sharding.make_mesh())


def test_prompts_are_neither_hidden_nor_scored_and_padding_is():
    batch = _placed(canvas_batch(1))
    lengths = canvas_batch(1)["prompt_lengths"]
    np.testing.assert_array_equal(batch["changeable"], np.arange(T) >= lengths[:, None])
    packed = packed_rows()
    placed = _placed({k: v for k, v in packed.items() if k != "changeable"})
    np.testing.assert_array_equal(placed["changeable"], packed["segment_ids"] > 0)


def test_llada_loss_bounds_what_exact_enumeration_gives():
    """The expected loss over all masks of a 3-token answer, by t on a grid and every subset."""
    tokens = canvas_batch(2)["tokens"]
    changeable = np.zeros((B, T), bool)
    changeable[:, 2:5] = True
    batch = _placed(canvas_batch(2)) | {"changeable": jnp.asarray(changeable)}
    objective = Objective()
    steps = np.arange(600)
    sampled = jax.jit(jax.vmap(lambda s: masked_diffusion.loss_fn(
        CONFIG, objective, PARAMS, batch, s)[0]))(steps)  # fmt: skip
    exact = np.zeros(B)
    for subset in itertools.product((False, True), repeat=3):
        masked = np.zeros((B, T), bool)
        masked[:, 2:5] = subset
        logits = predict(PARAMS, batch, np.where(masked, MASK, tokens), None)
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], -1)
        nats = -(log_p[..., 0] * masked).sum(1)
        k = sum(subset)
        t = (np.arange(20000) + 0.5) / 20000
        p = (1 - 1e-3) * t + 1e-3
        exact += nats * (p ** (k - 1) * (1 - p) ** (3 - k)).mean() if k else 0.0
    assert np.mean(sampled) == pytest.approx(exact.mean() / 3, rel=0.06)


def test_block_sizes_follow_their_schedule():
    objective = Objective(block_schedule=((0, 1), (10, 4), (20, 16)))
    found = [int(masked_diffusion.block_size(objective, step)) for step in (0, 9, 10, 19, 20, 99)]
    assert found == [1, 1, 4, 4, 16, 16]
    assert masked_diffusion.block_size(Objective(), 5) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(workdir)


def test_a_run_that_was_killed_goes_on_bit_identically(run, tmp_path):
    workdir, result = run
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, train_batches=Batches(stop_before=5))
    again = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)
    assert curve(tmp_path) == curve(workdir)
    losses = [line["loss"] for line in curve(workdir) if "loss" in line]
    assert len(set(losses)) == 6
    assert 0 < result.metrics["eval_loss"] < 10
    assert 0 <= result.metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize("fsdp", [False, True])
def test_mesh_of_eight_devices_has_the_same_losses(run, tmp_path, fsdp):
    workdir, result = run
    config = dataclasses.replace(CONFIG, mesh=(4, 2), fsdp=fsdp)
    spread = train(tmp_path, config=config)
    found, expected = (
        [float.fromhex(line["loss"]) for line in curve(path) if "loss" in line]
        for path in (tmp_path, workdir)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert spread.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-4)


def test_training_starts_from_given_parameters_and_leaves_them_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, initial_params=PARAMS, train_batches=Batches(stop_before=2))
    loss, _ = loss_fn(EVERYTHING, PARAMS, _placed(canvas_batch(1)), 0)
    assert float.fromhex(curve(tmp_path)[0]["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_what_lies_behind_a_cut_is_padding():
    batch = _placed(canvas_batch(1))
    cut = masked_diffusion.truncate(batch, jax.random.key(0), 1.0)
    lengths = np.asarray(cut["segment_ids"]).sum(axis=1)
    assert 0 < lengths.min() < T
    inside = np.arange(T) < lengths[:, None]
    np.testing.assert_array_equal(cut["segment_ids"], inside)
    np.testing.assert_array_equal(cut["changeable"], inside & np.asarray(batch["changeable"]))
    assert masked_diffusion.truncate(batch, jax.random.key(0), 0.0) is batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "elbow"}, "objective.weighting: 'elbow' .*did you mean 'elbo'"),
        ({"mask_ratio": (0.8, 0.3)}, r"objective.mask_ratio: \(0.8, 0.3\) must be a band"),
        ({"floor": 0.0}, "objective.floor: 0.0 must be above 0"),
        ({"truncated": 2.0}, "objective.truncated: 2.0"),
        ({"confidence_weight": -1.0}, "objective.confidence_weight: -1.0"),
        ({"block_schedule": ((1, 4),)}, "objective.block_schedule: .* rising from 0"),
        ({"block_schedule": ((0, 0),)}, "objective.block_schedule: .* sizes at least 1"),
    ],
)
def test_objectives_that_cannot_be_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        Objective(**changes)


def test_models_and_batches_that_do_not_fit_are_named(tmp_path):
    def refuse(message, model=None, **more):
        config = CONFIG if model is None else dataclasses.replace(CONFIG, model=model)
        with pytest.raises(InputError, match=message):
            train(tmp_path, config=config, eval_batches=None, **more)

    refuse("model.causal: True is not for this pipeline", MODEL.replace(causal=True))
    refuse("model.mask_token_id: None", MODEL.replace(mask_token_id=None))
    for field in ("corruption", "remask", "kept_weight", "turns"):
        with pytest.raises(InputError, match=f"editing.{field}: -1"):
            Editing(**{field: -1})
    batch = canvas_batch(1)
    wrong = [
        ("batch.tokens: missing", {}),
        ("batch.prompt_lengths: shape", batch | {"prompt_lengths": np.zeros(B + 1, np.int32)}),
        ("batch.segment_ids: missing", {"tokens": batch["tokens"]}),
        ("batch.tokens: id 32 is out of range", batch | {"tokens": batch["tokens"] + 2}),
    ]
    for message, spoiled in wrong:
        with pytest.raises(InputError, match=message):
            _placed(spoiled)


# A named model, tiny, from its recipe to a directory that decodes.

TINY = {
    "dataset_options": {"size": 300, "levels": [6]},
    "vocab_size": 280,
    "eval_batches": 2,
    "train.num_steps": 4,
    "train.batch_size": 4,
    "train.sequence_length": 64,
    "train.optimizer": OptimizerConfig(),
    "train.model.num_layers": 1,
    "train.model.embed_dim": 16,
    "train.model.num_heads": 2,
    "train.model.num_kv_heads": 2,
    "train.model.head_dim": 8,
    "train.model.mlp_dim": 32,
    "train.model.max_position": 64,
}


def test_named_models_are_llada_directories(tmp_path):
    overrides = {**TINY, **{f"start.{field}": value for field, value in TINY.items()}}
    made = base_models.ensure("arithmetic_mdlm", cache_dir=tmp_path, overrides=overrides)
    start = base_models.ensure("arithmetic_mdlm_short", cache_dir=tmp_path, overrides=TINY)
    raw = json.loads((made / "config.json").read_text())
    assert raw["model_type"] == "llada"
    config, params = hf_checkpoint.load(made)
    tokenizer = Tokenizer.from_directory(made, config)
    assert not config.causal
    assert tokenizer.encode("<|endoftext|><|mask|>") == [
        *config.eos_token_ids,
        raw["mask_token_id"],
    ]
    assert config.mask_token_id == raw["mask_token_id"]
    summary = json.loads((made / base_models.SUMMARY_FILE).read_text())
    assert summary["recipe"]["objective"]["weighting"] == "mean"
    assert summary["start"] == start.name
    first = json.loads((start / base_models.SUMMARY_FILE).read_text())
    # Four steps of warming up change little: it went on from where the other one ended.
    assert summary["eval_loss"] == pytest.approx(first["eval_loss"], rel=0.1)
    assert (made / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    assert tokenizer.decode(decode_one_a_step(config, params, tokenizer.encode("1+2"), 16)) != ""


apply = jax.jit(transformer.apply, static_argnums=0)


def test_models_to_compare_share_their_tokeniser_and_size(tmp_path):
    changes = {name: TINY[name] for name in ("dataset_options", "vocab_size")}
    names = [name for name in base_models.RECIPES if name.startswith("arithmetic_mdlm")]
    names += ["arithmetic_ar", "arithmetic_block_mdlm", "arithmetic_edit_mdlm"]
    recipes = [base_models.recipe(name, changes) for name in names]
    assert len({base_models._ensure_tokenizer(recipe, tmp_path) for recipe in recipes}) == 1
    assert len({recipe.train.model.num_params() for recipe in recipes}) == 1


def decode_one_a_step(config, params, prompt, canvas):
    """The plainest decoder: each step writes the most confident masked token."""
    tokens = np.full((1, canvas), config.mask_token_id)
    tokens[0, : len(prompt)] = prompt
    while (tokens == config.mask_token_id).any():
        logits = np.array(apply(config, params, tokens).logits, np.float64)[0]
        logits[:, config.mask_token_id] = -np.inf
        probabilities = special.softmax(logits, -1)
        confidence = np.where(tokens[0] == config.mask_token_id, probabilities.max(-1), -1.0)
        tokens[0, confidence.argmax()] = logits[confidence.argmax()].argmax()
    return tokens[0, len(prompt) :].tolist()


def test_a_tiny_model_learns_to_repeat_its_prompt(tmp_path):
    """Trained for seconds, decoded a token at a time: the whole of the pipeline has to be right."""
    model = MODEL.replace(num_layers=1)
    config = dataclasses.replace(
        CONFIG, model=model, optimizer=MuonConfig(learning_rate=0.02, warmup_steps=20),
        num_steps=200, batch_size=32, log_every=100, checkpoint_every=200,
    )  # fmt: skip
    data = Batches(lengths=(4, 4), rows=32)
    result = train(tmp_path, Objective(), config, train_batches=data, eval_batches=None)
    tokens = canvas_batch(2000, lengths=(4, 4))["tokens"]
    answers = [decode_one_a_step(model, result.state.params, row[:4].tolist(), T) for row in tokens]
    assert np.mean(np.array(answers) == tokens[:, 4:]) > 0.9
