"""The one training loop: every pipeline hands it a jitted step and a state.

It owns what all of them need: resuming, the work directory, metrics, evaluation, checkpoints, the
progress bar, and stopping cleanly when a loss is not finite or the process is asked to end.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from models import distributed
from models.errors import InputError
from training import checkpoints, metric_writers

# Exit status of a run that SIGTERM ended, after its checkpoint was written: 128 + 15, which
# schedulers read as 'was terminated, may be started again'. It is what a process without a handler
# is reported to end with, so one rule of a launcher serves runs that saved and phases that had
# nothing to save.
TERMINATED = 143

# Fields of a run's config that say where it runs, which may change when it goes on.
_LAYOUT = ("mesh", "fsdp", "run.devices")

# Steps that are dispatched before the oldest must be done: enough to keep a device busy, few
# enough that their batches fit in memory.
_IN_FLIGHT = 4

State = Any
Metrics = Mapping[str, jax.Array]


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved, as JSON, and restored."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
      state: after the last step.
      step: steps done.
      metrics: the last evaluation's; empty without evaluation.
      seconds: wall-clock time in the loop, summed over all processes that worked on it.
    """

    state: State
    step: int
    metrics: dict[str, float]
    seconds: float


def run(
    step_fn: Callable[[State, Any], tuple[State, Metrics]],
    init_fn: Callable[[], State],
    *,
    template: State,
    batches: Batches,
    num_steps: int,
    workdir: str | pathlib.Path,
    config: Mapping[str, Any],
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    tokens_per_step: int = 0,
    log_every: int = 10,
    eval_every: int = 100,
    checkpoint_every: int = 100,
    keep_checkpoints: int = 2,
    description: str = "train",
) -> Result:
    """Trains for `num_steps`, going on from the newest checkpoint of `workdir` if it has one.

    A run that is killed at any moment and started again has the same metrics, bit for bit, as
    one that was not: state, data position and the lines of `metrics.jsonl` go back to the
    newest checkpoint. SIGTERM makes it write a checkpoint after the step that is running, and exit
    with status `TERMINATED`; of several processes any one may get the signal, and all of them
    stop after the same step. A run may go on with other processes and another mesh than before.

    Args:
      step_fn: one update; may donate its state. Returns the new state and scalar metrics, all
        of which must stay finite.
      init_fn: makes the state of step 0.
      template: tree of `jax.ShapeDtypeStruct` with shardings, like what `init_fn` returns.
      batches: see `Batches`; set back to the checkpoint's position when resuming.
      num_steps: updates in all.
      workdir: holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      config: everything that determines the run, as JSON can hold it.
      evaluate: metrics of a state, `eval_loss` among them; called every `eval_every` steps and
        after the last.
      tokens_per_step: for the throughput, tokens a second.
      log_every: steps between lines of metrics.
      eval_every, checkpoint_every: steps.
      keep_checkpoints: newest ones kept, beside the one of least `eval_loss`.
      description: in front of the progress bar.

    Raises:
      InputError: `workdir` is in use or belongs to another config; the disk is full; the
        batches ended; a metric or the state is not finite (the last good checkpoint is kept).
      SystemExit: with status `TERMINATED`, after SIGTERM.
    """
    with (
        checkpoints.lock(workdir),
        contextlib.closing(_open(workdir, config, keep_checkpoints)) as checkpointer,
    ):
        step, seconds, metrics = 0, 0.0, dict[str, float]()
        restored = checkpointer.restore(template)
        if restored is None:
            state = init_fn()
        else:
            step, state, metrics = restored.step, restored.state, restored.metrics
            seconds = restored.data_state["seconds"]
            batches.set_state(restored.data_state["batches"])
        if step == num_steps:
            return Result(state, step, metrics, seconds)
        begun = time.perf_counter() - seconds
        log = _Log(workdir, step, num_steps, log_every, tokens_per_step, description, checkpointer)
        with log, _termination() as asked_to_end:
            while step < num_steps:
                state, step_metrics = step_fn(state, _next(batches, step, num_steps))
                step += 1
                log.add(step, step_metrics)
                last, metrics = step == num_steps, {}
                terminated = asked_to_end()
                evaluating = evaluate is not None and (last or step % eval_every == 0)
                saving = last or terminated or step % checkpoint_every == 0
                if evaluating or saving:
                    log.drain()
                if evaluating:
                    assert evaluate is not None
                    metrics = dict(evaluate(state))
                    log.write(step, metrics)
                    log.drain()
                seconds = time.perf_counter() - begun
                if saving:
                    if not all_finite(state):
                        raise InputError(f"state: not finite at step {step}; {_kept(checkpointer)}")
                    position = {"batches": batches.get_state(), "seconds": seconds}
                    checkpointer.save(step, state, position, metrics)
                if evaluating or saving:
                    log.restart_clock()
                if terminated:
                    raise SystemExit(TERMINATED)
        return Result(state, step, metrics, seconds)


