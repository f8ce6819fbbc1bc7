"""Cloud TPU VMs: the commands as recorded, and whole runs against a stand-in for gcloud."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli, results
from launch import exit_status, packaging, tpu_commands, tpu_vm
from models.distributed import PEER_LOST
from models.errors import InputError
from training import loop

GOLDEN = Path(__file__).with_name("golden")
FAKE = Path(__file__).with_name("fake_gcloud.py")
WHERE = (
    "--name=my-tpu", "--zone=us-central1-a", "--accelerator_type=v5litepod-16",
    "--runtime_version=v2-alpha-tpuv5-lite",
)  # fmt: skip
COMMAND = ("python", "-m", "experiments.generate", "--prompt=it's $HOME; `x`", "--checkpoint=DIR")


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tpu_vm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run_main(tpu_vm.main, tpu_vm.FLAGS)
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts the stand-in on PATH; returns a function that sets its plan, and one for its calls."""
    home = tmp_path / "cloud"
    (tmp_path / "bin").mkdir()
    home.mkdir()
    script = tmp_path / "bin" / "gcloud"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S {FAKE} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(home))
    monkeypatch.setattr(tpu_vm, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(packaging.ROOT)

    def plan(**fields):
        (home / "plan.json").write_text(json.dumps({"workers": 2, **fields}))

    def calls():
        lines = (home / "calls.jsonl").read_text().splitlines()
        return [" ".join(json.loads(line)[2:4]) for line in lines]

    plan()
    plan.home, plan.calls, plan.output = home, calls, tmp_path / "output"
    return plan


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tpu_vm_keep", ()),
        (
            "tpu_vm_queued",
            ("--queued", "--spot", "--delete", "--project=my-project", "--setup=gcsfuse b ~/b"),
        ),
    ],
)
def test_a_dry_run_prints_the_commands_as_recorded(program, monkeypatch, name, flags):
    monkeypatch.setenv("PATH", "")
    status, out, _ = program(*WHERE, *flags, "--dry_run", "--", *COMMAND)
    assert status == 0
    assert out == (GOLDEN / f"{name}.txt").read_text()


