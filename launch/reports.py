"""What the compiler says of a program on one device of a slice, and what follows for its time."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from launch import chips, hlo_costs
from launch.chips import Chip, Roofline
from launch.hlo_costs import Costs
from launch.programs import Lowered

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one device.

    Attributes:
      program: 'train', 'prefill' or 'decode'.
      held: bytes of what it is called with, by name ('parameters', 'cache', ...).
      temporary: bytes that it needs beside its arguments and results while it runs.
      peak: bytes in all: arguments, results that do not take an argument's place, temporaries and
        the program itself; or what the compiler gave up at.
      limit: bytes of the chip's memory that programs may have.
      fits: whether it does.
      per: 'call', or 'round' for a loop that runs until all rows are done: costs are of one.
      costs: work, see `hlo_costs`; None where the compiler gave up.
      compiler_flops, compiler_bytes: the compiler's own `cost_analysis` of a call, each loop's body
        once and vector memory included; 0 where it gave up.
      roofline: seconds of a call or round at the chip's peak rates; None where it gave up.
    """

    program: str
    held: dict[str, float]
    temporary: float
    peak: float
    limit: float
    fits: bool
    per: str
    costs: Costs | None
    compiler_flops: float
    compiler_bytes: float
    roofline: Roofline | None

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it, with the roofline's totals."""
        found = dataclasses.asdict(self)
        if self.costs is not None and self.roofline is not None:
            found["costs"]["collectives"] = [
                {"kind": kind, "devices": group, **dataclasses.asdict(one)}
                for (kind, group), one in self.costs.collectives.items()
            ]
            found["roofline"] |= {
                "bound": self.roofline.bound,
                "seconds": self.roofline.seconds,
                "serial_seconds": self.roofline.serial_seconds,
            }
        return found


def network_seconds(costs: Costs, chip: Chip) -> float:
    """Seconds of a device's collectives, one after another.

    Each takes what its bytes take over all links, and at least its hops across the torus: twice
    those of a gather for an all-reduce, one for a permutation.
    """
    dimensions = chip.shapes[0].count("x") + 1
    total = 0.0
    for (kind, group), one in costs.collectives.items():
        if group < 2:
            continue
        times = {"all-reduce": 2.0, "collective-permute": 0.0}.get(kind, 1.0)
        hops = max(1.0, times * chips.hops(group, dimensions))
        wire = one.sent / max(one.count, 1e-9) / chip.ici_bandwidth
        total += one.count * max(wire, hops * chips.HOP_SECONDS)
    return total


def compile_report(program: Lowered, chip: Chip) -> Report:
    """Compiles a program and reads off what it needs and does."""
    per = "round" if program.name == "decode" else "call"
    held: dict[str, float] = dict(program.held)
    try:
        with _unkept():
            compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _out_of_memory(str(error))
        if used is None:
            raise
        needed, limit = used
        return Report(program.name, held, max(0.0, needed - sum(held.values())), needed, limit,
                      False, per, None, 0.0, 0.0, None)  # fmt: skip
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    module = hlo_costs.Program(compiled.as_text())
    costs = (module.main_loop() if per == "round" else None) or module.total()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Report(
        program.name,
        held,
        memory.temp_size_in_bytes,
        peak,
        chip.hbm_bytes,
        peak <= chip.hbm_bytes,
        per,
        costs,
        float(analysis.get("flops", 0)),
        float(analysis.get("bytes accessed", 0)),
        chips.roofline(chip, costs.flops, costs.hbm_bytes, network_seconds(costs, chip)),
    )


@contextlib.contextmanager
def _unkept() -> Iterator[None]:
    """Programs are not kept on disk: without their chip they cannot be read again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _out_of_memory(message: str) -> tuple[float, float] | None:
    """(needed, available) bytes of HBM that the compiler gave up at; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([BKMGT])"
    for form in (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)"):
        if found := re.search(form, message):
            first, one, second, two = found.groups()
            return float(first) * _UNITS[one], float(second) * _UNITS[two]
    return None


