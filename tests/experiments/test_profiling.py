"""Traces of warm decoding calls: they exist, name the parts of a round, and hold no compilation."""

import gzip
import json
import logging

import pytest

from experiments import profiling, timing
from models.errors import InputError

PARTS = ("draft", "target", "verify", "commit")
MODELS = ("--checkpoint=random:tiny_llama", "--prompt_ids=1,2,3", "--prompt_ids=4,5")


def test_generate_traces_a_warm_call_whose_parts_have_names(run, tmp_path):
    flags = (
        *MODELS, "--draft=random:tiny_llama", "--method=speculative_sampling",
        "--method_option=num_draft=3", "--max_new_tokens=8", "--json",
    )  # fmt: skip
    status, out, _ = run(*flags, f"--profile={tmp_path}")
    assert status == 0
    [xplane] = (tmp_path / "speculative_sampling" / "plugins" / "profile").glob("*/*.xplane.pb")
    content = xplane.read_bytes()
    for part in PARTS:
        assert f"jit(advance)/while/body/{part}/".encode() in content
    [events] = xplane.parent.glob("*.trace.json.gz")
    names = [
        e.get("name", "") for e in json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    ]
    assert any("generation.py" in name and "generate" in name for name in names)
    assert not any("backend_compile" in name for name in names)
    # What is printed does not depend on it.
    assert run(*flags)[1] == out
    # Not a directory, and not with text that comes piece by piece.
    (tmp_path / "file").write_text("")
    assert "--profile" in run(*MODELS[:2], "--stream", f"--profile={tmp_path}")[2]


def test_of_what_is_timed_the_first_is_traced(tmp_path, caplog):
    calls = []
    runs = {"a": lambda: calls.append("a"), "b, T=1": lambda: calls.append("b")}
    with profiling.asked(tmp_path):
        timing.side_by_side(runs, 1)
        timing.side_by_side(runs, 1)
    assert calls == ["a", "b"] * 5  # twice each, once for the trace, then twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b_T=1"]
    with profiling.asked(None):
        timing.side_by_side(runs, 1)
    assert calls == ["a", "b"] * 7
    caplog.set_level(logging.WARNING, logger="absl")
    with profiling.asked(tmp_path):
        pass
    assert "nothing was traced" in caplog.text


def test_a_trace_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"profile: cannot write to .*file"):
        profiling.trace(tmp_path / "file" / "sub", lambda: None)
