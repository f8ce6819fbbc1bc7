"""Traces of warm decoding calls: they exist, name the parts of a round, and hold no compilation."""

import gzip
import json
import logging
import sys

import pytest
from google.protobuf import descriptor_pb2

from experiments import cli, profile_parts, profiling, timing
from models.errors import InputError

PARTS = ("draft", "target", "verify", "commit")
MODELS = ("--checkpoint=random:tiny_llama", "--prompt_ids=1,2,3", "--prompt_ids=4,5")


def test_generate_traces_a_warm_call_whose_parts_have_names(run, tmp_path, monkeypatch, capsys):
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
    trace = json.loads(gzip.decompress(events.read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any("generation.py" in name and "generate" in name for name in names)
    assert not any("backend_compile" in name for name in names)
    # Every part took some of the time, and all of them no more than there was.
    times = profile_parts.seconds(tmp_path / "speculative_sampling")
    assert all(times[part] > 0 for part in PARTS)
    steps = [event for event in trace["traceEvents"] if "dur" in event]
    whole = max(e["ts"] + e["dur"] for e in steps) - min(e["ts"] for e in steps)
    threads = len({event["tid"] for event in steps})
    assert sum(times.values()) < threads * whole / 1e6
    monkeypatch.setattr(sys, "argv", ["profile_parts", f"--profile={tmp_path}"])
    with pytest.raises(SystemExit):
        cli.run_main(profile_parts.main, profile_parts.FLAGS)
    table = capsys.readouterr().out
    assert "speculative_sampling" in table and table.count("%") == len(PARTS) + 2
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


def test_time_within_an_event_is_not_its_own_and_threads_do_not_mix():
    def event(name, ts, dur, tid=1):
        return {"name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}

    events = [
        event("while", 0, 10), event("body", 1, 8), event("dot", 2, 3), event("add", 5, 4),
        event("after", 10, 2), event("elsewhere", 2, 5, tid=2),
    ]  # fmt: skip
    found = {event["name"]: time for event, time in profile_parts.self_times(events[::-1])}
    assert found == {"while": 2, "body": 1, "dot": 3, "add": 4, "after": 2, "elsewhere": 5}


def test_protocol_buffers_are_read_as_they_are_written():
    message = descriptor_pb2.FileDescriptorProto(name="n" * 300, dependency=["a", "b"])
    message.message_type.add(name="first").field.add(name="x", number=2**28)
    message.message_type.add(name="second").field.add(name="y", number=7)
    raw = message.SerializeToString()
    assert profile_parts._text(raw, 1) == "n" * 300
    assert profile_parts._all([raw], 3) == [b"a", b"b"]
    assert profile_parts._all([raw], 4, 2, 1) == [b"x", b"y"]
    assert profile_parts._all([raw], 4, 2, 3) == [2**28, 7]
    message = descriptor_pb2.SourceCodeInfo()
    message.location.add(path=[1, 300, 0])
    [packed] = profile_parts._all([message.SerializeToString()], 1, 1)
    assert list(profile_parts._packed(packed)) == [1, 300, 0]


def test_parts_are_read_off_where_an_operation_is_from():
    body = "jit(advance)/while/body/"
    for source, part in (
        (f"{body}draft/while/body/closed_call/dot_general", "draft"),
        (f"{body}target/Transformer.run/layers_0/attention/mul", "target"),
        (f"{body}add", profile_parts.REST),
        ("jit(start)/Transformer.run/layers_0/attention/mul", profile_parts.OUTSIDE),
        ("", profile_parts.OUTSIDE),
    ):
        assert profile_parts.part_of(source) == part
    with pytest.raises(InputError, match="profile: no trace"):
        profile_parts.seconds(profile_parts.Path("nowhere"))


def test_an_operation_without_a_source_is_given_its_neighbours():
    """embed -> dot -> fusion -> argmax: the unnamed two belong to the target, used later."""
    body = "jit(advance)/while/body/"
    named = {
        1: ("p", "parameter", "", []),
        2: ("embed", "gather", f"{body}target/gather", [1]),
        3: ("dot", "dot", "", [1, 2]),
        4: ("ynn_fusion", "fusion", "", [3]),
        5: ("argmax", "reduce", f"{body}verify/reduce", [4]),
        6: ("copy", "copy", "", [1]),
        7: ("add", "add", f"{body}commit/add", [6]),
    }
    operations = {n: profile_parts._Operation(*fields) for n, fields in named.items()}
    profile_parts._fill(operations)
    parts = {o.name: profile_parts.part_of(o.source) for o in operations.values()}
    assert parts["dot"] == parts["ynn_fusion"] == "target"
    assert parts["copy"] == "commit" and parts["argmax"] == "verify"
    assert parts["p"] == profile_parts.OUTSIDE
