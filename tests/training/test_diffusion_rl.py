"""EBPO on a model of two blocks: bounds and gradients against loops, and a reward that rises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models import sharding, transformer
from models.config import TransformerConfig
from models.errors import InputError
from training import corruption, diffusion_rl, fitting, masked_diffusion, metric_writers
from training.diffusion_rl import Policy
from training.fitting import TrainConfig
from training.optimizers import OptimizerConfig

R, T, V, MASK, EOS = 4, 8, 8, 7, 6
MODEL = TransformerConfig(
    vocab_size=V, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
    max_position=16, family="llada", causal=False, mask_token_id=MASK, eos_token_ids=(EOS,),
    tie_embeddings=True,
)  # fmt: skip
CONFIG = TrainConfig(
    model=MODEL, optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, weight_decay=0.0),
    num_steps=8, batch_size=R, sequence_length=T, log_every=1, eval_every=8, checkpoint_every=3,
)  # fmt: skip
POLICY = Policy(group_size=2, block=4, timesteps=3, updates=2)
PARAMS = transformer.init(MODEL, jax.random.key(0))
OTHER = jax.tree.map(
    lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), PARAMS
)
KEY = jax.random.key(4)
PROMPTS = np.array([2, 3, 2, 1], np.int32)


def _batch():
    """Completions that end before, in and after the second block; the third has no end."""
    tokens = np.random.default_rng(0).integers(0, 6, (R, T)).astype(np.int32)
    for row, end in enumerate([5, 7, None, 3]):
        if end is not None:
            tokens[row, end:] = EOS
    batch = {"tokens": tokens, "prompt_lengths": PROMPTS}
    placed = masked_diffusion.put(batch, CONFIG, sharding.make_mesh())
    answers = jnp.asarray(diffusion_rl._answers(tokens, PROMPTS, MODEL))
    return {**placed, "changeable": answers, "advantages": jnp.array([1.0, -1.0, 0.5, -0.5]),
            "rewards": jnp.array([1.0, 0.0, 1.0, 0.0])}  # fmt: skip


BATCH = _batch()
bound = jax.jit(functools.partial(diffusion_rl.log_likelihood, CONFIG, POLICY))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(policy, params, batch):
    def loss(params):
        return diffusion_rl.loss_fn(CONFIG, policy, params, batch, KEY)

    return jax.value_and_grad(loss, has_aux=True)(params)


@jax.jit
def block_logits(params, tokens):
    """One row, of blocks of 4."""
    index = jnp.arange(T) // 4
    mask = (index[None, :] <= index[:, None])[None]
    return transformer.apply(MODEL, params, tokens[None], mask=mask).logits[0]


def test_answers_end_with_their_first_end_of_text():
    expected = np.zeros((R, T), bool)
    for row, (start, stop) in enumerate([(2, 6), (3, 8), (2, 8), (1, 4)]):
        expected[row, start:stop] = True
    np.testing.assert_array_equal(BATCH["changeable"], expected)


def test_bound_is_a_loop_over_copies_and_blocks():
    found = bound(PARAMS, BATCH, KEY)
    tokens = np.asarray(BATCH["tokens"])
    expected = np.zeros(R)
    for n in range(1, POLICY.timesteps + 1):
        share = jnp.full((R, 1), n / POLICY.timesteps)
        noise = jax.random.fold_in(KEY, n)
        noisy = corruption.mask(noise, tokens, BATCH["changeable"], share, MASK)
        masked = np.asarray(noisy.masked)
        if n == POLICY.timesteps:
            np.testing.assert_array_equal(masked, BATCH["changeable"])
        for row in range(R):
            for start in (0, 4):
                seen = tokens[row].copy()
                seen[start:] = np.asarray(noisy.tokens)[row, start:]
                log_p = special.log_softmax(np.asarray(block_logits(PARAMS, seen), np.float64), -1)
                for i in range(start, start + 4):
                    weight = 1 / (POLICY.timesteps * n / POLICY.timesteps)
                    expected[row] += weight * masked[row, i] * log_p[i, tokens[row, i]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected.max() < -1


def test_ratio_is_one_at_the_old_parameters():
    batch = {**BATCH, "old": bound(PARAMS, BATCH, KEY)}
    (loss, metrics), gradient = loss_and_gradient(POLICY, PARAMS, batch)
    assert float(metrics["log_ratio"]) < 1e-6
    assert float(metrics["clipped"]) == 0
    assert float(loss) == pytest.approx(-float(BATCH["advantages"].mean()), abs=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-4


def along(direction, size):
    """PARAMS moved a step along a direction."""
    return jax.tree.map(lambda x, d: x + size * d, PARAMS, direction)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradient_is_that_of_finite_differences(ratio):
    """Away from the old parameters, along random directions; no row is at the clip's edge."""
    policy = dataclasses.replace(POLICY, ratio=ratio, clip_low=0.9, clip_high=9.0)
    batch = {**BATCH, "old": bound(OTHER, BATCH, KEY)}
    (_, metrics), gradient = loss_and_gradient(policy, PARAMS, batch)
    assert float(metrics["log_ratio"]) > 1e-3
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda p, rng=rng: rng.normal(size=p.shape), PARAMS)
        direction = jax.tree.map(np.float32, direction)
        ahead, behind = (
            float(loss_and_gradient(policy, along(direction, size), batch)[0][0])
            for size in (2e-3, -2e-3)
        )
        products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), gradient, direction)
        expected = sum(jax.tree.leaves(products))
        assert (ahead - behind) / 4e-3 == pytest.approx(expected, rel=0.03, abs=2e-3)


