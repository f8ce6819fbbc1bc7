"""XManager: what is handed to it, and two work units that run for real."""

import asyncio
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, results
from launch import packaging, xm_launch
from models.errors import InputError

spec = importlib.util.spec_from_file_location(
    "fake_xmanager", Path(__file__).with_name("fake_xmanager.py")
)
fake_xmanager = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_xmanager)

GOLDEN = Path(__file__).with_name("golden")
RSD = "experiments/configs/rsd.py:offline"
ROOT = packaging.ROOT

# Two settings that run, on random weights, and one that no method has.
CONFIG = """
from experiments.config_parts import comparison, method


def get_config():
    config = comparison("tiny")
    config.models.target = config.models.draft = "random:tiny_llama"
    config.data.update(num_prompts=1, prompt_tokens=16)
    config.decode.update(max_new_tokens=4, repeats=1, temperatures=(0.0,))
    config.lossless.samples = 0
    config.decode.methods = (method("plain", "autoregressive"),)
    return config


def sweep():
    return [
        {"name": "bad", "decode.methods": (method("bad", "no_such_method"),)},
        {"name": "good"},
    ]
"""


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("xm_local_sweep", {}),
        (
            "xm_vertex_tpu",
            {"executor": "vertex", "accelerator": "tpu_v3=8", "workdir": "/gcs/bucket/rsd"},
        ),
        (
            "xm_vertex_gpu_run",
            {
                "executor": "vertex",
                "accelerator": "a100=2",
                "workdir": "/gcs/bucket/rsd",
                "as_sweep": False,
                "more": ("--config.decode.repeats=1",),
            },
        ),
    ],
)
def test_plans_are_as_recorded(here, name, arguments):
    plan = xm_launch.plan(RSD, **{"workdir": "/runs/rsd", "interpreter": "python", **arguments})
    found = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert found == json.loads((GOLDEN / f"{name}.json").read_text())


def test_a_vertex_experiment_gets_the_image_and_a_job_a_setting(here, monkeypatch):
    plan = xm_launch.plan(RSD, "/gcs/bucket/rsd", executor="vertex", accelerator="tpu_v3=8")
    xm, xm_local, log = fake_xmanager.modules()
    seen = {}

    def look(path, dockerfile):
        """The copy is there for as long as XManager builds the image."""
        seen["files"] = {
            p for p in ("setup.cfg", "launch/xm_launch.py") if (Path(path) / p).exists()
        }
        seen["dockerfile"] = Path(dockerfile).read_text()
        seen["ignored"] = (Path(path) / ".venv").exists()
        return "image"

    xm.Dockerfile = look
    assert asyncio.run(xm_launch.launch(plan, xm, xm_local)) == {}
    assert seen["files"] == {"setup.cfg", "launch/xm_launch.py"} and not seen["ignored"]
    assert seen["dockerfile"] == (ROOT / "launch/docker/tpu.Dockerfile").read_text()
    [title, package, *jobs, left] = log
    assert title == ("experiment", plan.title) and left == ("left",)
    assert package[1].executable_spec == "image" and package[1].executor_spec == "vertex spec"
    assert [tuple(job.args) for _, job in jobs] == [unit.arguments for unit in plan.work_units]
    assert all(job.executor.requirements == {"tpu_v3": 8} for _, job in jobs)


