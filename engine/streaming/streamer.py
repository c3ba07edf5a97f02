"""Hand out a model's blocks in order, each in its slot when its turn comes, fetching ahead in a reader thread."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from .order import Mark
from .store import BlockStore


@dataclass
class _Slot:
    buffer: Tensor
    module: nn.Module
    filled: Mark  # recorded on the copy stream when the block is decoded
    used: Mark  # recorded on the compute stream after the block's last use


class BlockStreamer:
    """`with BlockStreamer(store, slots=2) as streamer: for index, block in streamer.visit(...): ...`

    Guarantees: the blocks come in order, each whole; at most `slots` slots exist on the device, from entry to exit;
    one pass reads every block that is not resident exactly once; an error of the reader is raised where the block
    was wanted; on every way out the reader has stopped and the slots are given back.
    """

    def __init__(self, store: BlockStore, *, slots: int) -> None:
        self._store = store
        self._order = store.order
        self._count = slots
        self._free: deque[_Slot] = deque()
        self._ahead: deque[tuple[int, _Slot, Future[None]]] = deque()
        self._reader: ThreadPoolExecutor | None = None
        self._queue: tuple[int, ...] = ()
        self._next = 0
        self.waited_seconds = 0.0

    def __enter__(self) -> "BlockStreamer":
        needed = sum(1 for i in range(len(self._store.blocks)) if self._store.module(i) is None)
        if needed and self._count < 1:
            raise ValueError(f"{needed} blocks are not resident; they need at least 1 slot, got 0.")
        self._follow_residency()
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
        self._store.release_staging()
        self._store.source.close()  # an open file cannot be replaced on Windows

    def visit(self, *, more: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """One pass over all blocks. `more`: another pass follows, whose first blocks may be fetched at the end of
        this one.

        Resident blocks that were taken from the device since the last pass are fetched like the others; those that
        are there when the pass begins stay until it ends.
        """
        self._follow_residency()
        modules = [self._store.module(index) for index in range(len(self._store.blocks))]
        if self._ahead and self._ahead[0][0] != self._queue[0]:
            self._discard()
        if not self._ahead:
            self._next = 0
        position = len(self._ahead)
        self._next = position % max(1, len(self._queue))
        remaining = len(self._queue) * (2 if more else 1) - position
        remaining = self._fetch_ahead(remaining)
        for index, module in enumerate(modules):
            if module is not None:
                yield index, module
                continue
            slot = self._take(index)
            try:
                yield index, slot.module
            finally:
                self._order.record_compute(slot.used)
                self._free.append(slot)
            remaining = self._fetch_ahead(remaining)

    def _follow_residency(self) -> None:
        """Queue the blocks that need a slot, and make the slots and the reader that they need."""
        store = self._store
        queue = tuple(i for i in range(len(store.blocks)) if store.module(i) is None)
        if queue == self._queue:
            return
        self._discard()
        self._queue = queue
        while len(self._free) < min(max(1, self._count), len(queue)):
            buffer, module = store.new_slot()
            self._free.append(_Slot(buffer, module, self._order.mark(), self._order.mark()))
        self._order.after_compute()
        if queue and self._reader is None and store.hardware.prefetch:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qwen-block-reader")

    def _fetch_ahead(self, remaining: int) -> int:
        while self._free and remaining > 0:
            slot = self._free.popleft()
            index = self._queue[self._next]
            self._next = (self._next + 1) % len(self._queue)
            self._ahead.append((index, slot, self._start(index, slot)))
            remaining -= 1
        return remaining

    def _start(self, index: int, slot: _Slot) -> "Future[None]":
        if self._reader is not None:
            return self._reader.submit(self._fill, index, slot)
        future: Future[None] = Future()
        try:
            self._fill(index, slot)
            future.set_result(None)
        except Exception as error:  # handed on where the block is wanted, as the reader thread does
            future.set_exception(error)
        try:
            return future
        finally:
            del future  # see _take

    def _fill(self, index: int, slot: _Slot) -> None:
        self._order.copy_waits(slot.used)
        self._store.fetch_into(index, slot.buffer)
        self._order.record_copy(slot.filled)

    def _take(self, index: int) -> _Slot:
        wanted, slot, future = self._ahead.popleft()
        if wanted != index:
            raise RuntimeError(f"block {index} is due, but block {wanted} was fetched")
        start = time.perf_counter()
        try:
            future.result()
        except BaseException:
            self._free.append(slot)  # a later pass needs it
            del future  # it holds the error, whose traceback holds this frame: a circle would keep the buffers alive
            raise
        self.waited_seconds += time.perf_counter() - start
        self._order.compute_waits(slot.filled)
        return slot

    def _discard(self) -> None:
        """Forget what was fetched ahead by a pass that was left in the middle."""
        while self._ahead:
            _, slot, future = self._ahead.popleft()
            if not future.cancel():
                future.exception()
            self._free.append(slot)
