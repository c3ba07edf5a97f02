"""The way of a block's bytes into a slot: read, copy on the copy stream, decode. Keeps no block."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple
from functools import cached_property

import torch
from torch import Tensor

from ..hardware import Hardware
from .block_layout import StoredBlock
from .block_source import BlockSource
from .decode_costs import DecodeCost, decode_cost
from .pinned_memory import HostBuffer, PinnedMemory
from .streams import Mark, StreamOrder
from .transfer_clock import TransferClock

# a block passes through the ring in pieces: large enough for a disk's full speed, and several are read at once
PIECE_BYTES = 32 * 1024**2
RING_PIECES = 4


class BlockSizes:
    """Room that any of a model's blocks finds enough, in bytes. Each is worked out when it is first asked for."""

    def __init__(self, blocks: Sequence[StoredBlock]) -> None:
        self._blocks = blocks

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
    def patch_bytes(self) -> int:
        """What patches need beside that."""
        return max(block.patch_scratch_bytes for block in self._blocks)

    @cached_property
    def scratch_bytes(self) -> int:
        """What codecs and patches allocate for a moment."""
        return max(block.scratch_bytes for block in self._blocks)

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
        return RING_PIECES * self.piece_bytes


class Transfer:
    """Owns what a run passes blocks through: ring, reader threads, staging and scratch, until `end_run`.

    Called under the store's lock, by one thread at a time; what it writes on the device, it writes on the stream that
    is current.
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
        self._order = order
        self._hardware = hardware
        self._host = host
        self._staging: Tensor | None = None
        self._scratch: Tensor | None = None
        self._ring: list[tuple[HostBuffer, Mark]] = []
        self._turn = -1
        self._readers: ThreadPoolExecutor | None = None

    def replace(self, source: BlockSource, sizes: BlockSizes) -> None:
        """Bring other blocks from now on; between two runs."""
        self.source, self.sizes = source, sizes

    def new_buffer(self, nbytes: int) -> Tensor:
        """On the device."""
        # nodes run in inference mode, and a reader thread may not write to what was made there
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._hardware.device)

    def decode(self, block: StoredBlock, encoded: Tensor, slot: Tensor) -> None:
        """A block whose raw bytes lie on the device."""
        scratch = self._scratch_buffer()
        for group in block.groups:
            group.decode(encoded, slot, scratch)

    def fill(self, index: int, block: StoredBlock, held: HostBuffer | None, slot: Tensor) -> None:
        """Bring and decode a block, from host memory where it is `held`, else from its file."""
        scratch = self._scratch_buffer()
        if block.native:
            self._bring(index, held, 0, slot[: block.slot.nbytes])
        for group in block.groups:
            staging = self._staging_buffer()
            self._bring(index, held, group.start, staging[: group.end - group.start])
            group.decode(staging, slot, scratch, base=group.start)
        if held is None:
            self._count_file(block)

    def bring(self, index: int, block: StoredBlock, held: HostBuffer | None, out: Tensor) -> None:
        """All raw bytes of a block, as they are stored."""
        self._bring(index, held, 0, out)
        if held is None:
            self._count_file(block)

    def take_host_memory(self, block: StoredBlock) -> HostBuffer:
        """For the raw bytes of a block. Raises RuntimeError or MemoryError where the system has none."""
        return self._host.take(block.raw.nbytes)

    def read_whole(self, index: int, block: StoredBlock, buffer: HostBuffer) -> None:
        """All raw bytes of a block from its file into host memory."""
        piece_bytes = self.sizes.piece_bytes
        pieces = enumerate(buffer.data.split(piece_bytes))
        reads = [self._start(index, None, i * piece_bytes, piece) for i, piece in pieces]
        wait(reads)
        while reads:
            reads.pop().result()
        self._count_file(block)

    def end_run(self) -> None:
        """Give back what only a run needs."""
        self._order.finish()
        if self._readers is not None:
            self._readers.shutdown(wait=True)
            self._readers = None
        self._staging = self._scratch = None
        self._ring.clear()
        self.source.close()

    def _bring(self, index: int, held: HostBuffer | None, start: int, out: Tensor) -> None:
        """Raw bytes of a block, from `start` on, into `out` on the device; on the current stream."""
        if self._hardware.host_device:
            self._read(index, held, start, out)
            return
        self.copied_bytes += len(out)
        if held is not None and (held.pinned or not self._hardware.pinned):
            with self.clock.copying(len(out)):
                out.copy_(held.data[start : start + len(out)], non_blocking=held.pinned)
            return
        self._bring_through_ring(index, held, start, out)

    def _bring_through_ring(self, index: int, held: HostBuffer | None, start: int, out: Tensor) -> None:
        pending: deque[tuple[Tensor, HostBuffer, Mark, Future[None]]] = deque()
        piece_bytes = self.sizes.piece_bytes
        try:
            for begin in range(0, len(out), piece_bytes):
                if len(pending) == RING_PIECES:
                    self._copy_piece(*pending.popleft())
                buffer, copied = self._ring_buffer()
                self._order.host_waits(copied)
                piece = out[begin : begin + piece_bytes]
                read_into = buffer.data[: len(piece)]
                pending.append((piece, buffer, copied, self._start(index, held, start + begin, read_into)))
            while pending:
                self._copy_piece(*pending.popleft())
        finally:
            while pending:  # after an error: nobody may write to a buffer that is given back
                pending.popleft()[-1].exception()

    def _copy_piece(self, piece: Tensor, buffer: HostBuffer, copied: Mark, read: "Future[None]") -> None:
        try:
            read.result()
        finally:
            del read  # it holds the error, whose traceback holds this frame: a circle would keep the buffers alive
        with self.clock.copying(len(piece)):
            piece.copy_(buffer.data[: len(piece)], non_blocking=buffer.pinned)
        self._order.record_copy(copied)

    def _start(self, index: int, held: HostBuffer | None, start: int, out: Tensor) -> "Future[None]":
        """Read from the file, or from held memory that the device cannot copy from, in a reader thread if there are
        any."""
        if self._hardware.prefetch:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(RING_PIECES, thread_name_prefix="qwen-block-reader-piece")
            return self._readers.submit(self._read, index, held, start, out)
        future: Future[None] = Future()
        self._read(index, held, start, out)
        future.set_result(None)
        return future

    def _read(self, index: int, held: HostBuffer | None, start: int, out: Tensor) -> None:
        if held is None:
            with self.clock.reading(len(out)):
                self.source.read(index, out, start)
        else:
            out.copy_(held.data[start : start + len(out)])

    def _count_file(self, block: StoredBlock) -> None:
        self.fetched_blocks += 1
        self.fetched_bytes += block.nbytes

    def _ring_buffer(self) -> tuple[HostBuffer, Mark]:
        if len(self._ring) < RING_PIECES:
            self._ring.append((self._host.take(self.sizes.piece_bytes), self._order.mark()))
        self._turn = (self._turn + 1) % len(self._ring)
        return self._ring[self._turn]

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            self._staging = self.new_buffer(self.sizes.staging_bytes)
        return self._staging

    def _scratch_buffer(self) -> Tensor:
        if self._scratch is None:
            self._scratch = self.new_buffer(self.sizes.patch_bytes)
        return self._scratch