def test_what_workers_are_sent_passes_shellcheck_and_keeps_arguments_whole(tmp_path):
    script = tmp_path / "remote.sh"
    lines = (
        tpu_commands.UNPACK,
        tpu_commands.INSTALL,
        tpu_commands.STOP,
        f"( {tpu_commands.remote(COMMAND)} )",
    )
    script.write_text("#!/bin/bash\n" + "\n".join(lines) + "\n")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    # SC2164: cd is followed by &&. SC2016: what is quoted is not to be expanded here.
    done = subprocess.run([shellcheck, "--exclude=SC2016", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert tuple(shlex.split(tpu_commands.remote(COMMAND))[-len(COMMAND) :]) == COMMAND


# Prints, leaves a result, and ends with the status that its worker's home has in `status`.
WORKER = (
    "import os, pathlib, sys; home = pathlib.Path.home(); print('at', os.getcwd(), sys.argv[1:]);"
    "pathlib.Path('runs/result.txt').write_text(home.name);"
    "revision = pathlib.Path('REVISION').read_text(); told = home / 'status';"
    "status = int(told.read_text()) if told.exists() else 0;"
    "print('status', status, file=sys.stderr); sys.exit(status)"
)


def start(program, plan, *flags):
    return program(
        *WHERE, f"--output={plan.output}", *flags, "--", "python", "-c", WORKER, "a b", "$HOME"
    )


def test_a_run_from_creation_to_deletion(program, gcloud):
    """Two workers run the checkout's copy in real shells, arguments whole."""
    status, out, _ = start(program, gcloud, "--delete")
    assert status == 0 and "all workers ended well" in out
    for worker in range(2):
        text = (gcloud.output / "logs" / f"worker-{worker}.log").read_text()
        assert f"worker-{worker}/tokenloom/code ['a b', '$HOME']" in text and "status 0" in text
        assert (gcloud.home / f"worker-{worker}/tokenloom/code/launch/tpu_vm.py").exists()
    assert (gcloud.output / "runs" / "result.txt").read_text() == "worker-0"
    revision = (gcloud.home / "worker-0/tokenloom/code" / results.REVISION_FILE).read_text()
    assert revision.strip() == results.git_revision() or "+changes" in revision
    assert gcloud.calls() == [
        "tpu-vm describe", "tpu-vm create", "tpu-vm describe", "tpu-vm scp", "tpu-vm ssh",
        "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm scp", "tpu-vm delete",
    ]  # fmt: skip
    assert not (gcloud.home / "vm.json").exists()


def test_a_worker_that_fails_is_named_and_the_vm_is_deleted_all_the_same(program, gcloud):
    """The other worker says only that it lost a peer: it is not to blame, and nothing restarts."""
    for worker, status in ((0, PEER_LOST), (1, 7)):
        (gcloud.home / f"worker-{worker}").mkdir()
        (gcloud.home / f"worker-{worker}" / "status").write_text(str(status))
    status, _, err = start(program, gcloud, "--delete")
    assert status == tpu_vm.FAILED
    assert "worker 1: exit status 7: status 7 (see" in err
    assert "status 7" in (gcloud.output / "logs" / "worker-1.log").read_text()
    assert (gcloud.output / "runs" / "result.txt").exists()
    assert gcloud.calls()[-1] == "tpu-vm delete" and gcloud.calls().count("tpu-vm create") == 1


def test_preemption_starts_again_and_no_more_often_than_asked(program, gcloud):
    """First the VM is taken away, later the command itself says that it was terminated."""
    gcloud(workers=1, vanish=1)
    status, _, _ = start(program, gcloud)
    assert status == 0
    # It is made anew: the one that was taken away keeps its name until it is deleted.
    assert [c for c in gcloud.calls() if c.split()[1] in ("create", "delete")] == [
        "tpu-vm create", "tpu-vm delete", "tpu-vm create",
    ]  # fmt: skip
    (gcloud.home / "worker-0" / "status").write_text(str(loop.TERMINATED))
    before = len(gcloud.calls())
    status, _, err = start(program, gcloud, "--restarts=1")
    assert status == exit_status.PREEMPTED == loop.TERMINATED and "143" in err
    again = gcloud.calls()[before:]
    assert again.count("tpu-vm ssh") == 2 * 3 and "tpu-vm create" not in again


def test_a_queued_resource_is_waited_for(program, gcloud):
    gcloud(workers=1, queued_states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert start(program, gcloud, "--queued", "--delete")[0] == 0
    assert gcloud.calls().count("queued-resources describe") == 4
    assert gcloud.calls()[-1] == "queued-resources delete"
    gcloud(workers=1, queued_states=["WAITING_FOR_RESOURCES", "FAILED"])
    status, _, err = start(program, gcloud, "--queued")
    assert status == cli.BAD_INPUT and "my-tpu: the queued resource is FAILED" in err


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (
            {"describe": "ERROR: You do not currently have an active account selected."},
            "error: credentials: missing or too old; run `gcloud auth login`",
        ),
        (
            {"describe": "ERROR: The required property [project] is not currently set."},
            "error: project: missing; give --project",
        ),
        (
            {"create": "ERROR: no more\ncapacity in the zone"},
            "tpu-vm create my-tpu: ERROR: no more",
        ),
    ],
)
def test_what_gcloud_refuses_is_one_clear_line(program, gcloud, refuse, message):
    gcloud(refuse=refuse)
    status, _, err = start(program, gcloud)
    assert status == cli.BAD_INPUT and message in err and err.count("error:") == 1


def test_a_vm_is_deleted_when_its_set_up_fails(program, gcloud):
    gcloud(refuse={"ssh": "ERROR: connection refused"})
    status, _, err = start(program, gcloud, "--delete")
    assert status == cli.BAD_INPUT and "connection refused" in err
    assert gcloud.calls()[-1] == "tpu-vm delete"
    gcloud(refuse={"ssh": "ERROR: connection refused", "delete": "ERROR: backend"})
    status, _, err = start(program, gcloud, "--delete")
    assert status == cli.BAD_INPUT and "connection refused" in err
    assert "could not be deleted, delete it by hand" in err


def test_mistakes_are_named(program, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program(*WHERE, "--", "true")[::2] == (
        cli.BAD_INPUT,
        "error: gcloud: not found on PATH; install the Google Cloud CLI, or see --dry_run\n",
    )
    assert "command: missing" in program(*WHERE)[2]
    assert program(*WHERE[1:], "--", "true")[2] == "error: --name: missing\n"
    with pytest.raises(InputError, match="gcloud: not found"):
        tpu_vm.call(("gcloud",))


def test_an_interrupted_launcher_stops_the_workers(gcloud):
    """SIGTERM while a worker runs: it is told to stop, and the VM is deleted."""
    gcloud(workers=1)
    begun = gcloud.home / "worker-0" / "begun"
    code = f"import pathlib, time; pathlib.Path({str(begun)!r}).write_text(''); time.sleep(60)"
    flags = (*WHERE, f"--output={gcloud.output}", "--delete")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.tpu_vm", *flags, "--", "python", "-c", code],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == loop.TERMINATED
    assert gcloud.calls()[-2:] == ["tpu-vm ssh", "tpu-vm delete"]
