"""The command lines of gcloud for a Cloud TPU VM, and what its workers' shells are sent."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

Command = tuple[str, ...]

_HOME = '"$HOME"/tokenloom'
UNPACK = (
    f"rm -rf {_HOME}/code && mkdir -p {_HOME}/code {_HOME}/runs"
    f' && tar -xzf "$HOME"/tokenloom.tar.gz -C {_HOME}/code && ln -s ../runs {_HOME}/code/runs'
)
# uv, since the image's Python may be older than 3.11.
INSTALL = (
    'python3 -m pip install --quiet --user uv && PATH="$HOME"/.local/bin:"$PATH"'
    f" && uv venv --quiet --allow-existing --python 3.12 {_HOME}/venv"
    f" && uv pip install --quiet --python {_HOME}/venv/bin/python"
    f" --constraint {_HOME}/code/constraints.txt --editable {_HOME}/code'[tpu]'"
)
STOP = f'kill -TERM "$(cat {_HOME}/pid)"'


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU VM, there or not.

    Attributes:
      name: of the VM, and of its queued resource.
      zone: of Google Cloud.
      project: None for gcloud's own setting.
      accelerator_type: kind and size.
      runtime_version: the VM's image.
      queued: whether it comes from a queued resource.
      spot: whether it may be taken away.
    """

    name: str
    zone: str
    project: str | None
    accelerator_type: str
    runtime_version: str
    queued: bool = False
    spot: bool = False


def _gcloud(where: Slice, kind: str, verb: str, *more: str) -> Command:
    project = (f"--project={where.project}",) if where.project else ()
    scope = (f"--zone={where.zone}", *project, "--quiet")
    return ("gcloud", "compute", "tpus", kind, verb, *more, *scope)


def describe(where: Slice, kind: str = "tpu-vm") -> Command:
    return _gcloud(where, kind, "describe", where.name, "--format=json")


def create(where: Slice) -> Command:
    accelerator = f"--accelerator-type={where.accelerator_type}"
    spot = ("--spot",) if where.spot else ()
    if where.queued:
        version = f"--runtime-version={where.runtime_version}"
        node = f"--node-id={where.name}"
        return _gcloud(
            where, "queued-resources", "create", where.name, node, accelerator, version, *spot
        )
    version = f"--version={where.runtime_version}"
    return _gcloud(where, "tpu-vm", "create", where.name, accelerator, version, *spot)


def delete(where: Slice) -> Command:
    if where.queued:  # --force: with its VM
        return _gcloud(where, "queued-resources", "delete", where.name, "--force")
    return _gcloud(where, "tpu-vm", "delete", where.name)


def ssh(where: Slice, command: str, worker: str = "all") -> Command:
    return _gcloud(where, "tpu-vm", "ssh", where.name, f"--worker={worker}", f"--command={command}")


def send(where: Slice, archive: Path) -> Command:
    target = f"{where.name}:tokenloom.tar.gz"
    return _gcloud(where, "tpu-vm", "scp", str(archive), target, "--worker=all")


def fetch(where: Slice, output: Path) -> Command:
    source = f"{where.name}:tokenloom/runs"
    return _gcloud(where, "tpu-vm", "scp", "--recurse", source, str(output), "--worker=0")


def remote(command: Sequence[str]) -> str:
    """The shell command that a worker runs; its shell becomes the program, so signals reach it."""
    return (
        f"cd {_HOME}/code && echo $$ > {_HOME}/pid"
        f' && exec env PATH={_HOME}/venv/bin:"$PATH" {shlex.join(command)}'
    )
