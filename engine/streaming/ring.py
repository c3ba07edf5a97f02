"""Bytes of blocks on their way through the host: read in pieces ahead of their turn, copied to the device in it."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..hardware import Hardware
from ..planning.overlap import RING_PIECES
from .block_source import BlockSource
from .landing import Landing
from .pinned_memory import HostBuffer, PinnedMemory
from .rooms import Room
from .streams import Mark, StreamOrder
from .transfer_clock import TransferClock

if TYPE_CHECKING:
    from .transfer import BlockSizes


@dataclass(frozen=True)
class Passing:
    """A block of `nbytes` as it is stored, that passes through the ring.

    held: it is copied from this host memory, which the device cannot copy from; else it is read from its file. room:
    host memory that it is read into, as it stays there.
    """

    index: int
    nbytes: int
    held: HostBuffer | None = None
    room: "Future[Room] | None" = None


@dataclass(eq=False)
class _Place:
    """One piece's room in the ring, taken when it is first needed."""

    copied: Mark  # recorded on the copy streams behind the last copy of what was in it
    buffer: HostBuffer | None = None


@dataclass(frozen=True)
class _Bytes:
    """Where bytes lie in host memory. pinned: the device copies them by itself."""

    data: Tensor
    pinned: bool


@dataclass(eq=False)
class _Piece:
    block: Passing
    start: int
    end: int
    place: _Place
    read: "Future[_Bytes]"


