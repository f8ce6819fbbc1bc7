"""Commands that run a few at a time, each a process of its own: what one breaks is its own.

A thread or a pool of processes would not do: a device out of memory, or a compiler that crashes,
ends the process it happens in, and a pool with it.
"""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.loop import TERMINATED

_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Task:
    """A command, the file that receives what it prints, and variables that it finds set.

    Variables that this process has go before those.
    """

    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run(
    tasks: Mapping[int, Task],
    workers: int,
    done: Callable[[int, int], None] = lambda number, status: None,
) -> dict[int, int]:
    """Runs every task, at most `workers` at a time, in order of their numbers.

    Args:
      tasks: by number.
      workers: at least 1.
      done: called with a task's number and exit status as each one ends.

    Returns:
      Exit status by number: 128 + n for a process that signal n ended, as a shell says it.

    Raises:
      SystemExit: with `training.loop.TERMINATED` when this process gets SIGTERM. Processes that
        still run get it too, and are waited for: they save a checkpoint first.
    """
    waiting = collections.deque(sorted(tasks))
    running: dict[int, subprocess.Popen] = {}
    statuses: dict[int, int] = {}

    def stop(*_: Any) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number = waiting.popleft()
                running[number] = _start(tasks[number])
            for number in [n for n, process in running.items() if process.poll() is not None]:
                code = running.pop(number).returncode
                statuses[number] = code if code >= 0 else 128 - code
                done(number, statuses[number])
            time.sleep(_POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return statuses


def _start(task: Task) -> subprocess.Popen:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        return subprocess.Popen(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**task.environment, **os.environ},
        )


def last_words(log: Path) -> str:
    """The last line of a log that says something, for a message about why its process ended."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this interpreter."""
    return (sys.executable, *arguments)
