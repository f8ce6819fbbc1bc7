"""Training of a hypernetwork that gives tokens of any tokeniser their embeddings (ZeTT).

arXiv 2405.07883, as in its official code. A first stage learns to give back the language model's
own rows; the main stage draws a tokeniser for every batch (`training.tokenizer_sampling`), puts
the predicted tables into the frozen language model, and follows the gradient of its loss. Each
stage is a run of its own: Adam's moments start again at the second, whose learning rate starts
from zero. `training.hypernetwork_recipes` keeps what was trained.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import byte_level, sharding, token_tables
from models import hypernetwork as network
from models.config import TransformerConfig
from models.errors import InputError
from models.hypernetwork import HypernetworkConfig
from training import fitting, loop, losses
from training.fitting import TrainConfig
from training.hypernetwork_losses import (
    BaseModel,
    distance,
    identity_loss,
    main_loss,
    overlapping,
    predicted_tables,
    token_nats,
)
from training.optimizers import OptimizerConfig
from training.tokenizer_sampling import SampledBatches, SamplerConfig

_ANCHORS = 2048
_ROWS = ("tokens", "targets", "loss_mask", "target_bytes")


def _adam(learning_rate: float, warmup_steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=0.01,
        clip_norm=0.1,
    )


@dataclasses.dataclass(frozen=True)
class HypernetworkTraining:
    """How a hypernetwork is trained; defaults are the published ones.

    Attributes:
      identity_steps: of the first stage; 0 for none.
      identity_tokens: rows that a step of it gives back, drawn without replacement.
      identity_rate: learning rate that it rises to.
      steps: of the main stage.
      learning_rate, warmup_steps: of the main stage: a linear rise, then a cosine to a tenth.
      sequence_length: tokens of a row [T].
      auxiliary_weight: alpha, of the distance of overlapping tokens' rows.
      compute_dtype: of the language model and the hypernetwork.
      remat: recompute activations in the backward pass.
      mesh: devices along (data, model).
      eval_batches: held-out batches, each in a tokeniser of its own.
      log_every, eval_every, checkpoint_every: steps.
      seed: of everything.
    """

    identity_steps: int = 10_000
    identity_tokens: int = 16_384
    identity_rate: float = 3e-4
    steps: int = 190_000
    learning_rate: float = 6e-5
    warmup_steps: int = 10_000
    sequence_length: int = 128
    auxiliary_weight: float = 0.5
    compute_dtype: str = "bfloat16"
    remat: bool = False
    mesh: tuple[int, int] = (1, 1)
    eval_batches: int = 16
    log_every: int = 100
    eval_every: int = 5000
    checkpoint_every: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.identity_steps < 0:
            raise InputError(f"identity_steps: {self.identity_steps} must be at least 0")
        for field in ("identity_tokens", "steps", "eval_batches"):
            if (value := getattr(self, field)) < 1:
                raise InputError(f"{field}: {value} must be at least 1")
        if self.auxiliary_weight < 0:
            raise InputError(f"auxiliary_weight: {self.auxiliary_weight} must be at least 0")

    def stage(self, model: TransformerConfig, rows: int, *, identity: bool) -> TrainConfig:
        """The `TrainConfig` of a stage, of batches of `rows`."""
        steps = self.identity_steps if identity else self.steps
        rate = self.identity_rate if identity else self.learning_rate
        return TrainConfig(
            model=model,
            optimizer=_adam(rate, steps if identity else self.warmup_steps),
            num_steps=steps,
            batch_size=rows,
            sequence_length=self.sequence_length,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            mesh=self.mesh,
            log_every=self.log_every,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
        )


class _NoBatches:
    """The identity stage reads nothing but the model."""

    def __next__(self) -> dict[str, np.ndarray]:
        return {}

    def get_state(self) -> None:
        return None

    def set_state(self, state: Any) -> None:
        del state


def train(
    config: HypernetworkConfig,
    training: HypernetworkTraining,
    base: BaseModel,
    *,
    train_batches: SampledBatches,
    eval_batches: Sequence[Mapping[str, np.ndarray]],
    sampler: SamplerConfig,
    workdir: str | pathlib.Path,
    identity: Mapping[str, Any] | None = None,
    description: str = "hypernetwork",
) -> loop.Result:
    """Trains a hypernetwork for a frozen language model, or goes on where `workdir` left off.

    Args:
      config, training: see there.
      base: see `BaseModel`; nothing of it changes.
      train_batches, eval_batches: from `tokenizer_sampling`, of `sampler`.
      sampler: gives the sizes of batches and vocabularies.
      workdir: holds a directory for each stage, as `training.loop.run` makes it.
      identity: what identifies data and model, as JSON can hold it.
      description: in front of the progress bar.

    Returns:
      The final `TrainState` in `Result.state`; `Result.metrics` has `eval_loss` (nats a token),
      `eval_bits_per_byte` and `eval_auxiliary` on held-out text in unseen tokenisers.

    Raises:
      InputError, SystemExit: as `fitting.fit`.
    """
    mesh = sharding.make_mesh(*training.mesh)
    frozen = _place_frozen(base, mesh)
    config = dataclasses.replace(config, dtype=training.compute_dtype)
    model = base.config.replace(vocab_size=sampler.vocab_max)
    main = training.stage(model, sampler.batch_size, identity=False)
    params = start(config, base, training.seed)
    recorded = {
        "network": dataclasses.asdict(config),
        "training": dataclasses.asdict(training),
        "sampler": dataclasses.asdict(sampler),
        "identity": dict(identity or {}),
    }
    shared: dict[str, Any] = {"recorded": recorded, "mesh": mesh, "frozen": frozen}
    if training.identity_steps:
        first = training.stage(base.config, sampler.batch_size, identity=True)
        loss = functools.partial(
            identity_loss, config, base.config, training.identity_tokens, first
        )
        params = fitting.fit(
            first,
            functools.partial(fitting.update, first, loss),
            prepare=lambda _, batch: {},
            train_batches=_NoBatches(),
            evaluate=None,
            workdir=pathlib.Path(workdir) / "identity",
            initial_params=params,
            description=f"{description}: identity",
            **shared,
        ).state.params
    loss = functools.partial(main_loss, config, main, training.auxiliary_weight)
    return fitting.fit(
        main,
        functools.partial(fitting.update, main, loss),
        prepare=lambda _, batch: put(batch, main, mesh),
        train_batches=train_batches,
        evaluate=_evaluator(config, main, eval_batches, mesh, frozen),
        workdir=pathlib.Path(workdir) / "main",
        initial_params=params,
        description=description,
        **shared,
    )


def start(config: HypernetworkConfig, base: BaseModel, seed: int) -> Any:
    """Random parameters with calibrated scalers, on surfaces of the source's own tokens."""
    tokens = base.form.tokens[: min(_ANCHORS, base.form.num_original)]
    anchors = byte_level.surfaces(
        base.form, tokens, pad_id=config.pad_id, max_length=config.max_surface
    ).ids

    @jax.jit
    def make(source: jax.Array, anchors: jax.Array) -> Any:
        fresh = network.init(config, jax.random.key(seed))
        return network.calibrate(config, fresh, source, anchors)

    return make(base.source.astype(jnp.float32), jnp.asarray(anchors))


