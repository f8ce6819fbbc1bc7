"""Work directories: one run's config, its lock, and its Orbax checkpoints.

Several processes of one job share a work directory on a file system that all of them see. The
first one holds the lock and writes what is small; each writes its own part of the arrays.

A checkpoint is everything that the next step depends on: a tree of arrays (parameters, optimiser
state, step, random keys) and the position of the data iterator as JSON. Orbax writes it under a
temporary name and renames it when complete, so a killed or failed save leaves the older
checkpoints as they were.
"""

import contextlib
import dataclasses
import fcntl
import gc
import io
import json
import logging
import os
import pathlib
import re
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_managers

from models import distributed, files
from models.errors import InputError

PathLike = str | os.PathLike[str]

# After a failed write, how long Orbax's other threads may take to fail as well.
_THREADS_END_SECONDS = 0.5
# tensorstore reports a failed system call as ValueError with the number in its text.
_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")


def write_json(path: PathLike, value: Any) -> None:
    """Writes `value` so that `path` holds either the old text or the new, never half of it."""
    files.write_text(pathlib.Path(path), json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def disk_errors(doing: str, directory: PathLike, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turns a full disk and other failed system calls into one line about `directory`.

    Args:
      doing: what failed, as in 'cannot write the checkpoint of step 5'.
      directory: where.
      kept: called for the end of the line, which says what is safe.

    Raises:
      InputError: in place of an OSError, or of the ValueError that tensorstore makes of one.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = _os_error(error)
        if reason is None:
            raise
        tail = kept()
        _forget_frames(error)
        raise InputError(
            f"workdir: {doing} in {directory}: {reason}{'; ' + tail if tail else ''}"
        ) from None


def _forget_frames(error: BaseException | None) -> None:
    """Frees what the frames of a handled error hold.

    Orbax's coroutines for the arrays that were not written are among it; kept until the
    interpreter shuts down, each of them would print an error of its own.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _os_error(error: BaseException | None) -> str | None:
    """The system's words for a failed call anywhere in the chain of causes; None for others."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if code := _OS_ERROR_CODE.search(str(error)):
            return os.strerror(int(code.group(1)))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def lock(directory: PathLike, *, wait: bool = False) -> Iterator[None]:
    """Holds `directory` for this process, creating it where it is missing.

    The lock is the kernel's (`flock`): it ends with the process however that dies, so the file
    that a killed run leaves behind locks nobody out. Of several processes of one job the first
    holds it for all.

    Args:
      directory: what to hold.
      wait: until another process lets go of it, rather than failing.

    Raises:
      InputError: another process holds it (named by its id), it cannot be created, or other
        processes of this job do not see it.
    """
    directory = pathlib.Path(directory)
    with contextlib.ExitStack() as held:

        def take() -> str:
            _take_lock(directory, wait, held)
            return str(os.getpid())

        holder = distributed.first(take)
        _check_shared(directory, holder)
        yield


def _take_lock(directory: pathlib.Path, wait: bool, held: contextlib.ExitStack) -> None:
    with disk_errors("cannot lock", directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((directory / ".lock").open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = f"{directory} is in use by process {file.read().strip() or 'unknown'}"
        if not wait:
            raise InputError(f"workdir: {holder}; wait for it or give another directory") from None
        absl_logging.warning("%s; waiting for it", holder)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def _check_shared(directory: pathlib.Path, holder: str) -> None:
    """Raises InputError in every process unless all of them see the first one's lock."""
    try:
        seen = (directory / ".lock").read_text() == holder
    except OSError:
        seen = False
    blind = [i for i, text in enumerate(distributed.gather(str(seen))) if text != "True"]
    if blind:
        raise InputError(
            f"workdir: {directory} of process 0 is not what process {blind[0]} sees there; several "
            "processes need a file system that all of them share"
        )


def claim(workdir: PathLike, config: Mapping[str, Any], free: Collection[str] = ()) -> None:
    """Records `config` (anything JSON can hold) as the config of `workdir`, once and for all.

    Args:
      workdir: of the run.
      config: of the run.
      free: dotted names of fields that may change when the run goes on.

    Raises:
      InputError: when `workdir` was begun with another config, naming the first field that
        differs.
    """
    distributed.first(lambda: _claim(workdir, config, free))


def _claim(workdir: PathLike, config: Mapping[str, Any], free: Collection[str]) -> None:
    path = pathlib.Path(workdir) / "config.json"
    new = json.loads(json.dumps(config))
    if not path.exists():
        with disk_errors("cannot write config.json", workdir):
            write_json(path, new)
        return
    try:
        old = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"workdir: {path} is not valid JSON") from None
    if difference := _first_difference(old, new, "", free):
        raise InputError(f"workdir: {workdir} is the directory of another config: {difference}")


def _first_difference(old: Any, new: Any, name: str, free: Collection[str]) -> str | None:
    if name in free:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for field in [*new, *(field for field in old if field not in new)]:
            missing = "absent"
            there, here = old.get(field, missing), new.get(field, missing)
            inner = f"{name}.{field}" if name else field
            if difference := _first_difference(there, here, inner, free):
                return difference
        return None
    return None if old == new else f"{name} is {old!r} there and {new!r} here"


@dataclasses.dataclass(frozen=True)
class Restored:
    """One checkpoint read back.

    Attributes:
      step: steps done when it was written.
      state: the tree, laid out as the template asked.
      data_state: the data iterator's state.
      metrics: evaluation metrics it was saved with; empty when there were none.
    """

    step: int
    state: Any
    data_state: Any
    metrics: dict[str, float]


class Checkpointer:
    """The checkpoints of one work directory, under `checkpoints/<step>`.

    Saving is synchronous: when `save` returns, the checkpoint is on the disk.
    """

    def __init__(self, workdir: PathLike, *, keep_last: int = 2) -> None:
        """Opens (or creates) the directory and clears what an interrupted save left behind.

        Args:
          workdir: of the run.
          keep_last: newest checkpoints that are kept; the one of least `eval_loss` is kept too.
        """
        self._workdir = pathlib.Path(workdir).absolute()
        self.directory = self._workdir / "checkpoints"
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(
                    get_metric_fn=_eval_loss,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_eval_loss,
            best_mode="min",
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        with disk_errors("cannot open the checkpoints", self.directory), _quiet():
            self._manager = ocp.CheckpointManager(self.directory, options=self._options)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The checkpoint of least `eval_loss`; None when none was evaluated."""
        measured = {step: self.metrics(step) for step in self.steps}
        losses = {step: _eval_loss(found) for step, found in measured.items() if found}
        return min(losses, key=lambda step: losses[step]) if losses else None

    def metrics(self, step: int) -> dict[str, float]:
        """What `save` was given; empty when nothing was evaluated at that step."""
        return dict(self._manager.metrics(step) or {})

    def save(
        self, step: int, state: Any, data_state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Writes one checkpoint and drops those that need not be kept.

        Args:
          step: steps done; one that is already on disk is left as it is.
          state: tree of arrays, sharded or not; typed random keys may be among them.
          data_state: what JSON can hold.
          metrics: with the entry `eval_loss` when the state was evaluated.

        Raises:
          InputError: the disk is full or another system call failed. The older checkpoints are
            as they were.
        """
        if step in self.steps:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"state": data_state})
        )

        def kept() -> str:
            return f"the checkpoint of step {self.steps[-1]} is kept" if self.steps else ""

        doing = f"cannot write the checkpoint of step {step}"
        with disk_errors(doing, self.directory, kept), _quiet():
            self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None)

    def restore(self, template: Any, *, step: int | None = None) -> Restored | None:
        """Reads the newest checkpoint that is whole; None when there is none at all.

        Newer ones that cannot be read (a copy that was cut off, a damaged disk) are moved to
        `unreadable_checkpoints`, out of the way of the run that goes on from the older one.

        Args:
          template: tree of `jax.ShapeDtypeStruct` or arrays like the saved state; leaves that
            carry a sharding are read straight onto it.
          step: read this one and no other.

        Raises:
          InputError: there are checkpoints and none of them can be read.
        """
        failures: dict[int, str] = {}
        for candidate in [step] if step is not None else self.steps[::-1]:
            restored, reason = None, ""
            try:
                restored = self._restore(candidate, template)
            except Exception as error:  # Orbax raises many kinds for a damaged file.
                reason = " ".join(str(error).split(" [tensorstore_spec")[0].split()) or repr(error)
            # What one process cannot read, none goes on from.
            if reason := max(distributed.gather(reason)):
                failures[candidate] = reason[:300]
                absl_logging.warning("checkpoint of step %d: %s", candidate, reason)
                continue
            self._set_aside(list(failures))
            return restored
        if not failures:
            return None
        newest = max(failures)
        raise InputError(
            f"workdir: no checkpoint in {self.directory} can be read; that of step {newest}: "
            f"{failures[newest]}"
        )

    def _restore(self, step: int, template: Any) -> Restored:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(template), data=ocp.args.JsonRestore()
        )
        with _quiet():
            read = self._manager.restore(step, args=items)
        return Restored(step, read["state"], read["data"]["state"], self.metrics(step))

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        aside = self._workdir / "unreadable_checkpoints"

        def move() -> None:
            with disk_errors("cannot move a damaged checkpoint", aside):
                aside.mkdir(exist_ok=True)
                for step in steps:
                    taken = len(list(aside.glob(f"{step}*")))
                    (self.directory / str(step)).rename(aside / f"{step}.{taken}")

        distributed.first(move)
        self._manager.reload()

    def close(self) -> None:
        self._manager.close()


def _eval_loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax logs, and what its threads print when a write fails.

    What goes wrong is raised, and said once.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = absl_logging.get_absl_logger()
    logger.addFilter(keep)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
            except Exception:
                time.sleep(_THREADS_END_SECONDS)
                raise
    finally:
        logger.removeFilter(keep)
