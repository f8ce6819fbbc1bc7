import os
import pathlib
import signal
import subprocess
import sys

import pytest

from training import checkpoints, metric_writers

RUN = pathlib.Path(__file__).with_name("resume_run.py")
ROOT = RUN.parents[2]
STEPS, KILLED_BEFORE = 25, 21  # checkpoints at 8, 16, 24 and 25; evaluations at 6, 12, ...


def _command(workdir, cache, *more):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # The three processes compile once.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }
    return {
        "args": [sys.executable, str(RUN), str(workdir), *map(str, more)],
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def _run(workdir, cache):
    done = subprocess.run(**_command(workdir, cache), timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _curve(workdir):
    """Every line without what depends on the clock; floats as their exact hexadecimal."""
    lines = metric_writers.read_metrics(workdir / "metrics.jsonl")
    return [
        {
            name: value.hex() if isinstance(value, float) else value
            for name, value in line.items()
            if name != "tokens_per_second"
        }
        for line in lines
    ]


@pytest.mark.slow
def test_killed_run_goes_on_bit_identically(tmp_path):
    cache = tmp_path / "compiled"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = _run(whole, cache)

    with subprocess.Popen(**_command(broken, cache, KILLED_BEFORE)) as process:
        assert process.stdout.readline() == "waiting\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert checkpoints.Checkpointer(broken).steps[-1] == 16
    before = _curve(broken)
    assert before[-1]["step"] >= 16  # whatever of steps 17 to 20 had been written is redone

    assert _run(broken, cache) == expected
    curve = _curve(whole)
    assert _curve(broken) == curve
    losses = [line["loss"] for line in curve if "loss" in line]
    assert len(losses) == STEPS
    assert len(set(losses)) > STEPS // 2
    assert [line["step"] for line in curve if "eval_loss" in line] == [6, 12, 18, 24, 25]
    # The run that was cut short had come to the same numbers.
    assert before == curve[: len(before)]
