"""Writes what a cluster needs to run a command: a Kubernetes JobSet, or a Slurm script.

    python -m launch.cluster --kind=jobset --name=rsd --image=IMAGE --topology=v5e:4x4 \\
        --bucket=BUCKET -- python -m experiments.run --config=... --workdir=/bucket/rsd > rsd.yaml
    python -m launch.cluster --kind=jobset --name=rsd --image=IMAGE --hosts=2 --gpus=8 -- python ...
    python -m launch.cluster --kind=slurm --name=rsd --hosts=2 --gpus=8 --time=12:00:00 \\
        --setup="source .venv/bin/activate" -- python -m experiments.run ... > rsd.sh

Every host runs the same command. Where it ends with a status after which it may be started again
(see `launch.exit_status`), both start it again. Images are those of launch/docker.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from absl import flags

from experiments import cli
from launch import chips, exit_status
from models.errors import InputError, check_choice

FLAGS = flags.FlagValues()


def _text(name: str, text: str, default: str | None = None) -> flags.FlagHolder:
    return flags.DEFINE_string(name, default, text, flag_values=FLAGS)


def _integer(name: str, default: int | None, least: int, text: str) -> flags.FlagHolder:
    return flags.DEFINE_integer(name, default, text, least, flag_values=FLAGS)


_KIND = _text("kind", "jobset or slurm.")
_NAME = _text("name", "Of the job.")
_HOSTS = _integer("hosts", None, 1, "Hosts; follows from --topology.")
_GPUS = _integer("gpus", None, 1, "GPUs of a host.")
_RESTARTS = _integer("restarts", 3, 0, "Times to start again (JobSet: preemption does not count).")
_GRACE = _integer("grace_seconds", 120, 1, "From SIGTERM until the job is killed.")
_IMAGE = _text("image", "jobset: container image.")
_TOPOLOGY = _text("topology", "jobset: a TPU slice of GKE, for example v5e:4x4.")
_BUCKET = _text("bucket", "jobset: bucket of Cloud Storage, seen at /bucket.")
_SERVICE_ACCOUNT = _text("service_account", "jobset: Kubernetes account that may use the bucket.")
_TIME = _text("time", "slurm: time limit, for example 12:00:00.", "24:00:00")
_PARTITION = _text("partition", "slurm: where to run.")
_ACCOUNT = _text("account", "slurm: whom to charge.")
_SETUP = flags.DEFINE_multi_string(
    "setup", [], "slurm: shell command that comes first.", flag_values=FLAGS
)

_TEMPLATES = {"jobset": "jobset.yaml.j2", "slurm": "slurm.sh.j2"}
# Node labels of GKE's TPU slices. A slice of up to eight v5e or v6e chips is one host; larger ones,
# and those of other chips, have four chips a host.
_GKE_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
_ONE_HOST = {"v5e": 8, "v6e": 8}
_CHIPS_PER_HOST = 4
# A label of RFC 1123, short enough for the names of pods made of it.
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_WORD = re.compile(r"[\w.:,@+-]+")


def tpu_slice(topology: str) -> tuple[dict[str, Any], int]:
    """What a manifest says of a TPU slice, and its number of hosts.

    Raises:
      InputError: no such slice, or a part of a host.
    """
    chip, shape = chips.parse(topology)
    check_choice("topology", chip.name, _GKE_ACCELERATORS)
    size = math.prod(shape)
    one_host = size <= _ONE_HOST.get(chip.name, _CHIPS_PER_HOST)
    per_host = size if one_host else _CHIPS_PER_HOST
    fields = {
        "accelerator": _GKE_ACCELERATORS[chip.name],
        "topology": "x".join(map(str, shape)),
        "chips_per_host": per_host,
    }
    return fields, size // per_host


def render(kind: str, command: Sequence[str], fields: Mapping[str, Any]) -> str:
    """A manifest or a script.

    Args:
      kind: 'jobset' or 'slurm'.
      command: what every host runs.
      fields: `name`, `hosts`, `gpus`, `restarts`, `grace_seconds`; for a JobSet `image`, `tpu` (of
        `tpu_slice`), `bucket`, `service_account`; for Slurm `time`, `partition`, `account`,
        `setup`. What is None is left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # neither is HTML
    )
    environment.filters["quote"] = shlex.quote
    # Kubernetes would put a variable in place of $(NAME).
    environment.filters["literal"] = lambda text: text.replace("$(", "$$(")
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    template = environment.get_template(_TEMPLATES[kind])
    return template.render(
        command=list(command), restartable=sorted(exit_status.RESTARTABLE), **fields
    )


def _check(kind: str, values: Mapping[str, Any]) -> None:
    """Raises InputError for flags that are missing, of the other kind, or not one word."""
    need = {"jobset": ("name", "image"), "slurm": ("name", "hosts")}[kind]
    other = {
        "slurm": ("image", "topology", "bucket", "service_account"),
        "jobset": ("partition", "account", "setup"),
    }[kind]
    for name in need:
        if not values[name]:
            raise InputError(f"--{name}: missing")
    for name in other:
        if values[name]:
            raise InputError(f"{name}: not with --kind={kind}")
    if not _LABEL.fullmatch(values["name"]):
        raise InputError(
            f"name: {values['name']!r}; allowed: up to 40 of a-z, 0-9 and '-', a letter first"
        )
    for name in ("time", "partition", "account"):
        if values[name] and not _WORD.fullmatch(values[name]):
            raise InputError(f"{name}: {values[name]!r}; allowed: letters, digits and .:,@+-_")
    if kind == "jobset" and (values["topology"] is None) == (values["gpus"] is None):
        raise InputError("topology: give this for TPUs, or --gpus and --hosts for GPUs")
    if kind == "jobset" and values["topology"] and values["hosts"]:
        raise InputError("hosts: not with --topology, which says how many there are")


def main(argv: list[str]) -> None:
    if _KIND.value is None:
        raise InputError(f"--kind: missing; allowed: {', '.join(_TEMPLATES)}")
    check_choice("kind", _KIND.value, _TEMPLATES)
    if len(argv) < 2:
        raise InputError("command: missing; give it after --, for example -- python -m ...")
    fields: dict[str, Any] = {
        flag.name: flag.value
        for flag in (
            _NAME, _HOSTS, _GPUS, _RESTARTS, _GRACE, _IMAGE, _TOPOLOGY, _BUCKET, _SERVICE_ACCOUNT,
            _TIME, _PARTITION, _ACCOUNT, _SETUP,
        )
    }  # fmt: skip
    _check(_KIND.value, fields)
    tpu, hosts = None, _HOSTS.value or 1
    if _TOPOLOGY.value:
        tpu, hosts = tpu_slice(_TOPOLOGY.value)
    sys.stdout.write(render(_KIND.value, argv[1:], {**fields, "tpu": tpu, "hosts": hosts}))


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
