"""How long a step will take, and what it will wait for. Numbers in, numbers out; imports no torch."""

from dataclasses import dataclass, replace
from enum import Enum

from .footprint import TransformerFootprint
from .overlap import PIECE_BYTES, RING_PIECES, BlockSeconds, pass_seconds
from .rates import DECODE_SHARE, ISSUE_SECONDS, LAUNCH_SECONDS, LOCK_BYTES, STEP_SECONDS
from .request import SamplingRequest


@dataclass(frozen=True)
class Speeds:
    """What a machine does in a second.

    flops: floating-point operations of large matrix products in the compute dtype. bus_bytes: from page-locked host
    memory to the device. disk_bytes: from the model's file to host memory. memory_bytes: read and written in the
    device's memory by kernels that do little else, as decoding does.
    """

    flops: float
    bus_bytes: float
    disk_bytes: float
    memory_bytes: float = 290e9


# a middling card in a middling slot, and an NVMe disk; where nothing has been measured
TYPICAL = Speeds(flops=25e12, bus_bytes=12e9, disk_bytes=2.5e9)


class Bound(Enum):
    """What a step waits for."""

    COMPUTE = "compute"
    BUS = "the bus"
    DISK = "the disk"
    DECODING = "decoding"


@dataclass(frozen=True)
class StepForecast:
    """Seconds of one step: of the model's products, of copies to the device, of reads from the file, of decoding; and
    together.

    slowed_seconds: what computing takes beyond its products, beside decoding and between steps. pass_seconds: together,
    where blocks were followed one by one; 0 where they were not.
    """

    compute_seconds: float
    bus_seconds: float
    disk_seconds: float
    overlapped: bool
    decode_seconds: float = 0.0
    slowed_seconds: float = 0.0
    pass_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Copies and reads hide behind each other, and behind computing where blocks are fetched ahead. Decoding goes
        beside computing, and follows copies."""
        computing, moving = self.compute_seconds + self.slowed_seconds, self.bus_seconds + self.decode_seconds
        moving = max(moving, self.disk_seconds)
        together = max(computing, moving) if self.overlapped else computing + moving
        return max(together, self.pass_seconds)

    @property
    def bound(self) -> Bound:
        seconds = {
            Bound.COMPUTE: self.compute_seconds + self.slowed_seconds,
            Bound.BUS: self.bus_seconds + self.decode_seconds,
            Bound.DISK: self.disk_seconds,
        }
        longest = max(seconds, key=lambda bound: seconds[bound])
        return Bound.DECODING if longest is Bound.BUS and self.decode_seconds > self.bus_seconds else longest

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
    ring_pieces: int = RING_PIECES,
    piece_bytes: int = PIECE_BYTES,
    first: bool = False,
) -> StepForecast:
    """For `streamed` blocks that pass through slots, `from_file` of which come from the file, in pieces of which
    `ring_pieces` are read ahead of their copies. `first`: with nothing there yet, and what is to be held is read."""
    compute = footprint.step_flops(request) / speeds.flops
    each = compute / footprint.all_blocks
    one = _block_seconds(footprint, request, speeds, each)
    between = 0.0 if footprint.host else STEP_SECONDS
    passing = streamed if footprint.native else footprint.blocks
    ring = 0 if footprint.host else ring_pieces * piece_bytes
    together = pass_seconds(
        footprint.blocks,
        one,
        streamed=streamed,
        from_file=from_file,
        slots=slots,
        ring_blocks=ring / footprint.stored_bytes,
        piece_blocks=piece_bytes / footprint.stored_bytes,
        between=between + one.compute * footprint.elsewhere,
        first=first,
    )
    return StepForecast(
        compute,
        streamed * one.copy,
        (streamed if first else from_file) * one.read,
        overlapped=True,
        decode_seconds=passing * one.decode,
        slowed_seconds=between + (one.compute - each) * footprint.all_blocks + (slots > 1) * passing * one.lost,
        pass_seconds=float(f"{together:.9g}"),  # sums of many small numbers, whose order is not to choose a plan
    )


def decode_seconds(moved_bytes: int, launches: int, speeds: Speeds) -> float:
    """Of decoding that reads and writes so many bytes of the device's memory."""
    return moved_bytes / speeds.memory_bytes + launches * LAUNCH_SECONDS


def _block_seconds(
    footprint: TransformerFootprint, request: SamplingRequest, speeds: Speeds, each: float
) -> BlockSeconds:
    """Of a block whose products take `each` seconds."""
    decode = decode_seconds(footprint.decode_bytes, footprint.decode_launches, speeds)
    lost = DECODE_SHARE * min(decode, each / (1 - DECODE_SHARE))  # computing is beside it for no longer
    read = footprint.stored_bytes / speeds.disk_bytes
    if footprint.host:
        return BlockSeconds(each, 0.0, read, decode, lost)
    copy, lock = footprint.stored_bytes / speeds.bus_bytes, footprint.stored_bytes / LOCK_BYTES
    return BlockSeconds(max(each, request.branches * ISSUE_SECONDS), copy, read, decode, lost, lock)


def forecast_visit(
    *,
    tokens: int,
    weights: float,
    nbytes: int,
    host: bool,
    slots: int,
    speeds: Speeds,
    decode_bytes: int = 0,
    decode_launches: int = 0,
) -> StepForecast:
    """For one visit of layers that are read from the file: `weights` of them, stored in `nbytes`, times `tokens`."""
    decode = decode_seconds(decode_bytes, decode_launches, speeds)
    return StepForecast(
        compute_seconds=2 * tokens * weights / speeds.flops,
        bus_seconds=0.0 if host else nbytes / speeds.bus_bytes,
        disk_seconds=nbytes / speeds.disk_bytes,
        overlapped=slots > 1,
        decode_seconds=decode,
        slowed_seconds=DECODE_SHARE * decode if slots > 1 else 0.0,
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

    return replace(
        speeds,
        flops=speeds.flops * _bounded(forecast.compute_seconds / computing),
        bus_bytes=moved(speeds.bus_bytes, forecast.bus_seconds, waited_bus_seconds),
        disk_bytes=moved(speeds.disk_bytes, forecast.disk_seconds, waited_disk_seconds),
    )


def _bounded(factor: float) -> float:
    return min(MOST_CORRECTION, max(1 / MOST_CORRECTION, factor))
