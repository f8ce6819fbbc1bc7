"""Which data x model mesh of a slice fits, and which is fastest on paper.

Whole programs of large models take minutes to compile, and a search needs many. Layers are alike,
so a program is compiled with few layers, twice, and everything is taken as affine in their number
(`reports.extrapolate`); likewise in the rows that are decoded together. Rows that lie on different
devices do not talk to each other while they are decoded, so a mesh of d x m decodes B rows as each
of its d parts decodes B / d: what is compiled is one part, on the smallest slice that holds it. A
training step is compiled on the slice itself.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from launch import chips, programs, reports, topologies
from launch.chips import Chip
from launch.programs import Decoding
from launch.reports import Report
from models.errors import InputError
from training.fitting import TrainConfig

# What is compiled: so many layers, and so many rows of a part. Fewer layers fit into the chip's
# vector memory, where they take no HBM.
PROBES, ROWS = (3, 5), (8, 64)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a workload on a slice.

    Attributes:
      chips: in all.
      data, model: the mesh.
      batch_size: rows over the whole mesh.
      report: of one device, from probes; None where it cannot run.
      reason: why it cannot, or an empty text.
    """

    chips: int
    data: int
    model: int
    batch_size: int
    report: Report | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.report is not None and self.report.fits

    @property
    def seconds(self) -> float:
        """Of a round or step, collectives overlapped with nothing."""
        assert self.report is not None and self.report.roofline is not None
        return self.report.roofline.serial_seconds

    @property
    def chip_seconds_per_row(self) -> float:
        """Chips times seconds, over the rows of a round or step."""
        return self.chips * self.seconds / self.batch_size


