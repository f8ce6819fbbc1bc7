"""Runs of models whose parameters fit one device: copies on a data axis, each with its rows.

What the image pipelines share on top of `training.loop`. A step is a pure function of a state and
a batch; on a mesh XLA derives the rest, so the numbers do not depend on the number of devices.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models import distributed, sharding
from models.errors import InputError
from training import loop

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a run is and what it leaves.

    Attributes:
      num_steps: batches in all.
      batch_size: rows a batch, over all processes.
      devices: along the data axis.
      log_every, eval_every, checkpoint_every: steps.
      keep_checkpoints: newest ones kept, beside the one of least evaluation loss.
      seed: of the initial parameters and of every draw in a step.
    """

    num_steps: int = 1000
    batch_size: int = 32
    devices: int = 1
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 200
    keep_checkpoints: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "seed" and (value := getattr(self, field.name)) < 1:
                raise InputError(f"run.{field.name}: {value} must be at least 1")
        if self.batch_size % self.devices:
            raise InputError(
                f"run.batch_size: {self.batch_size} must be a multiple of run.devices, "
                f"{self.devices}"
            )


def run(
    config: RunConfig,
    step: Callable[[Any, Mapping[str, jax.Array]], tuple[Any, loop.Metrics]],
    init: Callable[[], Any],
    *,
    batches: loop.Batches,
    settings: Mapping[str, Any],
    workdir: str | pathlib.Path,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    tokens_per_step: int = 0,
    description: str = "train",
) -> loop.Result:
    """`training.loop.run` with `step` jitted, its state replicated and its batch split by rows.

    Args:
      config: see `RunConfig`.
      step: (state, batch) -> (state, scalar metrics), not jitted; the state is donated. It is
        compiled once for every shape of batch.
      init: makes the state of step 0.
      batches: dicts of arrays of this process's rows.
      settings: everything that determines the run beside `config`, the data's identity included.
      workdir, evaluate, tokens_per_step, description: as in `training.loop.run`.

    Raises:
      InputError: as `training.loop.run`; fewer devices than asked for; several processes.
      SystemExit: `training.loop.TERMINATED`, after SIGTERM.
    """
    if distributed.several():
        raise InputError("processes: image models train in one process, on all its devices")
    mesh = sharding.make_mesh(config.devices)
    everywhere = NamedSharding(mesh, P())
    shapes = jax.eval_shape(init)
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    update = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, None))
    return loop.run(
        lambda state, batch: update(state, put(batch, mesh)),
        jax.jit(init, out_shardings=everywhere),
        template=template,
        batches=batches,
        num_steps=config.num_steps,
        workdir=workdir,
        config={"run": dataclasses.asdict(config), **settings},
        evaluate=evaluate,
        tokens_per_step=tokens_per_step,
        log_every=config.log_every,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        description=description,
    )


def put(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows on the mesh, split over its data axis."""
    rows, everywhere = sharding.batch_sharding(mesh), NamedSharding(mesh, P())

    def one(value: np.ndarray) -> jax.Array:
        place = rows if np.ndim(value) else everywhere
        return jax.make_array_from_process_local_data(place, np.asarray(value))

    return {name: one(value) for name, value in batch.items()}
