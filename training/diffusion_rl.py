"""Reinforcement learning of masked diffusion models with EBPO (LLaDA2.1, arXiv 2602.08676).

A policy-gradient step needs the likelihood of whole completions, which a diffusion model does not
give. EBPO puts the evidence lower bound in its place: N noisy copies of a completion, each scored
in all blocks by one pass over [noisy ; clean]. Rewards are compared within a group of completions
of one prompt. How completions are drawn is the caller's: any decoding method will do.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import sharding
from models.config import TransformerConfig
from models.errors import InputError, check_choice
from training import corruption, fitting, loop, losses, masked_diffusion
from training.fitting import Batch, DeviceBatch, TrainConfig, TrainState

RATIOS = ("token", "sequence")

# Keys of the bound's noisy copies are numbered from 1.
_ROLLOUT = 0

# rollout(params, tokens=int [R, T], prompt_lengths=int [R], key=key) -> completions int [R, T];
# tokens are prompts followed by masks.
Rollout = Callable[..., jax.Array]
# reward(completions int [R, T], references int [R, T], prompt_lengths int [R]) -> float [R].
Reward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Policy:
    """EBPO; the paper names its parts but gives no numbers.

    Attributes:
      group_size: completions of a prompt, whose rewards are compared.
      block: tokens a block of the likelihood; None for the whole row as one block.
      timesteps: noisy copies N of a completion, at mask ratios 1/N, 2/N, ..., 1.
      clip_low, clip_high: the ratio is clipped to 1 - clip_low .. 1 + clip_high.
      ratio: 'token' divides the log-ratio by the completion's tokens, so that clipping does not
        depend on its length (GSPO, arXiv 2507.18071, equation 7); 'sequence' does not, as printed.
      updates: steps on each batch of completions; from the second on the ratio is not 1.
    """

    group_size: int = 4
    block: int | None = 16
    timesteps: int = 4
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: str = "token"
    updates: int = 2

    def __post_init__(self) -> None:
        check_choice("policy.ratio", self.ratio, RATIOS)
        for field, least in (("group_size", 2), ("timesteps", 1), ("updates", 1)):
            if (value := getattr(self, field)) < least:
                raise InputError(f"policy.{field}: {value} must be at least {least}")
        if self.block is not None and self.block < 1:
            raise InputError(f"policy.block: {self.block} must be at least 1, or None")
        if not 0 < self.clip_low < 1:
            raise InputError(f"policy.clip_low: {self.clip_low} must be above 0 and below 1")
        if self.clip_high <= 0:
            raise InputError(f"policy.clip_high: {self.clip_high} must be positive")


def train(
    config: TrainConfig,
    policy: Policy,
    *,
    rollout: Rollout,
    reward: Reward,
    initial_params: Any,
    train_batches: loop.Batches,
    eval_batches: Iterable[Batch] | None,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "reinforce",
) -> loop.Result:
    """Raises the reward of a model's completions, or goes on where `workdir` left off.

    Args:
      config: see `TrainConfig`; `num_steps` counts batches of prompts, `batch_size` rows, which are
        prompts times `policy.group_size`.
      policy: see `Policy`.
      rollout: draws completions; see `Rollout`. A function of its arguments alone.
      reward: of completions; see `Reward`.
      initial_params: the model to improve.
      train_batches: endless iterator with `get_state` and `set_state`, over batches of
        `training.canvas_batches` of `batch_size / group_size` rows, whose answers are the
        references.
      eval_batches: such batches, iterated from their start at every evaluation; None for none.
      workdir: as `masked_diffusion.train`.
      identity: what identifies data, rollout, reward and initial parameters, as JSON can hold it.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_reward`, and `eval_loss`,
      which is 1 less that.

    Raises:
      InputError: as `masked_diffusion.train`; rows that groups do not fill; several processes.
      SystemExit: `loop.TERMINATED`, after SIGTERM.
    """
    masked_diffusion.check(config)
    if config.batch_size % policy.group_size:
        raise InputError(
            f"batch_size: {config.batch_size} must be a multiple of policy.group_size "
            f"{policy.group_size}"
        )
    if jax.process_count() > 1:
        raise InputError(f"processes: {jax.process_count()}; rewards are computed in one")
    mesh = sharding.make_mesh(*config.mesh)
    likelihood = jax.jit(functools.partial(log_likelihood, config, policy))

    def complete(params: Any, batch: Batch, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        prompts = jax.device_put(_prompts(batch, config.model), sharding.batch_sharding(mesh))
        completions = np.asarray(rollout(params, **prompts, key=key))
        lengths = batch["prompt_lengths"]
        rewards = np.asarray(reward(completions, batch["tokens"], lengths), np.float32)
        if rewards.shape != lengths.shape:
            raise InputError(f"reward: shape {rewards.shape} must be {lengths.shape}")
        return completions, rewards

    def prepare(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        key = fitting.step_key(config, state.step)
        batch = {name: np.repeat(rows, policy.group_size, axis=0) for name, rows in batch.items()}
        completions, rewards = complete(state.params, batch, jax.random.fold_in(key, _ROLLOUT))
        rows = {
            "changeable": _answers(completions, batch["prompt_lengths"], config.model),
            "rewards": rewards,
            "advantages": advantages(rewards, policy.group_size),
        }
        scored = {
            **masked_diffusion.put({**batch, "tokens": completions}, config, mesh),
            **jax.device_put(rows, sharding.batch_sharding(mesh)),
        }
        return {**scored, "old": likelihood(state.params, scored, key)}

    def evaluate(state: TrainState) -> dict[str, float]:
        assert eval_batches is not None
        key = jax.random.key(config.seed)
        rewards = [
            complete(state.params, batch, jax.random.fold_in(key, index))[1]
            for index, batch in enumerate(eval_batches)
        ]
        if not rewards:
            raise InputError("eval_batches: there are none")
        mean = float(np.mean(np.concatenate(rewards)))
        return {"eval_reward": mean, "eval_loss": 1.0 - mean}

    return fitting.fit(
        config,
        functools.partial(_update, config, policy),
        prepare=prepare,
        train_batches=train_batches,
        evaluate=evaluate if eval_batches is not None else None,
        workdir=workdir,
        recorded={"policy": dataclasses.asdict(policy), "identity": identity},
        mesh=mesh,
        initial_params=initial_params,
        description=description,
    )


def log_likelihood(
    config: TrainConfig, policy: Policy, params: Any, batch: DeviceBatch, key: jax.Array
) -> jax.Array:
    """The evidence lower bound of each row's completion, float32 [R].

    sum_n w_n sum_i 1[i masked in z_n] log p(y_i | z_n, clean blocks before i's), t_n = n / N and
    w_n = 1 / (N t_n); z_n hides each token of the completion with probability t_n. The same key
    hides the same tokens, so that two models' bounds differ by their parameters alone.

    Args:
      config: gives the architecture.
      policy: gives blocks and timesteps.
      params: of the model.
      batch: tokens, segment_ids, positions int [R, T]; changeable bool [R, T], the completion.
      key: of the noise.
    """
    model = fitting.compute_config(config)
    tokens, mask_id = batch["tokens"], masked_diffusion.mask_id(model)

    def one(n: jax.Array) -> jax.Array:
        t = jnp.full((tokens.shape[0], 1), n / policy.timesteps)
        noise = jax.random.fold_in(key, n)
        noisy = corruption.mask(noise, tokens, batch["changeable"], t, mask_id)
        logits = masked_diffusion.predict(
            model, params, batch, noisy.tokens, policy.block, remat=config.remat
        )
        nats = losses.cross_entropy(logits, tokens)
        return -jnp.sum(jnp.where(noisy.masked, nats, 0.0), axis=1) / n

    # w_n = 1 / n with t_n = n / N.
    return jax.lax.map(one, jnp.arange(1, policy.timesteps + 1)).sum(axis=0)


def advantages(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Rewards less their group's mean, over its deviation (GRPO, arXiv 2402.03300): float32 [R].

    Zero where a group's rewards are equal. Groups are consecutive rows.
    """
    groups = rewards.reshape(-1, group_size).astype(np.float64)
    centred = groups - groups.mean(axis=1, keepdims=True)
    deviation = groups.std(axis=1, keepdims=True)
    scaled = np.where(deviation > 0, centred / np.maximum(deviation, 1e-6), 0.0)
    return scaled.reshape(-1).astype(np.float32)


def surrogate(
    log_ratio: jnp.ndarray, advantage: jnp.ndarray, clip_low: float, clip_high: float
) -> jnp.ndarray:
    """-mean min(rho A, clip(rho) A), float32 []; log_ratio and advantage [R]."""
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))


def loss_fn(
    config: TrainConfig, policy: Policy, params: Any, batch: DeviceBatch, key: jax.Array
) -> tuple[jax.Array, loop.Metrics]:
    """EBPO's loss on completions, and how far the ratios are from 1.

    `batch` as `log_likelihood`, with `advantages`, `rewards` and `old` (the bounds under the
    parameters that drew the completions, by the same key), float32 [R].
    """
    log_ratio = log_likelihood(config, policy, params, batch, key) - batch["old"]
    if policy.ratio == "token":
        log_ratio = log_ratio / jnp.maximum(batch["changeable"].sum(axis=1), 1)
    loss = surrogate(log_ratio, batch["advantages"], policy.clip_low, policy.clip_high)
    outside = (log_ratio < jnp.log1p(-policy.clip_low)) | (log_ratio > jnp.log1p(policy.clip_high))
    return loss, {
        "reward": batch["rewards"].mean(),
        "log_ratio": jnp.abs(log_ratio).mean(),
        "clipped": outside.mean(),
    }


def _update(
    config: TrainConfig, policy: Policy, state: TrainState, batch: DeviceBatch, frozen: None
) -> tuple[TrainState, loop.Metrics]:
    """`policy.updates` steps on one batch of completions; metrics of the last."""
    # The noise of the bounds is that of the step which drew the completions.
    key = fitting.step_key(config, state.step)
    schedule = dataclasses.replace(config, num_steps=config.num_steps * policy.updates)

    def loss(params: Any, batch: DeviceBatch, _: jax.Array, frozen: None) -> Any:
        return loss_fn(config, policy, params, batch, key)

    def one(state: TrainState, _: None) -> tuple[TrainState, loop.Metrics]:
        return fitting.update(schedule, loss, state, batch, frozen)

    state, metrics = jax.lax.scan(one, state, None, length=policy.updates)
    return state, jax.tree.map(lambda values: values[-1], metrics)


def text_reward(
    decode: Callable[[list[int]], str],
    eos_ids: tuple[int, ...],
    is_right: Callable[[str, str], bool],
) -> Reward:
    """A reward of 1 for an answer that is right, else 0.

    Args:
      decode: ids to text.
      eos_ids: an answer is read up to the first of these.
      is_right: of an answer's text and the reference's.
    """

    def read(row: np.ndarray, start: int) -> str:
        ids = row[start:].tolist()
        stop = next((at for at, token in enumerate(ids) if token in eos_ids), len(ids))
        return decode(ids[:stop])

    def reward(
        completions: np.ndarray, references: np.ndarray, prompt_lengths: np.ndarray
    ) -> np.ndarray:
        rows = zip(completions, references, prompt_lengths, strict=True)
        return np.array([is_right(read(a, n), read(b, n)) for a, b, n in rows], np.float32)

    return reward


def _prompts(batch: Batch, model: TransformerConfig) -> dict[str, np.ndarray]:
    """Rows whose answers are hidden."""
    tokens, lengths = batch["tokens"], batch["prompt_lengths"]
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    hidden = np.where(inside, tokens, masked_diffusion.mask_id(model)).astype(np.int32)
    return {"tokens": hidden, "prompt_lengths": lengths.astype(np.int32)}


def _answers(
    tokens: np.ndarray, prompt_lengths: np.ndarray, model: TransformerConfig
) -> np.ndarray:
    """bool [R, T]: from behind the prompt through the first end-of-text."""
    behind = np.arange(tokens.shape[1]) >= prompt_lengths[:, None]
    ends = np.isin(tokens, model.eos_token_ids) & behind
    return behind & (np.cumsum(ends, axis=1) - ends == 0)