def extrapolate(probes: Sequence[tuple[dict[str, int], Report]], at: dict[str, int],
                chip: Chip) -> Report | None:  # fmt: skip
    """The report at other sizes than those compiled, everything being affine in each size.

    Args:
      probes: the first at a base point, each further one with one size changed.
      at: the sizes asked for.
      chip: for the roofline.

    Returns:
      None where the compiler gave up on a probe.
    """
    (base_at, base), *others = probes
    if any(report.costs is None for _, report in probes):
        return None
    numbers = _numbers(base)
    total = dict(numbers)
    for changed_at, report in others:
        (name,) = [name for name in base_at if changed_at[name] != base_at[name]]
        slope = (at[name] - base_at[name]) / (changed_at[name] - base_at[name])
        other = _numbers(report)
        for key in numbers.keys() | other.keys():
            difference = other.get(key, 0.0) - numbers.get(key, 0.0)
            total[key] = total.get(key, 0.0) + slope * difference
    return _from_numbers(base, {key: max(0.0, value) for key, value in total.items()}, chip)


def _numbers(report: Report) -> dict[Any, float]:
    assert report.costs is not None
    found: dict[Any, float] = {("held", name): value for name, value in report.held.items()}
    for name in ("temporary", "peak", "compiler_flops", "compiler_bytes"):
        found[name] = getattr(report, name)
    found |= {"flops": report.costs.flops, "hbm_bytes": report.costs.hbm_bytes}
    for key, one in report.costs.collectives.items():
        found |= {(key, field): value for field, value in dataclasses.asdict(one).items()}
    return found


def _from_numbers(base: Report, numbers: dict[Any, float], chip: Chip) -> Report:
    assert base.costs is not None
    keys = {key[0] for key in numbers if isinstance(key, tuple) and isinstance(key[0], tuple)}
    collectives = {
        key: hlo_costs.Collective(
            *(numbers[(key, field)] for field in ("count", "payload", "sent"))
        )
        for key in sorted(keys)
    }
    costs = Costs(numbers["flops"], numbers["hbm_bytes"], collectives, base.costs.open_loops)
    return dataclasses.replace(
        base,
        held={key[1]: value for key, value in numbers.items()
              if isinstance(key, tuple) and key[0] == "held"},
        temporary=numbers["temporary"],
        peak=numbers["peak"],
        fits=numbers["peak"] <= chip.hbm_bytes,
        costs=costs,
        compiler_flops=numbers["compiler_flops"],
        compiler_bytes=numbers["compiler_bytes"],
        roofline=chips.roofline(
            chip, costs.flops, costs.hbm_bytes, network_seconds(costs, chip)
        ),
    )  # fmt: skip


_HEAD = (
    "program", "per", "parameters", "cache or optimiser", "temporary", "peak", "of", "fits",
    "GFLOP", "HBM read and written", "collectives", "compute", "memory", "network", "at best",
    "bound",
)  # fmt: skip


def table(found: Sequence[Report]) -> str:
    """Markdown: a line a program; sizes in GB (1e9 bytes), times in ms, each of one device."""
    lines = [f"| {' | '.join(_HEAD)} |", f"|{' --- |' * len(_HEAD)}"]
    for report in found:
        lines.append(f"| {' | '.join(_cells(report))} |")
    return "\n".join(lines)


def _cells(report: Report) -> list[str]:
    def size(value: float) -> str:
        return f"{value / 1e9:.3g}"

    other = sum(v for k, v in report.held.items() if k not in ("parameters", "cache"))
    cells = [
        report.program, report.per, size(report.held["parameters"]),
        size(report.held.get("cache", other)), size(report.temporary), size(report.peak),
        size(report.limit), "yes" if report.fits else "NO",
    ]  # fmt: skip
    if report.costs is None or report.roofline is None:
        return cells + ["-"] * 8
    kinds: dict[str, tuple[float, float]] = {}
    for (kind, _), one in report.costs.collectives.items():
        count, sent = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = (count + one.count, sent + one.payload)
    said = ", ".join(f"{count:.0f} {kind} {size(sent)}" for kind, (count, sent) in kinds.items())
    roofline = report.roofline
    times = (roofline.compute, roofline.memory, roofline.network, roofline.seconds)
    return [
        *cells, f"{report.costs.flops / 1e9:.4g}", size(report.costs.hbm_bytes), said or "none",
        *(f"{1e3 * value:.3g}" for value in times), roofline.bound,
    ]  # fmt: skip
