"""A stand-in for the gcloud program: TPU VMs are directories, and ssh is a shell in one of them.

FAKE_GCLOUD names a directory with `plan.json` (see below) and what it keeps: `calls.jsonl`, the
argument lists; `vm.json`, while there is a VM; `queued.json`; `worker-N`, each worker's home.

plan.json: `workers`: how many; `refuse`: verb -> what it says on standard error before it fails;
`queued_states`: what a queued resource goes through; `vanish`: starts after which the VM is gone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

home = Path(os.environ["FAKE_GCLOUD"])
plan = json.loads((home / "plan.json").read_text())
arguments = sys.argv[1:]
with (home / "calls.jsonl").open("a") as file:
    file.write(json.dumps(arguments) + "\n")
kind, verb, *rest = arguments[2:]
options = dict(a.removeprefix("--").split("=", 1) for a in rest if a.startswith("--") and "=" in a)
names = [a for a in rest if not a.startswith("--")]
vm, queued = home / "vm.json", home / "queued.json"


def fail(text, status=1):
    print(text, file=sys.stderr)
    sys.exit(status)


def workers():
    chosen = options["worker"]
    numbers = range(plan["workers"]) if chosen == "all" else [int(chosen)]
    return [home / f"worker-{number}" for number in numbers]


def make_vm():
    vm.write_text(json.dumps({"state": "READY", "networkEndpoints": [{}] * plan["workers"]}))
    for number in range(plan["workers"]):
        (home / f"worker-{number}").mkdir(exist_ok=True)


def shell(directory, command):
    if "pip install" in command:  # nothing is fetched: this Python, and no more
        binaries = directory / "tokenloom" / "venv" / "bin"
        binaries.mkdir(parents=True, exist_ok=True)
        program = binaries / "python"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)
        return 0
    environment = os.environ | {"HOME": str(directory)}
    return subprocess.run(["bash", "-c", command], env=environment).returncode


if verb in plan.get("refuse", {}):
    fail(plan["refuse"][verb])
if kind == "queued-resources":
    if verb == "create":
        queued.write_text(json.dumps(plan["queued_states"]))
    elif not queued.exists():
        fail("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    elif verb == "delete":
        queued.unlink()
        vm.unlink(missing_ok=True)
    else:
        states = json.loads(queued.read_text())
        queued.write_text(json.dumps(states[1:] or states))
        if states[0] == "ACTIVE" and not vm.exists():
            make_vm()
        print(json.dumps({"state": {"state": states[0]}}))
elif verb == "create":
    if vm.exists():
        fail("ERROR: (gcloud) ALREADY_EXISTS")
    make_vm()
elif not vm.exists():
    fail("ERROR: (gcloud.compute.tpus.tpu-vm) NOT_FOUND: Resource 'nodes' was not found")
elif verb == "describe":
    print(vm.read_text())
elif verb == "delete":
    vm.unlink()
elif verb == "scp":
    source, target = names
    for directory in workers():
        if ":" in target:
            shutil.copy(source, directory / target.split(":")[1])
        else:
            path = directory / source.split(":")[1]
            shutil.copytree(path, Path(target) / path.name, dirs_exist_ok=True)
elif verb == "ssh":
    command = options["command"]
    status = max(shell(directory, command) for directory in workers())
    if "exec env" in command:
        starts = home / "starts"
        count = len(starts.read_text()) + 1 if starts.exists() else 1
        starts.write_text("x" * count)
        if count <= plan.get("vanish", 0):
            vm.write_text(json.dumps({"state": "PREEMPTED"}))
            sys.exit(255)
    sys.exit(status)