class Ring:
    """Reads blocks in pieces, in the order in which they are expected, as far ahead as there are places.

    Guarantees: there are at most `pieces` buffers, and that many reads under way; a piece is read once, unless it is
    forgotten; an error of a read is raised where its bytes are wanted; after `forget` and `end_run` nobody writes to a
    buffer. One thread at a time calls; the reads are done by threads of the ring where the hardware has them.
    """

    def __init__(
        self,
        source: BlockSource,
        sizes: "BlockSizes",
        order: StreamOrder,
        hardware: Hardware,
        host: PinnedMemory,
        clock: TransferClock,
    ) -> None:
        """`pieces` is changed between two runs alone. `order`: of all devices that bytes go to."""
        self._source = source
        self._sizes = sizes
        self._order = order
        self._hardware = hardware
        self._host = host
        self._clock = clock
        self.pieces = RING_PIECES
        self._free: deque[_Place] = deque()
        self._places: list[_Place] = []
        self._pieces: deque[_Piece] = deque()
        self._expected: Sequence[Passing] = ()
        self._upcoming: Iterator[tuple[Passing, int, int]] = iter(())
        self._readers: ThreadPoolExecutor | None = None

    @property
    def untaken_bytes(self) -> int:
        """Of buffers that may still be needed."""
        taken = sum(place.buffer is not None for place in self._places)
        return (self.pieces - taken) * self._sizes.piece_bytes

    def expect(self, blocks: Sequence[Passing]) -> None:
        """These come next, each from its first byte on. What was read ahead of others is forgotten."""
        begun = [piece.block for piece in self._pieces if piece.start == 0]
        if list(blocks[: len(begun)]) != begun:
            self.forget()
            begun = []
        self._expected = blocks
        self._upcoming = self._rest(blocks, len(begun), self._pieces[-1].end if begun else 0)
        self._read_ahead()

    def comes_next(self, index: int) -> bool:
        """Whether block `index` is the first that is expected."""
        return bool(self._expected) and self._expected[0].index == index

    def copy_into(self, landings: Sequence[Landing], index: int, start: int) -> None:
        """Bytes of block `index`, which is the first, from `start` on and behind those of the last call, to devices:
        the same to each."""
        done, wanted = 0, len(landings[0].data)
        while done < wanted:
            piece = self._piece(index, start + done)
            try:
                there = piece.read.result()
                nbytes = min(piece.end - start, wanted) - done
                begin = start + done - piece.start
                for landing in landings:
                    landing.copy(there.data[begin : begin + nbytes], done, pinned=there.pinned)
                self._order.record_copy(piece.place.copied)
                done += nbytes
                if start + done == piece.end < piece.block.nbytes:
                    self._pass(piece)
            finally:
                del piece  # its read holds the error, whose traceback holds this frame: a circle would keep the buffers

    def end_block(self, index: int) -> None:
        """All that was wanted of it has been copied."""
        while not self._pass(self._piece(index, 0)):
            pass

    def forget(self) -> None:
        """Stop reading ahead; what was read is lost. Returns when nobody reads any more."""
        self._expected, self._upcoming = (), iter(())
        for piece in self._pieces:
            piece.read.cancel()
        while self._pieces:
            piece = self._pieces.popleft()
            if not piece.read.cancelled():
                piece.read.exception()
            self._free.append(piece.place)

    def end_run(self) -> None:
        """Give back threads and buffers, when all that was copied from these is on the device."""
        self.forget()
        if self._readers is not None:
            self._readers.shutdown(wait=True)
            self._readers = None
        self._free.clear()
        self._places.clear()

    def _rest(self, blocks: Sequence[Passing], begun: int, at: int) -> Iterator[tuple[Passing, int, int]]:
        """What is to be read, of the last of the blocks that are `begun` from byte `at` on: (block, start, end)."""
        piece_bytes = self._sizes.piece_bytes
        for number, block in enumerate(blocks[max(0, begun - 1) :]):
            for start in range(at if begun and not number else 0, block.nbytes, piece_bytes):
                yield block, start, min(block.nbytes, start + piece_bytes)

    def _read_ahead(self) -> None:
        while self._hardware.prefetch and len(self._pieces) < self.pieces and self._begin():
            pass

    def _begin(self) -> bool:
        """Read the next piece; whether there is one."""
        turn = next(self._upcoming, None)
        if turn is None:
            return False
        place = self._place()
        try:
            self._pieces.append(_Piece(*turn, place, self._start(*turn, place)))
        except BaseException:
            self._free.append(place)
            raise
        return True

    def _place(self) -> _Place:
        """A new one, else the one whose copy is the longest ago."""
        if len(self._places) == self.pieces:
            return self._free.popleft()
        self._places.append(_Place(self._order.mark()))
        return self._places[-1]

    def _start(self, block: Passing, start: int, end: int, place: _Place) -> "Future[_Bytes]":
        if self._hardware.prefetch:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(self.pieces, thread_name_prefix="qwen-block-reader-piece")
            return self._readers.submit(self._read, block, start, end, place)
        future: Future[_Bytes] = Future()
        future.set_result(self._read(block, start, end, place))
        return future

    def _read(self, block: Passing, start: int, end: int, place: _Place) -> _Bytes:
        """In a reader thread."""
        stays = block.held if block.room is None else block.room.result().buffer
        if stays is not None and block.held is None:
            self._read_file(block, stays.data[start:end], start)
            if stays.pinned or not self._hardware.pinned:
                return _Bytes(stays.data[start:end], stays.pinned)
        if place.buffer is None:
            place.buffer = self._host.take(self._sizes.piece_bytes)
        self._order.host_waits(place.copied)
        out = place.buffer.data[: end - start]
        if stays is None:
            self._read_file(block, out, start)
        else:
            out.copy_(stays.data[start:end])
        return _Bytes(out, place.buffer.pinned)

    def _read_file(self, block: Passing, out: Tensor, start: int) -> None:
        with self._clock.reading(len(out)):
            self._source.read(block.index, out, start)

    def _piece(self, index: int, at: int) -> _Piece:
        """Of block `index`, the one that holds byte `at`, or a later one that is the first; those before it make
        room."""
        while True:
            if not self._pieces and not self._begin():
                raise RuntimeError(f"block {index} was not expected")
            piece = self._pieces[0]
            if piece.block.index != index:
                raise RuntimeError(f"block {index} is wanted, but block {piece.block.index} comes next")
            if at < piece.end:
                return piece
            self._pass(piece)

    def _pass(self, piece: _Piece) -> bool:
        """Read on into the first piece's place; whether it was its block's last one."""
        self._pieces.popleft()
        if not piece.read.done():
            piece.read.exception()  # nothing of it was wanted
        self._free.append(piece.place)
        self._read_ahead()
        return piece.end == piece.block.nbytes