def _place_frozen(base: BaseModel, mesh: Any) -> dict[str, Any]:
    """What the losses read and nothing changes, laid out over the mesh."""
    everywhere = NamedSharding(mesh, P())
    specials = np.array(sorted(base.form.specials.values()), np.int32)
    tables = jax.tree.map(lambda x: x.astype(jnp.float32), base.tables)
    placed = jax.device_put((tables, specials, base.source.astype(jnp.float32)), everywhere)
    params = jax.device_put(base.params, sharding.tree_shardings(base.params, mesh))
    tables, specials, source = placed
    return {
        "params": params, "tables": tables, "specials": specials, "source": source,
        "bias": tables.bias,
    }  # fmt: skip


def put(batch: Mapping[str, np.ndarray], config: TrainConfig, mesh: Any) -> dict[str, jax.Array]:
    """A sampled batch on the mesh: rows split over its data axis, surfaces everywhere."""
    placed = fitting.place(batch, config, mesh, fields=_ROWS, ids=("tokens", "targets"))
    everywhere = NamedSharding(mesh, P())
    rest = {name: value for name, value in batch.items() if name not in _ROWS}
    return placed | {
        name: jax.make_array_from_process_local_data(everywhere, np.asarray(value))
        for name, value in rest.items()
    }


def _evaluator(
    config: HypernetworkConfig,
    train: TrainConfig,
    batches: Sequence[Mapping[str, np.ndarray]],
    mesh: Any,
    frozen: Any,
) -> Callable[[Any], dict[str, float]]:
    """Held-out losses, in nats a token and bits a byte; noise of masks is the batch's own."""

    @jax.jit
    def measure(params: Any, batch: Mapping[str, jax.Array], key: jax.Array, frozen: Any) -> Any:
        found, tables = predicted_tables(config, params, batch["surfaces"], frozen)
        nats, weights = token_nats(
            fitting.compute_config(train), frozen["params"], tables, batch, key
        )
        same = overlapping(config, batch["surfaces"], frozen["specials"])
        rows = jnp.where(same, batch["surfaces"][:, 0], 0)
        wanted = token_tables.split(train.model, frozen["source"][rows])
        size = jnp.sum(batch["target_bytes"] * weights)
        away = distance(found, wanted, same.astype(jnp.float32))
        return jnp.sum(nats * weights), jnp.sum(weights), size, away

    def evaluate(state: Any) -> dict[str, float]:
        parts = []
        for number, batch in enumerate(batches):
            key = jax.random.key(number)
            parts.append(measure(state.params, put(batch, train, mesh), key, frozen))
        if not parts:
            raise InputError("eval_batches: there are none")
        nats, tokens, size, away = np.sum(np.array(jax.device_get(parts), np.float64), axis=0)
        return {
            "eval_loss": float(nats / tokens),
            "eval_bits_per_byte": losses.bits_per_byte(float(nats), float(size)),
            "eval_auxiliary": float(away / len(parts)),
        }

    return evaluate
