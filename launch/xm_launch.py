"""Launches a config, or every setting of its sweep, as work units of an XManager experiment.

    python -m launch.xm_launch --config=experiments/configs/rsd.py:offline --workdir=runs/rsd_sweep
    python -m launch.xm_launch --config=... --workdir=/gcs/BUCKET/rsd --executor=vertex \\
        --accelerator=tpu_v3=8
    python -m launch.xm_launch --config=... --workdir=... --nosweep -- --config.decode.repeats=1

A config with a `sweep()` becomes a work unit a setting, each `experiments.sweep --setting=N`; when
they have ended, `experiments.sweep --collect` writes the page of them all. Any other config, or
--nosweep, is one work unit of `experiments.run`; arguments after `--` are added to its command.

local: processes of this machine, from a copy of the checkout in the work directory. vertex: Google
Cloud's Vertex AI, with the image of launch/docker; XManager builds and pushes it, so either Docker
or Cloud Build is needed. A work directory under /gcs/BUCKET is the bucket of that name.

XManager needs protobuf below 7, so it goes into an environment of its own, without constraints.txt:
pip install -e '.[launch]'. --dry_run works without it, and prints the experiment as JSON.
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, sweep
from launch import packaging
from models.errors import InputError, check_choice

with contextlib.suppress(ImportError):  # so that its flags (--xm_...) are known
    from xmanager import xm_flags  # noqa: F401

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
    "config", None, "Config file: x.py or x.py:preset.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all results.", flag_values=FLAGS)
_EXECUTOR = flags.DEFINE_string("executor", "local", "local or vertex.", flag_values=FLAGS)
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", None, "NAME=COUNT of a work unit, for example tpu_v3=8.", flag_values=FLAGS
)
_SWEEP = flags.DEFINE_bool(
    "sweep", None, "Whether to run the config's sweep(); default if it has one.", flag_values=FLAGS
)
_PARALLEL = flags.DEFINE_integer(
    "parallel", 1, "Local work units that run at a time.", 1, 1024, flag_values=FLAGS
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print what would be launched, as JSON.", flag_values=FLAGS
)

EXECUTORS = ("local", "vertex")
# What XManager can ask Vertex AI for. Newer TPUs: launch/tpu_vm.py and launch/cluster.py.
ACCELERATORS = (
    "tpu_v2", "tpu_v3", "p4", "t4", "p100", "v100", "a100", "a100_80gib", "l4_24th", "h100",
    "h200", "b200",
)  # fmt: skip
BUCKET = "GOOGLE_CLOUD_BUCKET_NAME"  # read by XManager
UNIT_FAILED = 1


@dataclasses.dataclass(frozen=True)
class WorkUnit:
    """One job: its name, and the arguments of the Python interpreter that runs it."""

    name: str
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is handed to XManager.

    Attributes:
      title: of the experiment.
      executor: of `EXECUTORS`.
      package: how the checkout is packaged: `kind` ('binary' or 'dockerfile') and its fields.
      environment: variables of every work unit.
      requirements: accelerators of every work unit.
      work_units: in order.
    """

    title: str
    executor: str
    package: dict[str, str]
    environment: dict[str, str]
    requirements: dict[str, int]
    work_units: tuple[WorkUnit, ...]


def parse_accelerator(text: str | None, executor: str) -> dict[str, int]:
    """NAME=COUNT as XManager's requirements; InputError says what Vertex AI has."""
    if text is None:
        return {}
    if executor == "local":
        raise InputError("accelerator: not with --executor=local, which uses this machine as it is")
    name, _, count = text.partition("=")
    if not count.isdigit() or int(count) == 0:
        raise InputError(f"accelerator: {text!r} must be NAME=COUNT, for example tpu_v3=8")
    try:
        check_choice("accelerator", name, ACCELERATORS)
    except InputError as error:
        hint = "; for newer TPUs use launch.tpu_vm or launch.cluster" if "tpu" in name else ""
        raise InputError(f"{error}{hint}") from None
    return {name: int(count)}


def plan(
    config: str,
    workdir: str,
    *,
    executor: str = "local",
    accelerator: str | None = None,
    as_sweep: bool | None = None,
    more: Sequence[str] = (),
    interpreter: str = sys.executable,
) -> Plan:
    """What to launch for a config.

    Args:
      config: FILE or FILE:PRESET.
      workdir: of the run or the sweep, as the work units see it.
      executor: of `EXECUTORS`.
      accelerator: NAME=COUNT, for Vertex AI.
      as_sweep: whether to expand the config's `sweep()`; None if it has one.
      more: arguments of `experiments.run`.
      interpreter: of local work units.

    Raises:
      InputError: bad values; a config outside the checkout for another machine.
    """
    check_choice("executor", executor, EXECUTORS)
    requirements = parse_accelerator(accelerator, executor)
    base = cli.load_config_file(config)
    names = _settings(config, as_sweep)
    if names and more:
        raise InputError(f"argument {more[0]!r}: not for a sweep; allowed with --nosweep")
    inside = packaging.inside(config)
    first: tuple[str, ...]
    if executor == "local":
        code = Path(workdir).absolute() / "code"
        # -P: what is imported is the copy, not the directory that the launcher is started in.
        package = {"kind": "binary", "path": interpreter, "copy": str(code)}
        environment = {"PYTHONPATH": str(code)}
        config = f"{code}/{inside}" if inside else config
        first = ("-P", "-m")
    else:
        if inside is None:
            raise InputError(f"config: {config} is outside the checkout, which is all that is sent")
        kind = "gpu" if requirements and not next(iter(requirements)).startswith("tpu") else "tpu"
        package = {"kind": "dockerfile", "dockerfile": f"launch/docker/{kind}.Dockerfile"}
        environment, config, first = {}, inside, ("-m",)
    common = (f"--config={config}", f"--workdir={workdir}")
    if names:
        units = tuple(
            WorkUnit(name, (*first, "experiments.sweep", *common, f"--setting={number}"))
            for number, name in enumerate(names)
        )
    else:
        units = (WorkUnit(base.name, (*first, "experiments.run", *common, *more)),)
    return Plan(base.name, executor, package, environment, requirements, units)