def meshes(count: int, most_model: int = 64) -> list[tuple[int, int]]:
    """(data, model) over so many chips, model a power of two."""
    models = [2**power for power in range(most_model.bit_length()) if 2**power <= most_model]
    return [(count // model, model) for model in models if count % model == 0]


def with_layers(config: Any, layers: int) -> Any:
    """The same architecture with fewer layers; InputError for one that is not a Transformer's."""
    if not hasattr(config, "num_layers"):
        raise InputError("search: only models of tokens can be searched over; name another --model")
    more = {"local_layers": config.local_layers[:layers]} if config.local_layers else {}
    return config.replace(num_layers=layers, **more)


class Decoder:
    """Reports of one round for any mesh and batch of one workload on one kind of chip.

    Compiled probes are kept: meshes with the same part share them.
    """

    def __init__(self, work: Decoding, chip: Chip):
        self.work, self.chip = work, chip
        self._kept: dict[tuple[int, int], Report | str] = {}

    def report(self, model: int, rows: int) -> Report | str:
        """One part: `rows` on `model` chips; a text says why there is none."""
        probes = []
        for some in ROWS:
            found = self._kept.get((model, some))
            if found is None:
                try:
                    found = self._probe(model, some)
                except InputError as error:
                    found = str(error)
                self._kept[model, some] = found
            if isinstance(found, str):
                return found
            probes.append(({"rows": some}, found))
        return reports.extrapolate(probes, {"rows": rows}, self.chip) or "does not fit"

    def _probe(self, model: int, rows: int) -> Report | str:
        topology, size = _smallest(self.chip, model)
        mesh = topologies.make_mesh(topology, size // model, model)
        whole = {role: config.num_layers for role, config in self.work.configs.items()}
        base = {role: min(PROBES[0], layers) for role, layers in whole.items()}
        points = [base]
        for role, layers in whole.items():
            if layers > PROBES[0]:
                points.append(base | {role: min(PROBES[1], layers)})
        probes = []
        for point in points:
            configs = {
                role: with_layers(config, point[role]) for role, config in self.work.configs.items()
            }
            batch = rows * mesh.shape["data"]
            work = dataclasses.replace(self.work, configs=configs, batch_size=batch)
            decode = programs.decoding(work, mesh)[1]()
            probes.append((point, reports.compile_report(decode, self.chip)))
        found = reports.extrapolate(probes, whole, self.chip)
        return "does not fit even with few layers" if found is None else found


def _smallest(chip: Chip, least: int) -> tuple[str, int]:
    """The smallest slice of a chip of a multiple of so many chips, and its size."""
    size = least
    while (topology := chips.slice_of(chip, size)) is None:
        size *= 2
        if size > 256:
            raise InputError(f"mesh: no slice of {chip.name} is a multiple of {least} chips")
    return topology, size


def decoding(
    decoder: Decoder, count: int, batch_sizes: Iterable[int], models: Sequence[int]
) -> list[Candidate]:
    """Every mesh of `count` chips with every batch that it divides."""
    found = []
    for data, model in meshes(count):
        if model not in models:
            continue
        for batch in batch_sizes:
            if batch % data:
                reason = f"{batch} rows do not divide over {data}"
                found.append(Candidate(count, data, model, batch, None, reason))
                continue
            report = decoder.report(model, batch // data)
            done = (None, report) if isinstance(report, str) else (report, "")
            found.append(Candidate(count, data, model, batch, *done))
    return found


def training(
    config: TrainConfig, topology: str, models: Sequence[int], batch_sizes: Iterable[int]
) -> list[Candidate]:
    """As `decoding`, for a training step; the step is compiled on the slice itself."""
    chip, shape = chips.parse(topology)
    count = math.prod(shape)
    found = []
    for data, model in meshes(count):
        if model not in models:
            continue
        for batch in batch_sizes:
            try:
                report: Report | None = _training(config, topology, data, model, batch, chip)
                reason = "" if report else "does not fit even with few layers"
            except InputError as error:
                report, reason = None, str(error)
            found.append(Candidate(count, data, model, batch, report, reason))
    return found


def _training(
    config: TrainConfig, topology: str, data: int, model: int, batch: int, chip: Chip
) -> Report | None:
    mesh = topologies.make_mesh(topology, data, model)
    layers = config.model.num_layers
    probes = []
    for probe in sorted({min(probe, layers) for probe in PROBES}):
        small = dataclasses.replace(
            config, model=with_layers(config.model, probe), batch_size=batch, mesh=(data, model)
        )
        probes.append(
            ({"layers": probe}, reports.compile_report(programs.training(small, mesh)(), chip))
        )
    return reports.extrapolate(probes, {"layers": layers}, chip)


def best(found: Iterable[Candidate]) -> Candidate | None:
    """The candidate that fits with the fewest chip-seconds a row; None where none fits."""
    fitting = [one for one in found if one.fits]
    return min(fitting, key=lambda one: one.chip_seconds_per_row, default=None)


def table(found: Sequence[Candidate], per: str) -> str:
    """Markdown: a line a candidate; sizes of one device in GB (1e9 bytes), times in ms."""
    head = ("chips", "data x model", "rows", "parameters", "peak", "fits", "compute", "memory",
            "network", f"ms a {per}", f"chip-ms a row and {per}")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    chosen = best(found)
    for one in found:
        start = [str(one.chips), f"{one.data}x{one.model}", str(one.batch_size)]
        report = one.report
        if report is None or report.roofline is None:
            lines.append(f"| {' | '.join([*start, '-', '-', one.reason])} |" + " - |" * 5)
            continue
        roofline = report.roofline
        mark = "**" if one is chosen else ""
        cells = [
            *start, f"{report.held['parameters'] / 1e9:.3g}", f"{report.peak / 1e9:.3g}",
            "yes" if report.fits else "NO",
            *(f"{1e3 * x:.3g}" for x in (roofline.compute, roofline.memory, roofline.network)),
            f"{1e3 * one.seconds:.3g}", f"{mark}{1e3 * one.chip_seconds_per_row:.3g}{mark}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def record(one: Candidate) -> dict[str, Any]:
    """A candidate as JSON can hold it."""
    found = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    found["report"] = None if one.report is None else one.report.as_json()
    if one.report is not None and one.report.roofline is not None:
        found |= {"seconds": one.seconds, "chip_seconds_per_row": one.chip_seconds_per_row}
    return found
