"""JobSets, Slurm scripts and images: as recorded, valid, and right in what they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from experiments import cli
from launch import cluster, exit_status, packaging

GOLDEN = Path(__file__).with_name("golden")
BIN = Path(sys.executable).parent
KUBERNETES = "1.37"
IMAGE = "--image=registry.example/tokenloom:1"
JOBSET = ("--kind=jobset", "--name=rsd", IMAGE)
SLURM = ("--kind=slurm", "--name=rsd", "--hosts=2")
# What quoting has to keep: quotes, a YAML comment, and what shells and Kubernetes would expand.
PROMPT = '--prompt="yes": #no it\'s $HOME $(HOME) é'
RUN = ("--", "python", "-m", "experiments.run", "--config=rsd.py", "--workdir=w")
GENERATE = ("--", "python", "-m", "experiments.generate", PROMPT, "--checkpoint=DIR")


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cluster", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run_main(cluster.main, cluster.FLAGS)
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "jobset_tpu.yaml",
            (*JOBSET, "--topology=v5e:4x4", "--bucket=my-bucket", "--service_account=me", *RUN),
        ),
        ("jobset_gpu.yaml", (*JOBSET, "--gpus=8", "--hosts=2", *GENERATE)),
        (
            "slurm_gpu.sh",
            (*SLURM, "--gpus=8", "--partition=gpu", "--setup=module load cuda", *GENERATE),
        ),
        ("slurm_cpu.sh", (*SLURM, "--restarts=1", "--time=1:00:00", *RUN)),
    ],
)
def test_specs_are_as_recorded_and_pass_their_checkers(program, name, arguments):
    status, out, _ = program(*arguments)
    assert status == 0
    assert out == (GOLDEN / name).read_text()
    if name.endswith(".sh"):
        # SC2016: what stands in single quotes is not to be expanded.
        checked = subprocess.run(
            [BIN / "shellcheck", "--exclude=SC2016", GOLDEN / name], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout
        return
    jobset = yaml.safe_load(out)
    schema = json.loads(Path(__file__).with_name("jobset.schema.json").read_text())
    jsonschema.validate(jobset, schema)
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "rsd"}}
    kubernetes_validate.validate(job | replicated["template"], KUBERNETES, strict=True)
    # What `strict` means: a field in the wrong place is an error.
    replicated["template"]["spec"]["template"]["spec"]["image"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | replicated["template"], KUBERNETES, strict=True)


def test_a_jobset_restarts_after_preemption_and_keeps_arguments_whole(program):
    jobset = yaml.safe_load(program(*JOBSET, "--gpus=8", "--hosts=2", *GENERATE)[1])
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["values"] == sorted(exit_status.RESTARTABLE)
    container = job["template"]["spec"]["containers"][0]
    assert codes["containerName"] == container["name"]
    assert container["command"][3] == PROMPT.replace("$(", "$$(")  # which Kubernetes makes $( again
    names = [variable["name"] for variable in container["env"]]
    assert names == ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    alone = yaml.safe_load(program(*JOBSET, "--gpus=1", *GENERATE)[1])
    template = alone["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert "env" not in template["spec"]["containers"][0]  # nobody to find


@pytest.mark.parametrize(
    ("topology", "hosts", "per_host"),
    [("v5e:1x1", 1, 1), ("v5e:2x4", 1, 8), ("v5e:16x16", 64, 4), ("v5p:2x2x1", 1, 4),
     ("v5p:4x4x4", 16, 4), ("v6e:4x4", 4, 4)],
)  # fmt: skip
def test_hosts_of_tpu_slices(topology, hosts, per_host):
    fields, found = cluster.tpu_slice(topology)
    assert (found, fields["chips_per_host"]) == (hosts, per_host)
    assert fields["topology"] == topology.partition(":")[2]


@pytest.mark.parametrize(
    ("ended", "restarts_before", "requeued"),
    [(0, 0, False), (1, 0, False), (143, 0, True), (75, 2, True), (143, 3, False)],
)
def test_a_slurm_script_requeues_what_was_preempted(
    program, tmp_path, ended, restarts_before, requeued
):
    """The script in a real shell; srun and scontrol note how they are called."""
    script = tmp_path / "job.sh"
    script.write_text(program(*SLURM, "--setup=cd .", *GENERATE)[1])
    for name, status in (("srun", ended), ("scontrol", 1)):  # a refusal is no failure
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\nexit {status}\n')
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12",
        "SLURM_RESTART_COUNT": str(restarts_before),
    }
    done = subprocess.run(["bash", script], env=environment, cwd=tmp_path)
    assert done.returncode == ended
    assert (tmp_path / "srun.txt").read_text().splitlines() == list(GENERATE[1:])
    called = tmp_path / "scontrol.txt"
    assert (called.read_text().split() if called.exists() else []) == (
        ["requeue", "12"] if requeued else []
    )


def test_a_slurm_script_does_not_go_on_when_its_set_up_fails(program, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(program(*SLURM, "--setup=cd nowhere", *RUN)[1])
    done = subprocess.run(["bash", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "srun" not in done.stderr


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_images_pass_the_linter_and_install_their_extra(kind):
    path = packaging.ROOT / "launch" / "docker" / f"{kind}.Dockerfile"
    checked = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    text = path.read_text()
    assert f"'.[{kind}]'" in text and 'ENTRYPOINT ["python"]' in text


def test_mistakes_are_named(program):
    jobset, slurm = (*JOBSET, *RUN), (*SLURM, *RUN)
    for arguments, message in (
        (RUN, "--kind: missing; allowed: jobset, slurm"),
        (("--kind=k8s", *RUN), "kind: 'k8s' is not known"),
        (JOBSET, "command: missing"),
        (jobset, "topology: give this for TPUs, or --gpus and --hosts for GPUs"),
        (("--topology=v5e:3x3", *jobset), "3x3"),
        (("--topology=v9:4x4", *jobset), "'v9' is not known"),
        (("--topology=v5e:4x4", "--hosts=2", *jobset), "hosts: not with --topology"),
        (("--partition=a", "--gpus=1", *jobset), "partition: not with --kind=jobset"),
        (("--image=x", *slurm), "image: not with --kind=slurm"),
        (("--kind=slurm", "--name=a", *RUN), "--hosts: missing"),
        (("--kind=slurm", "--name=A b", "--hosts=1", *RUN), "name: 'A b'; allowed: up to 40"),
        (("--time=1\n#SBATCH --x", *slurm), "time: '1\\n#SBATCH --x'; allowed: letters"),
        (("--gpus=0", *slurm), "gpus"),
    ):
        status, out, err = program(*arguments)
        assert status == cli.BAD_INPUT and not out
        assert err.startswith("error: ") and message in err, err