def _settings(config: str, as_sweep: bool | None) -> list[str]:
    """Names of the sweep's settings; none for a single run."""
    if as_sweep is False:
        return []
    try:
        return [setting.name for setting in sweep.settings(config)]
    except InputError as error:
        if as_sweep is None and str(error).endswith("has no function sweep"):
            return []
        raise


def check_cloud() -> None:
    """Raises InputError unless Google Cloud's credentials, project and bucket are there."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        _, project = google.auth.default()
    except DefaultCredentialsError:
        raise InputError(
            "credentials: Google Cloud's are missing; run `gcloud auth application-default login`"
        ) from None
    if not project:
        raise InputError(
            "project: missing; set GOOGLE_CLOUD_PROJECT or `gcloud config set project`"
        )
    if not os.environ.get(BUCKET):
        raise InputError(f"{BUCKET}: missing; set it to a bucket for XManager's own files")


async def launch(what: Plan, xm: Any, xm_local: Any, parallel: int = 1) -> dict[str, str]:
    """Packages the checkout and adds the work units; waits for local ones.

    Args:
      what: of `plan`.
      xm: the module of that name.
      xm_local: likewise.
      parallel: local work units that run at a time.

    Returns:
      Why work units failed, by name. One that fails does not stop the others.
    """
    failed: dict[str, str] = {}
    places = asyncio.Semaphore(parallel)

    async def run(experiment: Any, job: Any, name: str, wait: bool) -> None:
        async with places:
            try:
                unit = await experiment.add(job)
                if wait:
                    await unit.wait_until_complete()
            except Exception as error:  # XManager raises many kinds, and the others must go on
                failed[name] = " ".join(str(error).split())

    with tempfile.TemporaryDirectory() as directory:
        local = what.executor == "local"
        executor = _executor(what, xm, xm_local)
        # On leaving, XManager raises again what local work units failed with.
        with contextlib.suppress(RuntimeError) if local else contextlib.nullcontext():
            async with xm_local.create_experiment(experiment_title=what.title) as experiment:
                package = xm.Packageable(
                    executable_spec=_package(what, xm, Path(directory)),
                    executor_spec=executor.Spec(),
                    env_vars=what.environment,
                )
                [executable] = experiment.package([package])
                jobs = [
                    xm.Job(executable, executor, name=f"unit{number}", args=list(unit.arguments))
                    for number, unit in enumerate(what.work_units)
                ]
                await asyncio.gather(
                    *(run(experiment, job, u.name, local) for job, u in zip(jobs, what.work_units))
                )
    return failed


def _executor(what: Plan, xm: Any, xm_local: Any) -> Any:
    if what.executor == "local":
        return xm_local.Local()
    return xm_local.Vertex(requirements=xm.JobRequirements(**what.requirements))


def _package(what: Plan, xm: Any, directory: Path) -> Any:
    """Copies the checkout, and says how XManager makes an executable of the copy."""
    if what.package["kind"] == "binary":
        packaging.snapshot(Path(what.package["copy"]))
        return xm.Binary(path=what.package["path"])
    code = directory / "tokenloom"  # the image's name
    packaging.snapshot(code)
    return xm.Dockerfile(path=str(code), dockerfile=str(code / what.package["dockerfile"]))


def main(argv: list[str]) -> int | None:
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise InputError(f"--{'config' if _CONFIG.value is None else 'workdir'}: missing")
    what = plan(
        _CONFIG.value,
        _WORKDIR.value,
        executor=_EXECUTOR.value,
        accelerator=_ACCELERATOR.value,
        as_sweep=_SWEEP.value,
        more=argv[1:],
    )
    if _DRY_RUN.value:
        print(json.dumps(dataclasses.asdict(what), indent=1))
        return None
    if importlib.util.find_spec("xmanager") is None:
        raise InputError(
            "xmanager: not installed; it is the extra 'launch': pip install -e '.[launch]'"
        )
    if what.executor == "vertex":
        check_cloud()
    from xmanager import xm, xm_local

    failed = asyncio.run(launch(what, xm, xm_local, _PARALLEL.value))
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    print(f"{len(what.work_units) - len(failed)} of {len(what.work_units)} work units launched")
    if len(what.work_units) > 1:
        flags_ = f"--config={_CONFIG.value} --workdir={_WORKDIR.value}"
        print(f"page of them all: python -m experiments.sweep {flags_} --collect")
    return UNIT_FAILED if failed else None


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
