"""TPU chips: published peak figures, the slices they come in, and a roofline over them."""

import dataclasses
import math

from models.errors import InputError, check_choice

# Hops of a message between neighbouring chips take about this long: Austin et al., 'How to Scale
# Your Model' (2025), part 3, which gives 1 microsecond. It bounds small collectives.
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU.

    Attributes:
      name: as topologies are named, `v5e:4x4`.
      flops: bf16 operations a second.
      hbm_bytes: memory.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second over all links to other chips, both directions together.
      shapes: slices of up to 256 chips that are offered, smallest first.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    shapes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

# Google Cloud's pages 'TPU v4', 'TPU v5e', 'TPU v5p' and 'TPU v6e' (docs.cloud.google.com),
# read in November 2026. They give no interconnect bandwidth for v4: 300 GB/s are the 2,400 Gbit/s
# that comparisons with v4 used to give. v5e's memory is 819 GB/s there, or 800 GiB/s (859 GB/s) in
# a newer version; the lower one is taken. Its 16 GB and v6e's 32 are GiB to the compiler. 1x1x1
# is one chip of a host of four.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1200e9, 300e9, _CUBES),
        Chip("v5e", 197e12, 16 * 2**30, 819e9, 400e9, _FLAT),
        Chip("v5p", 459e12, 95 * 2**30, 2765e9, 1200e9, _CUBES),
        Chip("v6e", 918e12, 32 * 2**30, 1638e9, 800e9, _FLAT),
    )
}


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape of a slice such as `v5p:4x4x4`; InputError lists what is allowed."""
    name, colon, shape = topology.partition(":")
    if not colon:
        raise InputError(
            f"topology: {topology!r} must be CHIP:SHAPE, for example v5e:4x4; allowed chips: "
            f"{', '.join(CHIPS)}"
        )
    check_choice("topology", name, CHIPS)
    if shape not in CHIPS[name].shapes:
        raise InputError(
            f"topology: {name} has no slice {shape!r}; allowed: "
            f"{', '.join(f'{name}:{known}' for known in CHIPS[name].shapes)}"
        )
    return CHIPS[name], tuple(map(int, shape.split("x")))


def slice_of(chip: Chip, chips: int) -> str | None:
    """The topology of so many chips; None where none is offered."""
    sizes = {math.prod(map(int, shape.split("x"))): shape for shape in chip.shapes}
    return f"{chip.name}:{sizes[chips]}" if chips in sizes else None


def hops(group: int, dimensions: int) -> float:
    """Hops across a torus of `group` chips in so many dimensions, the longest way."""
    return 0.0 if group < 2 else max(1.0, dimensions * group ** (1 / dimensions) / 2)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by what they are spent on, at peak rates.

    Attributes:
      compute, memory, network: seconds each would take alone.
    """

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "network"), key=lambda part: getattr(self, part))

    @property
    def seconds(self) -> float:
        """All three overlapped perfectly: no run can be faster."""
        return max(self.compute, self.memory, self.network)

    @property
    def serial_seconds(self) -> float:
        """Collectives overlapped with nothing, as where the next product waits for them."""
        return max(self.compute, self.memory) + self.network


def roofline(chip: Chip, flops: float, hbm_bytes: float, network_seconds: float) -> Roofline:
    """The roofline of one device's work on `chip`."""
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, network_seconds)