def _modules(kind):
    if kind == "fake":
        return fake_xmanager.modules()[:2]
    pytest.importorskip("xmanager")
    from absl import flags
    from xmanager import xm, xm_local

    flags.FLAGS.mark_as_parsed()
    return xm, xm_local


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_two_work_units_run_for_real_and_one_that_dies_leaves_the_other(
    kind, tmp_path, monkeypatch
):
    """From a copy of the checkout: results name its revision."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where XManager keeps its database
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    plan = xm_launch.plan(str(config), str(tmp_path / "work"))
    failed = asyncio.run(xm_launch.launch(plan, *_modules(kind), 2))
    assert list(failed) == ["bad"] and "non-zero" in failed["bad"]
    found = results.read(tmp_path / "work" / "001")
    assert found["name"] == "good" and found["runs"]
    revision = (tmp_path / "work" / "code" / results.REVISION_FILE).read_text().strip()
    assert found["git_revision"] == revision != "unknown"


def test_mistakes_are_named(here, tmp_path, monkeypatch):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    vertex = {"executor": "vertex"}
    for arguments, message in (
        ({"executor": "slurm"}, "executor: 'slurm' is not known.*allowed: local, vertex"),
        ({"accelerator": "tpu_v3=8"}, "accelerator: not with --executor=local"),
        (vertex | {"accelerator": "tpu_v3"}, "must be NAME=COUNT"),
        (vertex | {"accelerator": "tpu_v6e=4"}, "'tpu_v6e' is not known.*use launch.tpu_vm"),
        (vertex | {"accelerator": "h1000=4"}, "did you mean 'h100'"),
        (vertex | {"config": str(config)}, "is outside the checkout"),
        ({"more": ("--config.seed=1",)}, "not for a sweep; allowed with --nosweep"),
        (
            {"as_sweep": True, "config": "experiments/configs/quickstart.py"},
            "has no function sweep",
        ),
        ({"config": "none.py"}, "'none.py' is not a file"),
    ):
        with pytest.raises(InputError, match=message):
            xm_launch.plan(**{"config": RSD, "workdir": "w", **arguments})


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["xm_launch", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.run_main(xm_launch.main, xm_launch.FLAGS)
    return (end.value.code or 0, *capsys.readouterr())


def test_the_program_says_what_is_missing(here, monkeypatch, capsys, tmp_path):
    flags = (f"--config={RSD}", f"--workdir={tmp_path}")
    status, out, _ = run(monkeypatch, capsys, *flags, "--dry_run")
    assert status == 0 and json.loads(out)["executor"] == "local"
    assert not list(tmp_path.iterdir())
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xmanager" else real(name)
    )
    status, _, err = run(monkeypatch, capsys, *flags)
    assert status == cli.BAD_INPUT and "pip install -e '.[launch]'" in err
    assert run(monkeypatch, capsys, "--workdir=w")[2] == "error: --config: missing\n"


def test_missing_cloud_settings_are_named(monkeypatch):
    """With a stand-in for google.auth: no credentials, then no project, then no bucket."""
    import types

    class DefaultCredentialsError(Exception):
        pass

    answers = [DefaultCredentialsError(), (None, None), (None, "project")]

    def default():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    auth = types.SimpleNamespace(default=default)
    errors = types.SimpleNamespace(DefaultCredentialsError=DefaultCredentialsError)
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(auth=auth))
    monkeypatch.setitem(sys.modules, "google.auth", auth)
    monkeypatch.setitem(sys.modules, "google.auth.exceptions", errors)
    monkeypatch.delenv(xm_launch.BUCKET, raising=False)
    for message in ("^credentials: ", "^project: missing", "^GOOGLE_CLOUD_BUCKET_NAME: missing"):
        with pytest.raises(InputError, match=message):
            xm_launch.check_cloud()


def test_packages_hold_what_git_knows_of_and_not_what_it_ignores(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    with pytest.raises(InputError, match="is no git checkout"):
        packaging.files(root)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for name in ("a b.py", "sub/new.py", "gone.py", "runs/out.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("runs/\n")
    subprocess.run(["git", "add", "a b.py", "gone.py"], cwd=root, check=True)
    (root / "gone.py").unlink()
    names = [".gitignore", "a b.py", "sub/new.py"]
    assert [str(name) for name in packaging.files(root)] == names
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "stale.py").write_text("")
    packaging.snapshot(copy, root)
    import tarfile

    packaging.archive(tmp_path / "code.tar.gz", root)
    with tarfile.open(tmp_path / "code.tar.gz") as tar:
        assert sorted(tar.getnames()) == sorted([*names, results.REVISION_FILE])
    found = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
    assert found == sorted([*names, results.REVISION_FILE])
