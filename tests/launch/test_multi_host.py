"""Two real processes on this machine: training, decoding, one that is killed, one told to stop."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import cli, generate
from models import distributed
from models.distributed import Cluster
from models.errors import InputError
from tests.launch import multi_host_job
from training import checkpoints, metric_writers
from training.loop import TERMINATED

ROOT = pathlib.Path(__file__).parents[2]
JOB = [sys.executable, str(ROOT / "tests" / "launch" / "multi_host_job.py")]
GENERATE = [sys.executable, "-m", "experiments.generate", "--heartbeat_timeout=20"]
# What this process compiles with, and one device.
FLAGS = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
STEPS = 25  # checkpoints at 8, 16, 24 and 25
# A process that lost another says so itself, or JAX does and aborts.
LOST = re.compile("lost another process of this job|another task died")
LOST_STATUS = (distributed.PEER_LOST, -signal.SIGABRT)
# From the death of a process to the end of the other: heartbeats, with room for a busy machine.
BOUND_SECONDS = 90


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Pair:
    """Two processes of one job with a device each; outputs go to files, so that none blocks."""

    def __init__(self, command, folder, **environment):
        folder.mkdir()
        address = f"127.0.0.1:{free_port()}"
        self.files = [(folder / f"out{i}", folder / f"err{i}") for i in range(2)]
        self.processes = []
        for i, (out, err) in enumerate(self.files):
            env = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": FLAGS,
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                **environment,
            }
            with out.open("w") as output, err.open("w") as errors:
                self.processes.append(
                    subprocess.Popen(command, env=env, stdout=output, stderr=errors, cwd=ROOT)
                )

    def wait(self, seconds=240):
        """Exit statuses; kills what is left after so many seconds."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def read(self, i):
        """Standard output and error of process i."""
        return tuple(path.read_text() for path in self.files[i])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run of 25 steps that was told to stop, then killed, then done; and one in one process."""
    root = tmp_path_factory.mktemp("job")
    workdir = root / "run"
    found = {"root": root, "workdir": workdir}
    whole = multi_host_job.train(multi_host_job.run_config(mesh=(2, 2)), root / "whole")
    found["params"] = jax.device_get(whole.state.params)

    told = Pair([*JOB, str(workdir), "4", str(signal.SIGTERM.value)], root / "told")
    found["told"] = (told.wait(), told.read(0), told.read(1))
    found["told steps"] = checkpoints.Checkpointer(workdir).steps

    # The batches are counted anew: this is soon after the next checkpoint.
    killed = Pair([*JOB, str(workdir), "12", str(signal.SIGKILL.value)], root / "killed")
    killed.processes[1].wait(240)
    begin = time.monotonic()
    found["killed"] = (killed.wait(), killed.read(0))
    found["seconds to end"] = time.monotonic() - begin
    found["killed steps"] = checkpoints.Checkpointer(workdir).steps

    done = Pair([*JOB, str(workdir)], root / "done")
    found["done"] = (done.wait(), done.read(0), done.read(1))
    return found


@pytest.mark.slow
def test_what_two_processes_make_is_kept_once_when_both_are_done(job):
    kept = job["root"] / "kept"
    assert (kept / "thing" / "text").read_text() == "made by 0"
    assert [path.name for path in (kept / ".work" / "thing").iterdir()] == [".lock"]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_after_the_same_step(job):
    statuses, (_, first), (_, second) = job["told"]
    assert statuses == [TERMINATED, TERMINATED], first + second
    (step,) = job["told steps"][-1:]
    assert 4 <= step < STEPS


@pytest.mark.slow
def test_a_killed_process_ends_the_job_in_time_and_says_why(job):
    statuses, (_, said) = job["killed"]
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] in LOST_STATUS, said
    assert LOST.search(said)
    assert job["seconds to end"] < BOUND_SECONDS
    assert job["told steps"][-1] < job["killed steps"][-1] < STEPS


@pytest.mark.slow
def test_two_processes_train_as_one_does_whatever_became_of_them(job):
    assert job["done"][0] == [0, 0], job["done"][1:]
    lines = {
        name: metric_writers.read_metrics(job["root"] / name / "metrics.jsonl")
        for name in ("whole", "run")
    }
    losses = {name: [x for x in found if "loss" in x] for name, found in lines.items()}
    # Each step once, and each with the loss that one process has.
    assert [x["step"] for x in losses["run"]] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(
        [x["loss"] for x in losses["run"]], [x["loss"] for x in losses["whole"]], rtol=2e-5
    )
    evaluations = [[x["eval_loss"] for x in lines[name] if "eval_loss" in x] for name in lines]
    np.testing.assert_allclose(*evaluations, rtol=2e-5)
    with np.load(job["root"] / "params.npz") as saved:
        for ours, theirs in zip(saved.values(), jax.tree.leaves(job["params"]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(4, 2), (1, 1)])
def test_a_checkpoint_of_a_2x2_mesh_goes_on_on_another(job, tmp_path, mesh):
    workdir = shutil.copytree(job["root"] / "whole", tmp_path / "moved")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    moved = multi_host_job.train(multi_host_job.run_config(mesh=mesh), workdir)
    assert moved.step == STEPS
    for ours, theirs in zip(
        jax.tree.leaves(moved.state.params), jax.tree.leaves(job["params"]), strict=True
    ):
        assert len(ours.sharding.device_set) == mesh[0] * mesh[1]
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)
    lines = [
        metric_writers.read_metrics(d / "metrics.jsonl")[-1]
        for d in (workdir, job["root"] / "whole")
    ]
    assert lines[0]["eval_loss"] == pytest.approx(lines[1]["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_mesh_of_two_processes_decodes_as_one_device_does(job):
    expected = multi_host_job.decode(job["params"], None)
    with np.load(job["root"] / "rows.npz") as found:
        for name in ("rows", "heads"):
            assert found[name].tolist() == expected


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs `experiments.generate` in this process: (exit status, standard output and error)."""

    def here(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run_main(generate.main, generate.FLAGS)
        return end.value.code or 0, *capsys.readouterr()

    return here


@pytest.mark.slow
def test_prompts_are_answered_once_by_two_processes_one_of_which_is_killed(tmp_path, here):
    # Each round has a longer prompt, which is compiled anew: time to be killed in.
    prompts = [{"id": f"p{i}", "prompt": "ab" * (16 * (i // 4) + i % 4 + 1)} for i in range(14)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = [
        "--checkpoint=random:tiny_llama", f"--prompts_file={file}", "--method=prompt_lookup",
        "--temperature=0.8", "--batch_size=2", "--max_new_tokens=12", "--json",
    ]  # fmt: skip
    status, expected, _ = here(*flags)
    assert status == 0
    assert [json.loads(line)["id"] for line in expected.splitlines()] == [p["id"] for p in prompts]

    workdir = tmp_path / "rows"
    rows = workdir / "rows.jsonl"
    command = [*GENERATE, *flags, f"--workdir={workdir}"]
    killed = Pair(command, tmp_path / "killed", JAX_ENABLE_COMPILATION_CACHE="false")
    while not (rows.exists() and rows.read_text().count("\n") >= 4):
        assert killed.processes[1].poll() is None, killed.read(1)
        time.sleep(0.02)
    killed.processes[1].kill()
    statuses = killed.wait(BOUND_SECONDS)
    assert statuses[0] in LOST_STATUS
    assert LOST.search(killed.read(0)[1])
    kept = rows.read_text()
    assert expected.startswith(kept)
    assert 4 <= kept.count("\n") < len(prompts)

    done = Pair(command, tmp_path / "done")
    assert done.wait() == [0, 0], done.read(0) + done.read(1)
    # The first process prints every row once and in order, as one process would; the other nothing.
    assert done.read(0)[0] == expected
    assert done.read(1)[0] == ""
    assert rows.read_text() == expected
    # One process goes on from there as well: nothing is left to do.
    assert here(*flags, f"--workdir={workdir}") == (0, expected, "")
    status, _, said = here(*flags, f"--workdir={workdir}", "--seed=1")
    assert status == 2
    assert "seed is 0 there and 1 here" in said


def test_a_coordinator_that_cannot_be_reached_is_named_in_time(here):
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    status, out, said = here(
        "--checkpoint=random:tiny_llama", "--prompt=a", f"--coordinator={address}",
        "--num_processes=2", "--process_id=1", "--connect_timeout=1",
    )  # fmt: skip
    assert time.monotonic() - begin < 20
    assert (status, out) == (2, "")
    assert f"coordinator: {address} cannot be reached in 1 s" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, "coordinator: missing; it is needed with num_proc"),
        ({"coordinator": "a:1", "num_processes": 2}, "process_id: missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "'a' must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id: 2 must be"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "num_processes: 0 must be"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout: 0 must be at least 1"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Cluster(**given)


def test_the_environment_says_what_flags_do_not():
    environment = {
        "JAX_COORDINATOR_ADDRESS": "host:99", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3",
    }  # fmt: skip
    assert distributed.from_environment(environment, process_id=1) == Cluster("host:99", 4, 1)
    assert distributed.from_environment({}) == Cluster()
    with pytest.raises(InputError, match="JAX_PROCESS_ID: 'x' must be an integer"):
        distributed.from_environment({**environment, "JAX_PROCESS_ID": "x"})


def test_how_processes_are_found(monkeypatch):
    """Slurm's and Cloud TPU's variables are JAX's to read; what reaches it from here is checked."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: asked.append((a, k)))
    timeouts = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 100}
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    distributed.start(Cluster(detect=False))
    distributed.start(Cluster("host:99", 1, 0))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.start(Cluster())  # one task: there is nothing to find
    assert not asked

    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.start(Cluster())
    ((address,), options) = asked.pop()
    assert address is None
    assert timeouts.items() <= options.items()
    assert "cluster_detection_method" not in options

    distributed.start(Cluster("host:99", 2, 0))
    (arguments, options) = asked.pop()
    assert arguments == ("host:99", 2, 0)
    assert options["cluster_detection_method"] == "deactivate"


def test_slurm_is_read_by_jax(monkeypatch):
    """The variables of `srun --ntasks=2` on two nodes; nobody answers there."""
    monkeypatch.setattr(distributed, "_SHUTDOWN_SECONDS", 1)
    found = {}

    def stop(self, *arguments, **_):
        found["arguments"] = arguments
        raise RuntimeError("stop here")

    # JAX's own detection runs; only the connection is taken away.
    from jax._src import distributed as runtime
    from jax._src import xla_bridge

    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(
        runtime._jax, "get_distributed_runtime_client", lambda *a, **k: stop(None, *a)
    )
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    state = runtime.State()
    monkeypatch.setattr(runtime, "global_state", state)
    with pytest.raises(InputError, match="cluster: one was found, but not its processes"):
        distributed.start(Cluster())
    assert found["arguments"] == (state.coordinator_address, 1)
    assert state.coordinator_address.startswith("node03:")
    assert state.num_processes == 2
