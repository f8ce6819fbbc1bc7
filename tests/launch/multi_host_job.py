"""One process of a job that trains, then decodes: `python multi_host_job.py WORKDIR [STEP SIGNAL]`.

Where the others are is in the environment. With a step, the second process sends itself a signal
before the batch of that step, and every batch after it takes its time. At the end the first process
writes the final parameters and decoded rows into the work directory's parent.
"""

import dataclasses
import os
import pathlib
import sys
import time

import jax
import numpy as np

from decoding import generation, methods
from decoding.sampling import SamplingConfig
from models import distributed, sharding
from tests.training import resume_run
from training import artifacts, batches, language_model
from training.language_model import TrainConfig

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 1, 2], [3], [2, 2, 2, 2, 5]]


class SignalBefore:
    """Batches, of which one is when the second process sends itself a signal."""

    def __init__(self, inner, step: int, signal: int):
        self._inner, self._step, self._signal = inner, step, signal
        self._seen = 0
        self.get_state, self.set_state = inner.get_state, inner.set_state

    def __next__(self):
        self._seen += 1
        if self._seen == self._step and distributed.processes() == (2, 1):
            os.kill(os.getpid(), self._signal)
        if self._seen >= self._step:
            time.sleep(0.2)  # the signal is on its way, and steps are short
        return next(self._inner)


def run_config(**changes) -> TrainConfig:
    return dataclasses.replace(resume_run.CONFIG, **changes)


def train(config: TrainConfig, workdir: pathlib.Path, wrap=lambda batches: batches):
    """The whole run, with the documents in two shards."""
    sizes = {"batch_size": config.batch_size, "seq_len": config.sequence_length}
    documents = resume_run.documents(0, 30)
    return language_model.train(
        config,
        train_batches=wrap(batches.train_batches(documents, seed=3, shards=2, **sizes)),
        eval_batches=list(batches.eval_batches(resume_run.documents(1, 6), **sizes)),
        workdir=workdir,
    )


def make_slowly(work: pathlib.Path, result: pathlib.Path) -> None:
    """A result made of what lies in the work directory, which the second process reads later."""
    _, index = distributed.processes()
    if index == 0:
        work.mkdir(parents=True, exist_ok=True)
        (work / "log").write_text("made by")
    distributed.barrier("written")
    time.sleep(0.5 * index)
    result.mkdir(parents=True)
    (result / "text").write_text(f"{(work / 'log').read_text()} {index}")


def decode(params, mesh) -> list[list[int]]:
    """Token ids of PROMPTS' continuations, with parameters that are on the host."""
    model = resume_run.CONFIG.model
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(model, mesh))
    method = methods.build("prompt_lookup", {"target": model}, SamplingConfig(temperature=1.0))
    stop = generation.stop_config(model, 12, ())
    rows = generation.generate({"target": params}, PROMPTS, method, stop, seed=4, mesh=mesh)
    return [row.token_ids for row in rows]


def main(workdir: str, step: str = "", signal: str = "") -> None:
    place = pathlib.Path(workdir)
    cluster = distributed.from_environment(os.environ, connect_timeout=60, heartbeat_timeout=20)
    with distributed.job(cluster):

        def wrap(inner):
            return SignalBefore(inner, int(step), int(signal)) if step else inner

        artifacts.cached(place.parent / "kept" / "thing", make_slowly)
        trained = train(run_config(mesh=(jax.device_count(), 1)), place, wrap)
        params = distributed.on_host(trained.state.params)
        meshes = {"rows": (2, 1), "heads": (1, 2)} if jax.device_count() > 1 else {}
        found = {name: decode(params, sharding.make_mesh(*size)) for name, size in meshes.items()}
        if distributed.is_first():
            leaves = map(np.asarray, jax.tree.leaves(params))
            np.savez(place.parent / "params.npz", *leaves)
            np.savez(place.parent / "rows.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
