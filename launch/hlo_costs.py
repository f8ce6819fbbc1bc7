"""What one device does in a compiled program, read off its optimised HLO text.

The compiler's own `cost_analysis` counts the body of every loop once, and as bytes also what stays
in the chip's vector memory. Here loops of a known number of steps count so many times, loops that
run until something is found count once, and bytes are those of HBM (arrays without a memory space
of their own, TPU's `S(n)`). A collective counts with its payload, the larger of what goes in and
what comes out, and with the bytes that a device sends in a ring.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from launch.hlo_text import Array, Computation, Instruction, group_size, hits, parse, windows

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
# Names for other instructions' results, and instructions whose work stands elsewhere.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "conditional", "call", "opt-barrier", "async-start",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size of group.

    Attributes:
      count: how many.
      payload: bytes of their whole arrays.
      sent: bytes that each device sends, in a ring.
    """

    count: float = 0.0
    payload: float = 0.0
    sent: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Work of one device.

    Attributes:
      flops: of matrix products.
      hbm_bytes: read and written.
      collectives: by (kind, devices that take part).
      open_loops: loops inside whose steps are not known, each counted as one step.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Mapping[tuple[str, int], Collective] = dataclasses.field(default_factory=dict)
    open_loops: int = 0

    def plus(self, other: "Costs", times: float = 1.0) -> "Costs":
        """The sum of this and `times` another."""
        total = dict(self.collectives)
        for key, more in other.collectives.items():
            old = total.get(key, Collective())
            total[key] = Collective(
                old.count + times * more.count,
                old.payload + times * more.payload,
                old.sent + times * more.sent,
            )
        return Costs(
            self.flops + times * other.flops,
            self.hbm_bytes + times * other.hbm_bytes,
            total,
            self.open_loops + other.open_loops,
        )


