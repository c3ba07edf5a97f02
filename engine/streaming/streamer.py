"""Hand out a model's blocks in order, each in its slot when its turn comes, fetching ahead in a reader thread."""

import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from ..hardware import Hardware
from ..log import logger
from ..planning.overlap import RING_PIECES
from .block_layout import StoredBlock
from .streams import Mark, Pace, StreamOrder

PlaceT = TypeVar("PlaceT")
ModuleT = TypeVar("ModuleT", covariant=True)


class Streamable(Protocol[PlaceT, ModuleT]):
    """What a BlockStreamer asks of a BlockStore, or of several SideBySide: places to bring blocks to, and what a block
    is computed with once it is in one. All is said there."""

    ring_pieces: int

    @property
    def hardware(self) -> Hardware: ...
    @property
    def order(self) -> StreamOrder: ...
    @property
    def blocks(self) -> tuple[StoredBlock, ...]: ...
    def module(self, index: int) -> ModuleT | None: ...
    def module_in(self, place: PlaceT, index: int, /) -> ModuleT: ...
    def new_slots(self, count: int = 1, least_bytes: int = 0) -> list[PlaceT]: ...
    def make_decoding_room(self, indices: Collection[int]) -> None: ...
    def reads_file(self, index: int) -> bool: ...
    def fetch_into(self, index: int, place: PlaceT, /, ahead: Sequence[int] = ()) -> None: ...
    def end_run(self) -> None: ...


@dataclass
class _Slot(Generic[PlaceT]):
    place: PlaceT
    filled: Mark  # recorded on the copy stream when the block is decoded
    used: Mark  # recorded on the compute stream after the block's last use
    from_file: bool = False


@dataclass(frozen=True)
class Waits:
    """Seconds that compute stood still until blocks came: those that were read from the file, and those that only had
    to be copied or decoded."""

    disk_seconds: float = 0.0
    bus_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.disk_seconds + self.bus_seconds

    def __add__(self, other: "Waits") -> "Waits":
        return Waits(self.disk_seconds + other.disk_seconds, self.bus_seconds + other.bus_seconds)

    def __sub__(self, other: "Waits") -> "Waits":
        return Waits(self.disk_seconds - other.disk_seconds, self.bus_seconds - other.bus_seconds)


