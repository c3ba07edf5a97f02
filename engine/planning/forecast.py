"""How long a step will take, and what it will wait for. Numbers in, numbers out; imports no torch."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from .footprint import TransformerFootprint
from .kept import NOTHING_KEPT, KeptTiers
from .overlap import PIECE_BYTES, RING_PIECES, BlockSeconds, pass_seconds
from .rates import CONVOLUTION_SHARE, DECODE_SHARE, ISSUE_SECONDS, LAUNCH_SECONDS, LOCK_BYTES, STEP_SECONDS
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
    LINK = "the link"


@dataclass(frozen=True)
class StepForecast:
    """Seconds of one step: of the model's products, of copies to the device, of reads from the file, of decoding; and
    together.

    slowed_seconds: what computing takes beyond its products, beside decoding and between steps. pass_seconds: together,
    where blocks were followed one by one; 0 where they were not. link_seconds: that computing stands still while the
    processes of the image exchange tokens.
    """

    compute_seconds: float
    bus_seconds: float
    disk_seconds: float
    overlapped: bool
    decode_seconds: float = 0.0
    slowed_seconds: float = 0.0
    pass_seconds: float = 0.0
    link_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Copies and reads hide behind each other, and behind computing and exchanges where blocks are fetched ahead.
        Decoding goes beside computing, and follows copies."""
        computing = self.compute_seconds + self.slowed_seconds + self.link_seconds
        moving = self.bus_seconds + self.decode_seconds
        moving = max(moving, self.disk_seconds)
        together = max(computing, moving) if self.overlapped else computing + moving
        return max(together, self.pass_seconds)

    @property
    def bound(self) -> Bound:
        computing = self.compute_seconds + self.slowed_seconds
        seconds = {
            Bound.COMPUTE: computing + self.link_seconds,  # one after another
            Bound.BUS: self.bus_seconds + self.decode_seconds,
            Bound.DISK: self.disk_seconds,
        }
        longest = max(seconds, key=lambda bound: seconds[bound])
        if longest is Bound.COMPUTE and self.link_seconds > computing:
            return Bound.LINK
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
    kept: KeptTiers = NOTHING_KEPT,
) -> StepForecast:
    """For `streamed` blocks that pass through slots, `from_file` of which come from the file, in pieces of which
    `ring_pieces` are read ahead of their copies. `first`: with nothing there yet, and what is to be held is read.
    `kept`: of what blocks make once, what is made anew, or all in the first step, and what is copied to the device."""
    made = 1.0 if first or not kept.blocks else kept.remade / kept.blocks
    compute = (footprint.step_flops(request) + made * footprint.kept_flops(request)) / speeds.flops
    brought = 0.0 if footprint.host else kept.in_host * kept.block_bytes / speeds.bus_bytes
    each = compute / footprint.all_blocks
    one, link = _block_seconds(footprint, request, speeds, each), link_seconds(footprint, request)
    between = (0.0 if footprint.host else STEP_SECONDS) + (0.0 if kept.ahead else brought)
    passing = streamed if footprint.native else footprint.blocks
    ring = 0 if footprint.host else ring_pieces * piece_bytes
    together = pass_seconds(
        footprint.blocks,
        replace(one, compute=one.compute + link),
        streamed=streamed,
        from_file=from_file,
        slots=slots,
        ring_blocks=ring / footprint.stored_bytes,
        piece_blocks=piece_bytes / footprint.stored_bytes,
        between=between + (one.compute + link) * footprint.elsewhere,
        first=first,
    )
    return StepForecast(
        compute,
        streamed * one.copy + brought,
        (streamed if first else from_file) * one.read,
        overlapped=True,
        decode_seconds=passing * one.decode,
        slowed_seconds=between + (one.compute - each) * footprint.all_blocks + (slots > 1) * passing * one.lost,
        pass_seconds=float(f"{together:.9g}"),  # sums of many small numbers, whose order is not to choose a plan
        link_seconds=link * footprint.all_blocks,
    )


def link_seconds(footprint: TransformerFootprint, request: SamplingRequest) -> float:
    """Of the exchanges within a block, for which each process that makes the image waits. Which part of the tokens is
    whose, hosts tell each other ahead of that; a step's answers, of few numbers a token, are not counted."""
    if request.ranks == 1:
        return 0.0
    return request.link.seconds(footprint.exchanged_bytes(request), footprint.exchanges(request))


