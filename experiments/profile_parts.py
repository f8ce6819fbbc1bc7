"""Where the time of a traced decoding call went: draft, target, verify, commit, and the rest.

    python -m experiments.profile_parts --profile=DIR

TensorBoard's profiler says this of TPUs and GPUs, operation by operation. Of CPUs it shows when
each operation ran, and does not add up; this does, for all of them. A trace has every operation's
time under its name in the compiled program, and the program, which says what part of the code each
operation is from.
"""

import collections
import dataclasses
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from models.errors import InputError

FLAGS = flags.FlagValues()
_PROFILE = flags.DEFINE_string("profile", None, "What --profile was given.", flag_values=FLAGS)

PARTS = ("draft", "target", "verify", "commit")
REST = "rest of the loop"
OUTSIDE = "outside the loop"  # prompts are read there
# They take no time, and what uses one result of theirs says nothing of what uses another.
_NOBODYS = ("parameter", "get-tuple-element", "tuple")
_LOOP = "jit(advance)/while/body/"


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a serialised protocol buffer: (number, integer or bytes), in order."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = divmod(key, 8)
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, at = _varint(message, at)
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of any size, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _packed(message: bytes) -> Iterator[int]:
    """The integers of a packed field."""
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _all(messages: Sequence[bytes], *path: int) -> list[bytes]:
    """Every submessage or string at a path of field numbers."""
    found = list(messages)
    for number in path:
        found = [value for message in found for n, value in fields(message) if n == number]
    return found


def _text(message: bytes, *path: int) -> str:
    return b"".join(_all([message], *path)[:1]).decode(errors="replace")


@dataclasses.dataclass
class _Operation:
    """One instruction of a compiled program."""

    name: str
    kind: str
    source: str
    operands: list[int]


def sources(xplane: bytes) -> dict[tuple[str, str], str]:
    """(module, operation) -> where in the code it is from, of the programs in a trace.

    XLA forgets that of some operations that it rewrites, matrix products above all. They are given
    that of an operand, or else of an operation that uses them.

    Numbers are those of xplane.proto (XSpace.planes 1, XPlane.name 2 and event_metadata 4, value 2,
    XEventMetadata.stats 5, XStat.bytes_value 6), hlo.proto (HloProto.hlo_module 1, HloModuleProto
    .name 1 and computations 3, HloComputationProto.instructions 2, HloInstructionProto.name 1,
    opcode 2, metadata 7, id 35 and operand_ids 36) and xla_data.proto (OpMetadata.op_name 2).
    """
    planes = [p for p in _all([xplane], 1) if _text(p, 2) == "/host:metadata"]
    found = {}
    for module in _all(planes, 4, 2, 5, 6, 1):
        for computation in _all([module], 3):
            operations = {}
            for instruction in _all([computation], 2):
                [number] = [value for n, value in fields(instruction) if n == 35]
                operations[number] = _Operation(
                    _text(instruction, 1),
                    _text(instruction, 2),
                    _text(instruction, 7, 2),
                    [o for packed in _all([instruction], 36) for o in _packed(packed)],
                )
            _fill(operations)
            for operation in operations.values():
                found[_text(module, 1), operation.name] = operation.source
    return found


def _fill(operations: Mapping[int, _Operation]) -> None:
    """Gives operations without a source that of a neighbour within the loop."""
    users = collections.defaultdict(list)
    for number, operation in operations.items():
        for operand in operation.operands:
            users[operand].append(number)
    changed = True
    while changed:
        changed = False
        for number, operation in operations.items():
            if operation.source or operation.kind in _NOBODYS:
                continue
            near = [operations[n].source for n in (*operation.operands, *users[number])]
            operation.source = next((one for one in near if one.startswith(_LOOP)), "")
            changed |= bool(operation.source)


def self_times(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Each event of a thread with its time less that of the events within it, in microseconds."""
    threads = collections.defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for mine in threads.values():
        mine.sort(key=lambda event: (event["ts"], -event["dur"]))
        inner = [0.0] * len(mine)
        above: list[int] = []
        for index, event in enumerate(mine):
            while above and event["ts"] >= mine[above[-1]]["ts"] + mine[above[-1]]["dur"]:
                above.pop()
            if above:
                inner[above[-1]] += event["dur"]
            above.append(index)
        yield from ((event, event["dur"] - time) for event, time in zip(mine, inner))


def part_of(source: str) -> str:
    """The part of a round that an operation of `source` belongs to."""
    if not source.startswith(_LOOP):
        return OUTSIDE
    part = source.removeprefix(_LOOP).partition("/")[0]
    return part if part in PARTS else REST


def seconds(directory: Path) -> dict[str, float]:
    """Time of a trace's operations by part, added up over threads.

    Args:
      directory: of one trace; the newest in it counts.

    Raises:
      InputError: there is none.
    """
    found = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    if not found:
        raise InputError(f"profile: no trace in {directory}")
    source = sources(found[-1].read_bytes())
    [events] = found[-1].parent.glob("*.trace.json.gz")
    everything = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
    operations = [e for e in everything if "hlo_op" in e.get("args", {}) and "dur" in e]
    total = dict.fromkeys((*PARTS, REST, OUTSIDE), 0.0)
    for event, time in self_times(operations):
        name = event["args"]["hlo_module"], event["args"]["hlo_op"]
        total[part_of(source.get(name, ""))] += time / 1e6
    return total


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    if _PROFILE.value is None:
        raise InputError("--profile: missing")
    traces = sorted(path.parent for path in Path(_PROFILE.value).glob("*/plugins"))
    if not traces:
        raise InputError(f"profile: no trace in {_PROFILE.value}")
    width = max(len(path.name) for path in traces) + 2
    print(f"{'':<{width}}{'ms':>9}" + "".join(f"{part:>18}" for part in (*PARTS, REST, OUTSIDE)))
    for path in traces:
        times = seconds(path)
        whole = sum(times.values())
        shares = "".join(f"{time / max(whole, 1e-12):>18.1%}" for time in times.values())
        print(f"{path.name:<{width}}{1e3 * whole:>9.2f}{shares}")


if __name__ == "__main__":
    cli.run_main(main, FLAGS)
