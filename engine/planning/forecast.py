"""How long a step will take, and what it will wait for. Numbers in, numbers out; imports no torch."""

from dataclasses import dataclass
from enum import Enum

from .footprint import TransformerFootprint
from .overlap import BlockSeconds, pass_seconds
from .request import SamplingRequest


@dataclass(frozen=True)
class Speeds:
    """What a machine does in a second.

    flops: floating-point operations of large matrix products in the compute dtype. bus_bytes: from page-locked host
    memory to the device. disk_bytes: from the model's file to host memory.
    """

    flops: float
    bus_bytes: float
    disk_bytes: float


# a middling card in a middling slot, and an NVMe disk; where nothing has been measured
TYPICAL = Speeds(flops=25e12, bus_bytes=12e9, disk_bytes=2.5e9)


class Bound(Enum):
    """What a step waits for."""

    COMPUTE = "compute"
    BUS = "the bus"
    DISK = "the disk"


@dataclass(frozen=True)
class StepForecast:
    """Seconds of one step: of computing, of copies to the device, of reads from the file, and together.

    pass_seconds: together, where blocks were followed one by one; 0 where they were not.
    """

    compute_seconds: float
    bus_seconds: float
    disk_seconds: float
    overlapped: bool
    pass_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Copies and reads hide behind each other, and behind computing where blocks are fetched ahead."""
        moving = max(self.bus_seconds, self.disk_seconds)
        together = max(self.compute_seconds, moving) if self.overlapped else self.compute_seconds + moving
        return max(together, self.pass_seconds)

    @property
    def bound(self) -> Bound:
        seconds = {
            Bound.COMPUTE: self.compute_seconds,
            Bound.BUS: self.bus_seconds,
            Bound.DISK: self.disk_seconds,
        }
        return max(seconds, key=lambda bound: seconds[bound])

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s per step, bound by {self.bound.value}"


def forecast_step(
    footprint: TransformerFootprint,
    request: SamplingRequest,
    speeds: Speeds,
    *,
    streamed: int,
    from_file: int,
    slots: int,
    ring_pieces: int = 4,
    piece_bytes: int = 32 * 1024**2,
) -> StepForecast:
    """For `streamed` blocks that pass through slots, `from_file` of which come from the file, in pieces of which
    `ring_pieces` are read ahead of their copies."""
    compute = footprint.step_flops(request) / speeds.flops
    copy = 0.0 if footprint.host else footprint.stored_bytes / speeds.bus_bytes
    read = footprint.stored_bytes / speeds.disk_bytes
    ring = 0 if footprint.host else ring_pieces * piece_bytes
    each = compute / footprint.all_blocks
    together = pass_seconds(
        footprint.blocks,
        BlockSeconds(each, copy, read),
        streamed=streamed,
        from_file=from_file,
        slots=slots,
        ring_blocks=ring / footprint.stored_bytes,
        piece_blocks=piece_bytes / footprint.stored_bytes,
        between=each * footprint.elsewhere,
    )
    # what followed in many small sums is the same for plans that wait for nothing
    return StepForecast(compute, streamed * copy, from_file * read, True, float(f"{together:.9g}"))


def forecast_visit(*, tokens: int, weights: float, nbytes: int, host: bool, slots: int, speeds: Speeds) -> StepForecast:
    """For one visit of layers that are read from the file: `weights` of them, stored in `nbytes`, times `tokens`."""
    return StepForecast(
        compute_seconds=2 * tokens * weights / speeds.flops,
        bus_seconds=0.0 if host else nbytes / speeds.bus_bytes,
        disk_seconds=nbytes / speeds.disk_bytes,
        overlapped=slots > 1,
    )


# of any speed, by one run
MOST_CORRECTION = 2.0


def corrected(
    speeds: Speeds,
    forecast: StepForecast,
    *,
    step_seconds: float,
    waited_disk_seconds: float,
    waited_bus_seconds: float,
) -> Speeds:
    """The speeds that measured steps tell of: how long one took, and how much of that it waited for blocks.

    What was not waiting was computing. What a step waited for during more than a twentieth of its time moved all the
    while; and what took longer in the forecast than the whole step did, is faster than was thought. One run changes a
    speed by MOST_CORRECTION at the most: it may have been disturbed.
    """
    computing = max(step_seconds - waited_disk_seconds - waited_bus_seconds, step_seconds / 1000)

    def moved(speed: float, seconds: float, waited: float) -> float:
        slower, faster = waited > step_seconds / 20, seconds > step_seconds
        return speed * _bounded(seconds / step_seconds) if seconds and (slower or faster) else speed

    return Speeds(
        flops=speeds.flops * _bounded(forecast.compute_seconds / computing),
        bus_bytes=moved(speeds.bus_bytes, forecast.bus_seconds, waited_bus_seconds),
        disk_bytes=moved(speeds.disk_bytes, forecast.disk_seconds, waited_disk_seconds),
    )


def _bounded(factor: float) -> float:
    return min(MOST_CORRECTION, max(1 / MOST_CORRECTION, factor))
