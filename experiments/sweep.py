"""Runs the sweep of a config: each setting is an experiment of its own, then one page for all.

    python -m experiments.sweep --config=experiments/configs/rsd.py:offline --workdir=runs/rsd_sweep
    python -m experiments.sweep --config=... --workdir=... --workers=4   # four processes at a time
    python -m experiments.sweep --config=... --workdir=... --setting=3   # one, elsewhere perhaps
    python -m experiments.sweep --config=... --workdir=... --collect     # and the page of all

The config file's `sweep()` returns a list of overrides (dotted field -> value; `name` labels the
setting). Settings that have results already are not run again, so a sweep that was stopped goes on.
A setting that fails is named at the end, and the exit status is then 1; the others are run all the
same.

One worker runs all settings in this process, which keeps what it has loaded and compiled. More are
a process for each setting, whose output is in `NNN.log` of the work directory. They share a GPU's
memory, and only one process at a time can have a TPU.
"""

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict

from experiments import cli
from experiments.sweep_page import ERROR, collect, quality, write
from models.errors import InputError

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
    "config", None, "Config file, optionally with a preset: x.py:preset.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all results.", flag_values=FLAGS)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Settings run at a time; above 1, in processes.", 1, 1024, flag_values=FLAGS
)
_SETTING = flags.DEFINE_integer(
    "setting", None, "Run this setting only, by number from 0; no page.", 0, flag_values=FLAGS
)
_COLLECT = flags.DEFINE_bool(
    "collect", False, "Run nothing; write the page of what has results.", flag_values=FLAGS
)

FAILED = 1  # exit status when a setting failed
# What JAX takes of a GPU's memory when nothing else is said; workers share it.
_GPU_MEMORY_SHARE = 0.75


def settings(argument: str) -> list[ConfigDict]:
    """The configs of a sweep, in its order.

    Args:
      argument: FILE or FILE:PRESET, as for `--config` of `experiments.run`.

    Raises:
      InputError: the file has no `sweep()`, or an override names no field of the config.
    """
    base = cli.load_config_file(argument)
    path = Path(argument.partition(":")[0])
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sweep: Callable[[], Sequence[Mapping[str, Any]]] | None = getattr(module, "sweep", None)
    if sweep is None:
        raise InputError(f"config: {path} has no function sweep")
    configs = []
    for number, overrides in enumerate(sweep()):
        config = ConfigDict(base.to_dict())
        config.name = f"{base.name} {number}"
        for field, value in overrides.items():
            _set(config, field, value)
        configs.append(config)
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise InputError(f"config: sweep of {path}: two settings share a name; given: {names}")
    return configs


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *above, last = field.split(".")
    holder = config
    for part in above:
        holder = holder[part] if part in holder else _unknown(field)
    if last not in holder:
        _unknown(field)
    holder[last] = value


def _unknown(field: str) -> Any:
    raise InputError(f"config: sweep: no field {field!r} in the config")


def directory_of(workdir: Path, number: int) -> Path:
    """The work directory of a setting."""
    return workdir / f"{number:03d}"


def finished(configs: Sequence[ConfigDict], workdir: Path) -> dict[int, dict[str, Any]]:
    """The results of the settings that have any, by number.

    Raises:
      InputError: results in the work directory are of another config.
    """
    from experiments import results

    found = {}
    for number, config in enumerate(configs):
        directory = directory_of(workdir, number)
        if (directory / results.RESULTS_FILE).exists():
            found[number] = results.read(directory)
            if found[number]["config"] != json.loads(config.to_json()):
                raise InputError(f"workdir: {directory} holds results of another config")
    return found


def run_here(
    configs: Sequence[ConfigDict], numbers: Sequence[int], workdir: Path
) -> dict[int, str]:
    """Runs settings in this process, one after another; returns why some failed, by number."""
    import jax

    from experiments import run

    failed = {}
    for number in numbers:
        logging.info("setting %d of %d: %s", number + 1, len(configs), configs[number].name)
        try:
            run.execute(configs[number], directory_of(workdir, number))
        except Exception as error:  # whatever it is, the other settings are not to blame
            failed[number] = f"{type(error).__name__}: {error}".splitlines()[0]
            if not isinstance(error, InputError):
                logging.error("setting %d failed\n%s", number, traceback.format_exc())
        # Some hundred loaded programs use up the memory maps that a process may have.
        jax.clear_caches()
    return failed


