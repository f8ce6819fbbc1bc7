"""SIGTERM to a real training process: a checkpoint, a status that says so, and no trace of it."""

import signal
import subprocess

import pytest

from tests.training.test_resume import STEPS, _command, _curve, _run
from training import checkpoints
from training.loop import TERMINATED

STOPPED_BEFORE = 12  # between the checkpoints of steps 8 and 16


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_goes_on_bit_identically(tmp_path):
    cache = tmp_path / "compiled"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = _run(whole, cache)

    with subprocess.Popen(**_command(broken, cache, STOPPED_BEFORE)) as process:
        assert process.stdout.readline() == "waiting\n", process.stderr.read()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=600)
    assert process.returncode == TERMINATED == 128 + signal.SIGTERM, said
    # The step that was to come is still taken, and nothing after it.
    assert checkpoints.Checkpointer(broken).steps == [8, STOPPED_BEFORE]
    assert [line["step"] for line in _curve(broken) if "loss" in line] == [*range(1, 13)]

    assert _run(broken, cache) == expected
    assert _curve(broken) == _curve(whole)
    assert _curve(broken)[-1]["step"] == STEPS