def _open(
    workdir: str | pathlib.Path, config: Mapping[str, Any], keep_last: int
) -> checkpoints.Checkpointer:
    checkpoints.claim(workdir, config, free=_LAYOUT)
    return checkpoints.Checkpointer(workdir, keep_last=keep_last)


def all_finite(tree: Any) -> bool:
    """Whether every floating-point number in a tree of arrays is finite."""
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return bool(_all_finite(floating))


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in arrays]))


def _next(batches: Batches, step: int, num_steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise InputError(f"batches: ended after {step} of {num_steps} steps") from None


def _kept(checkpointer: checkpoints.Checkpointer) -> str:
    steps = checkpointer.steps
    return f"stopped; the checkpoint of step {steps[-1]} is kept" if steps else "stopped"


class _Log:
    """Metrics on their way to the writers and the progress bar.

    Values stay on the device until a window of `log_every` steps is over, and are read while
    the next window runs, so that reading them never makes the device wait.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        step: int,
        num_steps: int,
        log_every: int,
        tokens_per_step: int,
        description: str,
        checkpointer: checkpoints.Checkpointer,
    ) -> None:
        self._workdir, self._log_every = workdir, log_every
        self._tokens_per_step, self._num_steps = tokens_per_step, num_steps
        self._checkpointer = checkpointer
        self._first = step + 1
        self._pending: list[tuple[int, Metrics]] = []
        with checkpoints.disk_errors("cannot write metrics", workdir):
            self._writer = metric_writers.create_writer(
                workdir, first_step=self._first, silent=not distributed.is_first()
            )
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=step,
            desc=description,
            unit="step",
            file=sys.stderr,
            # A log file gets a line now and then rather than a stream of redrawn bars.
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            disable=not distributed.is_first(),
        )
        self.restart_clock()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is None:
            with checkpoints.disk_errors("cannot write metrics", self._workdir):
                self._writer.close()
        else:  # the first error is the one to report
            with contextlib.suppress(Exception):
                self._writer.close()

    def restart_clock(self) -> None:
        """Leaves what happened since the last window out of the throughput."""
        self._clock = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was dispatched."""
        self._pending.append((step, metrics))
        if step == self._first:  # it was compiling
            self.drain()
        elif step % self._log_every == 0:
            self._read(len(self._pending) - self._log_every)
        if len(self._pending) > _IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - _IN_FLIGHT][1])

    def drain(self) -> None:
        """Reads everything and hands it to the operating system."""
        self._read(len(self._pending))
        with checkpoints.disk_errors("cannot write metrics", self._workdir):
            self._writer.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics that are already on the host."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise InputError(
                    f"{name}: {value} at step {step} is not finite; {_kept(self._checkpointer)}"
                )
        with checkpoints.disk_errors("cannot write metrics", self._workdir):
            self._writer.write_scalars(step, metrics)

    def _read(self, count: int) -> None:
        """Reads the oldest `count` pending steps."""
        if count <= 0:
            return
        window, self._pending = self._pending[:count], self._pending[count:]
        values = jax.device_get([metrics for _, metrics in window])
        now = time.perf_counter()
        rate = count * self._tokens_per_step / (now - self._clock)
        self._clock = now
        for (step, _), found in zip(window, values):
            if bad := [name for name, value in found.items() if not np.isfinite(value)]:
                raise InputError(
                    f"{bad[0]}: {found[bad[0]]} at step {step} is not finite; "
                    f"{_kept(self._checkpointer)}"
                )
            if step % self._log_every == 0 or step in (1, self._num_steps):
                line = {name: float(value) for name, value in found.items()}
                if self._tokens_per_step and step != self._first:
                    line["tokens_per_second"] = rate
                self.write(step, line)
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in line.items()}, refresh=False)
            self._bar.update(1)


@contextlib.contextmanager
def _termination() -> Iterator[Callable[[], bool]]:
    """Whether to end, to be asked after each step: the first SIGTERM says so.

    A second one ends the process at once. Where there are several processes, JAX handles the
    signal, and lets all of them know at the same step.
    """
    if jax.process_count() > 1:
        yield distributed.preempted
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event.is_set  # only the main thread may handle signals
        return

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)