def decode_seconds(moved_bytes: int, launches: int, speeds: Speeds) -> float:
    """Of decoding that reads and writes so many bytes of the device's memory."""
    return moved_bytes / speeds.memory_bytes + launches * LAUNCH_SECONDS


def convolution_seconds(flops: float, speeds: Speeds) -> float:
    """Of a VAE's layers."""
    return flops / (CONVOLUTION_SHARE * speeds.flops)


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
    issued = request.branches + request.beside  # by one thread of the host
    return BlockSeconds(max(each, issued * ISSUE_SECONDS), copy, read, decode, lost, lock)


class VisitedLayers(Protocol):
    """What a forecast asks of the footprint of layers that are visited once; fields as in TransformerFootprint."""

    @property
    def slot_bytes(self) -> int: ...
    @property
    def element_bytes(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def host(self) -> bool: ...
    @property
    def decode_bytes(self) -> int: ...
    @property
    def decode_launches(self) -> int: ...


def forecast_visit(layers: VisitedLayers, count: int, *, tokens: int, slots: int, speeds: Speeds) -> StepForecast:
    """For one visit of `count` layers, all read from the file, with `tokens` that each weight is multiplied with."""
    decode = decode_seconds(count * layers.decode_bytes, count * layers.decode_launches, speeds)
    nbytes = count * layers.stored_bytes
    return StepForecast(
        compute_seconds=2 * tokens * count * layers.slot_bytes / layers.element_bytes / speeds.flops,
        bus_seconds=0.0 if layers.host else nbytes / speeds.bus_bytes,
        disk_seconds=nbytes / speeds.disk_bytes,
        overlapped=slots > 1,
        decode_seconds=decode,
        slowed_seconds=DECODE_SHARE * decode if slots > 1 else 0.0,
    )


@dataclass(frozen=True)
class Throughput:
    """So many bytes, during which time any of them were under way."""

    nbytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Throughput") -> "Throughput":
        return Throughput(self.nbytes + other.nbytes, self.seconds + other.seconds)

    def __sub__(self, other: "Throughput") -> "Throughput":
        return Throughput(self.nbytes - other.nbytes, self.seconds - other.seconds)


# of any speed, by one run
MOST_CORRECTION = 4.0
# what takes a smaller part of a whole is not told by the rest of it
TELLING_PART = 1 / 20


def corrected(
    speeds: Speeds,
    *,
    step_flops: float,
    step_seconds: float,
    waited_seconds: float,
    slowed_seconds: float,
    waited_disk_seconds: float,
    copied: Throughput,
    read: Throughput,
) -> Speeds:
    """The speeds that a run tells of: how long its steps took, and what was copied and read meanwhile.

    waited_seconds: of a step, for blocks; slowed_seconds: what its computing takes beyond the model's products, as in
    its forecast. waited_disk_seconds: how long the run waited for what it `read`.

    The rest of a step was products; where that is the smaller part of its computing, or too small to tell, nothing is
    thought slower for it. Neither is a disk that nobody waited for: it may have been asked for less than it gives. One
    run changes a speed by MOST_CORRECTION at the most: it may have been disturbed.
    """
    shortest, computed = step_seconds * TELLING_PART, step_seconds - waited_seconds
    flops = step_flops / max(computed - slowed_seconds, shortest)
    if computed - slowed_seconds < max(shortest, slowed_seconds):
        flops = max(speeds.flops, step_flops / max(computed, shortest))
    disk = read.nbytes / read.seconds if read.nbytes and read.seconds else speeds.disk_bytes
    if waited_disk_seconds < read.seconds * TELLING_PART:
        disk = max(disk, speeds.disk_bytes)
    return replace(
        speeds,
        flops=_bounded(flops, speeds.flops),
        bus_bytes=_bounded(copied.nbytes / copied.seconds if copied.seconds else speeds.bus_bytes, speeds.bus_bytes),
        disk_bytes=_bounded(disk, speeds.disk_bytes),
    )


def _bounded(now: float, before: float) -> float:
    return min(before * MOST_CORRECTION, max(before / MOST_CORRECTION, now))
