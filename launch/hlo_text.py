"""Optimised HLO as text, read into computations and instructions."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
_PARENTHESIS = re.compile(r"[()]")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and place of one array: element type, dimensions, and whether it lies in HBM."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return _BYTES.get(self.dtype, 0) * math.prod(self.dims)

    @property
    def hbm(self) -> int:
        """Bytes in HBM."""
        return self.bytes if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: result arrays, opcode, names of operands and the text after them."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def called(self, role: str) -> str | None:
        """The computation that it calls as `role`, such as 'body'."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


# By name, the last one being the root.
Computation = dict[str, Instruction]
Window = Mapping[str, tuple[int, ...]]


def _close(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(" not in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _close(rest, 0) if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([\w\-]+)", rest[end:])
    if opcode is None:
        return None
    first = end + opcode.end()
    last = _close(rest, first)
    inside = rest[first + 1 : last - 1]
    names = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[1], _arrays(rest[:end]), opcode[1], names, inside, rest[last:])


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry. Raises ValueError for other text."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _instruction(line)) is not None:
            if "ROOT " in line[:12]:
                current["ROOT"] = found
            current[found.name] = found
    if not entry:
        raise ValueError("not the text of an HLO module: no entry")
    return computations, entry


def group_size(attributes: str) -> int:
    """Devices that take part in a collective together, from any form of its groups; 1 if none."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2 if "source_target_pairs={{" in attributes else 1


def windows(attributes: str, count: int) -> list[Window]:
    """Size, stride, padding and dilation of a convolution's window in each spatial dimension."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}

    def of(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * count

    return [
        {
            "size": (int(of("size", "1")[i]),),
            "stride": (int(of("stride", "1")[i]),),
            "pad": tuple(map(int, of("pad", "0_0")[i].split("_"))),
            "lhs": (int(of("lhs_dilate", "1")[i]),),
            "rhs": (int(of("rhs_dilate", "1")[i]),),
        }
        for i in range(count)
    ]


def hits(window: Window, size: int, out: int) -> int:
    """Pairs of an output place and a window place that meet an input element."""
    place = (
        np.arange(out)[:, None] * window["stride"][0]
        - window["pad"][0]
        + np.arange(window["size"][0]) * window["rhs"][0]
    )
    step = window["lhs"][0]
    return int(((place % step == 0) & (place >= 0) & (place // step < size)).sum())
