"""The way of a block's bytes into a slot: read, copy on the copy stream, decode. Keeps no block."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from functools import cached_property

from torch import Tensor

from ..hardware import Hardware
from ..planning.overlap import PIECE_BYTES, RING_PIECES
from .block_layout import StoredBlock
from .block_source import BlockSource
from .decode_costs import DecodeCost, decode_cost
from .device_buffers import new_buffers
from .landing import Landing
from .pinned_memory import HostBuffer, PinnedMemory
from .ring import Passing, Ring
from .rooms import Room, Rooms
from .streams import StreamOrder
from .transfer_clock import TransferClock


class BlockSizes:
    """Room that any of a model's blocks finds enough, in bytes. Each is worked out when it is first asked for."""

    def __init__(self, blocks: Sequence[StoredBlock], *, on_host: bool) -> None:
        """`on_host`: whether they are decoded on the CPU."""
        self._blocks = blocks
        self._on_host = on_host

    @cached_property
    def slot_bytes(self) -> int:
        return max(block.slot.nbytes for block in self._blocks)

    @cached_property
    def raw_bytes(self) -> int:
        """As stored."""
        return max(block.raw.nbytes for block in self._blocks)

    @cached_property
    def staging_bytes(self) -> int:
        """What is decoded or added at a time."""
        return max(block.staging_bytes for block in self._blocks)

    @cached_property
    def scratch_bytes(self) -> int:
        """What codecs and patches need beside that."""
        return max(block.scratch_bytes(on_host=self._on_host) for block in self._blocks)

    @cached_property
    def allocated_bytes(self) -> int:
        """What patches allocate for a moment."""
        return max(block.allocated_bytes for block in self._blocks)

    @cached_property
    def decode_cost(self) -> DecodeCost:
        """Of one block, in the mean."""
        costs = [decode_cost(block) for block in self._blocks]
        return DecodeCost(*(sum(values) // len(costs) for values in zip(*map(astuple, costs), strict=True)))

    @property
    def piece_bytes(self) -> int:
        return min(PIECE_BYTES, self.raw_bytes)

    @property
    def ring_bytes(self) -> int:
        """Of the smallest ring."""
        return RING_PIECES * self.piece_bytes


@dataclass(frozen=True)
class Target:
    """Where a block goes on one device: a buffer there, and the device's transfer."""

    transfer: "Transfer"
    block: StoredBlock
    buffer: Tensor


class Transfer:
    """Owns what a run passes blocks through: ring, reader threads, staging and scratch, and the host memory that it
    takes ahead for blocks that will stay there; until `end_run`.

    Called under the store's lock, by one thread at a time; what it writes on a device, it writes on the device's copy
    stream. One that leads others (`lead`) reads for their devices, too: bytes are read once, and copied to each.
    """

    def __init__(
        self,
        source: BlockSource,
        sizes: BlockSizes,
        order: StreamOrder,
        hardware: Hardware,
        host: PinnedMemory,
    ) -> None:
        self.source = source
        self.sizes = sizes
        self.fetched_blocks = 0
        self.fetched_bytes = 0
        self.copied_bytes = 0
        self.clock = TransferClock(order)
        self.order = order
        self.order_of_all = order  # with that of devices that it leads
        self._hardware = hardware
        self._host = host
        self._staging: Tensor | None = None
        self._scratch: Tensor | None = None
        self._ring = self._new_ring(RING_PIECES)
        self._rooms = Rooms(hardware, host)

    def replace(self, source: BlockSource, sizes: BlockSizes) -> None:
        """Bring other blocks from now on; between two runs."""
        self.source, self.sizes = source, sizes
        self._ring = self._new_ring(RING_PIECES)

    def lead(self, others: Sequence["Transfer"]) -> None:
        """From now on bring blocks to the devices of these, too, until it is called again; between two runs."""
        self.end_run()
        orders = [self.order, *(other.order for other in others)]
        self.order_of_all = StreamOrder.together(orders) if others else self.order
        self._ring = self._new_ring(self.ring_pieces)

    def _new_ring(self, pieces: int) -> Ring:
        ring = Ring(self.source, self.sizes, self.order_of_all, self._hardware, self._host, self.clock)
        ring.pieces = pieces
        return ring

    def new_buffers(self, *sizes: int) -> list[Tensor]:
        """On the device, of so many bytes, in one allocation."""
        return new_buffers(self._hardware.device, *sizes)

    def make_decoding_room(self, *, staging: bool) -> None:
        """Take scratch, and `staging` where blocks come encoded, from the stream that is current, in one allocation,
        unless that is there; until `end_run`.

        Taken on the copy stream, when the first block is decoded, it would lie in a pool of its own, and nothing else
        could have its memory afterwards.
        """
        if self._scratch is None and self._staging is None:
            sizes = self.sizes.scratch_bytes, self.sizes.staging_bytes if staging else 0
            if any(sizes):
                self._scratch, staged = self.new_buffers(*sizes)
                self._staging = staged if staging else None

    def decode(self, block: StoredBlock, encoded: Tensor, slot: Tensor) -> None:
        """A block whose raw bytes lie on the device."""
        with self.order.copying():
            scratch = self._scratch_buffer()
            for group in block.groups:
                group.decode(encoded, slot, scratch)

    @property
    def ring_pieces(self) -> int:
        """How many buffers the ring may have."""
        return self._ring.pieces

    @ring_pieces.setter
    def ring_pieces(self, pieces: int) -> None:
        if pieces != self._ring.pieces:
            self.end_run()
            self._ring.pieces = pieces

    def passes_ring(self, held: HostBuffer | None) -> bool:
        """Whether a block that is `held` in host memory, or read from its file, has to."""
        if self._hardware.host_device:
            return False
        return held is None or (self._hardware.pinned and not held.pinned)

    def expect(self, blocks: Sequence[Passing]) -> None:
        """These pass through the ring next, in this order: read ahead."""
        try:
            self._ring.expect(blocks)
        except BaseException:
            self._stop()
            raise

    def fill(self, index: int, held: HostBuffer | None, slots: Sequence[Target]) -> None:
        """Bring and decode a block; from host memory where it is `held`, else from its file, through the ring if it is
        the next that is expected there."""
        way = _Way(index, held, self._ring.comes_next(index))
        try:
            self._fill(way, slots)
            self._end_block(way, slots[0].block)
        except BaseException:
            self._stop()
            raise

    def bring(self, index: int, held: HostBuffer | None, outs: Sequence[Target]) -> None:
        """All raw bytes of a block, as they are stored; otherwise as `fill`."""
        way = _Way(index, held, self._ring.comes_next(index))
        try:
            self._bring(way, 0, [(out.transfer, out.buffer) for out in outs])
            self._end_block(way, outs[0].block)
        except BaseException:
            self._stop()
            raise

    @property
    def untaken_bytes(self) -> int:
        """Of host memory that the ring may still take."""
        return self._ring.untaken_bytes

    def ask_room(self, index: int, block: StoredBlock) -> "Future[Room]":
        """Host memory for the raw bytes of a block that will stay there."""
        return self._rooms.ask(index, block.raw.nbytes, spare_bytes=self.untaken_bytes)

    def take_room(self, index: int) -> Room:
        """That memory, with the block that has come through it; it is the caller's from now on."""
        return self._rooms.take(index)

    def forget_rooms(self, indices: Collection[int]) -> None:
        """These blocks will not stay in host memory."""
        if any(index in self._rooms for index in indices):
            self._ring.forget()
            self._rooms.forget(indices)

    def end_run(self) -> None:
        """Give back what only a run needs."""
        self.order_of_all.finish()
        self._ring.end_run()
        self._rooms.end_run()
        self._staging = self._scratch = None
        self.source.close()

    def _fill(self, way: "_Way", slots: Sequence[Target]) -> None:
        block = slots[0].block
        if block.native:
            self._bring(way, 0, [(slot.transfer, slot.buffer[: block.slot.nbytes]) for slot in slots])
        for number, group in enumerate(block.groups):
            staged = [slot.transfer._staging_buffer()[: group.end - group.start] for slot in slots]
            self._bring(way, group.start, [(slot.transfer, raw) for slot, raw in zip(slots, staged, strict=True)])
            for slot, raw in zip(slots, staged, strict=True):
                slot.transfer._decode_group(slot, number, raw)

    def _decode_group(self, slot: Target, number: int, raw: Tensor) -> None:
        group = slot.block.groups[number]
        with self.order.copying():
            group.decode(raw, slot.buffer, self._scratch_buffer(), base=group.start)

    def _bring(self, way: "_Way", start: int, outs: Sequence[tuple["Transfer", Tensor]]) -> None:
        """Raw bytes of a block, from `start` on, into `outs` on their devices."""
        if not self._hardware.host_device:
            for transfer, out in outs:
                transfer.copied_bytes += len(out)
        landings = [Landing(out, transfer.order, transfer.clock) for transfer, out in outs]
        if way.through_ring:
            self._ring.copy_into(landings, way.index, start)
            return
        for landing in landings:
            out = landing.data
            if way.held is None:
                with self.clock.reading(len(out)):
                    self.source.read(way.index, out, start)
            elif self._hardware.host_device:
                out.copy_(way.held.data[start : start + len(out)])
            else:
                landing.copy(way.held.data[start : start + len(out)], pinned=way.held.pinned)

    def _end_block(self, way: "_Way", block: StoredBlock) -> None:
        if way.through_ring:
            self._ring.end_block(way.index)
        if way.held is None:
            self.fetched_blocks += 1
            self.fetched_bytes += block.nbytes

    def _stop(self) -> None:
        """After an error: nobody may write to a buffer that is read from, or given back."""
        self._ring.forget()
        self.order_of_all.finish()

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            with self.order.copying():
                (self._staging,) = self.new_buffers(self.sizes.staging_bytes)
        return self._staging

    def _scratch_buffer(self) -> Tensor:
        if self._scratch is None:
            (self._scratch,) = self.new_buffers(self.sizes.scratch_bytes)
        return self._scratch


@dataclass(frozen=True)
class _Way:
    """How a block's bytes come: through the ring, else from where it is held, else straight from its file."""

    index: int
    held: HostBuffer | None
    through_ring: bool
