"""Runs a command on every worker of a Cloud TPU VM, from this checkout, with the gcloud program.

    python -m launch.tpu_vm --name=NAME --zone=us-central1-a --accelerator_type=v5litepod-16 \\
        --runtime_version=v2-alpha-tpuv5-lite --delete -- \\
        python -m experiments.run --config=experiments/configs/rsd.py --workdir=runs/rsd

Creates the TPU VM or uses the one of that name (with --queued, through a queued resource), copies
the checkout there, installs it with the extra 'tpu', starts the same command on all workers (JAX
finds the others by itself), collects each worker's output and worker 0's `runs`, and with --delete
deletes the VM, whatever happened. --dry_run prints the commands instead.

A VM that is taken away, and a command that ends with a status after which it may be started again
(see `launch.exit_status`), is started again, --restarts times at most. What has to outlive the VM,
such as a work directory with its checkpoints, belongs into a bucket that --setup mounts.

Exit status: 0; 1 when a worker failed; 143 when the last restart was preempted too; 2 for bad
input, credentials or a project that are missing, and whatever else gcloud refuses.
"""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments import cli, sweep_workers
from launch import exit_status, packaging, tpu_commands
from models.errors import InputError

FLAGS = flags.FlagValues()


def _text(name: str, text: str, default: str | None = None) -> flags.FlagHolder:
    return flags.DEFINE_string(name, default, text, flag_values=FLAGS)