class Program:
    """A parsed module, with what is asked of its computations remembered."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.costs = functools.cache(self._costs)

    def total(self) -> Costs:
        """The whole program, run once."""
        return self.costs(self.entry)

    def main_loop(self) -> Costs | None:
        """One step of the entry's own loop of unknown length; None without one.

        Of several it is the one that does most.
        """
        loops = [
            self.costs(body)
            for one in self._instructions(self.entry)
            if one.opcode == "while" and self.steps(one) is None
            if (body := one.called("body")) is not None
        ]
        return max(loops, key=lambda cost: (cost.hbm_bytes, cost.flops), default=None)

    def steps(self, loop: Instruction) -> int | None:
        """Steps of a `while` that counts from 0 to a constant; None for any other."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        root = condition["ROOT"]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        left, right = (condition[name] for name in root.operands)
        if right.opcode != "constant" or left.opcode != "get-tuple-element":
            return None
        return int(right.literal)

    def _instructions(self, computation: str) -> Iterator[Instruction]:
        body = self.computations[computation]
        return (one for name, one in body.items() if name != "ROOT")

    def _costs(self, computation: str) -> Costs:
        found = Costs()
        for one in self._instructions(computation):
            found = found.plus(self._own(computation, one))
            if one.opcode == "while":
                steps = self.steps(one)
                body = self.costs(one.called("body") or "")
                inner = found.plus(body, 1 if steps is None else steps)
                found = dataclasses.replace(inner, open_loops=inner.open_loops + (steps is None))
            elif one.opcode == "conditional":
                branches = [self.costs(name) for name in self._branches(one)]
                found = found.plus(max(branches, key=lambda cost: (cost.hbm_bytes, cost.flops)))
            elif one.opcode in ("call", "async-start"):
                target = one.called("to_apply") or one.called("calls")
                if target is not None:
                    found = found.plus(self.costs(target))
        return found

    @staticmethod
    def _branches(one: Instruction) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        if listed:
            return re.findall(r"%([\w.\-]+)", listed[1])
        return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", one.attributes)

    def _own(self, computation: str, one: Instruction) -> Costs:
        """What an instruction itself does, loops and calls left out."""
        flops, collectives = self._inside(computation, one)
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return Costs(flops, 0.0, collectives)
        return Costs(flops, self._traffic(computation, one), collectives)

    def _inside(
        self, computation: str, one: Instruction
    ) -> tuple[float, dict[tuple[str, int], Collective]]:
        """Operations and collectives of an instruction, a fusion's included."""
        if one.opcode == "fusion":
            target = one.called("calls") or ""
            flops, total = 0.0, Costs()
            scattered = target.startswith("all-reduce-scatter")
            for inner in self._instructions(target):
                more, found = self._inside(target, inner)
                flops += more
                if scattered:  # TPU's form of a reduce-scatter
                    found = {
                        ("reduce-scatter", group): Collective(c.count, c.payload, c.sent / 2)
                        for (_, group), c in found.items()
                    }
                total = total.plus(Costs(collectives=found))
            return flops, dict(total.collectives)
        if one.opcode in ("convolution", "dot"):
            return self._products(computation, one), {}
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            return 0.0, {}
        group = group_size(one.attributes)
        payload = max(
            sum(array.bytes for array in one.arrays) // (2 if one.opcode != kind else 1),
            sum(array.bytes for array in self._operands(computation, one)),
        )
        share = (group - 1) / group
        sent = {"all-reduce": 2 * share * payload, "collective-permute": float(payload)}
        return 0.0, {(kind, group): Collective(1, payload, sent.get(kind, share * payload))}

    def _operands(self, computation: str, one: Instruction) -> list[Array]:
        body = self.computations[computation]
        return [array for name in one.operands if name in body for array in body[name].arrays]

    def _products(self, computation: str, one: Instruction) -> float:
        """Operations of a product; as the compiler, padding and holes of windows left out."""
        body = self.computations[computation]
        left, right = (body[name].arrays[0].dims for name in one.operands[:2])
        out = one.arrays[0].dims
        if one.opcode == "dot":
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
            axes = [int(d) for d in dims[1].split(",") if d] if dims else []
            return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
        assert labels is not None
        lhs, rhs, result = labels.groups()
        groups = re.search(r"batch_group_count=(\d+)", one.attributes)
        total = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
        for number, window in enumerate(windows(one.attributes, sum(map(str.isdigit, lhs)))):
            axis = str(number)
            total *= hits(window, left[lhs.index(axis)], out[result.index(axis)])
        return total / (int(groups[1]) if groups else 1)

    def _traffic(self, computation: str, one: Instruction) -> float:
        """Bytes that an instruction reads from and writes to HBM."""
        body = self.computations[computation]
        if one.opcode in ("copy-start", "slice-start"):
            source = self._operands(computation, one)[0]
            moved = [array for array in one.arrays if len(array.dims) == len(source.dims)]
            copy = moved[0] if one.opcode == "copy-start" else moved[-1]
            return min(copy.bytes, source.bytes) * (source.in_hbm + copy.in_hbm)
        written = float(sum(array.hbm for array in one.arrays))
        if one.opcode == "fusion":
            target = one.called("calls") or ""
            read = sum(
                self._read(target, number, array)
                for number, name in enumerate(one.operands)
                if name in body
                for array in body[name].arrays[:1]
            )
            return read + self._written(target, one)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            source = body[one.operands[0]].arrays[0]
            return written + (one.arrays[0].bytes if source.in_hbm else 0)
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = body[one.operands[1 if one.opcode[0] == "d" else 2]].arrays[0]
            return update.hbm + (update.bytes if one.arrays[0].in_hbm else 0)
        if one.opcode.endswith("-start"):  # a collective: its result holds its operand too
            written /= 2
        return written + sum(array.hbm for array in self._operands(computation, one))

    def _read(self, computation: str, number: int, array: Array) -> float:
        """Bytes that a fusion reads of its operand: only the slices that it takes."""
        return min(array.bytes, self._used_inside(computation, number, array)) * array.in_hbm

    def _used_inside(self, computation: str, number: int, array: Array) -> float:
        for one in self._instructions(computation):
            if one.opcode == "parameter" and one.literal == str(number):
                return self._used(self.computations[computation], one.name, array)
        return math.inf

    def _used(self, body: Computation, name: str, array: Array) -> float:
        """Bytes that users of `name` take of it; infinite where it is handed on as a result."""
        if body["ROOT"].name == name:
            return math.inf
        total = 0.0
        for label, user in body.items():
            if label == "ROOT" or name not in user.operands:
                continue
            first = user.operands[0] == name
            if user.opcode == "bitcast":
                total += self._used(body, user.name, array)
            elif user.opcode == "fusion":
                inner = user.called("calls") or ""
                taken = self._used_inside(inner, user.operands.index(name), array)
                total += taken if math.isfinite(taken) else self._used(body, user.name, array)
            elif first and user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.arrays[0].bytes
            elif not (first and user.opcode == "dynamic-update-slice"):
                total += array.bytes
        return total

    def _written(self, computation: str, one: Instruction) -> float:
        """Bytes that a fusion writes: of an update in place, the update alone."""
        body = self.computations[computation]
        root = body["ROOT"]
        results = [root] if root.opcode != "tuple" else [body[name] for name in root.operands]
        if len(results) != len(one.arrays):
            return float(sum(array.hbm for array in one.arrays))
        return sum(
            min(array.hbm, self._update(body, result))
            for array, result in zip(one.arrays, results, strict=True)
        )

    def _update(self, body: Computation, one: Instruction) -> float:
        if one.opcode == "bitcast":
            return self._update(body, body[one.operands[0]])
        if one.opcode == "dynamic-update-slice":
            return body[one.operands[1]].arrays[0].bytes
        if one.opcode == "fusion":
            inner = self.computations[one.called("calls") or ""]
            return self._update(inner, inner["ROOT"])
        return math.inf
