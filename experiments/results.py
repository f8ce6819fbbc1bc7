"""What every experiment records: where it ran, what it measured, which claims held."""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from models import files
from models.errors import InputError

RESULTS_FILE = "results.json"
REVISION_FILE = "REVISION"  # in a copy of the checkout, which commit it is of


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that an experiment tests.

    Attributes:
      name: the statement in words.
      measured: the value found.
      bound: what it was compared with, in words, for example '>= 1.0'.
      held: whether the comparison was true.
    """

    name: str
    measured: float
    bound: str
    held: bool


def at_least(name: str, measured: float, bound: float) -> Claim:
    """A claim that holds when `measured` >= `bound`."""
    return Claim(name, float(measured), f">= {bound:g}", bool(measured >= bound))


def at_most(name: str, measured: float, bound: float) -> Claim:
    """A claim that holds when `measured` <= `bound`."""
    return Claim(name, float(measured), f"<= {bound:g}", bool(measured <= bound))


def machine() -> dict[str, Any]:
    """The machine in words and numbers; no host or user names."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    devices = jax.devices()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def git_revision() -> str:
    """The checkout's commit, with '+changes' when files differ from it; 'unknown' outside git.

    A copy that a launcher made names it in `REVISION_FILE`.
    """
    root = Path(__file__).parents[1]
    if (root / REVISION_FILE).is_file():
        return (root / REVISION_FILE).read_text().strip()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def header(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every results file begins with."""
    return {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "git_revision": git_revision(),
        "machine": machine(),
        "config": config,
    }


def ratio_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Standard error of sum(numerators) / sum(denominators) over independent rows; 0 for one row.

    The usual linearisation (Cochran, 'Sampling techniques', section 2.11).
    """
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    n = len(a)
    if n < 2 or not b.sum():
        return 0.0
    left = a - b * (a.sum() / b.sum())
    return float(np.sqrt((left**2).sum() * n / (n - 1)) / b.sum())


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all. Raises InputError when the disk refuses."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes such as a picture's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write(workdir: Path, results: Mapping[str, Any]) -> Path:
    """Writes `results.json` into the work directory and returns its path."""
    path = workdir / RESULTS_FILE
    write_text(path, json.dumps(results, indent=1, default=_plain) + "\n")
    return path


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers for metric writers, named by method and setting."""
    where = f"{record['label']}/T{record['temperature']:g}/batch{record['batch_size']}"
    names = ("tokens_per_second", "speedup", "tokens_per_target_call")
    return {f"{where}/{name}": record[name] for name in names}


def read(workdir: Path) -> dict[str, Any]:
    """The recorded results; raises InputError when there are none."""
    path = workdir / RESULTS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"workdir: {workdir} has no {RESULTS_FILE}; run an experiment") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