def _switch(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE_bool(name, False, text, flag_values=FLAGS)


_NAME = _text("name", "Name of the TPU VM.")
_ZONE = _text("zone", "Zone of Google Cloud.")
_PROJECT = _text("project", "Project; default gcloud's own setting.")
_ACCELERATOR_TYPE = _text("accelerator_type", "For example v5litepod-16.")
_RUNTIME_VERSION = _text("runtime_version", "For example v2-alpha-tpuv5-lite.")
_QUEUED = _switch("queued", "Wait for capacity, through a queued resource.")
_SPOT = _switch("spot", "Cheaper capacity that may be taken away.")
_SETUP = flags.DEFINE_multi_string(
    "setup", [], "Shell command for every worker before the install.", flag_values=FLAGS
)
_OUTPUT = _text("output", "Directory for logs and results; default runs/NAME.")
_DELETE = _switch("delete", "Delete the TPU VM in the end.")
_RESTARTS = flags.DEFINE_integer(
    "restarts", 3, "Times to start again after preemption.", 0, 1000, flag_values=FLAGS
)
_WAIT_MINUTES = flags.DEFINE_integer(
    "wait_minutes", 24 * 60, "Longest wait for a queued resource.", 1, flag_values=FLAGS
)
_DRY_RUN = _switch("dry_run", "Print the commands, and run none.")

FAILED = 1
POLL_SECONDS = 30.0
# States of a VM or a queued resource that is no more, or never will be.
_GONE = {"PREEMPTED", "TERMINATED", "STOPPED", "DELETING", "SUSPENDED", "SUSPENDING", "FAILED"}
# Statuses that say something of others: ssh's, of a lost connection; that of a process which JAX
# aborts when another one is lost.
_NOT_ITS_OWN = {255, 134}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command for every worker of a slice.

    Attributes:
      slice: where.
      command: program and arguments.
      setup: shell commands that come first.
      output: receives `logs/worker-N.log` and `runs`.
      delete: whether the slice is deleted in the end.
      restarts: times to start again after preemption.
      wait_minutes: the longest wait for a queued resource.
    """

    slice: tpu_commands.Slice
    command: tuple[str, ...]
    setup: tuple[str, ...]
    output: Path
    delete: bool
    restarts: int = 3
    wait_minutes: int = 24 * 60


def prepare(job: Job, archive: Path) -> Iterator[tuple[str, tpu_commands.Command]]:
    """What has to be done on a slice before the command: a word for it, and the command line."""
    yield "copy the checkout", tpu_commands.send(job.slice, archive)
    yield "unpack it", tpu_commands.ssh(job.slice, tpu_commands.UNPACK)
    for command in job.setup:
        yield "set up", tpu_commands.ssh(job.slice, command)
    yield "install", tpu_commands.ssh(job.slice, tpu_commands.INSTALL)


def steps(job: Job) -> Iterator[tuple[str, tpu_commands.Command]]:
    """Every command of a run without incident, for a slice that is not there yet."""
    where = job.slice
    yield "is it there?", tpu_commands.describe(where)
    if where.queued:
        yield "is it queued?", tpu_commands.describe(where, "queued-resources")
    yield "if not, create it", tpu_commands.create(where)
    if where.queued:
        yield "wait until ACTIVE", tpu_commands.describe(where, "queued-resources")
    yield "count its workers", tpu_commands.describe(where)
    yield from prepare(job, Path("tokenloom.tar.gz"))
    yield "start on worker 0, and on 1, 2, ... at the same time", _start(job, 0)
    yield "collect results", tpu_commands.fetch(where, job.output)
    if job.delete:
        yield "delete it", tpu_commands.delete(where)


def _start(job: Job, worker: int) -> tpu_commands.Command:
    return tpu_commands.ssh(job.slice, tpu_commands.remote(job.command), str(worker))


class NotThereError(InputError):
    """gcloud knows no such thing."""


def call(command: tpu_commands.Command) -> str:
    """Runs a gcloud command and returns its standard output.

    Raises:
      NotThereError: what it is about does not exist.
      InputError: anything else that gcloud refuses, with what to do about it where that is known.
    """
    logging.info("%s", shlex.join(command))
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise InputError(
            "gcloud: not found on PATH; install the Google Cloud CLI, or see --dry_run"
        ) from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
    lower = said.lower()
    if "not_found" in lower or "was not found" in lower:
        raise NotThereError(f"gcloud: {said}")
    if any(word in lower for word in ("active account", "credentials", "reauth", "auth login")):
        raise InputError(f"credentials: missing or too old; run `gcloud auth login` ({said})")
    if "property [project]" in lower or "property [core/project]" in lower:
        raise InputError(
            f"project: missing; give --project or `gcloud config set project` ({said})"
        )
    raise InputError(f"{shlex.join(command[:6])}: {said}")


def _look(command: tpu_commands.Command) -> dict[str, Any]:
    """What a describe command says; empty for what is not there."""
    try:
        return json.loads(call(command))
    except NotThereError:
        return {}


def _state(described: dict[str, Any]) -> str:
    """Of a VM a word, of a queued resource a word within a record."""
    state = described.get("state", "")
    return state.get("state", "") if isinstance(state, dict) else state


def ensure(job: Job) -> int:
    """Makes the slice be there, and returns its number of workers.

    Raises:
      InputError: it cannot be had, or not within `wait_minutes`.
    """
    where = job.slice
    found = _look(tpu_commands.describe(where))
    if _state(found) == "READY":
        logging.info("using %s, which is there", where.name)
        return len(found["networkEndpoints"])
    if where.queued:
        queued = _state(_look(tpu_commands.describe(where, "queued-resources")))
        if queued in _GONE:
            call(tpu_commands.delete(where))
        if queued in _GONE or not queued:
            call(tpu_commands.create(where))
        _wait(job)
    else:
        if found:  # taken away, or broken; its name is still in use
            call(tpu_commands.delete(where))
        call(tpu_commands.create(where))
    found = _look(tpu_commands.describe(where))
    if _state(found) != "READY":
        raise InputError(f"{where.name}: state {_state(found) or 'unknown'}; needed: READY")
    return len(found["networkEndpoints"])


def _wait(job: Job) -> None:
    deadline = time.monotonic() + 60 * job.wait_minutes
    while (
        state := _state(_look(tpu_commands.describe(job.slice, "queued-resources")))
    ) != "ACTIVE":
        if state in _GONE:
            raise InputError(f"{job.slice.name}: the queued resource is {state}")
        if time.monotonic() > deadline:
            raise InputError(
                f"{job.slice.name}: still {state or 'unknown'} after {job.wait_minutes} minutes; "
                "it stays queued: call again to wait on, or delete it"
            )
        time.sleep(POLL_SECONDS)


def run_workers(job: Job, workers: int) -> dict[int, int]:
    """Runs the command on all workers and returns their exit statuses; output goes to logs."""
    tasks = {
        worker: sweep_workers.Task(_start(job, worker), log(job, worker))
        for worker in range(workers)
    }

    def done(worker: int, status: int) -> None:
        logging.info("worker %d: exit status %d", worker, status)

    try:
        return sweep_workers.run(tasks, workers, done)
    except BaseException:  # interrupted: the workers would go on
        logging.info("stopping the workers")
        call(tpu_commands.ssh(job.slice, tpu_commands.STOP))
        raise


def log(job: Job, worker: int) -> Path:
    return job.output / "logs" / f"worker-{worker}.log"


def judge(job: Job, statuses: dict[int, int]) -> tuple[int, str]:
    """The job's exit status, and a line about it: `FAILED` if a worker failed by itself.

    A worker that ended because another one did is not to blame; neither is one whose VM is gone.
    """
    bad = {worker: status for worker, status in statuses.items() if status}
    if not bad:
        return 0, "all workers ended well"
    others = _NOT_ITS_OWN.union(exit_status.RESTARTABLE)
    own = {worker: status for worker, status in bad.items() if status not in others}
    if not own and any(status in exit_status.RESTARTABLE for status in bad.values()):
        return exit_status.PREEMPTED, f"exit statuses by worker: {bad}"
    if not own and (state := _state(_look(tpu_commands.describe(job.slice)))) != "READY":
        return exit_status.PREEMPTED, f"the TPU VM is {state or 'not there any more'}"
    worker, status = min((own or bad).items())
    words = sweep_workers.last_words(log(job, worker))
    return FAILED, f"worker {worker}: exit status {status}: {words} (see {log(job, worker)})"


def run(job: Job) -> int:
    """Runs a job from beginning to end; returns the exit status.

    Raises:
      InputError: what gcloud refused. The slice is deleted all the same if that was asked.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as directory:
            archive = Path(directory) / "tokenloom.tar.gz"
            packaging.archive(archive)
            for attempt in range(job.restarts + 1):
                workers = ensure(job)
                for what, command in prepare(job, archive):
                    logging.info("%s", what)
                    call(command)
                status, words = judge(job, run_workers(job, workers))
                _collect(job)
                if status != exit_status.PREEMPTED:
                    break
                logging.warning("preempted (%s), start %d", words, attempt + 1)
    finally:
        if job.delete:
            _delete(job.slice)
    print(words, file=sys.stderr if status else sys.stdout)
    print(f"logs and results: {job.output}")
    return status


def _collect(job: Job) -> None:
    try:
        call(tpu_commands.fetch(job.slice, job.output))
    except InputError as error:  # a VM that is gone has none; the run is judged by its workers
        logging.warning("no results: %s", error)


def _delete(where: tpu_commands.Slice) -> None:
    try:
        call(tpu_commands.delete(where))
    except NotThereError:
        logging.info("%s is gone already", where.name)
    except InputError as error:  # an error that led here must be seen, too
        print(
            f"error: {where.name} could not be deleted, delete it by hand: {error}", file=sys.stderr
        )


def main(argv: list[str]) -> int | None:
    required = {
        "name": _NAME.value,
        "zone": _ZONE.value,
        "accelerator_type": _ACCELERATOR_TYPE.value,
        "runtime_version": _RUNTIME_VERSION.value,
    }
    for name, value in required.items():
        if not value:
            raise InputError(f"--{name}: missing")
    if len(argv) < 2:
        raise InputError("command: missing; give it after --, for example -- python -m ...")
    job = Job(
        tpu_commands.Slice(
            **required, project=_PROJECT.value, queued=_QUEUED.value, spot=_SPOT.value
        ),
        tuple(argv[1:]),
        tuple(_SETUP.value),
        Path(_OUTPUT.value or f"runs/{_NAME.value}"),
        _DELETE.value,
        _RESTARTS.value,
        _WAIT_MINUTES.value,
    )
    if _DRY_RUN.value:
        for what, command in steps(job):
            print(f"# {what}\n{shlex.join(command)}")
        return None
    if shutil.which("gcloud") is None:
        raise InputError(
            "gcloud: not found on PATH; install the Google Cloud CLI, or see --dry_run"
        )
    return run(job)


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