class BlockStreamer(Generic[PlaceT, ModuleT]):
    """`with BlockStreamer(store, slots=2) as streamer: for index, block in streamer.visit(...): ...`

    Guarantees: the blocks come in order, each whole; at most `slots` slots exist on the device, from entry to exit;
    one pass reads every block that is not resident exactly once; an error of the reader is raised where the block
    was wanted; on every way out the reader has stopped and the slots are given back.

    The host is as near to the device as it can be without holding it up: when a block is handed out, the device is at
    the one before it. So whoever counts blocks counts what is done, and whoever stops there waits for one block.
    """

    def __init__(
        self,
        store: Streamable[PlaceT, ModuleT],
        *,
        slots: int,
        ring: int = RING_PIECES,
        blocks: range | None = None,
        pace: Pace | None = None,
        together_bytes: int | None = None,
    ) -> None:
        """`ring`: pieces of host memory that blocks pass through. `blocks`: those that are visited; all of them if not
        given. `pace`: that of several streamers which take turns in one pass. `together_bytes`: all
        slots lie in one allocation of at least so many, which a larger slot of another store finds free afterwards."""
        self._store = store
        self._blocks = range(len(store.blocks)) if blocks is None else blocks
        self._order = store.order
        self._count = slots
        self._ring = ring
        self._free: deque[_Slot[PlaceT]] = deque()
        self._ahead: deque[tuple[int, _Slot[PlaceT], Future[None]]] = deque()
        self._reader: ThreadPoolExecutor | None = None
        self._queue: tuple[int, ...] = ()
        self._next = 0
        self._waits = Waits()
        self._moments: list[tuple[int, bool, Any, Any]] = []
        self._pace = pace or Pace()
        self._together_bytes = together_bytes

    @property
    def hardware(self) -> Hardware:
        """Where blocks are handed out."""
        return self._store.hardware

    @property
    def device(self) -> torch.device:
        return self.hardware.device

    @property
    def waits(self) -> Waits:
        """So far."""
        self._settle()
        return self._waits

    def __enter__(self) -> "BlockStreamer[PlaceT, ModuleT]":
        self._follow_residency()
        self._store.ring_pieces = self._ring
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, _, future in self._ahead:
            future.cancel()
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None
        self._order.finish()
        self._ahead.clear()
        self._free.clear()
        self._queue = ()
        self._store.end_run()  # open files too: they cannot be replaced on Windows
        self._store.ring_pieces = RING_PIECES

    def visit(self, *, more: bool = False, may_end: bool = False) -> Iterator[tuple[int, ModuleT]]:
        """One pass over the blocks. `more`: another pass follows, whose first blocks may be fetched at the end of
        this one. `may_end`: passes may end behind their first block, so that none behind it is fetched, or read ahead,
        until the next one is asked for.

        Resident blocks that were taken from the device since the last pass are fetched like the others; those that
        are there when the pass begins stay until it ends.
        """
        self._follow_residency()
        self._settle()
        modules = [(index, self._store.module(index)) for index in self._blocks]
        if self._ahead and self._ahead[0][0] != self._queue[0]:
            self._discard()
        if not self._ahead:
            self._next = 0
        position = len(self._ahead)
        self._next = position % max(1, len(self._queue))
        first = len(self._queue[:1]) if self._queue[:1] == tuple(self._blocks[:1]) else 0
        remaining = len(self._queue) + (first if may_end else len(self._queue)) * more - position
        behind = remaining - max(0, first - position) if may_end else 0  # nobody may ask for these
        remaining = self._fetch_ahead(remaining - behind)
        for index, module in modules:
            self._pace.keep(self._order)
            if module is not None:
                yield index, module
            else:
                slot = self._take(index)
                try:
                    yield index, self._store.module_in(slot.place, index)
                finally:
                    self._order.record_compute(slot.used)
                    self._free.append(slot)
            remaining, behind = self._fetch_ahead(remaining + behind), 0

    def _follow_residency(self) -> None:
        """Queue the blocks that need a slot, and make the slots and the reader that they need."""
        store = self._store
        queue = tuple(i for i in self._blocks if store.module(i) is None)
        if queue == self._queue:
            return
        self._discard()
        self._queue = ()  # until its slots exist: memory may run out, and the next pass begins here again
        while missing := max(0, min(max(1, self._count), len(queue)) - len(self._free)):
            together = self._together_bytes
            for place in store.new_slots() if together is None else store.new_slots(missing, together):
                self._free.append(_Slot(place, self._order.mark(), self._order.mark()))
        if queue:
            store.make_decoding_room(queue)  # behind the slots: it would have a part of what one of them finds free
        self._order.after_compute()
        self._queue = queue
        if queue and self._reader is None and store.hardware.prefetch:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qwen-block-reader")

    def _fetch_ahead(self, remaining: int) -> int:
        while self._free and remaining > 0:
            index, ahead = self._queue[self._next], self._following(remaining - 1)
            self._ahead.append((index, self._free[0], self._start(index, self._free[0], ahead)))
            self._free.popleft()
            self._next = (self._next + 1) % len(self._queue)
            remaining -= 1
        return remaining

    def _following(self, count: int) -> tuple[int, ...]:
        """So many blocks that are wanted after the next one, of this pass and the one after it."""
        return (self._queue * 3)[self._next + 1 :][:count]

    def _start(self, index: int, slot: _Slot[PlaceT], ahead: tuple[int, ...]) -> "Future[None]":
        if self._reader is not None:
            return self._reader.submit(self._fill, index, slot, ahead)
        future: Future[None] = Future()
        try:
            self._fill(index, slot, ahead)
            future.set_result(None)
        except Exception as error:  # handed on where the block is wanted, as the reader thread does
            future.set_exception(error)
        try:
            return future
        finally:
            del future  # see _take

    def _fill(self, index: int, slot: _Slot[PlaceT], ahead: tuple[int, ...]) -> None:
        self._order.copy_waits(slot.used)
        slot.from_file = self._store.reads_file(index)
        self._store.fetch_into(index, slot.place, ahead)
        self._order.record_copy(slot.filled)

    def _take(self, index: int) -> _Slot[PlaceT]:
        wanted, slot, future = self._ahead[0]
        if wanted != index:
            raise RuntimeError(f"block {index} is due, but block {wanted} was fetched")
        self._ahead.popleft()
        wanted_at = self._order.compute_moment()
        try:
            future.result()
        except BaseException:
            self._free.append(slot)  # a later pass needs it
            del future  # it holds the error, whose traceback holds this frame: a circle would keep the buffers alive
            raise
        self._order.compute_waits(slot.filled)
        self._moments.append((index, slot.from_file, wanted_at, self._order.compute_moment()))
        return slot

    def _settle(self) -> None:
        """Add up what was waited since the last time: during a pass, or a part of one."""
        waited = Waits()
        for _, from_file, wanted, there in self._moments:
            seconds = self._order.seconds_between(wanted, there)
            waited += Waits(disk_seconds=seconds) if from_file else Waits(bus_seconds=seconds)
        self._waits += waited
        if self._moments and logger.isEnabledFor(logging.DEBUG):
            self._tell(waited)
        self._moments.clear()

    def _tell(self, waited: Waits) -> None:
        read = [index for index, from_file, _, _ in self._moments if from_file]
        logger.debug(
            "pass on %s: %d blocks, %d of them read from the file (%d bytes); waited %.3f s for these, %.3f s for the "
            "others",
            self.device,
            len(self._moments),
            len(read),
            sum(self._store.blocks[index].nbytes for index in read),
            waited.disk_seconds,
            waited.bus_seconds,
        )

    def _discard(self) -> None:
        """Forget what was fetched ahead by a pass that was left in the middle."""
        while self._ahead:
            _, slot, future = self._ahead.popleft()
            if not future.cancel():
                future.exception()
            self._free.append(slot)