def test_surrogate_is_clipped_on_the_side_that_pays():
    log_ratio = np.log([2.0, 2.0, 0.5, 0.5, 1.1])
    advantage = np.array([1.0, -1.0, 1.0, -1.0, 3.0])
    expected = -np.mean([1.2, -2.0, 0.5, -0.7, 3.3])
    found = diffusion_rl.surrogate(jnp.array(log_ratio), jnp.array(advantage), 0.3, 0.2)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_advantages_are_within_groups():
    rewards = np.array([1, 0, 0, 0, 5, 5, 5, 5], np.float32)
    first = (np.array([1, 0, 0, 0]) - 0.25) / np.std([1, 0, 0, 0])
    np.testing.assert_allclose(diffusion_rl.advantages(rewards, 4), [*first, 0, 0, 0, 0], rtol=1e-6)


def test_text_reward_reads_to_the_end_of_text():
    asked = []

    def is_right(answer, reference):
        asked.append((answer, reference))
        return answer == reference

    reward = diffusion_rl.text_reward(lambda ids: "".join(map(str, ids)), (EOS,), is_right)
    completions = np.array([[9, 1, 2, EOS, 3], [9, 9, 1, 1, 1]])
    references = np.array([[9, 1, 2, EOS, EOS], [9, 9, 1, EOS, EOS]])
    assert reward(completions, references, np.array([1, 2])).tolist() == [1.0, 0.0]
    assert asked == [("12", "12"), ("111", "1")]


class Batches:
    def __init__(self, stop_before=0):
        self._position, self._stop_before = 0, stop_before

    def __next__(self):
        self._position += 1
        if self._position == self._stop_before:
            raise KeyboardInterrupt
        tokens = np.full((R // POLICY.group_size, T), 3, np.int32)
        tokens[:, 0] = self._position % 5
        return {"tokens": tokens, "prompt_lengths": np.ones(len(tokens), np.int32)}

    def get_state(self):
        return {"position": self._position}

    def set_state(self, state):
        self._position = state["position"]


@jax.jit
def rollout(params, tokens, prompt_lengths, key):
    """Every masked token at once, sampled: the plainest policy."""
    del prompt_lengths
    logits = transformer.apply(MODEL, params, tokens).logits.at[..., MASK].set(-jnp.inf)
    drawn = jax.random.categorical(key, logits)
    return jnp.where(tokens == MASK, drawn, tokens)


def share_of_threes(completions, references, prompt_lengths):
    return np.mean(completions[:, 1:] == references[:, 1:], axis=1)


# Small embeddings: logits near zero, so that every token is tried at first.
START = jax.tree_util.tree_map_with_path(
    lambda path, x: 0.2 * x if "embedding" in jax.tree_util.keystr(path) else x, PARAMS
)


def train(workdir, config=CONFIG, **more):
    more = {"rollout": rollout, "reward": share_of_threes, "train_batches": Batches(),
            "eval_batches": None, "initial_params": START} | more  # fmt: skip
    return diffusion_rl.train(config, POLICY, workdir=workdir, **more)


def test_reward_rises_and_a_killed_run_goes_on_bit_identically(tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=60, checkpoint_every=25, eval_every=30)
    held_out = {"eval_batches": [next(Batches())]}
    result = train(tmp_path / "whole", config, **held_out)
    lines = metric_writers.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewards[:10]) < 0.3
    assert np.mean(rewards[-10:]) > 0.6
    assert result.metrics["eval_reward"] > 0.5
    assert int(result.state.step) == 60 * POLICY.updates
    ratios = [line["log_ratio"] for line in lines if "log_ratio" in line]
    assert max(ratios) > 1e-3  # of the second update on the same completions
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", config, train_batches=Batches(stop_before=40), **held_out)
    again = train(tmp_path / "broken", config, **held_out)
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)


def test_noise_of_a_step_is_its_own():
    keys = [fitting.step_key(CONFIG, jnp.int32(step)) for step in (0, 1)]
    first, second = (bound(PARAMS, BATCH, key) for key in keys)
    assert np.any(np.asarray(first) != np.asarray(second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "policy.group_size: 1 must be at least 2"),
        ({"timesteps": 0}, "policy.timesteps: 0 must be at least 1"),
        ({"block": 0}, "policy.block: 0 must be at least 1, or None"),
        ({"clip_low": 1.0}, "policy.clip_low: 1.0"),
        ({"clip_high": 0.0}, "policy.clip_high: 0.0"),
        ({"ratio": "tokens"}, "policy.ratio: 'tokens' .*did you mean 'token'"),
    ],
)
def test_policies_that_cannot_be_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(POLICY, **changes)


def test_rows_and_rewards_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InputError, match=r"batch_size: 3 must be a multiple of policy.group_size"):
        train(tmp_path, dataclasses.replace(CONFIG, batch_size=3))
    with pytest.raises(InputError, match=r"model.causal: True"):
        train(tmp_path, dataclasses.replace(CONFIG, model=MODEL.replace(causal=True)))
    with pytest.raises(InputError, match=r"reward: shape \(1,\) must be \(4,\)"):
        train(tmp_path, reward=lambda *_: np.zeros(1))