def run_apart(
    argument: str,
    configs: Sequence[ConfigDict],
    numbers: Sequence[int],
    workdir: Path,
    workers: int,
) -> dict[int, str]:
    """As `run_here`, with a process for every setting and so many `workers` at a time."""
    from experiments import sweep_workers

    module = ("-m", "experiments.sweep", f"--config={argument}", f"--workdir={workdir}")
    tasks = {
        number: sweep_workers.Task(
            sweep_workers.python(*module, f"--setting={number}"),
            workdir / f"{number:03d}.log",
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_GPU_MEMORY_SHARE / workers:.3f}"},
        )
        for number in numbers
    }

    def done(number: int, status: int) -> None:
        logging.info("setting %d, %s: exit status %d", number, configs[number].name, status)

    statuses = sweep_workers.run(tasks, workers, done)
    return {
        number: f"exit status {status}: {sweep_workers.last_words(tasks[number].log)}"
        for number, status in sorted(statuses.items())
        if status
    }


def execute(
    configs: Sequence[ConfigDict],
    workdir: Path,
    *,
    argument: str | None = None,
    workers: int = 1,
    collect_only: bool = False,
) -> dict[str, Any]:
    """Runs every setting that has no results yet, and writes the sweep's page.

    Args:
      configs: of `settings`.
      workdir: of the sweep; a setting's own is `directory_of` it.
      argument: what `configs` were read from; needed for more than one worker.
      workers: settings at a time; above 1, each in a process of its own.
      collect_only: run nothing.

    Returns:
      What `collect` makes of all results, and `failed`: why, by the setting's name.
    """
    missing = sorted(set(range(len(configs))) - set(finished(configs, workdir)))
    failed: dict[int, str] = {}
    if missing and not collect_only:
        if workers == 1:
            failed = run_here(configs, missing, workdir)
        else:
            assert argument is not None
            failed = run_apart(argument, configs, missing, workdir, workers)
    collected = collect(list(finished(configs, workdir).values()))
    if failed:
        collected["failed"] = {configs[number].name: why for number, why in failed.items()}
    write(workdir, collected)
    return collected


def _run_one(configs: Sequence[ConfigDict], number: int, workdir: Path) -> None:
    """One setting, unless it has results; its error is this program's."""
    from experiments import run

    if number >= len(configs):
        raise InputError(f"setting: {number} is not there; allowed: 0 to {len(configs) - 1}")
    if number not in finished(configs, workdir):
        run.execute(configs[number], directory_of(workdir, number))


def main(argv: list[str]) -> int | None:
    cli.no_arguments(argv)
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise InputError(f"--{'config' if _CONFIG.value is None else 'workdir'}: missing")
    workdir = Path(_WORKDIR.value)
    configs = settings(_CONFIG.value)
    if _SETTING.value is not None:
        _run_one(configs, _SETTING.value, workdir)
        return None
    collected = execute(
        configs,
        workdir,
        argument=_CONFIG.value,
        workers=_WORKERS.value,
        collect_only=_COLLECT.value,
    )
    for r in collected["runs"]:
        print(
            f"{r['setting']:<20} {r['label']:<28} T={r['temperature']:<4g} "
            f"{r['tokens_per_target_call']:.2f} +- {r.get(ERROR, 0):.2f} tokens/call  "
            f"{r['speedup']:.2f}x" + quality(r)
        )
    for setting, scores in collected["scores"].items():
        for score, labels in scores.items():
            told = "  ".join(f"{label} {value:.4g}" for label, value in labels.items())
            print(f"{setting:<20} {score}: {told}")
    print(f"report: {workdir / 'sweep.html'}")
    for name, why in collected.get("failed", {}).items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return FAILED if collected.get("failed") else None


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
